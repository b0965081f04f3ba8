defmodule MeshxRpc.Stream.Pieces do
  @moduledoc false
  # Pieces of a stream as bytes: `term:8, len:32, bytes`, one after the other (docs/rpc-protocol.md, "Streams").

  alias MeshxRpc.{Message, Term}

  @max 0xFFFF_FFFF
  @at_once 65_536

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

  @doc """
  The first pieces of a batch, each looked at before it is decoded, and the rest of it. A batch may be many small ones,
  which take more memory than it does: at most so many at once as the first 64 KiB are, or one.
  """
  @spec decode(Message.t(), binary(), %{codec: module(), guard: map()}) ::
          {:ok, [term()], rest :: binary()} | {:error, reason :: term()}
  def decode(message, batch, config), do: decode(message, batch, config, byte_size(batch), [])

  defp decode(_message, batch, _config, size, pieces)
       when pieces != [] and (batch == "" or size - byte_size(batch) >= @at_once),
       do: {:ok, Enum.reverse(pieces), batch}

  defp decode(_message, "", _config, _size, []), do: {:ok, [], ""}

  defp decode(
         message,
         <<flag, length::32, bytes::binary-size(length), rest::binary>>,
         config,
         size,
         pieces
       ) do
    case Message.decode(message, config.codec, flag, bytes, config.guard) do
      {:ok, piece} -> decode(message, rest, config, size, [own(piece) | pieces])
      {:error, :refused} -> {:error, :serialization_fail}
      {:error, reason} -> {:error, reason}
    end
  end

  defp decode(_message, _short, _config, _size, _pieces), do: {:error, :invalid_state}

  # A piece that somebody keeps must not keep its whole batch. One that is most of it may.
  defp own(piece) when is_binary(piece) do
    if :binary.referenced_byte_size(piece) > 2 * byte_size(piece),
      do: :binary.copy(piece),
      else: piece
  end

  defp own(piece), do: piece
end
