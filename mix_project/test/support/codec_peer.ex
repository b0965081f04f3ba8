defmodule MeshxRpc.CodecPeer do
  @moduledoc false
  # Frames as a peer writes them, right or wrong: every field can be set. Shares no code with what it tests.

  @options %{
    role: :server,
    max_message: 100_000,
    max_bytes: 150_000,
    max_streams: 4,
    stream_window: 65_536,
    connection_window: 200_000
  }

  @types %{
    hello: 0x01,
    hello_ack: 0x02,
    auth: 0x03,
    ready: 0x04,
    refused: 0x05,
    request: 0x10,
    response: 0x11,
    data: 0x12,
    cancel: 0x13,
    reset: 0x14,
    window: 0x20,
    ping: 0x21,
    pong: 0x22,
    goaway: 0x23
  }

  def options(changes \\ %{}), do: Map.merge(@options, Map.new(changes))

  @doc "A codec after the handshake."
  def up(codec, changes \\ %{}, agreed \\ %{checksum: 1, blk_max_size: 16_384}) do
    options = options(changes)

    handshake =
      case options.role do
        :server -> control(:hello, 0, "")
        :client -> control(:hello_ack, 0, "") <> control(:ready, 0, "")
      end

    {:ok, decoder, [_ | _], _} = codec.feed(codec.new(options), handshake)
    codec.agree(decoder, agreed)
  end

  def header(len, type, flags \\ 0, stream \\ 0, seq \\ 0),
    do: <<len::24, number(type), flags, seq::24, stream::32>>

  def control(type, stream, payload),
    do: header(byte_size(payload), type, 0, stream) <> payload

  @doc "A block; options: `seq`, `fin` (default true), `crc` (default true; `:crc32c`)."
  def block(type, stream, payload, options \\ []) do
    fin = if Keyword.get(options, :fin, true), do: 1, else: 0
    crc = Keyword.get(options, :crc, true)
    flags = if crc, do: fin + 0x80, else: fin
    body = header(byte_size(payload), type, flags, stream, Keyword.get(options, :seq, 0)) <> payload

    case crc do
      false -> body
      true -> body <> <<:erlang.crc32(body)::32>>
      :crc32c -> body <> <<MeshxRpc.Codec.Elixir.Crc32c.of(body)::32>>
    end
  end

  def request_payload(total, data, fun \\ "echo"),
    do: <<1, 500::32, total::64, 1, byte_size(fun), fun::binary, data::binary>>

  def response_payload(total, data, status \\ 0), do: <<status, 1, total::64, data::binary>>

  def request(stream, argument, options \\ []),
    do: block(:request, stream, request_payload(byte_size(argument), argument), options)

  def response(stream, result, options \\ []),
    do: block(:response, stream, response_payload(byte_size(result), result), options)

  @doc "A message's frames, with at most `size` bytes in each."
  def message(type, stream, bytes, size, options \\ []) do
    blocks = chunks(bytes, size)
    last = length(blocks) - 1

    for {data, seq} <- Enum.with_index(blocks) do
      options = [seq: seq, fin: seq == last] ++ options

      case {seq, type} do
        {0, :request} ->
          block(:request, stream, request_payload(byte_size(bytes), data), options)

        {0, :response} ->
          block(:response, stream, response_payload(byte_size(bytes), data), options)

        _ ->
          block(:data, stream, data, options)
      end
    end
  end

  def chunks(bytes, size) when byte_size(bytes) <= size, do: [bytes]

  def chunks(bytes, size) do
    rest = binary_part(bytes, size, byte_size(bytes) - size)
    [binary_part(bytes, 0, size) | chunks(rest, size)]
  end

  @doc "The bytes before `at`, the byte there, the bytes after it."
  def at(bytes, at) do
    {binary_part(bytes, 0, at), :binary.at(bytes, at),
     binary_part(bytes, at + 1, byte_size(bytes) - at - 1)}
  end

  defp number(type) when is_integer(type), do: type
  defp number(type), do: Map.fetch!(@types, type)
end
