defmodule MeshxRpc.Client.Calls do
  @moduledoc false
  # The calls of one connection: who waits, on which stream, and whether that caller still lives.
  #
  # A call is known by its caller and the alias that its answer goes to. It has no stream until its first frame is made.
  #
  # A caller is watched from its first call on until it goes, since watching one anew for each call wakes it each time.
  # Callers that are watched and have no call are at most `@idle` more than there are calls.

  @idle 1_024

  # Fewer answers are always given in a row.
  @few 4
  # So many processes wait for a scheduler when there is enough to do.
  @enough 8

  alias MeshxRpc.Client.{ByCaller, Direct}
  alias MeshxRpc.{Link, Shared}

  @enforce_keys [:load, :index]
  # streams: stream => call. waiting: those without a stream, as keys. callers: pid => monitor. ids: how many streams
  # there ever were. direct: calls of which the others know nothing, nil without a socket. by_caller: nil until asked.
  defstruct [:load, :index, :direct, :by_caller, ids: 0, streams: %{}, waiting: %{}, callers: %{}]

  @type call :: {caller :: pid(), key :: reference()}
  @type t :: %__MODULE__{}

  @typedoc "How a call ended."
  @type outcome ::
          {:result | :error, flag :: byte(), binary()} | {:failed, reason :: atom()}

  @doc "`load` at `index` counts the calls, for the choice of a connection."
  @spec new(:counters.counters_ref(), pos_integer()) :: t()
  def new(load, index), do: %__MODULE__{load: load, index: index}

  @doc "How many calls there are, but for those that callers have written themselves."
  @spec count(t()) :: non_neg_integer()
  def count(%{streams: streams, waiting: waiting}), do: map_size(streams) + map_size(waiting)

  @doc "A call begins, on a stream or not yet: `{:DOWN, _, :process, caller, _}` comes when its caller goes."
  @spec add(t(), call(), pos_integer() | nil) :: t()
  # Before its caller is watched: of those that have no call, some may be no longer.
  def add(calls, {caller, _key} = call, nil) do
    %{calls | waiting: Map.put(calls.waiting, call, [])}
    |> note(call, nil)
    |> known(caller)
    |> counted()
  end

  def add(calls, {caller, _key} = call, stream),
    do: calls |> on(stream, call) |> note(call, stream) |> known(caller) |> counted()

  @doc "Calls begin, each on the stream after that of the one before. They are given last first."
  @spec add_all(t(), [call()], last :: pos_integer()) :: t()
  def add_all(calls, added, last) do
    {streams, ids} = put_all(added, last, calls.streams, calls.ids)
    calls = note_all(%{calls | streams: streams, ids: ids}, added, last)
    known_all(added, calls.callers, calls) |> counted()
  end

  defp put_all([], _stream, streams, ids), do: {streams, ids}

  defp put_all([call | calls], stream, streams, ids),
    do: put_all(calls, stream - 1, Map.put(streams, stream, call), ids + 1)

  defp note_all(%{by_caller: nil} = calls, _added, _last), do: calls
  defp note_all(calls, [], _last), do: calls

  defp note_all(calls, [call | added], last),
    do: calls |> note(call, last) |> note_all(added, last - 1)

  defp known_all([], _callers, calls), do: calls

  defp known_all([{caller, _key} | added], callers, calls) when is_map_key(callers, caller),
    do: known_all(added, callers, calls)

  defp known_all([{caller, _key} | added], _callers, calls) do
    calls = watch(calls, caller)
    known_all(added, calls.callers, calls)
  end

  defp known(%{callers: callers} = calls, caller) when is_map_key(callers, caller), do: calls
  defp known(calls, caller), do: watch(calls, caller)

  defp note(%{by_caller: nil} = calls, _call, _stream), do: calls

  defp note(calls, call, stream),
    do: %{calls | by_caller: ByCaller.note(calls.by_caller, call, stream, count(calls))}

  defp counted(calls) do
    :counters.put(calls.load, calls.index, count(calls))
    calls
  end

  @doc "A caller writes its calls itself from now on."
  @spec watch(t(), pid()) :: t()
  def watch(%__MODULE__{callers: callers} = calls, caller) when is_map_key(callers, caller) do
    Direct.watched(calls.direct, caller)
    calls
  end

  def watch(calls, caller) do
    monitor = :erlang.monitor(:process, caller)
    Direct.watched(calls.direct, caller)
    calls = unwatch_idle(calls)
    %{calls | callers: Map.put(calls.callers, caller, monitor)}
  end

  defp on(calls, stream, call),
    do: %{calls | ids: calls.ids + 1, streams: Map.put(calls.streams, stream, call)}

  # Those that have no call go when they are many. One that begins a call meanwhile has entered it before it asks
  # whether it is watched.
  defp unwatch_idle(calls) do
    if map_size(calls.callers) < @idle + 2 * count(calls), do: calls, else: unwatch(calls)
  end

  defp unwatch(%{callers: callers, direct: direct} = calls) do
    busy = for {{caller, _key}, _stream} <- all(calls), into: %{}, do: {caller, []}

    kept =
      Map.filter(callers, fn {caller, monitor} ->
        is_map_key(busy, caller) or
          not (Direct.unwatched(direct, caller) and :erlang.demonitor(monitor))
      end)

    for caller <- Direct.callers(direct),
        not is_map_key(kept, caller),
        reduce: %{calls | callers: kept} do
      calls ->
        Direct.watched(direct, caller)
        monitor = :erlang.monitor(:process, caller)
        %{calls | callers: Map.put(calls.callers, caller, monitor)}
    end
  end

  @doc "The first frame of a call was made."
  @spec opened(t(), call(), pos_integer()) :: t()
  def opened(calls, call, stream) do
    %{calls | waiting: Map.delete(calls.waiting, call)} |> on(stream, call) |> note(call, stream)
  end

  @doc "A new connection, on which so many stream ids were taken before."
  @spec renew(t(), non_neg_integer(), nil | Direct.t()) :: t()
  def renew(calls, ids, direct), do: %{calls | ids: ids, direct: direct}

  @doc "Takes over what callers have written themselves: from here on these are calls like all others."
  @spec adopt(t()) :: t()
  def adopt(calls) do
    for {call, stream} <- Direct.take_all(calls.direct), reduce: calls do
      calls -> add(calls, call, stream)
    end
  end

  @doc "The same, and callers write no more themselves."
  @spec close(t()) :: t()
  def close(%{direct: nil} = calls), do: calls

  def close(calls) do
    Direct.close(calls.direct)
    adopt(calls)
  end

  @doc "The socket's time is over. `close/1` came before."
  @spec retire(t()) :: t()
  def retire(calls) do
    Direct.delete(calls.direct)
    %{calls | direct: nil, by_caller: nil}
  end

  @doc "Takes the call that a caller has written itself on a stream."
  @spec take_direct(t(), pos_integer()) :: {:ok, call(), t()} | :error
  def take_direct(calls, stream) do
    with {:ok, call} <- Direct.take(calls.direct, stream),
         do: {:ok, call, %{calls | ids: calls.ids + 1}}
  end

  @doc "The call on a stream."
  @spec on_stream(t(), pos_integer()) :: {:ok, call()} | :error
  def on_stream(calls, stream), do: Map.fetch(calls.streams, stream)

  @doc "The stream of a call; nil when it has none yet."
  @spec stream(t(), call()) :: {{:ok, nil | pos_integer()} | :error, t()}
  def stream(calls, call) do
    calls = by_caller(calls)
    found = {call, ByCaller.stream(calls.by_caller, call)}
    {if(live?(calls, found), do: {:ok, elem(found, 1)}, else: :error), calls}
  end

  @doc "The calls of a caller, each with its stream."
  @spec of(t(), pid()) :: {[{call(), nil | pos_integer()}], t()}
  def of(calls, caller) do
    calls = by_caller(calls)
    {calls.by_caller |> ByCaller.of(caller) |> Enum.filter(&live?(calls, &1)), calls}
  end

  defp by_caller(%{by_caller: nil} = calls), do: %{calls | by_caller: ByCaller.new(all(calls))}
  defp by_caller(calls), do: %{calls | by_caller: ByCaller.ready(calls.by_caller)}

  defp live?(calls, {call, nil}), do: is_map_key(calls.waiting, call)
  defp live?(calls, {call, stream}), do: match?(%{^stream => ^call}, calls.streams)

  @doc "A caller that has no call is gone."
  @spec gone(t(), pid()) :: t()
  def gone(calls, caller) do
    Direct.unwatched(calls.direct, caller)
    %{calls | callers: Map.delete(calls.callers, caller)}
  end

  @doc "The calls that a peer which ran streams up to `last` has not begun, each with its stream."
  @spec above(t(), non_neg_integer()) :: [{call(), nil | pos_integer()}]
  def above(calls, last) do
    for({call, []} <- calls.waiting, do: {call, nil}) ++
      for {stream, call} <- calls.streams, stream > last, do: {call, stream}
  end

  @doc "All calls."
  @spec all(t()) :: [{call(), nil | pos_integer()}]
  def all(calls), do: above(calls, -1)

  @doc "Whether there is no call, but for those that callers have written themselves."
  @spec empty?(t()) :: boolean()
  def empty?(calls), do: calls.streams == %{} and calls.waiting == %{}

  @doc "Whether there is no call at all."
  @spec none?(t()) :: boolean()
  def none?(calls), do: empty?(calls) and Direct.count(calls.direct) == 0

  @doc "Whether there is but one call."
  @spec last?(t()) :: boolean()
  def last?(calls), do: count(calls) == 1

  @doc """
  Ends the calls that the first events of a read answer: as long as these are responses to calls that the connection has
  written. `:none` when already the first is not. The codec and the writer must know no more of them.

  When a read may answer more than half of all calls, it is half of those that come first: what their callers ask for next
  can go before the others have their answers. Else all would go round as one, and each VM would wait for the other. Not so
  when many processes are `waiting` for a scheduler: it has enough to do, and the others would have theirs after those.
  """
  @spec answer(t(), [MeshxRpc.Codec.event()], waiting :: non_neg_integer()) ::
          {t(), [MeshxRpc.Codec.event()]} | :none
  def answer(calls, events, waiting \\ :erlang.statistics(:total_run_queue_lengths)) do
    case take(events, calls.streams, [], in_a_row(length(events), count(calls), waiting)) do
      {_streams, [], _rest} ->
        :none

      {streams, taken, rest} ->
        calls = %{calls | streams: streams}
        # Before their callers can ask again.
        if empty?(calls), do: Shared.idle(calls.direct.shared)
        calls = counted(calls)
        Link.turn(length(taken))
        for {key, answer} <- :lists.reverse(taken), do: send(key, answer)
        {calls, rest}
    end
  end

  defp in_a_row(events, calls, waiting)
       when events > @few and 2 * events > calls and waiting < @enough,
       do: max(@few, div(events + 1, 2))

  defp in_a_row(events, _calls, _waiting), do: events

  defp take([{:response, stream, status, flag, bytes} | rest] = events, streams, taken, left)
       when status != :started and left > 0 do
    case :maps.take(stream, streams) do
      {{_caller, key}, streams} ->
        take(rest, streams, [{key, {key, status, flag, bytes}} | taken], left - 1)

      :error ->
        {streams, taken, events}
    end
  end

  defp take(events, streams, taken, _left), do: {streams, taken, events}

  @doc "Ends a call and tells its caller how: who asks again finds it ended."
  @spec finish(t(), call(), nil | pos_integer(), outcome()) :: t()
  def finish(calls, {_caller, key} = call, stream, outcome) do
    calls = forget(calls, call, stream)
    reply(key, outcome)
    calls
  end

  @doc "Tells a caller how its call ended."
  @spec reply(reference(), outcome()) :: :ok
  def reply(key, outcome) do
    case outcome do
      {:failed, reason} -> send(key, {key, :failed, reason})
      {status, flag, bytes} -> send(key, {key, status, flag, bytes})
    end

    :ok
  end

  @doc "Ends a call that nobody waits for any more."
  @spec forget(t(), call(), nil | pos_integer()) :: t()
  def forget(calls, call, nil),
    do: counted(%{calls | waiting: Map.delete(calls.waiting, call)})

  def forget(calls, _call, stream),
    do: counted(%{calls | streams: Map.delete(calls.streams, stream)})
end
