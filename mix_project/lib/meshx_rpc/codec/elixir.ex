defmodule MeshxRpc.Codec.Elixir do
  @moduledoc """
  The codec in plain Elixir, for VMs that cannot load the NIF. Slower, with the same limits and the same answers:
  one test suite runs on both, and a differential test feeds both the same bytes.
  """
  @behaviour MeshxRpc.Codec

  alias MeshxRpc.Codec.{Header, Wire}
  alias MeshxRpc.Codec.Elixir.{Crc32c, Guard, Streams}
  import MeshxRpc.Codec.Header, only: [is_block: 1]

  # Frames that make us work but bring no message (CANCEL, RESET, PING, frames of streams that are over, ...):
  # so many at once, and so many more each millisecond.
  @control_burst 10_000
  @control_per_ms 5

  @options [:role, :max_message, :max_bytes, :max_streams, :stream_window, :connection_window]
  @enforce_keys @options
  defstruct @options ++
              [
                phase: :hello,
                failure: nil,
                checksum: 0,
                block: 65_536,
                buffer: "",
                budget: nil,
                streams: %{},
                last: 0,
                skipped: %{},
                window_left: 0,
                window_pending: 0,
                reserved: 0,
                stray_bytes: 0,
                tokens: @control_burst,
                tokens_at: 0,
                frames: 0,
                bytes: 0,
                events: [],
                out: []
              ]

  @impl true
  def budget(max), do: {:atomics.new(1, []), max}

  @impl true
  def budget_used({used, _max}), do: :atomics.get(used, 1)

  @impl true
  def give_back({used, _max}, bytes), do: :atomics.sub(used, 1, bytes)

  @impl true
  def skipped(%__MODULE__{} = s), do: s.skipped |> Map.keys() |> Enum.sort()

  @impl true
  def policy(policy), do: MeshxRpc.Guard.policy(policy)

  @impl true
  def new(options) do
    decoder = struct!(__MODULE__, Map.take(options, [:budget | @options]))

    for key <- [:stream_window, :connection_window], value = Map.fetch!(options, key) do
      unless value in 1..Wire.max_window() do
        raise ArgumentError, "#{key} is #{inspect(value)}, 1 to #{Wire.max_window()} wanted"
      end
    end

    %{decoder | window_left: decoder.connection_window, tokens_at: now()}
  end

  @impl true
  def agree(%__MODULE__{} = s, %{checksum: checksum, blk_max_size: block})
      when checksum in 0..2 do
    phase = if s.role == :server and s.phase != :over, do: :up, else: s.phase
    %{s | checksum: checksum, block: min(block, Wire.max_payload()), phase: phase}
  end

  @impl true
  def feed(%__MODULE__{failure: {cause, text}} = s, _bytes), do: {:error, s, [], [], cause, text}
  def feed(%__MODULE__{phase: :over} = s, _bytes), do: {:ok, s, [], []}

  def feed(%__MODULE__{} = s, bytes) do
    s = %{refill(s) | bytes: s.bytes + byte_size(bytes), buffer: ""} |> frames(s.buffer <> bytes)
    {s, events, out} = flush(s)
    {:ok, s, events, out}
  catch
    {:fatal, %__MODULE__{} = s, cause, text} ->
      last_words =
        if s.phase == :up,
          do: [
            Enum.map(skipped(s), &Wire.reset(&1, :shutdown, "not run")),
            Wire.goaway(goaway_last(s), cause, text)
          ],
          else: Wire.refused(cause, text)

      {s, events, out} = flush(s)
      s = Streams.give_back(%{s | failure: {cause, text}, streams: %{}}, s.reserved)
      {:error, s, events, [out, last_words], cause, text}
  end

  @impl true
  def open(%__MODULE__{} = s, first, last),
    do: Enum.reduce(first..last//1, s, &Streams.open(&2, &1))

  @impl true
  def release(%__MODULE__{} = s, streams), do: Enum.reduce(streams, s, &Streams.release(&2, &1))

  @impl true
  def stats(%__MODULE__{} = s) do
    %{frames: s.frames, bytes: s.bytes, open: map_size(s.streams), reserved: s.reserved}
  end

  @impl true
  def crc32(iodata), do: :erlang.crc32(iodata)

  @impl true
  defdelegate crc32c(iodata), to: Crc32c, as: :of

  @impl true
  def guard(binary, policy), do: Guard.check(binary, policy)

  # Without native code there is no other place for what takes long.
  @impl true
  def decode(binary, policy) do
    with :ok <- Guard.check(binary, policy), do: {:ok, :erlang.binary_to_term(binary, [:safe])}
  end

  @doc false
  def fatal(s, cause, text), do: throw({:fatal, s, cause, text})

  @doc false
  def event(s, event), do: %{s | events: [event | s.events]}

  @doc false
  def out(s, bytes), do: %{s | out: [s.out | bytes]}

  @doc false
  # Takes one of the frames that a peer may send without bringing a message.
  def spend(%{tokens: 0} = s) do
    fatal(s, :protocol, "more than #{@control_burst} control frames at once, or 5000 a second")
  end

  def spend(s), do: %{s | tokens: s.tokens - 1}

  defp refill(s) do
    now = now()

    %{
      s
      | tokens: min(@control_burst, s.tokens + (now - s.tokens_at) * @control_per_ms),
        tokens_at: now
    }
  end

  defp now, do: System.monotonic_time(:millisecond)

  defp goaway_last(%{role: :server, last: last}), do: last
  defp goaway_last(%{role: :client}), do: 0

  defp flush(s), do: {%{s | events: [], out: []}, Enum.reverse(s.events), s.out}

  ## Frames

  defp frames(%{phase: :over} = s, _input), do: s

  defp frames(s, <<len::24, type, flags, seq::24, stream::32, _::binary>> = input) do
    header = {len, type, flags, seq, stream}

    with {:error, cause, text} <- Header.check(header, s.role, s.phase, s.block) do
      fatal(s, cause, text)
    end

    size = Header.frame_size(header)

    if byte_size(input) < size do
      %{s | buffer: :binary.copy(input)}
    else
      s = frame(%{s | frames: s.frames + 1}, header, input)
      frames(s, binary_part(input, size, byte_size(input) - size))
    end
  end

  defp frames(s, input), do: %{s | buffer: :binary.copy(input)}

  defp frame(s, {len, type, _, _, _} = header, input) when is_block(type) do
    Streams.block(s, header, binary_part(input, 12, len), checksum(s, header, input))
  end

  defp frame(s, {len, type, _flags, _seq, stream}, input) do
    control(s, type, stream, binary_part(input, 12, len))
  end

  defp checksum(%{checksum: agreed}, {len, _type, flags, _seq, _stream}, input) do
    cond do
      agreed > 0 and flags < 0x80 -> {:error, "no checksum though one was agreed on"}
      agreed == 0 and flags >= 0x80 -> {:error, "a checksum though none was agreed on"}
      agreed == 0 -> :ok
      trailer(input, len) == crc(agreed, binary_part(input, 0, 12 + len)) -> :ok
      true -> {:error, "the checksum does not fit the block"}
    end
  end

  defp crc(1, bytes), do: :erlang.crc32(bytes)
  defp crc(2, bytes), do: Crc32c.of(bytes)

  defp trailer(input, len) do
    <<crc::32>> = binary_part(input, 12 + len, 4)
    crc
  end

  ## Frames of the connection

  defp control(s, 0x01, 0, payload), do: event(%{s | phase: :auth}, {:hello, :binary.copy(payload)})

  defp control(s, 0x02, 0, payload),
    do: event(%{s | phase: :auth}, {:hello_ack, :binary.copy(payload)})

  defp control(s, 0x03, 0, proof), do: event(%{s | phase: :proved}, {:auth, :binary.copy(proof)})
  defp control(s, 0x04, 0, ""), do: event(%{s | phase: :up}, :ready)

  defp control(s, 0x05, 0, <<cause::16, text::binary>>),
    do: event(%{s | phase: :over}, {:refused, Wire.cause_name(cause), :binary.copy(text)})

  defp control(s, 0x13, stream, ""), do: Streams.cancel(s, stream)

  defp control(s, 0x14, stream, <<cause::16, text::binary>>),
    do: Streams.reset(s, stream, Wire.cause_name(cause), :binary.copy(text))

  defp control(s, 0x20, stream, <<increment::32>>) do
    if increment in 1..Wire.max_window() do
      if stream == 0,
        do: event(s, {:window, 0, increment}),
        else: Streams.window(s, stream, increment)
    else
      fatal(s, :protocol, "a window grows by #{increment} bytes, 1 to #{Wire.max_window()} wanted")
    end
  end

  defp control(s, 0x21, 0, bytes), do: s |> spend() |> out(Wire.pong(bytes))
  defp control(s, 0x22, 0, bytes), do: s |> spend() |> event({:pong, :binary.copy(bytes)})

  defp control(s, 0x23, 0, <<last::32, cause::16, text::binary>>),
    do: s |> spend() |> event({:goaway, last, Wire.cause_name(cause), :binary.copy(text)})

  # 0x80 and above: an extension that we do not know.
  defp control(s, type, _stream, _payload) when type >= 0x80, do: spend(s)
end
