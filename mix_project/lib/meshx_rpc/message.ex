defmodule MeshxRpc.Message do
  @moduledoc false
  # Arguments and results on their way between terms and bytes, by the user's own functions where there are some:
  # `:serialize_mfa`, `:deserialize_mfa`, and `:cks_mfa` for a checksum of each block.
  #
  # All of it runs in the process of the caller or of the request, so that a slow function holds up nobody else.
  # Without such functions, `nil`, it is `MeshxRpc.Term`. How checksums lie in a message is in docs/rpc-protocol.md,
  # "Checksums of the user's own".

  alias MeshxRpc.{Aside, Term}

  # size of the part that has checksums:64, bytes of a block:32, entries of <<size:8, checksum>>, their bytes:32
  @tail_bytes 16
  @max_checksum 255

  @enforce_keys [:serialize, :deserialize, :cks, :timeout_cks, :block]
  defstruct @enforce_keys

  @typedoc "nil: no functions of the user's own."
  @type t ::
          nil
          | %__MODULE__{
              serialize: nil | {module(), atom(), term()},
              deserialize: nil | {module(), atom(), term()},
              cks: nil | {module(), atom(), term()},
              timeout_cks: pos_integer(),
              block: pos_integer()
            }

  @typedoc "When checksums of the user's own end with `:timeout`: `:erlang.monotonic_time(:millisecond)`."
  @type until :: integer() | :infinity

  @doc "A term as bytes; `{:error, reason}` is the reason of `{:error_rpc, reason}`."
  @spec encode(t(), term(), until()) :: {:ok, Term.encoded()} | {:error, reason :: term()}
  def encode(message, term, until \\ :infinity)
  def encode(nil, term, _until), do: {:ok, Term.encode(term)}

  def encode(message, term, until) do
    with {:ok, encoded} <- serialize(message.serialize, term), do: sign(message, encoded, until)
  end

  @doc "The bytes as a term. `:refused`: by the guard."
  @spec decode(t(), module(), byte(), binary(), policy :: map(), until()) ::
          {:ok, term()} | {:error, :refused | :invalid_cks | :timeout_cks | :timeout | term()}
  def decode(message, codec, flag, bytes, policy, until \\ :infinity)
  def decode(nil, codec, flag, bytes, policy, _until), do: plain(codec, flag, bytes, policy)

  def decode(message, codec, flag, bytes, policy, until) do
    with {:ok, bytes} <- verify(message, bytes, until) do
      case message.deserialize do
        nil -> plain(codec, flag, bytes, policy)
        mfa -> deserialize(mfa, flag, bytes)
      end
    end
  end

  defp plain(codec, flag, bytes, policy) do
    with {:error, _why} <- Term.decode(codec, flag, bytes, policy), do: {:error, :refused}
  end

  # Serializers

  defp serialize(nil, term), do: {:ok, Term.encode(term)}

  defp serialize({module, fun, argument}, term) do
    case apply(module, fun, [term, argument]) do
      {:ok, bytes, flag} when is_binary(bytes) and flag in 0..255 ->
        {:ok, {flag, [bytes], byte_size(bytes)}}

      {:error, reason} ->
        {:error, reason}

      _other ->
        {:error, :serialization_fail}
    end
  catch
    kind, reason -> {:error, Term.failure(kind, reason, __STACKTRACE__)}
  end

  defp deserialize({module, fun, argument}, flag, bytes) do
    case apply(module, fun, [bytes, argument, flag]) do
      {:ok, term} -> {:ok, term}
      {:error, reason} -> {:error, reason}
      _other -> {:error, :serialization_fail}
    end
  catch
    kind, reason -> {:error, Term.failure(kind, reason, __STACKTRACE__)}
  end

  # Checksums

  defp sign(%{cks: nil}, encoded, _until), do: {:ok, encoded}

  defp sign(message, {flag, iovec, size}, until) do
    blocks = message.block

    with {:ok, checksums} <- checksums(message, iovec, blocks, until) do
      entries = for checksum <- checksums, do: [byte_size(checksum), checksum]
      entries = :erlang.iolist_to_binary(entries)
      tail = <<entries::binary, size::64, blocks::32, byte_size(entries)::32>>
      {:ok, {flag, iovec ++ [tail], size + byte_size(tail)}}
    end
  end

  defp verify(%{cks: nil}, bytes, _until), do: {:ok, bytes}

  defp verify(message, bytes, until) do
    with {:ok, data, block, entries} <- split(bytes),
         # Each block costs a call of the user's function, and each entry memory: no more of either than the sender's
         # blocks can be.
         {:ok, expected} <- parse(entries, block_count(byte_size(data), block), []),
         {:ok, checksums} <- checksums(message, [data], block, until),
         true <- checksums == expected do
      {:ok, data}
    else
      {:error, reason} -> {:error, reason}
      _malformed_or_different -> {:error, :invalid_cks}
    end
  end

  defp split(bytes) when byte_size(bytes) >= @tail_bytes do
    <<size::64, block::32, entries_bytes::32>> =
      binary_part(bytes, byte_size(bytes) - @tail_bytes, @tail_bytes)

    if block >= 200 and size + entries_bytes + @tail_bytes == byte_size(bytes),
      do: {:ok, binary_part(bytes, 0, size), block, binary_part(bytes, size, entries_bytes)},
      else: :malformed
  end

  defp split(_bytes), do: :malformed

  defp parse("", 0, done), do: {:ok, Enum.reverse(done)}

  defp parse(<<size, checksum::binary-size(size), rest::binary>>, left, done) when left > 0,
    do: parse(rest, left - 1, [checksum | done])

  defp parse(_short_or_too_many, _left, _done), do: :malformed

  defp block_count(0, _block), do: 1
  defp block_count(size, block), do: div(size + block - 1, block)

  # `timeout_cks` is for each block.
  defp checksums(%{cks: cks} = message, iovec, block, until) do
    case Aside.run(&each(cks, iovec, block, &1, []), message.timeout_cks, until) do
      {:ok, checksums} -> {:ok, checksums}
      {:error, :failed} -> {:error, :invalid_cks}
      {:error, :timeout} -> {:error, :timeout_cks}
      {:error, :late} -> {:error, :timeout}
    end
  end

  defp each({module, fun, argument} = cks, iovec, block, beat, done) do
    {part, rest} = take(iovec, block, [])
    checksum = apply(module, fun, [:erlang.iolist_to_binary(part), argument])

    unless is_binary(checksum) and byte_size(checksum) <= @max_checksum do
      raise ArgumentError,
            "cks_mfa #{inspect(module)}.#{fun}/2 answered #{inspect(checksum, limit: 8)}, " <>
              "wanted a binary of at most #{@max_checksum} bytes"
    end

    beat.()
    done = [checksum | done]
    if rest == [], do: Enum.reverse(done), else: each(cks, rest, block, beat, done)
  end

  # An empty message is one empty block.
  defp take([], _left, taken), do: {Enum.reverse(taken), []}
  defp take(["" | rest], left, taken), do: take(rest, left, taken)
  defp take(rest, 0, taken), do: {Enum.reverse(taken), rest}

  defp take([binary | rest], left, taken) when byte_size(binary) <= left,
    do: take(rest, left - byte_size(binary), [binary | taken])

  defp take([binary | rest], left, taken) do
    {head, tail} = :erlang.split_binary(binary, left)
    {Enum.reverse(taken, [head]), [tail | rest]}
  end
end
