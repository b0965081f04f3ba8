defmodule MeshxRpc.Server.Requests do
  @moduledoc false
  # The requests of one connection, each in a process of its own: begun, answered, ended, with all that the link and its
  # writer know of each. The state is that of `MeshxRpc.Server.Connection`.
  #
  # Under load a read brings many of them, and many end before the next: these are gone through in a loop that touches the
  # state, the counters and the codec once.

  alias MeshxRpc.{Frame, Link, Shared, Telemetry, Term, Writer}
  alias MeshxRpc.Server.{Alarm, Functions, Report, Room, Task}

  @calls Room.place(:call)
  @pieces Room.place({:internal, :pull})
  # Requests that begin together. They are counted before, also in a read of thousands of which none is for a loop.
  @most 64

  @typedoc "What the process of a request tells when it has ended."
  @type done :: {:done, pid(), stream :: pos_integer(), term()}

  @doc """
  The first events of a read: calls begin, as long as these are calls of the module's functions. `:none` when there are
  not at least two, or they are not for a loop.
  """
  @spec start_all(map(), [MeshxRpc.Codec.event()]) :: {map(), [MeshxRpc.Codec.event()]} | :none
  def start_all(%{phase: :up, draining: nil, rules: rules} = state, events) do
    with false <- Telemetry.on?(rules.telemetry, :call),
         count when count > 1 <- count(events, 0),
         true <- Room.take?(rules, state.held, @calls, count) do
      start_all(state, events, count)
    else
      _not_for_a_loop -> :none
    end
  end

  def start_all(_state, _events), do: :none

  defp count([{:request, _, :call, _, _, _, _} | events], count) when count < @most,
    do: count(events, count + 1)

  defp count(_events, count), do: count

  defp start_all(%{rules: rules, held: held} = state, events, count) do
    limits = {:erlang.monotonic_time(:millisecond), rules.timeout_execute}
    shared = {state.offered.names, state.task, limits}
    Link.turn(count)

    {left, rest, streams, last, until} =
      begin(events, count, shared, state.streams, state.last, :infinity)

    # One names no function of the module: that one, and those behind it, have not begun.
    if left > 0, do: Room.leave(rules, held, @calls, left)

    if left == count do
      :none
    else
      alarm = Alarm.set(state.alarm, until)
      link = Link.under_way(state.link, map_size(streams))
      {%{state | streams: streams, last: last, alarm: alarm, link: link}, rest}
    end
  end

  defp begin(events, 0, _shared, streams, last, until), do: {0, events, streams, last, until}

  defp begin([event | rest] = events, left, shared, streams, last, until) do
    {:request, stream, :call, deadline, name, flag, argument} = event
    {names, task, limits} = shared

    case names do
      %{^name => fun} when is_atom(fun) ->
        pid = Task.start(task, fun, {stream, :call, flag, argument}, nil)
        {ends, reason} = limit(deadline, limits)

        request = %{
          pid: pid,
          until: ends,
          reason: reason,
          kind: :call,
          place: @calls,
          measured: nil
        }

        streams = Map.put(streams, stream, request)
        begin(rest, left - 1, shared, streams, max(last, stream), min(until, ends))

      _internal_or_unknown ->
        {left, events, streams, last, until}
    end
  end

  # By the caller's deadline, or by our `timeout_execute`.
  defp limit(deadline, {now, execute}) when execute < deadline, do: {now + execute, :killed}
  defp limit(:infinity, _limits), do: {:infinity, :timeout}
  defp limit(deadline, {now, _execute}), do: {now + deadline, :timeout}

  @doc "A request that arrived."
  @spec start(map(), MeshxRpc.Codec.event()) :: map()
  def start(state, {:request, stream, kind, deadline, fun, flag, argument}) do
    # Requests become whole in another order than they began.
    state = %{state | last: max(state.last, stream)}

    case offered(state, fun) do
      {{:ok, fun}, state} ->
        if Room.take?(state.rules, state.held, Room.place(fun), 1) do
          start(state, stream, kind, deadline, fun, flag, argument)
        else
          text = "#{state.rules.max_concurrency} requests run (max_concurrency)"

          state
          |> Report.tell_refused(kind, fun, stream, argument, :full)
          |> reset(stream, :full, text)
        end

      {:error, state} ->
        state
        |> Report.tell_refused(kind, fun, stream, argument, :undef)
        |> answer(stream, {:error, Term.encode_error(Term.undef(state.rules.module, fun))})
    end
  end

  defp offered(%{rules: rules} = state, name) do
    case Functions.find(state.offered, name, rules.module, rules.functions) do
      {found, nil} -> {found, state}
      {found, offered} -> {found, %{state | offered: offered}}
    end
  end

  defp start(state, stream, kind, deadline, fun, flag, argument) do
    measured = Report.measured(state, kind, fun, stream, argument)
    pid = run(state, fun, {stream, kind, flag, argument}, measured)
    now = :erlang.monotonic_time(:millisecond)
    {until, reason} = limit(deadline, {now, state.rules.timeout_execute})

    request = %{
      pid: pid,
      until: until,
      reason: reason,
      kind: kind,
      place: Room.place(fun),
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

  defp run(state, {:internal, name}, {stream, _kind, flag, argument}, _measured),
    do: Task.internal(state.task, stream, name, flag, argument)

  # With others beside it, its result is not for itself to write: so they are spared the copy of what that takes.
  defp run(%{streams: none} = state, fun, request, measured) when none == %{},
    do: Task.start(%{state.task | direct: state.direct}, fun, request, measured)

  defp run(state, fun, request, measured), do: Task.start(state.task, fun, request, measured)

  @doc "Requests have ended, one after the other; they are given last first."
  @spec done_all(map(), [done()]) :: map()
  def done_all(state, []), do: state

  def done_all(%{phase: :up, link: link} = state, [_one, _two | _] = dones) do
    with {largest, total} <- sizes(dones, 0, 0),
         true <- largest <= state.agreed.peer_max_message,
         true <- Link.queued(link) + total <= state.rules.max_queue,
         true <- Link.whole?(link, largest, total) do
      whole(state, dones)
    else
      _one_that_is_not_for_a_loop -> one_by_one(state, dones)
    end
  end

  def done_all(state, dones), do: one_by_one(state, dones)

  defp one_by_one(state, dones), do: List.foldr(dones, state, &done/2)

  defp sizes([], largest, total), do: {largest, total}

  defp sizes([{:done, _pid, _stream, {status, {_flag, _iovec, size}}} | dones], largest, total)
       when status in [:result, :reply, :error],
       do: sizes(dones, max(largest, size), total + size)

  defp sizes(_others, _largest, _total), do: :odd

  defp whole(state, dones) do
    %{link: link, rules: rules, held: held} = state
    {streams, over, frames, size, unsent, pieces} = frames(dones, link.writer.crc, state.streams)
    if unsent > 0, do: _ = Shared.grant(link.shared, unsent)
    Room.leave(rules, held, @calls, length(over) - pieces)
    if pieces > 0, do: Room.leave(rules, held, @pieces, pieces)
    link = if size > 0, do: Link.frame(link, frames, size), else: link
    %{state | streams: streams, link: Link.release_all(link, over)}
  end

  # The requests that still run, those that are over, frames and their bytes, bytes that are not sent after all, and how
  # many of those that are over were for pieces.
  defp frames(dones, crc, streams), do: frames(dones, crc, streams, [], [], 0, 0, 0)

  defp frames([], _crc, streams, over, frames, size, unsent, pieces),
    do: {streams, over, frames, size, unsent, pieces}

  defp frames([done | dones], crc, streams, over, frames, size, unsent, pieces) do
    {:done, pid, stream, {status, {flag, iovec, bytes}}} = done

    case :maps.take(stream, streams) do
      {%{pid: ^pid, kind: :call, place: place}, streams} ->
        {frame, length} = Frame.response(stream, status(status), flag, iovec, bytes, crc)
        {over, frames, size} = {[stream | over], [frame | frames], size + length}
        frames(dones, crc, streams, over, frames, size, unsent, pieces + piece(place))

      # The caller of a cast had all there is to have when it started.
      {%{pid: ^pid, kind: :cast, place: place}, streams} ->
        {over, unsent} = {[stream | over], unsent + bytes}
        frames(dones, crc, streams, over, frames, size, unsent, pieces + piece(place))

      _over ->
        frames(dones, crc, streams, over, frames, size, unsent + bytes, pieces)
    end
  end

  defp piece(@pieces), do: 1
  defp piece(@calls), do: 0

  defp status(:reply), do: :result
  defp status(status), do: status

  defp done({:done, pid, stream, done}, state) do
    case state.streams do
      %{^stream => %{pid: ^pid}} when done == :answered -> state |> finished(stream) |> over(stream)
      %{^stream => %{pid: ^pid}} -> finish(state, stream, done)
      _over -> state
    end
  end

  @doc "A request's process that has not told us how it ended: few do, so nothing is kept to find them fast."
  @spec ended(map(), pid(), term()) :: map()
  def ended(state, pid, reason) do
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
    %{kind: kind} = Map.fetch!(state.streams, stream)
    state = finished(state, stream)
    if kind == :call, do: answer(state, stream, done), else: over(state, stream)
  end

  @doc "The alarm rang: requests whose time is over end."
  @spec too_late(map()) :: map()
  def too_late(state) do
    late = Alarm.late(state.streams)
    state = Enum.reduce(late, %{state | alarm: nil}, &too_late/2)
    %{state | alarm: Alarm.next(state.streams)}
  end

  # `:timeout` by the caller's deadline, `:killed` by our `timeout_execute`.
  defp too_late(stream, state) do
    %{reason: reason} = state.streams[stream]
    state |> kill(stream, reason) |> finish(stream, {:error, Term.encode_error(reason)})
  end

  # The request no longer runs.
  defp finished(state, stream) do
    {%{place: place}, streams} = Map.pop!(state.streams, stream)
    Room.leave(state.rules, state.held, place, 1)
    %{state | streams: streams}
  end

  @doc "All requests end, and none is answered."
  @spec kill_all(map()) :: map()
  def kill_all(state) do
    Enum.reduce(Map.keys(state.streams), state, fn stream, state ->
      state |> kill(stream, :killed) |> finished(stream)
    end)
  end

  @doc "The process of a request ends."
  @spec kill(map(), pos_integer(), atom()) :: map()
  def kill(state, stream, reason) do
    %{pid: pid} = state.streams[stream]
    Process.unlink(pid)
    Process.exit(pid, :kill)
    Report.tell_ended(state, stream, reason)
  end

  @doc "Nobody waits for it any more."
  @spec forget(map(), pos_integer()) :: map()
  def forget(state, stream) do
    state =
      if Map.has_key?(state.streams, stream),
        do: state |> kill(stream, :cancelled) |> finished(stream),
        else: state

    {_how_far, writer} = Writer.drop(state.link.writer, stream)
    over(%{state | link: %{state.link | writer: writer}}, stream)
  end

  @doc "What was written is over, but for a cast that still runs: that keeps its argument."
  @spec sent(map(), [Writer.note()]) :: map()
  def sent(state, notes) do
    Enum.reduce(notes, state, fn {:sent, stream}, state ->
      if Map.has_key?(state.streams, stream), do: state, else: over(state, stream)
    end)
  end

  @doc "The codec need not know of it any more."
  @spec over(map(), pos_integer()) :: map()
  def over(state, stream), do: %{state | link: Link.release(state.link, stream)}

  defp answer(%{phase: phase} = state, _stream, _done) when phase != :up, do: state

  defp answer(state, stream, {:refused_term, _}),
    do: reset(state, stream, :refused_term, "the argument is refused by this server's guard")

  defp answer(state, stream, {:invalid_cks, _}),
    do: reset(state, stream, :invalid_cks, "the argument is not what its checksums say")

  # Of requests that streams and casts are made of: they have room of their own, since the loss of one answer would
  # be the end of a stream.
  defp answer(state, stream, {:reply, encoded}),
    do: answer(state, stream, :result, encoded, 2 * state.rules.max_queue)

  defp answer(state, stream, {status, encoded}),
    do: answer(state, stream, status, encoded, state.rules.max_queue)

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
end
