defmodule MeshxRpc.Link do
  @moduledoc false
  # One connection's socket, codec and writer: what the client's and the server's connection have in common.
  #
  # The connection never waits inside the port: a batch of at most 512 KiB, and of larger messages 128 KiB, is written only
  # while the port's queue is below its watermark; `{:drained, socket}` says when it is again. So the queue is short, and
  # small calls overtake bulk. `gen_tcp:send` is no way to write: it answers only when the queue is below the mark again.
  # The port's own answer, `{:inet_reply, socket, :ok | {:error, reason}}`, comes as a message.

  alias MeshxRpc.{Address, Frame, Shared, Writer}

  # 32 KiB, and 1 MiB of binaries.
  @heap_words 4_096
  # 256 KiB for one that has so many messages under way at once. What it knows of these survives each collection, and is
  # copied by it.
  @busy_heap_words 32_768
  @busy 8
  @binary_words 131_072
  # From so many processes on a turn of its own is cheaper than what follows without.
  @many 4
  @batch 524_288
  # Of larger messages: small ones that come meanwhile wait for it, and the peer reads it while the next is made.
  @bulk 2 * Frame.max_block()
  # What the VM lets a process do before others have their turn. It takes a write for next to nothing, however much that is.
  @turn 4_000
  # Reads of at most 128 KiB that may wait for us. They are granted anew before they are used up: a socket that stops
  # and begins to read costs both VMs several system calls and wake-ups of threads, each time.
  @reads 32
  @grant 16
  # Control frames are answers to what a peer sends, so one that sends and does not read could pile them up.
  @max_control 4_194_304

  @enforce_keys [:socket, :module, :codec]
  defstruct [
    :socket,
    :module,
    :codec,
    writer: nil,
    shared: nil,
    # Frames that go with the next write, and their bytes.
    out: [],
    out_size: 0,
    dirty: false,
    written: 0,
    blocked: false,
    # Reads until the next grant.
    reads: @grant,
    # Whether it has the heap of a busy one.
    roomy: false,
    # The last stream that the codec was told of.
    opened: 0
  ]

  @type t :: %__MODULE__{}

  @doc """
  Gives this process a heap that fits a connection: else it collects garbage for each second or third call, or for each
  third read of 128 KiB, since what binaries hold counts too.
  """
  @spec prepare() :: :ok
  def prepare do
    _ = Process.flag(:min_heap_size, @heap_words)
    _ = Process.flag(:min_bin_vheap_size, @binary_words)
    :ok
  end

  @doc """
  Before so many processes are woken or started in a row: ends this process's turn on its scheduler, and begins the next.

  At the end of a turn the scheduler multiplies what it took by how many wait behind it, and by the sum wakes another one
  to help. With all that a read is in one turn with those it wakes, that is for each second read, of tiny calls that are
  through before the other is there: it looks for work, finds none, and takes a quarter of the CPU. Nobody comes in between.
  """
  @spec turn(non_neg_integer()) :: :ok
  def turn(woken) when woken < @many, do: :ok

  def turn(_woken) do
    priority = Process.flag(:priority, :high)
    :erlang.yield()
    _ = Process.flag(:priority, priority)
    :ok
  end

  @doc "So many messages are under way. The heap grows with the next collection, and stays."
  @spec under_way(t(), non_neg_integer()) :: t()
  def under_way(%{roomy: false} = link, count) when count >= @busy do
    _ = Process.flag(:min_heap_size, @busy_heap_words)
    %{link | roomy: true}
  end

  def under_way(link, _count), do: link

  @doc """
  A connection before its hello. `max_streams` messages may be received or in use at once; `budget` is what all
  connections of a server share, and the counter of what this one has of it, or nil.
  """
  @spec new(port(), :client | :server, map(), pos_integer(), term()) :: t()
  def new(socket, role, config, max_streams, budget \\ nil) do
    options =
      config
      |> Map.take([:max_message, :max_bytes, :stream_window, :connection_window])
      |> Map.merge(%{role: role, max_streams: max_streams, budget: budget})

    %__MODULE__{socket: socket, module: config.codec, codec: config.codec.new(options)}
  end

  @doc "The hello is done: from now on messages may be queued."
  @spec agree(t(), MeshxRpc.Hello.agreed(), keyword()) :: t()
  def agree(link, agreed, writer_options) do
    # A checksum of the user's own lies within messages, and CRC-32 on the frames.
    checksum = if agreed.checksum == 255, do: 1, else: agreed.checksum

    codec = link.module.agree(link.codec, %{checksum: checksum, blk_max_size: agreed.blk_max_size})

    writer =
      Writer.new(
        [
          block: agreed.block,
          crc: crc(link.module, checksum),
          stream_window: agreed.peer_stream_window,
          connection_window: agreed.peer_connection_window
        ] ++ writer_options
      )

    shared = writer.shared
    %{link | codec: codec, writer: writer, shared: shared, opened: Shared.taken(shared)}
  end

  # Captures of exported functions hold no version of their module.
  defp crc(_codec, 0), do: nil
  defp crc(codec, 1), do: Function.capture(codec, :crc32, 1)
  defp crc(codec, 2), do: Function.capture(codec, :crc32c, 1)

  @doc """
  Lets the socket deliver its first reads. `{:tcp_passive, socket}` comes when it has none left, and says nothing: it goes
  on when `took/1` grants more.
  """
  @spec activate(t()) :: :ok | {:error, term()}
  def activate(link), do: :inet.setopts(link.socket, active: @reads)

  @doc "One read was taken. A socket that is closed says so by itself."
  @spec took(t()) :: t()
  def took(%{reads: reads} = link) when reads > 1, do: %{link | reads: reads - 1}

  def took(link) do
    _ = :inet.setopts(link.socket, active: @grant)
    %{link | reads: @grant}
  end

  @doc "Gives one read to the codec. Bytes that the codec wants to be sent are queued, or sent while the hello lasts."
  def feed(link, bytes) do
    link = took(link)

    case link.module.feed(link.codec, bytes) do
      {:ok, codec, events, out} ->
        bounded(queue(%{link | codec: codec}, out), events)

      {:error, codec, events, out, cause, text} ->
        {:error, %{link | codec: codec}, events, out, cause, text}
    end
  end

  defp bounded(%{writer: %{control_bytes: bytes}} = link, events) when bytes > @max_control do
    text = "#{bytes} bytes of control frames are left unread, at most #{@max_control} wanted"
    {:error, link, events, [], :full, text}
  end

  defp bounded(link, events), do: {:ok, link, events}

  @doc "Streams that are not over for the codec."
  @spec open_streams(t()) :: non_neg_integer()
  def open_streams(link), do: link.module.stats(link.codec).open

  @doc """
  Tells the codec of the streams that were taken since, by whomever: before what a client reads is given to it, since an
  answer may be among that.
  """
  @spec open(t()) :: t()
  def open(%{shared: nil} = link), do: link

  def open(%{opened: opened} = link) do
    case Shared.taken(link.shared) do
      ^opened -> link
      taken -> %{link | opened: taken, codec: link.module.open(link.codec, opened + 1, taken)}
    end
  end

  @doc "Request ids that no request has taken."
  @spec skipped(t()) :: [pos_integer()]
  def skipped(link), do: link.module.skipped(link.codec)

  @doc "Tells the codec that a stream is over."
  @spec release(t(), pos_integer()) :: t()
  def release(link, stream), do: release_all(link, [stream])

  @doc "The same of several."
  @spec release_all(t(), [pos_integer()]) :: t()
  def release_all(link, streams),
    do: %{link | codec: link.module.release(link.codec, streams)}

  @doc "Changes the writer: something new may be sent."
  @spec update(t(), (Writer.t() -> Writer.t())) :: t()
  def update(link, fun), do: %{link | writer: fun.(link.writer), dirty: true}

  @doc """
  Whether messages may be sent at once, each in one frame: the largest, and all of them, of so many bytes. Their bytes
  of the window are taken then.
  """
  @spec whole?(t(), non_neg_integer(), non_neg_integer()) :: boolean()
  def whole?(%{blocked: blocked} = link, largest, total),
    do:
      not blocked and not Shared.retiring?(link.shared) and
        Writer.free?(link.writer, largest, total)

  @doc "Sends a request: `{stream, link}` when its only frame goes with the next write, `{nil, link}` when it waits."
  @spec request(t(), Writer.key(), binary(), [binary()], non_neg_integer()) ::
          {pos_integer() | nil, t()}
  def request(%{blocked: false} = link, key, head, data, size) do
    if Writer.free?(link.writer, size, size) and not Shared.retiring?(link.shared) do
      stream = Shared.take_id(link.shared)
      {stream, whole(link, :request, stream, head, data, size)}
    else
      {nil, update(link, &Writer.request(&1, key, head, data, size))}
    end
  end

  def request(link, key, head, data, size),
    do: {nil, update(link, &Writer.request(&1, key, head, data, size))}

  @doc "Sends a response: true when its only frame goes with the next write, false when it waits."
  @spec response(t(), pos_integer(), binary(), [binary()], non_neg_integer()) :: {boolean(), t()}
  def response(%{blocked: blocked} = link, stream, head, data, size) do
    if not blocked and Writer.free?(link.writer, size, size),
      do: {true, whole(link, :response, stream, head, data, size)},
      else: {false, update(link, &Writer.response(&1, stream, head, data, size))}
  end

  @doc "Frames that somebody else has made go with the next write."
  @spec frame(t(), iodata(), pos_integer()) :: t()
  def frame(link, frame, size),
    do: %{link | out: [link.out | frame], out_size: link.out_size + size, dirty: true}

  defp whole(link, kind, stream, head, data, size) do
    size = size + byte_size(head)
    frame(link, Frame.block(kind, true, 0, stream, [head | data], size, link.writer.crc), size + 16)
  end

  @doc "Bytes that wait here to be sent."
  @spec queued(t()) :: non_neg_integer()
  def queued(link), do: Writer.bytes(link.writer) + link.out_size

  @doc "Queues control frames."
  @spec queue(t(), iodata()) :: t()
  def queue(link, none) when none in [[], ""], do: link
  def queue(%{writer: nil} = link, frames), do: tap(link, &:gen_tcp.send(&1.socket, frames))
  def queue(link, frames), do: update(link, &Writer.control(&1, frames))

  @doc "A WINDOW of the peer."
  @spec window(t(), non_neg_integer(), pos_integer()) :: {:ok, t()} | :error
  def window(link, stream, increment) do
    with {:ok, writer} <- Writer.window(link.writer, stream, increment),
         do: {:ok, %{link | writer: writer, dirty: true}}
  end

  @doc "Whether a write may have something to do."
  @spec dirty?(t()) :: boolean()
  def dirty?(link), do: link.dirty and not link.blocked

  @doc "Whether what was collected is enough for a write."
  @spec enough?(t()) :: boolean()
  def enough?(link), do: link.out_size >= @batch

  @doc "Writes one batch, if the port has taken the one before."
  @spec write(t()) :: {:ok, t(), [Writer.note()]} | {:error, term()}
  def write(%{blocked: true} = link), do: {:ok, link, []}

  # What is ready goes before control frames: a CANCEL or RESET never overtakes the message that it is about.
  def write(link) do
    {frames, taken, notes, writer} = Writer.take(link.writer, @batch - link.out_size, @bulk)
    if taken > 0 and Writer.bulk?(link.writer), do: :erlang.bump_reductions(@turn)
    size = taken + link.out_size
    out = [link.out | frames]

    link = %{
      link
      | writer: writer,
        out: [],
        out_size: 0,
        # What is left may be more than windows allow: then the next write takes nothing.
        dirty: size >= @batch or (taken > 0 and Writer.count(writer) > 0),
        written: link.written + size
    }

    case if(size == 0, do: :ok, else: command(link.socket, out)) do
      :ok ->
        {:ok, ask(link), notes}

      # Those who write beside us have filled it.
      :busy ->
        {:ok, busy(%{link | out: out, out_size: size, dirty: true, blocked: true}), notes}

      {:error, reason} ->
        {:error, reason}
    end
  end

  @doc "The port has room again; how much, the next write asks."
  @spec drained(t()) :: t()
  def drained(link), do: %{link | blocked: false, written: Address.watermark()}

  @doc "A peer's text for the log and for people: it must not look like lines of ours, or steer a terminal."
  @spec printable(binary()) :: String.t()
  def printable(text) do
    quoted = inspect(text, binaries: :as_strings, printable_limit: :infinity)
    binary_part(quoted, 1, byte_size(quoted) - 2)
  end

  @doc "Sends last words, lets them arrive: after this the peer's bytes are ignored until it closes."
  @spec shutdown(t(), iodata()) :: :ok
  def shutdown(link, frames) do
    # A peer that does not read must not keep us: last words are only for those whose way is free.
    unless link.blocked, do: _ = command(link.socket, frames)
    unless link.blocked, do: _ = :gen_tcp.shutdown(link.socket, :write)
    :ok
  end

  @doc "Closes the socket; bytes that a peer leaves unread are thrown away."
  @spec close(t()) :: :ok
  def close(link) do
    if link.blocked, do: _ = :inet.setopts(link.socket, linger: {true, 0})
    :gen_tcp.close(link.socket)
  end

  defp command(socket, frames) do
    if MeshxRpc.Port.command(socket, frames), do: :ok, else: :busy
  rescue
    ArgumentError -> {:error, :closed}
  end

  # `written` is at least what we can have in the port's queue: it is asked only when that may be too much.
  defp ask(link) do
    if link.written < Address.watermark() do
      link
    else
      case :erlang.port_info(link.socket, :queue_size) do
        {:queue_size, size} ->
          busy(%{link | written: size, blocked: size >= Address.watermark()})

        # It has taken what was written all the same, and tells its end in a message of its own.
        :undefined ->
          link
      end
    end
  end

  # A write of nothing returns when the port is no longer busy, or closed: somebody else waits for that.
  defp busy(%{blocked: true, socket: socket} = link) do
    connection = self()

    spawn(fn ->
      _ = :gen_tcp.send(socket, [])
      send(connection, {:drained, socket})
    end)

    link
  end

  defp busy(link), do: link
end
