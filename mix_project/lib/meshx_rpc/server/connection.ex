defmodule MeshxRpc.Server.Connection do
  @moduledoc false
  # One connection of a server: hello, then requests, each in a process of its own.
  #
  #   :hello -> HELLO -> (:auth -> AUTH ->) :up -> :closing
  #
  # `:closing`: last words are on their way; what the peer still sends is thrown away for at most a second.

  use GenServer, restart: :temporary
  require Logger

  alias MeshxRpc.{Address, Frame, Hello, Link, Options, Refs, Shared, Telemetry, Term, Writer}
  alias MeshxRpc.Server.{Alarm, Functions, Report, Room, Task}

  @linger 1_000
  # How often a connection that drains looks whether it has.
  @drained 20
  # Messages that are collected for one write.
  @collect 32

  @enforce_keys [:config, :listener, :held, :offered]
  defstruct [
    :config,
    :listener,
    :held,
    :offered,
    :link,
    :peer,
    :agreed,
    :refs,
    :send_timer,
    :task,
    :direct,
    :draining,
    phase: :hello,
    proofs: [],
    # The timer of the first deadline, and when it is.
    alarm: nil,
    streams: %{},
    last: 0,
    hsk_ref: 0,
    since: 0
  ]

  @doc "`held` counts the requests of this connection that run: the listener returns them when it dies."
  def start_link({config, listener, held}),
    do:
      GenServer.start_link(
        __MODULE__,
        %__MODULE__{config: config, listener: listener, held: held, offered: config.offered},
        config.gen_statem_opts
      )

  @impl true
  def init(state) do
    Process.flag(:trap_exit, true)

    # Requests that end on several schedulers then need not wait for one another to tell us (OTP 25).
    Process.flag(:message_queue_data, :off_heap)
    Link.prepare()
    state = %{state | hsk_ref: System.unique_integer([:positive]), since: Telemetry.now()}
    _ = :erlang.start_timer(state.config.timeout_hsk, self(), :hello)
    {:ok, state}
  end

  @impl true
  def handle_info({:socket, socket}, state) do
    state = attach(state, socket)

    case Link.activate(state.link) do
      :ok -> continue(state)
      {:error, reason} -> broken(state, reason)
    end
  end

  def handle_info({:tcp, _socket, _bytes}, %{phase: :closing} = state),
    do: continue(%{state | link: Link.took(state.link)})

  def handle_info({:tcp, _socket, bytes}, state) do
    case read(state, bytes) do
      # Mostly requests run now, and there is nothing else to do.
      %{link: %{dirty: false}} = state -> {:noreply, state}
      state -> continue(state)
    end
  end

  def handle_info({:tcp_passive, _socket}, state), do: continue(state)

  def handle_info({:done, pid, stream, done}, state),
    do: state |> done(pid, stream, done) |> continue()

  def handle_info({:EXIT, pid, reason}, state), do: state |> ended(pid, reason) |> continue()

  # What was left after a write.
  def handle_info(:timeout, state), do: continue(state)

  def handle_info({:drained, _socket}, state),
    do: %{state | link: Link.drained(state.link)} |> watch() |> write()

  def handle_info({:inet_reply, _socket, :ok}, state), do: continue(state)
  def handle_info({:inet_reply, _socket, {:error, reason}}, state), do: broken(state, reason)

  def handle_info({:tcp_closed, _socket}, state) do
    if state.streams != %{}, do: Report.tell(state, :recv, :tcp_closed)
    {:stop, :normal, state}
  end

  def handle_info({:tcp_error, _socket, reason}, state), do: broken(state, reason)

  def handle_info({:timeout, timer, :alarm}, %{alarm: {timer, _at}} = state) do
    late = Alarm.late(state.streams)
    state = Enum.reduce(late, %{state | alarm: nil}, &too_late/2)
    continue(%{state | alarm: Alarm.next(state.streams)})
  end

  def handle_info({:timeout, _timer, :alarm}, state), do: continue(state)

  def handle_info({:timeout, _timer, :hello}, %{phase: phase, link: link} = state)
      when phase in [:hello, :auth] do
    if link,
      do:
        state
        |> refuse(:timeout, "the hello took longer than #{state.config.timeout_hsk} ms")
        |> continue(),
      else: {:stop, :normal, state}
  end

  def handle_info({:timeout, _timer, :hello}, state), do: continue(state)

  # The acceptor is about to hand the socket over, and the peer is to learn why it goes.
  def handle_info(:evicted, %{link: nil} = state) do
    receive do
      {:socket, socket} -> handle_info(:evicted, attach(state, socket))
    after
      @linger -> {:stop, :normal, state}
    end
  end

  # Too many are in their hello, and this is the oldest. It ends at once: lingering ones would fill the server.
  def handle_info(:evicted, %{phase: phase} = state) when phase in [:hello, :auth] do
    text = "#{state.config.max_hello} newer connections are in their hello (max_hello)"
    Report.log(state, :full, text)
    Link.shutdown(state.link, if(quiet?(state), do: [], else: Frame.refused(:full, text)))
    {:stop, :normal, state}
  end

  def handle_info(:evicted, state), do: continue(state)

  # The server stops: what has begun may end, nothing begins any more.
  def handle_info(:drain, %{phase: :up, draining: nil} = state) do
    draining = %{last: state.last, skipped: MapSet.new(Link.skipped(state.link))}
    link = Link.queue(state.link, goaway(state, :shutdown, "the server stops"))
    _ = :erlang.start_timer(@drained, self(), :drained?)
    continue(%{state | draining: draining, link: link})
  end

  def handle_info(:drain, %{phase: phase} = state) when phase in [:hello, :auth],
    do: {:stop, :normal, state}

  def handle_info(:drain, state), do: continue(state)

  def handle_info({:timeout, _timer, :drained?}, %{phase: :up} = state) do
    if drained?(state) do
      state |> close([]) |> continue()
    else
      _ = :erlang.start_timer(@drained, self(), :drained?)
      continue(state)
    end
  end

  def handle_info({:timeout, _timer, :drained?}, state), do: continue(state)
  def handle_info({:timeout, _timer, :linger}, state), do: {:stop, :normal, state}

  def handle_info({:timeout, timer, :send}, %{send_timer: timer} = state) do
    Report.log(
      state,
      :timeout,
      "the client left our bytes unread for #{state.config.timeout_send} ms"
    )

    {:stop, :normal, state}
  end

  def handle_info({:timeout, _timer, :send}, state), do: continue(state)

  # Functions of the user's find us among their links.
  def handle_info(_not_for_us, state), do: continue(state)

  defp attach(state, socket) do
    budget = {state.config.budget, state.held}
    link = Link.new(socket, :server, state.config, Room.most(state.config), budget)
    %{state | link: link, peer: Address.peer(socket)}
  end

  @impl true
  def terminate(_reason, state) do
    _ = Enum.reduce(Map.keys(state.streams), state, &kill(&2, &1, :killed))

    if state.link do
      if state.phase == :up and state.draining == nil,
        do: Link.shutdown(state.link, goaway(state, :shutdown, "the server stops"))

      Link.close(state.link)
    end
  end

  # Events

  defp events(state, events), do: Enum.reduce(events, state, &event/2)

  defp event(_event, %{phase: :closing} = state), do: state

  defp event({:hello, hello}, %{phase: :hello} = state) do
    state = %{state | refs: Refs.local(state.config)}

    case Hello.answer(Options.reveal(state.config, state.refs), hello, Hello.nonce()) do
      {:ok, agreed, ack, []} ->
        up(%{
          state
          | agreed: agreed,
            link: Link.queue(state.link, [Frame.hello_ack(ack), Frame.ready()])
        })

      {:ok, agreed, ack, proofs} ->
        link = Link.queue(state.link, Frame.hello_ack(ack))
        %{state | agreed: agreed, link: link, proofs: proofs, phase: :auth}

      {:refused, cause, text} ->
        refuse(state, cause, text)
    end
  end

  defp event({:auth, proof}, %{phase: :auth} = state) do
    if Hello.proved?(state.proofs, proof),
      do: up(%{state | proofs: [], link: Link.queue(state.link, Frame.ready())}),
      else: refuse(state, :auth, "the client does not prove that it holds one of the shared keys")
  end

  # The client knows from our GOAWAY that these do not run, and may have sent them elsewhere already.
  defp event({:request, stream, _, _, _, _, _} = request, %{draining: draining} = state)
       when draining != nil do
    if stream > draining.last or MapSet.member?(draining.skipped, stream),
      do: over(state, stream),
      else: request(request, state)
  end

  defp event({:request, _, _, _, _, _, _} = request, %{phase: :up} = state),
    do: request(request, state)

  defp event({:window, stream, increment}, %{phase: :up} = state) do
    case Link.window(state.link, stream, increment) do
      {:ok, link} ->
        %{state | link: link}

      :error ->
        text = "a window of stream #{stream} grew beyond 2147483647 bytes"
        Report.log(state, :protocol, text)
        close(state, goaway(state, :protocol, text))
    end
  end

  # Nobody waits for it any more.
  defp event({:cancel, stream}, state), do: forget(state, stream)

  defp event({over, stream, _cause, _text}, state) when over in [:reset, :stream_error],
    do: forget(state, stream)

  defp event({:refused, cause, text}, state) do
    Report.tell(state, :hsk, {cause, Link.printable(text)})

    unless state.config.quiet_on_hsk_error? do
      Logger.warning(
        "MeshxRpc.Server #{inspect(state.config.id)}: #{state.peer} refuses this server: #{cause}: #{Link.printable(text)}"
      )
    end

    state
  end

  defp event({:goaway, _last, _cause, _text}, state), do: state
  defp event({:pong, _bytes}, state), do: state

  defp event(_unexpected, state), do: refuse(state, :protocol, "a frame came out of turn")

  defp request({:request, stream, kind, deadline, fun, flag, argument}, state) do
    # Requests become whole in another order than they began.
    state = %{state | last: max(state.last, stream)}

    case offered(state, fun) do
      {{:ok, fun}, state} ->
        if Room.take?(state.config, state.held, Room.place(fun)) do
          start(state, stream, kind, deadline, fun, flag, argument)
        else
          text = "#{state.config.max_concurrency} requests run (max_concurrency)"

          state
          |> Report.tell_refused(kind, fun, stream, argument, :full)
          |> reset(stream, :full, text)
        end

      {:error, state} ->
        state
        |> Report.tell_refused(kind, fun, stream, argument, :undef)
        |> answer(stream, {:error, Term.encode_error(Term.undef(state.config.module, fun))})
    end
  end

  defp offered(%{config: config} = state, name) do
    case Functions.find(state.offered, name, config.module, config.functions) do
      {found, nil} -> {found, state}
      {found, offered} -> {found, %{state | offered: offered}}
    end
  end

  # Also of requests that came in part, and of answers that are not yet written.
  defp drained?(%{link: link} = state),
    do:
      state.streams == %{} and not link.dirty and not link.blocked and Link.open_streams(link) == 0

  defp up(state) do
    send(state.listener, {:up, self()})
    Report.tell(state, :hsk, :ok)
    %{config: config, agreed: agreed} = state
    link = Link.agree(state.link, agreed, [])

    task = %Task{connection: self(), server: config.id, traced: agreed.trace}

    direct = %{
      socket: link.socket,
      shared: link.shared,
      held: state.held,
      block: min(agreed.block, agreed.peer_stream_window),
      max_message: agreed.peer_max_message,
      crc: link.writer.crc
    }

    %{state | phase: :up, link: link, task: task, direct: direct}
  end

  # Ids that were not taken are below `last` and did not run either.
  defp goaway(state, cause, text) do
    resets = for id <- Link.skipped(state.link), do: Frame.reset(id, :shutdown, "not run")
    [resets | Frame.goaway(state.last, cause, text)]
  end

  defp read(%{phase: :closing} = state, _bytes), do: state

  defp read(state, bytes) do
    case Link.feed(state.link, bytes) do
      {:ok, link, events} ->
        events(%{state | link: link}, events)

      {:error, link, events, out, cause, text} ->
        state = events(%{state | link: link}, events)
        unless state.phase == :closing, do: Report.log(state, cause, text)
        close(state, if(quiet?(state), do: [], else: out))
    end
  end

  # Requests

  defp start(state, {:internal, name}, {stream, _kind, flag, argument}, _measured),
    do: Task.internal(state.task, stream, name, flag, argument)

  # With others beside it, its result is not for itself to write: so they are spared the copy of what that takes.
  defp start(%{streams: none} = state, fun, request, measured) when none == %{},
    do: Task.start(%{state.task | direct: state.direct}, fun, request, measured)

  defp start(state, fun, request, measured), do: Task.start(state.task, fun, request, measured)

  defp start(state, stream, kind, deadline, fun, flag, argument) do
    measured = Report.measured(state, kind, fun, stream, argument)
    pid = start(state, fun, {stream, kind, flag, argument}, measured)

    execute = state.config.timeout_execute
    reason = if execute < deadline, do: :killed, else: :timeout

    until = Alarm.until(min(deadline, execute))
    place = Room.place(fun)

    request = %{
      pid: pid,
      until: until,
      reason: reason,
      kind: kind,
      place: place,
      measured: measured
    }

    streams = Map.put(state.streams, stream, request)

    state = %{
      state
      | alarm: Alarm.set(state.alarm, until),
        streams: streams,
        link: Link.under_way(state.link, map_size(streams))
    }

    if kind == :cast, do: respond(state, stream, :started, {0, [], 0}), else: state
  end

  defp done(state, pid, stream, done) do
    case state.streams do
      %{^stream => %{pid: ^pid}} when done == :answered -> state |> finished(stream) |> over(stream)
      %{^stream => %{pid: ^pid}} -> finish(state, stream, done)
      _over -> state
    end
  end

  # A request's process that has not told us how it ended: few do, so nothing is kept to find them fast.
  defp ended(state, pid, reason) do
    case Enum.find(state.streams, fn {_stream, request} -> request.pid == pid end) do
      {stream, _request} ->
        reason = Term.exit_reason(reason)

        state
        |> Report.tell_ended(stream, reason)
        |> finish(stream, {:error, Term.encode_error(reason)})

      nil ->
        state
    end
  end

  # The caller of a cast had all there is to have when it started.
  defp finish(state, stream, done) do
    kind = state.streams[stream].kind
    state = finished(state, stream)
    if kind == :call, do: answer(state, stream, done), else: over(state, stream)
  end

  # `:timeout` by the caller's deadline, `:killed` by our `timeout_execute`.
  defp too_late(stream, state) do
    %{reason: reason} = state.streams[stream]
    state |> kill(stream, reason) |> finish(stream, {:error, Term.encode_error(reason)})
  end

  # The request no longer runs.
  defp finished(state, stream) do
    {%{place: place}, streams} = Map.pop!(state.streams, stream)
    Room.leave(state.config, state.held, place)
    %{state | streams: streams}
  end

  defp kill(state, stream, reason) do
    %{pid: pid} = state.streams[stream]
    Process.unlink(pid)
    Process.exit(pid, :kill)
    Report.tell_ended(state, stream, reason)
  end

  defp forget(state, stream) do
    state =
      if Map.has_key?(state.streams, stream),
        do: state |> kill(stream, :cancelled) |> finished(stream),
        else: state

    {_how_far, writer} = Writer.drop(state.link.writer, stream)
    over(%{state | link: %{state.link | writer: writer}}, stream)
  end

  defp over(state, stream), do: %{state | link: Link.release(state.link, stream)}

  defp answer(%{phase: phase} = state, _stream, _done) when phase != :up, do: state

  defp answer(state, stream, {:refused_term, _}),
    do: reset(state, stream, :refused_term, "the argument is refused by this server's guard")

  defp answer(state, stream, {:invalid_cks, _}),
    do: reset(state, stream, :invalid_cks, "the argument is not what its checksums say")

  # Of requests that streams and casts are made of: they have room of their own, since the loss of one answer would
  # be the end of a stream.
  defp answer(state, stream, {:reply, encoded}),
    do: answer(state, stream, :result, encoded, 2 * state.config.max_queue)

  defp answer(state, stream, {status, encoded}),
    do: answer(state, stream, status, encoded, state.config.max_queue)

  defp answer(state, stream, status, {_flag, _iovec, size} = encoded, max_queue) do
    queued = Link.queued(state.link)

    cond do
      size > state.agreed.peer_max_message ->
        respond(state, stream, :error, Term.encode_error(:error_too_long))

      queued > 0 and queued + size > max_queue ->
        reset(state, stream, :unread, "#{queued} bytes of results wait to be read (max_queue)")

      true ->
        respond(state, stream, status, encoded)
    end
  end

  defp respond(state, stream, status, {flag, iovec, size}) do
    head = Frame.response_head(status, flag, size)
    {whole?, link} = Link.response(state.link, stream, head, iovec, size)
    # A cast that still runs keeps its argument.
    over? = whole? and not is_map_key(state.streams, stream)
    %{state | link: if(over?, do: Link.release(link, stream), else: link)}
  end

  defp reset(state, stream, cause, text),
    do: over(%{state | link: Link.queue(state.link, Frame.reset(stream, cause, text))}, stream)

  # Writing

  # Takes what waits in the mailbox and may fill the same batch, and writes it.
  defp continue(%{phase: :up} = state), do: collect(state, @collect)
  defp continue(state), do: {:noreply, state}

  defp collect(%{phase: phase} = state, left) when left == 0 or phase != :up, do: write(state)

  defp collect(%{link: %{socket: socket} = link} = state, left) do
    if Link.enough?(link) do
      write(state)
    else
      receive do
        {:done, pid, stream, done} -> state |> done(pid, stream, done) |> collect(left - 1)
        # One of our requests, or nothing to us: a supervisor ends otherwise.
        {:EXIT, pid, :normal} -> state |> ended(pid, :normal) |> collect(left)
        {:tcp, ^socket, bytes} -> state |> read(bytes) |> collect(left - 1)
        {:inet_reply, ^socket, :ok} -> collect(state, left)
      after
        0 -> write(state)
      end
    end
  end

  defp write(%{phase: :up, link: %{dirty: true, blocked: false}} = state) do
    case Link.write(state.link) do
      {:ok, link, notes} -> %{state | link: link} |> sent(notes) |> watch() |> continue_later()
      {:error, reason} -> broken(state, reason)
    end
  end

  defp write(state), do: {:noreply, state}

  defp broken(state, reason) do
    Report.tell(state, if(state.link && state.link.blocked, do: :send, else: :recv), reason)

    Logger.debug(
      "MeshxRpc.Server #{inspect(state.config.id)}: connection of #{state.peer} broke: #{inspect(reason)}"
    )

    {:stop, :normal, state}
  end

  # A batch was written: what waits in the mailbox comes before the next one.
  defp continue_later(%{link: link} = state) do
    if link.blocked or Writer.count(link.writer) > 0,
      do: Shared.busy(link.shared),
      else: Shared.idle(link.shared)

    if Link.dirty?(link), do: {:noreply, state, 0}, else: {:noreply, state}
  end

  defp sent(state, notes) do
    Enum.reduce(notes, state, fn {:sent, stream}, state ->
      # A cast that still runs keeps its argument.
      if Map.has_key?(state.streams, stream), do: state, else: over(state, stream)
    end)
  end

  # Only a peer that does not read keeps the port's queue from becoming empty.
  defp watch(%{link: %{blocked: true}, send_timer: nil} = state),
    do: %{state | send_timer: :erlang.start_timer(state.config.timeout_send, self(), :send)}

  defp watch(%{link: %{blocked: false}, send_timer: timer} = state) when timer != nil do
    :erlang.cancel_timer(timer)
    %{state | send_timer: nil}
  end

  defp watch(state), do: state

  # The end

  defp refuse(state, cause, text) do
    Report.log(state, cause, text)
    close(state, if(quiet?(state), do: [], else: Frame.refused(cause, text)))
  end

  defp quiet?(state), do: state.config.quiet_on_hsk_error? and state.phase in [:hello, :auth]

  defp close(%{phase: :closing} = state, _frames), do: state

  defp close(state, frames) do
    kill = fn stream, state -> state |> kill(stream, :killed) |> finished(stream) end
    state = Enum.reduce(Map.keys(state.streams), state, kill)
    Link.shutdown(state.link, frames)
    _ = :erlang.start_timer(@linger, self(), :linger)
    %{state | phase: :closing}
  end
end
