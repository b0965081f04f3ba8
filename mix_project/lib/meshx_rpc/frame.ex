defmodule MeshxRpc.Frame do
  @moduledoc false
  # The sending half of docs/rpc-protocol.md: frames as iodata. Payloads are never joined.

  # Control frames are built by the codec's wire module.
  alias MeshxRpc.Codec.Wire

  @flag_end 0x01
  @flag_cks 0x80

  @type_hello 0x01
  @type_hello_ack 0x02
  @type_auth 0x03
  @type_ready 0x04
  @type_request 0x10
  @type_response 0x11
  @type_data 0x12
  @type_cancel 0x13
  @type_ping 0x21

  @call 1

  # Bytes of a frame's header, of what follows it, and of its checksum.
  @header 12
  @request_head 15
  @response_head 10
  @trailer 4

  @typedoc "Computes the checksum of header and payload; nil without one."
  @type crc :: nil | (iodata() -> non_neg_integer())

  @doc "Largest payload of a frame without its head, whatever the hello agreed on, in bytes."
  @spec max_block() :: pos_integer()
  def max_block, do: 65_536 - 512

  @spec hello(binary()) :: iodata()
  def hello(payload), do: control(@type_hello, 0, payload)

  @spec hello_ack(binary()) :: iodata()
  def hello_ack(payload), do: control(@type_hello_ack, 0, payload)

  @spec auth(<<_::256>>) :: iodata()
  def auth(proof), do: control(@type_auth, 0, proof)

  @spec ready() :: iodata()
  def ready, do: control(@type_ready, 0, <<>>)

  @spec refused(MeshxRpc.Codec.cause(), String.t()) :: iodata()
  defdelegate refused(cause, text), to: Wire

  @spec cancel(pos_integer()) :: iodata()
  def cancel(stream), do: control(@type_cancel, stream, <<>>)

  @spec reset(pos_integer(), MeshxRpc.Codec.cause(), String.t()) :: iodata()
  defdelegate reset(stream, cause, text), to: Wire

  @spec ping(<<_::64>>) :: iodata()
  def ping(data), do: control(@type_ping, 0, data)

  @spec goaway(non_neg_integer(), MeshxRpc.Codec.cause(), String.t()) :: iodata()
  defdelegate goaway(last, cause, text), to: Wire

  @doc "The head of the REQUEST of a call; `deadline` is the time that is left, in milliseconds."
  @spec request_head(timeout(), non_neg_integer(), byte(), binary()) :: binary()
  def request_head(deadline, total, term_flag, fun) do
    <<@call, deadline(deadline)::32, total::64, term_flag, byte_size(fun), fun::binary>>
  end

  @doc "A request in one frame, with the frame's length: `size` bytes of argument, as iodata."
  @spec request(pos_integer(), timeout(), binary(), byte(), iodata(), non_neg_integer(), crc()) ::
          {iodata(), pos_integer()}
  def request(stream, deadline, fun, flag, argument, size, crc) do
    length = size + byte_size(fun) + @request_head

    head =
      <<length::24, @type_request, flags(true, crc), 0::24, stream::32, @call,
        deadline(deadline)::32, size::64, flag, byte_size(fun), fun::binary>>

    checked([head | argument], length + @header, crc)
  end

  @doc "A response in one frame, with the frame's length: `size` bytes of result, as iodata."
  @spec response(
          pos_integer(),
          :result | :error | :started,
          byte(),
          iodata(),
          non_neg_integer(),
          crc()
        ) ::
          {iodata(), pos_integer()}
  def response(stream, status, flag, result, size, crc) do
    length = size + @response_head

    head =
      <<length::24, @type_response, flags(true, crc), 0::24, stream::32, status(status), flag,
        size::64>>

    checked([head | result], length + @header, crc)
  end

  defp checked(frame, length, nil), do: {frame, length}
  defp checked(frame, length, crc), do: {[frame, <<crc.(frame)::32>>], length + @trailer}

  defp flags(last?, crc),
    do: if(last?, do: @flag_end, else: 0) + if(crc, do: @flag_cks, else: 0)

  @doc "The head of a RESPONSE."
  @spec response_head(:result | :error | :started, byte(), non_neg_integer()) :: binary()
  def response_head(status, term_flag, total), do: <<status(status), term_flag, total::64>>

  @doc """
  One frame of a message. `kind` is `:request`, `:response` or `:data`, `block` is iodata of `size` bytes
  including the head, `crc` is nil or computes the checksum of iodata.
  """
  @spec block(
          :request | :response | :data,
          boolean(),
          non_neg_integer(),
          pos_integer(),
          iodata(),
          non_neg_integer(),
          crc()
        ) ::
          iodata()
  def block(kind, last?, seq, stream, block, size, crc) do
    header = <<size::24, type(kind), flags(last?, crc), seq::24, stream::32>>
    if crc, do: [header, block, <<crc.([header, block])::32>>], else: [header, block]
  end

  @doc "The first `n` bytes of an iovec (a list of binaries) and the rest, by sub-binaries."
  @spec split([binary()], non_neg_integer()) :: {[binary()], [binary()]}
  def split(iovec, n), do: split(iovec, n, [])

  defp split(rest, 0, taken), do: {:lists.reverse(taken), rest}

  defp split([binary | rest], n, taken) when byte_size(binary) <= n,
    do: split(rest, n - byte_size(binary), [binary | taken])

  defp split([binary | rest], n, taken) do
    {head, tail} = :erlang.split_binary(binary, n)
    {:lists.reverse(taken, [head]), [tail | rest]}
  end

  defp control(type, stream, payload), do: Wire.control(type, stream, payload)

  defp type(:request), do: @type_request
  defp type(:response), do: @type_response
  defp type(:data), do: @type_data

  defp status(:result), do: 0
  defp status(:error), do: 1
  defp status(:started), do: 2

  defp deadline(:infinity), do: 0xFFFF_FFFF
  defp deadline(milliseconds), do: milliseconds |> max(0) |> min(0xFFFF_FFFE)
end
