defmodule MeshxRpc.Codec.Wire do
  @moduledoc """
  Numbers, limits and control frames of `docs/rpc-protocol.md`, shared by both directions.
  """

  @causes [
    protocol: 1,
    invalid_cks: 2,
    full: 3,
    too_large: 4,
    cancelled: 5,
    sequence: 6,
    unknown_stream: 7,
    version: 8,
    auth: 9,
    settings: 10,
    timeout: 11,
    shutdown: 12,
    internal: 13,
    refused_term: 14,
    unread: 15
  ]

  @doc "Largest payload of one frame in bytes, heads included."
  def max_payload, do: 65_536

  @doc "Largest hello payload in bytes."
  def max_hello, do: 4_096

  @doc "Longest text of a RESET, REFUSED or GOAWAY in bytes."
  def max_text, do: 1_024

  @doc "Largest flow control window in bytes."
  def max_window, do: 0x7FFFFFFF

  @doc "A cause's number on the wire."
  @spec cause_number(MeshxRpc.Codec.cause()) :: non_neg_integer()
  def cause_number(number) when is_integer(number), do: number

  for {name, number} <- @causes do
    def cause_number(unquote(name)), do: unquote(number)
  end

  @doc "A cause's name; a number that has none stays a number."
  @spec cause_name(non_neg_integer()) :: MeshxRpc.Codec.cause()
  for {name, number} <- @causes do
    def cause_name(unquote(number)), do: unquote(name)
  end

  def cause_name(number), do: number

  @doc "A frame without checksum and with sequence number 0: every frame but REQUEST, RESPONSE and DATA."
  @spec control(byte(), non_neg_integer(), binary()) :: binary()
  def control(type, stream, payload) do
    <<byte_size(payload)::24, type, 0, 0::24, stream::32, payload::binary>>
  end

  @doc "REFUSED: the handshake ends here."
  def refused(cause, text), do: control(0x05, 0, <<cause_number(cause)::16, text(text)::binary>>)

  @doc "RESET: this stream is over."
  def reset(stream, cause, text),
    do: control(0x14, stream, <<cause_number(cause)::16, text(text)::binary>>)

  @doc "WINDOW: `increment` more bytes may be sent on `stream` (0 is the connection)."
  def window(stream, increment), do: control(0x20, stream, <<increment::32>>)

  @doc "PONG: gives the bytes of a PING back."
  def pong(bytes), do: control(0x22, 0, bytes)

  @doc "GOAWAY: streams above `last` are not run."
  def goaway(last, cause, text),
    do: control(0x23, 0, <<last::32, cause_number(cause)::16, text(text)::binary>>)

  # Never half a character.
  defp text(text) when byte_size(text) <= 1_024, do: text
  defp text(text), do: text |> binary_part(0, 1_024) |> String.chunk(:valid) |> hd()
end
