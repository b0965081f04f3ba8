defmodule MeshxRpc.Client.Connection do
  @moduledoc false
  # One connection of a client: connects, says hello, multiplexes calls, connects again.
  #
  #   :down -> connect -> :hello -> HELLO_ACK, READY -> :up -> (:draining ->) :down
  #
  # `:draining`: the server said GOAWAY or the stream ids are used up; calls that run may end, new ones
  # are answered with `:closed`. While it is `:up` the pool's table has a row for it.

  use GenServer

  alias MeshxRpc.{Frame, Hello, Link, Options, Reason, Refs, Shared, Telemetry}
  alias MeshxRpc.Client.{Backoff, Calls, Dial, Direct, Growth, InFlight, Listing}
  alias MeshxRpc.Client.{Liveness, Report, Successor}

  # Messages that are collected for one write. A request counts once more for each 16 KiB.
  @collect 32
  @counts_more 16_384
  # Stream ids that callers took and did not tell of, since they were killed at that moment: the server takes 1,024.
  @left_out 512
  # How long one that was replaced waits for callers that have just found it.
  @linger 1_000

  @enforce_keys [:config, :index, :table, :calls]
  defstruct [
    :config,
    :index,
    :table,
    :calls,
    :link,
    :address,
    :refs,
    :hello,
    :agreed,
    :timer,
    :send_timer,
    :id,
    :before,
    # Whether another connection is to take its place: nil, :asked, or :done when that one is up.
    replaced: nil,
    phase: :down,
    attempt: 0,
    failed: nil,
    logged: nil,
    hsk_ref: nil,
    since: 0,
    idle_since: 0,
    ping_timer: nil,
    heard: nil
  ]

  # What callers say of their calls, beside making them.
  defguardp is_of_caller(message)
            when (tuple_size(message) == 3 and elem(message, 0) in [:cancel, :expired]) or
                   (tuple_size(message) == 2 and elem(message, 0) == :watch) or
                   (tuple_size(message) == 5 and elem(message, 0) == :DOWN)

  def child_spec({config, index, _table, _load} = argument),
    do: Successor.child_spec(argument, {config.id, index}, nil)

  @doc "`before` is the connection that this one is to replace, as soon as it is up."
  def start_link({config, _index, _table, _load} = argument, id \\ nil, before \\ nil),
    do: GenServer.start_link(__MODULE__, {argument, id, before}, config.gen_statem_opts)

  @impl true
  def init({{config, index, table, load}, id, before}) do
    # What a connection that crashed has left.
    unless before && Process.alive?(before) do
      Listing.clear(table, index)
      :counters.put(load, index, 0)
    end

    Listing.forget_dead(table)

    Link.prepare()
    calls = Calls.new(load, index)

    state = %__MODULE__{
      config: config,
      index: index,
      table: table,
      calls: calls,
      id: id,
      before: before
    }

    {:ok, state, {:continue, :connect}}
  end

  @impl true
  def handle_continue(:connect, state), do: connect(state)

  @impl true
  def handle_info({:call, _key, _caller, _fun, _deadline, _encoded} = ask, state),
    do: continue(state, [ask])

  # A caller's own frame for which the port had no room.
  def handle_info({:frame, socket, frame, size}, %{link: %{socket: socket}} = state),
    do: continue(%{state | link: Link.frame(state.link, frame, size)})

  def handle_info(message, state) when is_of_caller(message),
    do: state |> heard(message) |> continue()

  def handle_info({:tcp, socket, bytes}, %{link: %{socket: socket}} = state) do
    case read(state, bytes) do
      # Mostly its callers have their answers, and there is nothing else to do.
      %{phase: :up, link: %{dirty: false}} = state -> {:noreply, state |> left_out() |> idle()}
      state -> continue(state)
    end
  end

  # What was left after a write.
  def handle_info(:timeout, state), do: continue(state)

  def handle_info({:drained, socket}, %{link: %{socket: socket}} = state),
    do: %{state | link: Link.drained(state.link)} |> watch() |> write()

  def handle_info({:inet_reply, socket, {:error, reason}}, %{link: %{socket: socket}} = state),
    do: state |> hear_out() |> lost(reason) |> continue()

  def handle_info({:tcp_closed, socket}, %{link: %{socket: socket}} = state),
    do: state |> lost(:closed) |> continue()

  def handle_info({:tcp_error, socket, reason}, %{link: %{socket: socket}} = state),
    do: state |> lost(reason) |> continue()

  def handle_info({:timeout, timer, :hello}, %{timer: timer} = state) do
    text = "the server's hello took longer than #{state.config.timeout_hsk} ms"
    say(state, Frame.refused(:timeout, text))
    state |> lost({:timeout, text}) |> continue()
  end

  def handle_info({:timeout, timer, :send}, %{send_timer: timer} = state) do
    text = "the server left our bytes unread for #{state.config.timeout_send} ms"
    state |> lost({:timeout, text}) |> continue()
  end

  # The connection that is to take our place is up.
  def handle_info(:replaced, state), do: state |> replaced() |> continue()
  def handle_info({:timeout, _timer, :replaced}, state), do: over(state)

  def handle_info({:timeout, timer, :connect}, %{timer: timer, phase: :down} = state),
    do: connect(state)

  # Once in that time it is looked whether there was a call. Claimed, no caller writes beside us while we close.
  def handle_info({:timeout, timer, :idle}, %{timer: timer, phase: :up} = state) do
    shared = state.link.shared
    unused? = Calls.none?(state.calls) and Shared.taken(shared) == state.idle_since

    if unused? and Shared.claim?(shared),
      do: state |> drain(:idle) |> continue(),
      else: state |> watch_idle() |> continue()
  end

  def handle_info({:timeout, timer, :ping}, %{ping_timer: timer} = state),
    do: state |> InFlight.adopt() |> alive() |> continue()

  # One beyond the pool's size, that is not needed any more.
  def handle_info(:leave, state), do: state |> Listing.leave() |> replaced() |> continue()

  def handle_info(_of_a_connection_that_is_gone, state), do: continue(state)

  defp heard(state, message), do: state |> InFlight.heard(message) |> drained()

  # What the server said before it closed may still lie behind what made us write: an answer is an answer, and its last
  # words tell what has not run.
  defp hear_out(%{link: %{socket: socket}} = state) do
    receive do
      {:tcp, ^socket, bytes} -> state |> read(bytes) |> hear_out()
    after
      0 -> state
    end
  end

  defp hear_out(state), do: state

  defp read(state, bytes) do
    case state.link |> Link.open() |> Link.feed(bytes) do
      {:ok, link, events} ->
        events(%{state | link: link}, events)

      {:error, link, events, out, cause, text} ->
        state = events(%{state | link: link}, events)
        if state.link, do: say(state, out)
        lost(state, {cause, text})
    end
  end

  # Connecting

  defp connect(%{config: config} = state) do
    state = %{
      state
      | hsk_ref: System.unique_integer([:positive]),
        since: Telemetry.now(),
        refs: nil
    }

    with {:ok, address, socket} <- Dial.socket(config, state.table, state.failed) do
      # Calls are bounded by their callers, results by `max_bytes`.
      link = Link.new(socket, :client, config, 0xFFFF_FFFF)
      refs = Refs.local(config)
      hello = Hello.hello(Options.reveal(config, refs), Hello.nonce())
      link = Link.queue(link, Frame.hello(hello))
      timer = :erlang.start_timer(config.timeout_hsk, self(), :hello)

      state = %{
        state
        | address: address,
          link: link,
          phase: :hello,
          hello: hello,
          refs: refs,
          timer: timer
      }

      case Link.activate(link) do
        :ok -> {:noreply, state}
        {:error, reason} -> state |> lost(reason) |> continue()
      end
    else
      {:error, {:connect, address}, reason} ->
        state = Report.tell(%{state | address: address}, :hsk, {:connect, reason})
        {:noreply, again(%{state | failed: address}, {:connect, reason}, :proxy)}

      {:error, :mesh, reason} ->
        state = Report.tell(state, :hsk, {:mesh, reason})
        {:noreply, again(state, {:mesh, reason}, :proxy)}
    end
  end

  # The connection is over, or was never there: answer who waits, and try again later.
  defp lost(%{link: nil} = state, _reason), do: state

  defp lost(state, reason) do
    state = state |> Listing.leave() |> InFlight.close()

    # A mesh takes the connection, and closes or resets it when there is nobody behind: no hello has failed then.
    nobody = is_atom(reason) and state.agreed == nil
    reason = if nobody, do: Dial.why(state, reason), else: reason
    state = Report.tell(state, Report.event_of(state), reason)
    Listing.forget(state.table)
    Link.close(state.link)

    for timer <- [state.timer, state.send_timer, state.ping_timer],
        timer,
        do: :erlang.cancel_timer(timer)

    # What was not wholly sent has not run.
    outcome = fn call ->
      {how_far, _writer} = if state.agreed, do: InFlight.drop(state, call), else: {:unsent, nil}
      {:failed, if(how_far == :sent, do: :tcp_closed, else: :closed)}
    end

    calls =
      for {call, stream} <- Calls.all(state.calls),
          reduce: state.calls,
          do: (calls -> Calls.finish(calls, call, stream, outcome.(call)))

    calls = Calls.retire(calls)
    was_up = state.phase in [:up, :draining]

    state = %{
      state
      | link: nil,
        agreed: nil,
        phase: :down,
        send_timer: nil,
        ping_timer: nil,
        calls: calls
    }

    cond do
      was_up -> again(%{state | attempt: 0}, reason, :idle)
      nobody -> again(state, reason, :proxy)
      true -> again(%{state | failed: state.address}, reason, :hello)
    end
  end

  # Another has taken its place, or it is not needed any more.
  defp again(%{replaced: :done} = state, _reason, _kind), do: %{state | timer: nil}

  defp again(%{config: config} = state, reason, kind) do
    longest =
      case kind do
        :idle -> config.retry_idle_error
        :proxy -> config.retry_proxy_fail
        :hello -> config.retry_hsk_fail
      end

    # A hello that failed once will not do better at once.
    attempt = if kind == :hello, do: 20, else: state.attempt
    timer = :erlang.start_timer(Backoff.wait(attempt, longest), self(), :connect)
    state = Report.log(%{state | timer: timer, attempt: state.attempt + 1}, kind, reason)
    Listing.down(state.table, state.index, reason)
    state
  end

  defp extra?(%{config: %{pool_opts: %{size: size}}, index: index}), do: index > size

  defp alive(state) do
    case Liveness.look(state) do
      {:ok, state} -> state
      {:silent, text} -> lost(state, {:timeout, text})
    end
  end

  # Events

  defp events(state, []), do: state

  # Mostly all of a read are results, and nothing waits to be sent.
  defp events(%{phase: :up, link: %{writer: %{messages: none}}} = state, events)
       when none == %{} do
    case Calls.answer(state.calls, events) do
      {calls, [event | _] = rest} when elem(event, 0) == :response ->
        %{state | calls: calls} |> asked() |> events(rest)

      {calls, rest} ->
        events(%{state | calls: calls}, rest)

      :none ->
        one_event(state, events)
    end
  end

  defp events(state, events), do: one_event(state, events)
  defp one_event(state, [event | events]), do: event |> event(state) |> events(events)

  defp event(_event, %{link: nil} = state), do: state

  defp event({:hello_ack, ack}, %{phase: :hello, agreed: nil} = state) do
    case Hello.accept(Options.reveal(state.config), state.hello, ack) do
      {:ok, agreed, nil} ->
        %{state | agreed: agreed}

      {:ok, agreed, proof} ->
        %{state | agreed: agreed, link: Link.queue(state.link, Frame.auth(proof))}

      {:refused, cause, text} ->
        say(state, Frame.refused(cause, text))
        lost(state, {cause, text})
    end
  end

  defp event(:ready, %{phase: :hello, agreed: agreed} = state) when agreed != nil do
    :erlang.cancel_timer(state.timer)
    link = Link.agree(state.link, agreed, Map.get(state.config, :writer, []))
    calls = Calls.renew(state.calls, Shared.taken(link.shared), Direct.new(link.shared))

    state = %{
      state
      | calls: calls,
        link: link,
        phase: :up,
        attempt: 0,
        timer: nil,
        failed: nil,
        logged: nil
    }

    Report.tell(state, :hsk, :ok)
    Listing.enter(state, Report.metadata(state))
    Growth.up(state.table, state.index)
    if state.before, do: send(state.before, :replaced)
    state = Liveness.start(%{state | before: nil})
    watch_idle(%{state | since: Telemetry.now()})
  end

  defp event({:refused, cause, text}, state), do: lost(state, {cause, Link.printable(text)})

  # We ask for no such answer.
  defp event({:response, stream, :started, _flag, _bytes}, state),
    do: done(state, stream, {:failed, :invalid_state})

  defp event({:response, stream, status, flag, bytes}, state),
    do: done(state, stream, {status, flag, bytes})

  # It is the result that finds no room here.
  defp event({:stream_error, stream, :full, _text}, state),
    do: done(state, stream, {:failed, :unread})

  defp event({over, stream, cause, _text}, state) when over in [:reset, :stream_error],
    do: done(state, stream, {:failed, Reason.of(cause)})

  defp event({:window, stream, increment}, %{agreed: agreed} = state) when agreed != nil do
    case Link.window(state.link, stream, increment) do
      {:ok, link} ->
        %{state | link: link}

      :error ->
        text = "a window of stream #{stream} grew beyond 2147483647 bytes"
        Link.shutdown(state.link, Frame.goaway(0, :protocol, text))
        lost(state, {:protocol, text})
    end
  end

  # What the server will not run may be sent to another.
  defp event({:goaway, last, cause, text}, %{phase: phase} = state)
       when phase in [:up, :draining],
       do:
         state |> InFlight.close() |> InFlight.unsent(last) |> drain({cause, Link.printable(text)})

  defp event({:pong, _bytes}, state), do: state

  defp event(_unexpected, state) do
    text = "a frame came out of turn"
    say(state, Frame.refused(:protocol, text))
    lost(state, {:protocol, text})
  end

  # Last words.
  defp say(%{phase: phase, config: config, link: link}, frames) do
    quiet? = config.quiet_on_hsk_error? and phase == :hello
    Link.shutdown(link, if(quiet?, do: [], else: frames))
  end

  defp watch_idle(%{config: %{idle_reconnect: :infinity}} = state), do: state

  defp watch_idle(state) do
    timer = :erlang.start_timer(Backoff.jitter(state.config.idle_reconnect), self(), :idle)
    %{state | timer: timer, idle_since: Shared.taken(state.link.shared)}
  end

  # No new calls; over as soon as there are no old ones.
  defp drain(state, reason) do
    state = state |> Listing.leave() |> InFlight.close()

    if Calls.empty?(state.calls) do
      lost(state, reason)
    else
      # Calls that come now should not have to wait until those that run have ended.
      if state.phase == :up and state.replaced == nil, do: Growth.drains(state.table, state.index)
      %{state | phase: :draining}
    end
  end

  # Over, if it drains and that was the last call.
  defp drained(%{phase: :draining} = state), do: drain(state, :drained)
  defp drained(state), do: state

  # Calls

  # A stream has ended at the server, perhaps before all was sent.
  defp done(state, stream, outcome) do
    case Calls.on_stream(state.calls, stream) do
      {:ok, call} ->
        state = InFlight.answered(state, stream, call, outcome)
        # Before its caller can ask again.
        if Calls.last?(state.calls), do: Shared.idle(state.link.shared)
        drained(%{state | calls: Calls.finish(state.calls, call, stream, outcome)})

      :error ->
        InFlight.done_direct(state, stream, outcome)
    end
  end

  # Writing

  # Takes what waits in the mailbox and may fill the same batch, and writes it.
  defp continue(state, asks \\ [])

  defp continue(%{phase: phase} = state, asks) when phase in [:up, :draining],
    do: state |> collect(asks, @collect, true) |> write()

  defp continue(state, asks), do: {:noreply, InFlight.ask_all(state, asks)}

  # `asks` are those of callers that came last, last first: they begin together. Without `reads?` what the server says
  # is left for later.
  defp collect(%{link: nil} = state, [], _left, _reads?), do: state
  defp collect(state, asks, left, _reads?) when left <= 0, do: InFlight.ask_all(state, asks)

  defp collect(%{link: %{socket: socket} = link} = state, asks, left, reads?) do
    if Link.enough?(link) do
      InFlight.ask_all(state, asks)
    else
      receive do
        {:call, _key, _caller, _fun, _deadline, {_flag, _iovec, size}} = ask ->
          collect(state, [ask | asks], left - 1 - div(size, @counts_more), reads?)

        {:inet_reply, ^socket, :ok} ->
          collect(state, asks, left, reads?)

        {:tcp, ^socket, bytes} when reads? ->
          state |> InFlight.ask_all(asks) |> read(bytes) |> collect([], left - 1, reads?)

        # Left to `handle_info`, each of thousands would be one more search of the whole mailbox.
        message when is_of_caller(message) ->
          state |> InFlight.ask_all(asks) |> heard(message) |> collect([], left - 1, reads?)
      after
        0 -> InFlight.ask_all(state, asks)
      end
    end
  end

  # Between the answers of a read: callers that have theirs run, and what they ask for goes. A write that fails does so
  # once more after the read, whose other answers are heard before that.
  defp asked(state) do
    :erlang.yield()
    %{link: link} = state = collect(state, [], @collect, false)

    with true <- Link.dirty?(link),
         {:ok, link, notes} <- Link.write(link) do
      %{state | link: link} |> InFlight.sent(notes) |> watch()
    else
      _not_now -> state
    end
  end

  defp write(%{link: nil} = state), do: {:noreply, state}
  defp write(%{link: %{dirty: false}} = state), do: {:noreply, state |> renew() |> idle()}
  defp write(%{link: %{blocked: true}} = state), do: {:noreply, state}

  defp write(state) do
    case Link.write(state.link) do
      {:ok, link, notes} ->
        state = %{state | link: link} |> InFlight.sent(notes) |> watch() |> renew()

        if state.link != nil and Link.dirty?(state.link),
          do: {:noreply, state, 0},
          else: {:noreply, idle(state)}

      {:error, reason} ->
        state |> hear_out() |> lost(reason) |> continue()
    end
  end

  # Callers may write themselves while nothing of others is on its way.
  defp idle(%{link: link, calls: calls} = state) do
    # One that has claimed it and does not use it may have been killed.
    if link != nil and Calls.empty?(calls) and Shared.busy?(link.shared) and Calls.none?(calls),
      do: Shared.idle(link.shared)

    state
  end

  defp renew(%{link: link} = state) do
    if Shared.retiring?(link.shared),
      do: retire(state),
      else: left_out(%{state | link: Link.open(link)})
  end

  defp left_out(%{link: link, calls: calls} = state) when link.opened - calls.ids >= @left_out,
    do: retire(state)

  defp left_out(state), do: state

  # The stream ids are nearly used up, or too many were left out. Another connection is made beside this one, which takes calls until that one is
  # up; the ids that are left are many more than can be asked for meanwhile.
  defp retire(%{phase: :up, replaced: nil} = state) do
    if extra?(state), do: Growth.drains(state.table, state.index), else: Successor.start(state)
    %{state | replaced: :asked}
  end

  defp retire(state), do: InFlight.used_up(state)

  # It is not needed any more. Callers that have found it just before may still ask it.
  defp replaced(%{phase: phase} = state) do
    _ = :erlang.start_timer(@linger, self(), :replaced)
    state = %{state | replaced: :done}

    case phase do
      :down -> %{state | timer: nil}
      :hello -> lost(state, :closed)
      _in_use -> state
    end
  end

  # Claimed, no caller writes beside us while we close.
  defp over(%{link: link} = state) do
    if Calls.none?(state.calls) and (link == nil or Shared.claim?(link.shared)) do
      unless extra?(state), do: Successor.delete_me(state)
      if link, do: Link.close(link)
      {:stop, :normal, refuse_late(state)}
    else
      replaced(state) |> continue()
    end
  end

  defp refuse_late(state) do
    receive do
      {:call, key, _caller, _fun, _deadline, _encoded} ->
        Calls.reply(key, {:failed, :closed})
        refuse_late(state)
    after
      0 -> state
    end
  end

  defp watch(%{link: %{blocked: true}, send_timer: nil} = state),
    do: %{state | send_timer: :erlang.start_timer(state.config.timeout_send, self(), :send)}

  defp watch(%{link: %{blocked: false}, send_timer: timer} = state) when timer != nil do
    :erlang.cancel_timer(timer)
    %{state | send_timer: nil}
  end

  defp watch(state), do: state
end
