defmodule MeshxRpc.Client.InFlight do
  @moduledoc false
  # The calls of one connection, on their way: begun, answered, dropped, with all that `MeshxRpc.Client.Calls`, the link
  # and its writer know of each. The state is that of `MeshxRpc.Client.Connection`.

  alias MeshxRpc.{Frame, Link, Shared, Writer}
  alias MeshxRpc.Client.Calls

  @doc "A call begins; without a connection, or beyond `max_queue`, it is refused."
  @spec ask(map(), reference(), pid(), binary(), timeout(), MeshxRpc.Term.encoded()) :: map()
  def ask(%{phase: :up} = state, key, caller, fun, deadline, {flag, iovec, size}) do
    queued = Link.queued(state.link)

    if queued > 0 and queued + size > state.config.max_queue do
      send(key, {key, :failed, :full})
      state
    else
      head = Frame.request_head(deadline, size, flag, fun)
      call = {caller, key}
      {stream, link} = Link.request(state.link, call, head, iovec, size)
      calls = Calls.add(state.calls, call, stream)
      %{state | calls: calls, link: Link.under_way(link, Calls.count(calls))}
    end
  end

  def ask(state, key, _caller, _fun, _deadline, _encoded) do
    send(key, {key, :failed, :closed})
    state
  end

  @typedoc "What a caller sends to have a call made."
  @type ask ::
          {:call, reference(), pid(), binary(), timeout(), MeshxRpc.Term.encoded()}

  @doc "Calls begin that came one after the other; they are given last first."
  @spec ask_all(map(), [ask()]) :: map()
  def ask_all(state, []), do: state

  def ask_all(%{phase: :up, link: link} = state, [_one, _two | _] = asks) do
    {largest, total} = sizes(asks, 0, 0)

    if Link.queued(link) + total <= state.config.max_queue and Link.whole?(link, largest, total),
      do: whole(state, asks),
      else: one_by_one(state, asks)
  end

  def ask_all(state, asks), do: one_by_one(state, asks)

  defp one_by_one(state, asks) do
    List.foldr(asks, state, fn {:call, key, caller, fun, deadline, encoded}, state ->
      ask(state, key, caller, fun, deadline, encoded)
    end)
  end

  defp sizes([], largest, total), do: {largest, total}

  defp sizes(
         [{:call, _key, _caller, _fun, _deadline, {_flag, _iovec, size}} | asks],
         largest,
         total
       ),
       do: sizes(asks, max(largest, size), total + size)

  # Each in one frame, that goes with the next write.
  defp whole(%{link: link} = state, asks) do
    last = Shared.take_ids(link.shared, length(asks))
    {calls, frames, size} = frames(asks, last, link.writer.crc, [], [], 0)
    calls = Calls.add_all(state.calls, :lists.reverse(calls), last)
    link = link |> Link.frame(frames, size) |> Link.under_way(Calls.count(calls))
    %{state | calls: calls, link: link}
  end

  defp frames([], _stream, _crc, calls, frames, size), do: {calls, frames, size}

  defp frames([ask | asks], stream, crc, calls, frames, size) do
    {:call, key, caller, fun, deadline, {flag, iovec, argument}} = ask
    {frame, length} = Frame.request(stream, deadline, fun, flag, iovec, argument, crc)
    frames(asks, stream - 1, crc, [{caller, key} | calls], [frame | frames], size + length)
  end

  @doc "What a write did: calls that waited have their streams."
  @spec sent(map(), [Writer.note()]) :: map()
  def sent(state, notes) do
    Enum.reduce(notes, state, fn
      {:opened, call, stream}, state -> %{state | calls: Calls.opened(state.calls, call, stream)}
      {:sent, _call}, state -> state
    end)
  end

  @doc "The server has answered a call that its caller has written itself, if it was one."
  @spec done_direct(map(), pos_integer(), Calls.outcome()) :: map()
  def done_direct(state, stream, outcome) do
    # All of these are adopted when the connection drains.
    case Calls.take_direct(state.calls, stream) do
      {:ok, {_caller, key} = call, calls} ->
        state = answered(%{state | calls: calls}, stream, call, outcome)
        # Before its caller can ask again.
        if Calls.empty?(calls), do: Shared.idle(state.link.shared)
        Calls.reply(key, outcome)
        state

      :error ->
        state
    end
  end

  @doc "The server has answered, perhaps before all was sent."
  @spec answered(map(), pos_integer(), Calls.call(), Calls.outcome()) :: map()
  # What arrived whole is no longer known to the codec, and its request mostly not to the writer.
  def answered(%{link: %{writer: %{messages: none}}} = state, _stream, _call, {_, _, _})
      when none == %{},
      do: state

  def answered(state, stream, call, _outcome) do
    {_how_far, state} = drop(state, call)
    release(state, stream)
  end

  defp release(state, stream), do: %{state | link: Link.release(state.link, stream)}

  @doc "Ends the calls that have not run and will not: those above stream `last`."
  @spec unsent(map(), non_neg_integer()) :: map()
  def unsent(state, last) do
    Enum.reduce(Calls.above(state.calls, last), state, fn {call, stream}, state ->
      {_how_far, state} = drop(state, call)
      %{state | calls: Calls.finish(state.calls, call, stream, {:failed, :closed})}
    end)
  end

  @doc "Ends what has no stream id, when there is none any more."
  @spec used_up(map()) :: map()
  def used_up(state),
    do: if(Shared.exhausted?(state.link.shared), do: unsent(state, 0xFFFF_FFFF), else: state)

  @doc """
  What a caller says beside making calls: he writes himself from now on, gives a call up, has waited as long as he wanted
  to without a word of the server, or is gone.
  """
  @spec heard(map(), tuple()) :: map()
  def heard(state, {:watch, caller}), do: %{state | calls: Calls.watch(state.calls, caller)}

  def heard(state, {:cancel, caller, key}) do
    state = adopt(state)

    case Calls.stream(state.calls, {caller, key}) do
      {{:ok, stream}, calls} -> give_up(%{state | calls: calls}, {caller, key}, stream)
      {:error, calls} -> %{state | calls: calls}
    end
  end

  def heard(state, {:expired, caller, key}) do
    case Calls.stream(state.calls, {caller, key}) do
      {{:ok, stream}, calls} ->
        Calls.reply(key, {:failed, :timeout})
        give_up(%{state | calls: calls}, {caller, key}, stream)

      {:error, calls} ->
        %{state | calls: calls}
    end
  end

  def heard(state, {:DOWN, _monitor, :process, caller, _reason}) do
    state = adopt(state)
    {open, calls} = Calls.of(state.calls, caller)

    state =
      Enum.reduce(open, %{state | calls: calls}, fn {call, stream}, state ->
        give_up(state, call, stream)
      end)

    %{state | calls: Calls.gone(state.calls, caller)}
  end

  # Nobody waits for it any more.
  defp give_up(state, call, stream) do
    {_how_far, state} = drop(state, call)
    state = %{state | calls: Calls.forget(state.calls, call, stream)}
    if stream, do: cancel(state, stream), else: state
  end

  @doc "Takes over what callers have written themselves."
  @spec adopt(map()) :: map()
  def adopt(state), do: %{state | calls: Calls.adopt(state.calls)}

  @doc "The same, and callers write no more themselves."
  @spec close(map()) :: map()
  def close(state), do: %{state | calls: Calls.close(state.calls)}

  # Tells the server.
  defp cancel(%{link: link} = state, stream),
    do: %{
      state
      | link: link |> Link.open() |> Link.release(stream) |> Link.queue(Frame.cancel(stream))
    }

  @doc "What of a call is not yet sent stays here."
  @spec drop(map(), Calls.call()) :: {:unsent | :partial | :sent, map()}
  def drop(state, call) do
    {how_far, writer} = Writer.drop(state.link.writer, call)
    {how_far, %{state | link: %{state.link | writer: writer}}}
  end
end
