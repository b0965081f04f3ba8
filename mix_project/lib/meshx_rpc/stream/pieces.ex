defmodule MeshxRpc.Stream.Pieces do
  @moduledoc false
  # Pieces of a stream as bytes: `term:8, len:32, bytes`, one after the other (docs/rpc-protocol.md, "Streams").

  alias MeshxRpc.{Message, Term}

  @max 0xFFFF_FFFF

  @doc "One piece as an iovec, and its bytes with its head. Raises when it cannot be encoded."
  @spec encode(Message.t(), term()) :: {[binary()], pos_integer()}
  def encode(message, piece) do
    case Message.encode(message, piece) do
      {:ok, {flag, iovec, size}} when size <= @max -> {[<<flag, size::32>> | iovec], size + 5}
      {:ok, _too_long} -> raise MeshxRpc.Error, reason: :error_too_long
      {:error, reason} -> raise MeshxRpc.Error, reason: reason
    end
  end

  @doc "The reason of a failure: an external term, whatever the serializers."
  @spec encode_reason(term()) :: {[binary()], pos_integer()}
  def encode_reason(reason) do
    {flag, iovec, size} = Term.encode_error(reason)
    {[<<flag, size::32>> | iovec], size + 5}
  end

  @doc "The pieces of a batch, each looked at before it is decoded."
  @spec decode(Message.t(), binary(), %{codec: module(), guard: map()}) ::
          {:ok, [term()]} | {:error, reason :: term()}
  def decode(message, batch, config), do: decode(message, batch, config, [])

  defp decode(_message, <<>>, _config, pieces), do: {:ok, Enum.reverse(pieces)}

  defp decode(
         message,
         <<flag, size::32, bytes::binary-size(size), rest::binary>>,
         config,
         pieces
       ) do
    case Message.decode(message, config.codec, flag, bytes, config.guard) do
      {:ok, piece} -> decode(message, rest, config, [own(piece, rest, pieces) | pieces])
      {:error, :refused} -> {:error, :serialization_fail}
      {:error, reason} -> {:error, reason}
    end
  end

  defp decode(_message, _short, _config, _pieces), do: {:error, :invalid_state}

  # A piece that somebody keeps must not keep its whole batch. One that is the batch may.
  defp own(piece, <<>>, []), do: piece
  defp own(piece, _rest, _pieces) when is_binary(piece), do: :binary.copy(piece)
  defp own(piece, _rest, _pieces), do: piece
end
