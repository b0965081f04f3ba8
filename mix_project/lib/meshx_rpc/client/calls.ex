defmodule MeshxRpc.Client.Calls do
  @moduledoc false
  # The calls of one connection: who waits, on which stream, and whether that caller still lives.
  #
  # A call is known by its caller and the alias that its answer goes to. It has no stream until its first frame is made.
  #
  # A caller is watched from its first call on until it goes, since watching one anew for each call wakes it each time.
  # Callers that are watched and have no call are at most `@idle` more than there are calls.

  @idle 1_024

  alias MeshxRpc.Client.Direct

  @enforce_keys [:load, :index]
  # streams: stream => call. callers: pid => {monitor, %{key => stream or nil}}. ids: how many streams there ever were.
  # direct: those of which the others know nothing, nil without a socket.
  defstruct [:load, :index, :direct, count: 0, ids: 0, streams: %{}, callers: %{}]

  @type call :: {caller :: pid(), key :: reference()}
  @type t :: %__MODULE__{}

  @typedoc "How a call ended."
  @type outcome ::
          {:result | :error, flag :: byte(), binary()} | {:failed, reason :: atom()}

  @doc "`load` at `index` counts the calls, for the choice of a connection."
  @spec new(:counters.counters_ref(), pos_integer()) :: t()
  def new(load, index), do: %__MODULE__{load: load, index: index}

  @doc "A call begins, on a stream or not yet: `{:DOWN, _, :process, caller, _}` comes when its caller goes."
  @spec add(t(), call(), pos_integer() | nil) :: t()
  def add(%__MODULE__{callers: callers} = calls, {caller, key} = call, stream) do
    :counters.add(calls.load, calls.index, 1)

    calls =
      case callers do
        %{^caller => {monitor, open}} ->
          open = Map.put(open, key, stream)
          %{calls | count: calls.count + 1, callers: %{callers | caller => {monitor, open}}}

        _new ->
          calls = watch(calls, caller)
          {monitor, none} = Map.fetch!(calls.callers, caller)
          callers = %{calls.callers | caller => {monitor, Map.put(none, key, stream)}}
          %{calls | count: calls.count + 1, callers: callers}
      end

    if stream, do: on(calls, stream, call), else: calls
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
    %{calls | callers: Map.put(calls.callers, caller, {monitor, %{}})}
  end

  defp on(calls, stream, call),
    do: %{calls | ids: calls.ids + 1, streams: Map.put(calls.streams, stream, call)}

  # Those that have no call go when they are many. One that begins a call meanwhile has entered it before it asks
  # whether it is watched.
  defp unwatch_idle(%{callers: callers, count: count} = calls)
       when map_size(callers) < @idle + 2 * count,
       do: calls

  defp unwatch_idle(%{callers: callers, direct: direct} = calls) do
    kept =
      Map.filter(callers, fn {caller, {monitor, open}} ->
        open != %{} or not (Direct.unwatched(direct, caller) and :erlang.demonitor(monitor))
      end)

    for caller <- Direct.callers(direct),
        not is_map_key(kept, caller),
        reduce: %{calls | callers: kept} do
      calls ->
        Direct.watched(direct, caller)
        monitor = :erlang.monitor(:process, caller)
        %{calls | callers: Map.put(calls.callers, caller, {monitor, %{}})}
    end
  end

  @doc "The first frame of a call was made."
  @spec opened(t(), call(), pos_integer()) :: t()
  def opened(calls, {caller, key} = call, stream) do
    {monitor, open} = Map.fetch!(calls.callers, caller)
    callers = %{calls.callers | caller => {monitor, %{open | key => stream}}}
    on(%{calls | callers: callers}, stream, call)
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
    %{calls | direct: nil}
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
  @spec stream(t(), call()) :: {:ok, nil | pos_integer()} | :error
  def stream(calls, {caller, key}) do
    case calls.callers do
      %{^caller => {_monitor, %{^key => stream}}} -> {:ok, stream}
      _over -> :error
    end
  end

  @doc "The calls of a caller."
  @spec of(t(), pid()) :: [call()]
  def of(calls, caller) do
    case calls.callers do
      %{^caller => {_monitor, open}} -> for {key, _stream} <- open, do: {caller, key}
      _not_watched -> []
    end
  end

  @doc "A caller that has no call is gone."
  @spec gone(t(), pid()) :: t()
  def gone(calls, caller) do
    Direct.unwatched(calls.direct, caller)
    %{calls | callers: Map.delete(calls.callers, caller)}
  end

  @doc "The calls that a peer which ran streams up to `last` has not begun."
  @spec above(t(), non_neg_integer()) :: [call()]
  def above(calls, last) do
    for {caller, {_monitor, open}} <- calls.callers,
        {key, stream} <- open,
        stream == nil or stream > last,
        do: {caller, key}
  end

  @doc "All calls."
  @spec all(t()) :: [call()]
  def all(calls), do: above(calls, -1)

  @doc "Whether there is no call, but for those that callers have written themselves."
  @spec empty?(t()) :: boolean()
  def empty?(calls), do: calls.count == 0

  @doc "Whether there is no call at all."
  @spec none?(t()) :: boolean()
  def none?(calls), do: calls.count == 0 and Direct.count(calls.direct) == 0

  @doc "Whether there is but one call."
  @spec last?(t()) :: boolean()
  def last?(calls), do: calls.count == 1

  @doc "Ends a call and tells its caller how: who asks again finds it ended."
  @spec finish(t(), call(), outcome()) :: t()
  def finish(calls, {_caller, key} = call, outcome) do
    calls = forget(calls, call)
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
  @spec forget(t(), call()) :: t()
  def forget(calls, {caller, key}) do
    :counters.sub(calls.load, calls.index, 1)
    {monitor, open} = Map.fetch!(calls.callers, caller)
    {stream, open} = Map.pop!(open, key)
    callers = %{calls.callers | caller => {monitor, open}}
    streams = if stream, do: Map.delete(calls.streams, stream), else: calls.streams
    %{calls | count: calls.count - 1, callers: callers, streams: streams}
  end
end
