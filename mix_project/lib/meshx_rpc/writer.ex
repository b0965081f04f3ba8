defmodule MeshxRpc.Writer do
  @moduledoc """
  Decides what a connection sends next: `docs/rpc-protocol.md`, "Order of sending" and "Flow control".

  A struct without a process: messages go in, batches of frames come out of `take/2`. It sends

    1. control frames,
    2. messages of at most 64 KiB, whole,
    3. larger messages: of each class of sizes (up to 1 MiB, up to 16 MiB, above) one at a time, in order; those of
       different classes one frame each in turn,

  and lets a bulk frame go first once 256 KiB of small messages overtook it, so that neither starves.
  Bytes of arguments and results never exceed the window of their stream nor that of the connection.

  Messages of one size that went in turn would all arrive when the last of them does, and until then each takes its
  memory at both ends. Those of different sizes do, so that none waits for one that is many times as large.

  Messages are known by a key of the caller's. A request gets its stream id when its first frame is made:
  ids must grow on the wire, and small requests overtake bulk ones.
  """

  alias MeshxRpc.{Frame, Shared}

  @small 65_536
  @medium 1_048_576
  @large 16_777_216
  @overtake 262_144
  @max_window 0x7FFF_FFFF

  # Where a processor announces `rep movsb` as fast, Linux copies with it what is written to a socket. On AMD's Zen 3 and
  # 4 that is ten times as slow when a copy's destination lies 1 to 31 bytes behind its source, both within their pages.
  # The VM gives a binary of 512 KiB or more pages of its own, and it begins some 40 to 100 bytes into the first; an idle
  # connection's bytes begin at the beginning of a page. So it is the headers before a block that decide, and with each
  # block they are 12 bytes more: two or three of a message's first were copied slowly, a sixth of a call of 1 MiB. These
  # are made short instead.
  @own_pages 524_288
  @short_blocks 12
  @short 64

  defmodule Message do
    @moduledoc false
    # class: :small, or one of those of larger messages. active?: a larger one that has its class's place.
    @enforce_keys [:kind, :head, :data, :left, :class, :window]
    defstruct [:kind, :head, :data, :left, :class, :window] ++
                [stream: nil, seq: 0, active?: false, blocked: false]
  end

  @enforce_keys [:block, :stream_window, :shared]
  defstruct [
    :block,
    :crc,
    :stream_window,
    :shared,
    control: [],
    control_bytes: 0,
    messages: %{},
    streams: %{},
    small: :queue.new(),
    bulk: :queue.new(),
    # By class: those that wait for its place, and whether somebody has it.
    waiting: %{medium: :queue.new(), large: :queue.new(), huge: :queue.new()},
    active: [],
    overtaken: 0,
    bytes: 0
  ]

  @type key :: term()
  @type t :: %__MODULE__{}

  @typedoc "What a batch did: a request got its stream id, a message is wholly in the batch."
  @type note :: {:opened, key(), stream :: pos_integer()} | {:sent, key()}

  @doc """
  A writer for a connection whose hello is done. Options: `:block` (bytes per frame), `:crc` (nil or a
  function from iodata to its checksum), `:stream_window` and `:connection_window` (what the peer grants), and those
  of `MeshxRpc.Shared.new/2`.
  """
  @spec new(keyword()) :: t()
  def new(options) do
    %__MODULE__{
      block: Keyword.fetch!(options, :block),
      crc: options[:crc],
      stream_window: Keyword.fetch!(options, :stream_window),
      shared:
        Shared.new(
          Keyword.fetch!(options, :connection_window),
          Keyword.take(options, [:next_stream, :last_stream])
        )
    }
  end

  @doc "Queues control frames: they go first."
  @spec control(t(), iodata()) :: t()
  def control(writer, frames) do
    bytes = writer.control_bytes + IO.iodata_length(frames)
    %{writer | control: [writer.control | frames], control_bytes: bytes}
  end

  @doc "Queues a request: `head` and `size` bytes of argument. Its stream id is chosen later."
  @spec request(t(), key(), binary(), [binary()], non_neg_integer()) :: t()
  def request(writer, key, head, data, size), do: put(writer, key, :request, nil, head, data, size)

  @doc "Queues the response of a stream, known by the stream's id."
  @spec response(t(), pos_integer(), binary(), [binary()], non_neg_integer()) :: t()
  def response(writer, stream, head, data, size),
    do: put(writer, stream, :response, stream, head, data, size)

  @doc """
  Drops what is left of a message. Says whether nothing of it, a part of it or all of it was taken
  (`:sent` also when the key was never known).
  """
  @spec drop(t(), key()) :: {:unsent | :partial | :sent, t()}
  def drop(writer, key) do
    case writer.messages do
      %{^key => message} ->
        {if(message.seq == 0, do: :unsent, else: :partial), forget(writer, key, message)}

      _ ->
        {:sent, writer}
    end
  end

  @doc "Adds to the window of the connection (stream 0) or of a stream; one that is over is ignored."
  @spec window(t(), non_neg_integer(), pos_integer()) :: {:ok, t()} | :error
  def window(writer, 0, increment),
    do: if(Shared.grant(writer.shared, increment) == :ok, do: {:ok, writer}, else: :error)

  def window(writer, stream, increment) do
    with %{^stream => key} <- writer.streams,
         message = Map.fetch!(writer.messages, key),
         true <- message.window + increment <= @max_window do
      message = %{message | window: message.window + increment}

      if message.blocked,
        do: {:ok, writer |> save(key, %{message | blocked: false}) |> requeue(key, message.class)},
        else: {:ok, save(writer, key, message)}
    else
      false -> :error
      _over -> {:ok, writer}
    end
  end

  @doc "Bytes of messages that wait here."
  @spec bytes(t()) :: non_neg_integer()
  def bytes(writer), do: writer.bytes

  @doc """
  Whether messages may be sent at once, each in one frame: nothing waits, and no window is too small for the largest, or
  for all of them. Their bytes of the window are taken then.
  """
  @spec free?(t(), largest :: non_neg_integer(), total :: non_neg_integer()) :: boolean()
  def free?(%{messages: messages} = writer, largest, total) do
    messages == %{} and largest <= writer.block and largest <= writer.stream_window and
      Shared.take_all?(writer.shared, total)
  end

  @doc "Messages that wait here, wholly or in part."
  @spec count(t()) :: non_neg_integer()
  def count(writer), do: map_size(writer.messages)

  @doc "Whether larger messages are among them."
  @spec bulk?(t()) :: boolean()
  def bulk?(writer), do: writer.active != []

  @doc "Whether the stream ids are used up: the connection must be replaced."
  @spec exhausted?(t()) :: boolean()
  def exhausted?(writer), do: Shared.exhausted?(writer.shared)

  @doc """
  Takes the next frames: about `max` bytes, of larger messages about `max_bulk` (at most one frame more). Empty iodata:
  nothing may be sent now.
  """
  @spec take(t(), pos_integer(), pos_integer() | :infinity) ::
          {iodata(), size :: non_neg_integer(), [note()], t()}
  def take(writer, max, max_bulk \\ :infinity) do
    %{control: control, control_bytes: size} = writer
    fill(%{writer | control: [], control_bytes: 0}, max, max_bulk, control, size, [])
  end

  # Any number is less than `:infinity`.
  defp fill(writer, max, bulk, frames, size, notes) when size >= max or bulk <= 0,
    do: {frames, size, Enum.reverse(notes), writer}

  defp fill(writer, max, bulk, frames, size, notes) do
    case next(writer) do
      {:emit, key, writer, n} ->
        message = Map.fetch!(writer.messages, key)
        {frame, frame_size, new, writer} = emit(writer, key, message, n)
        bulk = left(bulk, message.class, n)
        fill(writer, max, bulk, [frames | frame], size + frame_size, new ++ notes)

      :none ->
        {frames, size, Enum.reverse(notes), writer}

      {:again, writer} ->
        fill(writer, max, bulk, frames, size, notes)
    end
  end

  defp left(bulk, class, _n) when bulk == :infinity or class == :small, do: bulk
  defp left(bulk, _class, n), do: bulk - n

  # The message that sends the next frame; it is taken out of its queue.
  defp next(writer) do
    small? = not :queue.is_empty(writer.small)
    bulk? = not :queue.is_empty(writer.bulk)

    cond do
      small? and not (bulk? and writer.overtaken >= @overtake) -> pop(writer, :small)
      bulk? -> pop(writer, :bulk)
      true -> :none
    end
  end

  defp pop(writer, class) do
    {{:value, key}, queue} = :queue.out(Map.fetch!(writer, class))
    popped = Map.put(writer, class, queue)

    case writer.messages do
      %{^key => message} -> ready(writer, popped, key, message)
      _dropped -> {:again, popped}
    end
  end

  defp ready(writer, popped, key, message) do
    cond do
      message.stream == nil and exhausted?(writer) ->
        {:again, popped}

      message.left == 0 ->
        {:emit, key, popped, 0}

      message.window == 0 ->
        {:again, save(popped, key, %{message | blocked: true})}

      true ->
        wanted = message.left |> min(block(writer, message)) |> min(message.window)

        case Shared.take(writer.shared, wanted) do
          # Nothing may be sent, so it keeps its place in the queue.
          0 -> :none
          n -> {:emit, key, popped, n}
        end
    end
  end

  defp block(writer, %{seq: seq, left: left})
       when seq < @short_blocks and left > @own_pages,
       do: min(writer.block, @short)

  defp block(writer, _message), do: writer.block

  defp emit(writer, key, message, n) do
    {writer, message, opened} = open(writer, key, message)
    {data, rest} = Frame.split(message.data, n)
    last? = message.left == n
    kind = if message.seq == 0, do: message.kind, else: :data
    block = if message.seq == 0, do: [message.head | data], else: data
    block_size = if message.seq == 0, do: byte_size(message.head) + n, else: n

    frame =
      Frame.block(
        kind,
        last?,
        rem(message.seq, 0x100_0000),
        message.stream,
        block,
        block_size,
        writer.crc
      )

    message = %{
      message
      | seq: message.seq + 1,
        data: rest,
        left: message.left - n,
        window: message.window - n
    }

    writer = %{
      writer
      | bytes: writer.bytes - n,
        overtaken: overtaken(writer, message, n)
    }

    size = block_size + 12 + if(writer.crc, do: 4, else: 0)

    if last? do
      {frame, size, [{:sent, key} | opened], forget(writer, key, message)}
    else
      {frame, size, opened, writer |> save(key, message) |> requeue(key, message.class)}
    end
  end

  defp overtaken(%{active: active} = writer, %{class: :small}, n) when active != [],
    do: writer.overtaken + n + 12

  defp overtaken(_writer, _message, _n), do: 0

  defp open(writer, key, %{stream: nil} = message) do
    stream = Shared.take_id(writer.shared)
    writer = %{writer | streams: Map.put(writer.streams, stream, key)}
    {writer, %{message | stream: stream}, [{:opened, key, stream}]}
  end

  defp open(writer, _key, message), do: {writer, message, []}

  defp put(writer, key, kind, stream, head, data, size) do
    class = class(size)

    message = %Message{
      kind: kind,
      head: head,
      data: data,
      left: size,
      class: class,
      stream: stream,
      window: writer.stream_window
    }

    streams = if stream, do: Map.put(writer.streams, stream, key), else: writer.streams
    writer = save(%{writer | streams: streams, bytes: writer.bytes + size}, key, message)

    if class == :small,
      do: %{writer | small: :queue.in(key, writer.small)},
      else: writer |> wait(class, &:queue.in(key, &1)) |> promote(class)
  end

  defp class(size) when size <= @small, do: :small
  defp class(size) when size <= @medium, do: :medium
  defp class(size) when size <= @large, do: :large
  defp class(_size), do: :huge

  defp wait(writer, class, fun),
    do: %{writer | waiting: Map.update!(writer.waiting, class, fun)}

  defp forget(writer, key, message) do
    writer = %{
      writer
      | messages: Map.delete(writer.messages, key),
        streams: Map.delete(writer.streams, message.stream),
        bytes: writer.bytes - message.left
    }

    leave(writer, message)
  end

  # The place of its class, if it had it, is the next one's.
  defp leave(writer, %{active?: false}), do: writer

  defp leave(writer, %{class: class}),
    do: promote(%{writer | active: List.delete(writer.active, class)}, class)

  defp promote(%{active: active} = writer, class) do
    with false <- class in active,
         {{:value, key}, queue} <- :queue.out(Map.fetch!(writer.waiting, class)) do
      writer = wait(writer, class, fn _old -> queue end)

      case writer.messages do
        %{^key => message} ->
          writer = save(writer, key, %{message | active?: true})
          %{writer | bulk: :queue.in(key, writer.bulk), active: [class | active]}

        _dropped ->
          promote(writer, class)
      end
    else
      _taken_or_nobody -> writer
    end
  end

  # A small message goes on at once, a bulk one when the others had their turn.
  defp requeue(writer, key, :small), do: %{writer | small: :queue.in_r(key, writer.small)}
  defp requeue(writer, key, _class), do: %{writer | bulk: :queue.in(key, writer.bulk)}

  defp save(writer, key, message), do: %{writer | messages: Map.put(writer.messages, key, message)}
end
