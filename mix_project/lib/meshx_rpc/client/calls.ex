defmodule MeshxRpc.Client.Calls do
  @moduledoc false
  # The calls of one connection: who waits, on which stream, and whether that caller still lives.
  #
  # A call is known by the alias of its caller. It has no stream until its first frame is made.

  alias MeshxRpc.Client.Pool

  @enforce_keys [:pool, :load, :index]
  defstruct [:pool, :load, :index, calls: %{}, streams: %{}, monitors: %{}]

  @type key :: reference()
  @type t :: %__MODULE__{}

  @typedoc "How a call ended."
  @type outcome ::
          {:result | :error, flag :: byte(), binary()} | {:failed, reason :: atom()} | :started

  @doc "`load` at `index` counts the calls, for the choice of a connection."
  @spec new(atom(), :counters.counters_ref(), pos_integer()) :: t()
  def new(pool, load, index) do
    :counters.put(load, index, 0)
    %__MODULE__{pool: pool, load: load, index: index}
  end

  @doc "A call begins: its caller is watched from now on. Nobody waits for a cast."
  @spec add(t(), key(), :call | :cast, pid()) :: t()
  def add(calls, key, kind, caller) do
    monitor = if kind == :call, do: Process.monitor(caller)
    :counters.add(calls.load, calls.index, 1)
    entry = %{kind: kind, monitor: monitor, stream: nil}
    monitors = if monitor, do: Map.put(calls.monitors, monitor, key), else: calls.monitors
    %{calls | calls: Map.put(calls.calls, key, entry), monitors: monitors}
  end

  @doc "The first frame of a call was made."
  @spec opened(t(), key(), pos_integer()) :: t()
  def opened(calls, key, stream) do
    entry = Map.fetch!(calls.calls, key)

    %{
      calls
      | calls: Map.put(calls.calls, key, %{entry | stream: stream}),
        streams: Map.put(calls.streams, stream, key)
    }
  end

  @doc "The call on a stream."
  @spec on_stream(t(), pos_integer()) :: {:ok, key()} | :error
  def on_stream(calls, stream), do: Map.fetch(calls.streams, stream)

  @doc "The call whose caller this monitor watches."
  @spec watched(t(), reference()) :: {:ok, key()} | :error
  def watched(calls, monitor), do: Map.fetch(calls.monitors, monitor)

  @doc "The stream of a call; nil when it has none yet."
  @spec stream(t(), key()) :: {:ok, nil | pos_integer()} | :error
  def stream(calls, key) do
    with {:ok, entry} <- Map.fetch(calls.calls, key), do: {:ok, entry.stream}
  end

  @doc "The calls that a peer which ran streams up to `last` has not begun."
  @spec above(t(), non_neg_integer()) :: [key()]
  def above(calls, last) do
    for {key, %{stream: stream}} <- calls.calls, stream == nil or stream > last, do: key
  end

  @doc "How many casts the server has not started yet."
  @spec casts(t()) :: non_neg_integer()
  def casts(calls), do: map_size(calls.calls) - map_size(calls.monitors)

  @spec keys(t()) :: [key()]
  def keys(calls), do: Map.keys(calls.calls)

  @spec empty?(t()) :: boolean()
  def empty?(calls), do: calls.calls == %{}

  @doc "Ends a call and tells its caller how."
  @spec finish(t(), key(), outcome()) :: t()
  def finish(calls, key, outcome) do
    {entry, calls} = pop(calls, key)

    case {entry.kind, outcome} do
      {:call, {:failed, reason}} -> send(key, {key, :failed, reason})
      {:call, {status, flag, bytes}} -> send(key, {key, status, flag, bytes})
      {:call, :started} -> send(key, {key, :failed, :invalid_state})
      {:cast, :started} -> :ok
      {:cast, _failure} -> Pool.cast_failed(calls.pool)
    end

    calls
  end

  @doc "Ends a call that nobody waits for any more."
  @spec forget(t(), key()) :: t()
  def forget(calls, key), do: calls |> pop(key) |> elem(1)

  defp pop(calls, key) do
    {entry, rest} = Map.pop!(calls.calls, key)
    :counters.sub(calls.load, calls.index, 1)
    if entry.monitor, do: Process.demonitor(entry.monitor, [:flush])

    {entry,
     %{
       calls
       | calls: rest,
         monitors: Map.delete(calls.monitors, entry.monitor),
         streams: Map.delete(calls.streams, entry.stream)
     }}
  end
end
