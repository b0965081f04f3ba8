defmodule MeshxRpc.Codec.Header do
  @moduledoc false
  # A frame's header, and all that can be said against it before its payload is there.

  import Bitwise
  alias MeshxRpc.Codec.Wire

  @known_flags 0x81
  # kind, deadline, total, term, fun_len and the longest name.
  @max_request_head 270
  @min_request_head 16
  @response_head 10

  @type t ::
          {len :: 0..0xFFFFFF, type :: byte(), flags :: byte(), seq :: 0..0xFFFFFF,
           stream :: 0..0xFFFFFFFF}

  @doc "Bytes of the head of a RESPONSE."
  def response_head, do: @response_head

  @doc "Bytes of the longest head of a REQUEST."
  def max_request_head, do: @max_request_head

  @doc "Frame types that carry bytes of a message."
  defguard is_block(type) when type in [0x10, 0x11, 0x12]

  @doc "Bytes of the whole frame."
  def frame_size({len, _type, flags, _seq, _stream}), do: 12 + len + (flags >>> 7) * 4

  @doc """
  Checks a header. `role` is ours, `phase` one of `:hello`, `:auth`, `:proved`, `:up`; `block` is the agreed block size.
  """
  @spec check(t(), :client | :server, atom(), pos_integer()) :: :ok | {:error, atom(), String.t()}
  def check({len, type, flags, seq, stream}, role, phase, block) do
    with :ok <- known(type),
         :ok <- flags(type, flags),
         :ok <- size(len),
         :ok <- direction(type, role),
         :ok <- phase(type, role, phase),
         :ok <- length_of(type, len, block),
         :ok <- stream(type, stream) do
      seq(type, seq)
    end
  end

  defp known(type) when type in 0x01..0x05 or type in 0x10..0x14 or type in 0x20..0x23, do: :ok
  defp known(type) when type >= 0x80, do: :ok
  defp known(type), do: {:error, :protocol, "frame type #{type} is unknown"}

  defp flags(type, flags) do
    allowed = if is_block(type) or type >= 0x80, do: @known_flags, else: 0

    if (flags &&& bnot(allowed)) == 0,
      do: :ok,
      else: {:error, :protocol, "flags #{flags} on frame type #{type}, at most #{allowed} wanted"}
  end

  defp size(len) do
    if len <= Wire.max_payload(),
      do: :ok,
      else: {:error, :too_large, "a frame of #{len} bytes, at most #{Wire.max_payload()} wanted"}
  end

  defp direction(type, :server) when type in [0x02, 0x04, 0x11], do: wrong_side(type, "client")

  defp direction(type, :client) when type in [0x01, 0x03, 0x10, 0x13],
    do: wrong_side(type, "server")

  defp direction(_type, _role), do: :ok

  defp wrong_side(type, peer),
    do: {:error, :protocol, "frame type #{type} is not for a #{peer} to send"}

  defp phase(0x05, _role, _phase), do: :ok
  defp phase(0x01, :server, :hello), do: :ok
  defp phase(0x02, :client, :hello), do: :ok
  defp phase(0x03, :server, :auth), do: :ok
  defp phase(0x04, :client, :auth), do: :ok
  defp phase(type, _role, :up) when type >= 0x10, do: :ok
  defp phase(type, _role, _phase), do: {:error, :protocol, "frame type #{type} at the wrong time"}

  defp length_of(0x12, len, block) when len > block, do: too_large(len, block)
  defp length_of(0x10, len, block) when len > block + @max_request_head, do: too_large(len, block)
  defp length_of(0x11, len, block) when len > block + @response_head, do: too_large(len, block)

  defp length_of(type, len, _block) do
    {min, max} = bounds(type)

    if len >= min and len <= max,
      do: :ok,
      else: {:error, :protocol, "frame type #{type} of #{len} bytes, #{min} to #{max} wanted"}
  end

  defp too_large(len, block),
    do: {:error, :too_large, "a block of #{len} bytes, at most #{block} wanted"}

  defp bounds(0x01), do: {0, Wire.max_hello()}
  defp bounds(0x02), do: {0, Wire.max_hello()}
  defp bounds(0x03), do: {32, 32}
  defp bounds(0x04), do: {0, 0}
  defp bounds(0x05), do: {2, 2 + Wire.max_text()}
  defp bounds(0x10), do: {@min_request_head, Wire.max_payload()}
  defp bounds(0x11), do: {@response_head, Wire.max_payload()}
  defp bounds(0x13), do: {0, 0}
  defp bounds(0x14), do: {2, 2 + Wire.max_text()}
  defp bounds(0x20), do: {4, 4}
  defp bounds(0x21), do: {8, 8}
  defp bounds(0x22), do: {8, 8}
  defp bounds(0x23), do: {6, 6 + Wire.max_text()}
  defp bounds(_type), do: {0, Wire.max_payload()}

  defp stream(0x20, _stream), do: :ok
  defp stream(type, _stream) when type >= 0x80, do: :ok
  defp stream(type, stream) when type in 0x10..0x14 and stream > 0, do: :ok
  defp stream(type, 0) when type not in 0x10..0x14, do: :ok
  defp stream(type, stream), do: {:error, :protocol, "frame type #{type} on stream #{stream}"}

  defp seq(type, _seq) when is_block(type) or type >= 0x80, do: :ok
  defp seq(_type, 0), do: :ok

  defp seq(type, seq),
    do: {:error, :protocol, "sequence number #{seq} on frame type #{type}, 0 wanted"}
end
