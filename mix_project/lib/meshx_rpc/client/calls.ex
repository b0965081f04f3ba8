defmodule MeshxRpc.Client.Calls do
  @moduledoc false
  # The calls of one connection: who waits, on which stream, and whether that caller still lives.
  #
  # A call is known by its caller and the alias that its answer goes to. It has no stream until its first frame is made.
  #
  # A caller is watched from its first call on until it goes, since watching one anew for each call wakes it each time.
  # Callers that are watched and have no call are at most `@idle` more than there are calls.

  @idle 1_024

  @enforce_keys [:load, :index]
  # streams: stream => call. callers: pid => {monitor, %{key => stream or nil}}. ids: how many streams there ever were.
  defstruct [:load, :index, count: 0, ids: 0, streams: %{}, callers: %{}]

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

    callers =
      case callers do
        %{^caller => {monitor, open}} ->
          %{callers | caller => {monitor, Map.put(open, key, stream)}}

        _new ->
          monitor = :erlang.monitor(:process, caller)
          calls |> watched() |> Map.put(caller, {monitor, %{key => stream}})
      end

    calls = %{calls | count: calls.count + 1, callers: callers}
    if stream, do: on(calls, stream, call), else: calls
  end

  defp on(calls, stream, call),
    do: %{calls | ids: calls.ids + 1, streams: Map.put(calls.streams, stream, call)}

  # Those that have no call go when they are many.
  defp watched(%{callers: callers, count: count}) when map_size(callers) < @idle + 2 * count,
    do: callers

  defp watched(%{callers: callers}) do
    Map.filter(callers, fn {_caller, {monitor, open}} ->
      open != %{} or not :erlang.demonitor(monitor)
    end)
  end

  @doc "The first frame of a call was made."
  @spec opened(t(), call(), pos_integer()) :: t()
  def opened(calls, {caller, key} = call, stream) do
    {monitor, open} = Map.fetch!(calls.callers, caller)
    callers = %{calls.callers | caller => {monitor, %{open | key => stream}}}
    on(%{calls | callers: callers}, stream, call)
  end

  @doc "A new connection, on which so many stream ids were taken before."
  @spec renew(t(), non_neg_integer()) :: t()
  def renew(calls, ids), do: %{calls | ids: ids}

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
  def gone(calls, caller), do: %{calls | callers: Map.delete(calls.callers, caller)}

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

  @spec empty?(t()) :: boolean()
  def empty?(calls), do: calls.count == 0

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
