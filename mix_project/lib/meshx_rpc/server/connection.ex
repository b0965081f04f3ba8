defmodule MeshxRpc.Server.Connection do
  @moduledoc false
  # One connection of a server: hello, then requests, each in a process of its own.
  #
  #   :hello -> HELLO -> (:auth -> AUTH ->) :up -> :closing
  #
  # `:closing`: last words are on their way; what the peer still sends is thrown away for at most a second.

  use GenServer, restart: :temporary
  require Logger

  alias MeshxRpc.{Address, Entry, Frame, Hello, Link, Options, Refs, Shared, Telemetry, Writer}
  alias MeshxRpc.Server.{Report, Requests, Room, Task}

  @linger 1_000
  # How often a connection that drains looks whether it has.
  @drained 20
  # Messages that are collected for one write. A result counts once more for each 16 KiB.
  @collect 32
  @counts_more 16_384

  @enforce_keys [:config, :listener, :held, :offered]
  # rules: what requests need of the config.
  defstruct [
    :config,
    :rules,
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
    # As it is found there, it is copied to no process.
    rules = Entry.get({:server, state.config.id})
    hsk_ref = System.unique_integer([:positive])
    state = %{state | rules: rules, hsk_ref: hsk_ref, since: Telemetry.now()}
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

  def handle_info({:done, _pid, _stream, _done} = done, state), do: continue(state, [done])

  def handle_info({:EXIT, pid, reason}, state),
    do: state |> Requests.ended(pid, reason) |> continue()

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

  def handle_info({:timeout, timer, :alarm}, %{alarm: {timer, _at}} = state),
    do: state |> Requests.too_late() |> continue()

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

  # Refused already: its last words are not worth the place of another.
  def handle_info(:evicted, %{phase: :closing} = state), do: {:stop, :normal, state}
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
    _ = Enum.reduce(Map.keys(state.streams), state, &Requests.kill(&2, &1, :killed))

    if state.link do
      if state.phase == :up and state.draining == nil,
        do: Link.shutdown(state.link, goaway(state, :shutdown, "the server stops"))

      Link.close(state.link)
    end
  end

  # Events

  defp events(state, []), do: state

  defp events(state, [event | rest] = events) do
    case Requests.start_all(state, events) do
      {state, rest} -> events(state, rest)
      :none -> event |> event(state) |> events(rest)
    end
  end

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
      do: Requests.over(state, stream),
      else: Requests.start(state, request)
  end

  defp event({:request, _, _, _, _, _, _} = request, %{phase: :up} = state),
    do: Requests.start(state, request)

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
  defp event({:cancel, stream}, state), do: Requests.forget(state, stream)

  defp event({over, stream, _cause, _text}, state) when over in [:reset, :stream_error],
    do: Requests.forget(state, stream)

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

  # Also of requests that came in part, and of answers that are not yet written.
  defp drained?(%{link: link} = state),
    do:
      state.streams == %{} and not link.dirty and not link.blocked and Link.open_streams(link) == 0

  defp up(state) do
    send(state.listener, {:up, self()})
    Report.tell(state, :hsk, :ok)
    agreed = state.agreed
    link = Link.agree(state.link, agreed, [])

    task = %Task{connection: self(), rules: state.rules, traced: agreed.trace}

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

  # Writing

  # Takes what waits in the mailbox and may fill the same batch, and writes it.
  defp continue(state, dones \\ [])
  defp continue(%{phase: :up} = state, dones), do: collect(state, dones, @collect)
  defp continue(state, dones), do: {:noreply, Requests.done_all(state, dones)}

  # `dones` are the requests that have ended, last first: they are answered together.
  defp collect(%{phase: phase} = state, dones, left) when left <= 0 or phase != :up,
    do: state |> Requests.done_all(dones) |> write()

  defp collect(%{link: %{socket: socket} = link} = state, dones, left) do
    if Link.enough?(link) do
      state |> Requests.done_all(dones) |> write()
    else
      receive do
        {:done, _pid, _stream, _done} = done ->
          collect(state, [done | dones], left - weight(done))

        # One of our requests, or nothing to us: a supervisor ends otherwise.
        {:EXIT, pid, :normal} ->
          state |> Requests.done_all(dones) |> Requests.ended(pid, :normal) |> collect([], left)

        {:tcp, ^socket, bytes} ->
          state |> Requests.done_all(dones) |> read(bytes) |> collect([], left - 1)

        {:inet_reply, ^socket, :ok} ->
          collect(state, dones, left)
      after
        0 -> state |> Requests.done_all(dones) |> write()
      end
    end
  end

  defp weight({:done, _pid, _stream, {_status, {_flag, _iovec, size}}}),
    do: 1 + div(size, @counts_more)

  defp weight(_without_a_result), do: 1

  defp write(%{phase: :up, link: %{dirty: true, blocked: false}} = state) do
    case Link.write(state.link) do
      {:ok, link, notes} ->
        %{state | link: link} |> Requests.sent(notes) |> watch() |> continue_later()

      {:error, reason} ->
        broken(state, reason)
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
    state = Requests.kill_all(state)
    Link.shutdown(state.link, frames)
    _ = :erlang.start_timer(@linger, self(), :linger)
    %{state | phase: :closing}
  end
end
