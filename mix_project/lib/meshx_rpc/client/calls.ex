defmodule MeshxRpc.Client.Calls do
  @moduledoc false
  # The calls of one connection: who waits, on which stream, and whether that caller still lives.
  #
  # A call is known by the alias of its caller. It has no stream until its first frame is made.

  @enforce_keys [:load, :index]
  defstruct [:load, :index, keys: %{}, streams: %{}]

  @type key :: reference()
  @type t :: %__MODULE__{}

  @typedoc "How a call ended."
  @type outcome ::
          {:result | :error, flag :: byte(), binary()} | {:failed, reason :: atom()}

  @doc "`load` at `index` counts the calls, for the choice of a connection."
  @spec new(:counters.counters_ref(), pos_integer()) :: t()
  def new(load, index), do: %__MODULE__{load: load, index: index}

  @doc """
  A call begins, on a stream or not yet: its caller is watched from now on, `{{:caller_down, key}, ...}` comes when it
  goes.
  """
  @spec add(t(), key(), pid(), pos_integer() | nil) :: t()
  def add(%__MODULE__{} = calls, key, caller, stream) do
    monitor = :erlang.monitor(:process, caller, tag: {:caller_down, key})
    :counters.add(calls.load, calls.index, 1)
    keys = Map.put(calls.keys, key, {stream, monitor})

    if stream,
      do: %{calls | keys: keys, streams: Map.put(calls.streams, stream, key)},
      else: %{calls | keys: keys}
  end

  @doc "The first frame of a call was made."
  @spec opened(t(), key(), pos_integer()) :: t()
  def opened(calls, key, stream) do
    {nil, monitor} = Map.fetch!(calls.keys, key)

    %{
      calls
      | keys: Map.put(calls.keys, key, {stream, monitor}),
        streams: Map.put(calls.streams, stream, key)
    }
  end

  @doc "The call on a stream."
  @spec on_stream(t(), pos_integer()) :: {:ok, key()} | :error
  def on_stream(calls, stream), do: Map.fetch(calls.streams, stream)

  @doc "The stream of a call; nil when it has none yet."
  @spec stream(t(), key()) :: {:ok, nil | pos_integer()} | :error
  def stream(calls, key) do
    with {:ok, {stream, _monitor}} <- Map.fetch(calls.keys, key), do: {:ok, stream}
  end

  @doc "The calls that a peer which ran streams up to `last` has not begun."
  @spec above(t(), non_neg_integer()) :: [key()]
  def above(calls, last) do
    for {key, {stream, _monitor}} <- calls.keys, stream == nil or stream > last, do: key
  end

  @spec keys(t()) :: [key()]
  def keys(calls), do: Map.keys(calls.keys)

  @spec empty?(t()) :: boolean()
  def empty?(calls), do: calls.keys == %{}

  @doc "Whether there is but one call."
  @spec last?(t()) :: boolean()
  def last?(calls), do: map_size(calls.keys) == 1

  @doc "Ends a call and tells its caller how."
  @spec finish(t(), key(), outcome()) :: t()
  def finish(calls, key, outcome) do
    reply(key, outcome)
    forget(calls, key)
  end

  @doc "Tells a caller how its call ended."
  @spec reply(key(), outcome()) :: :ok
  def reply(key, outcome) do
    case outcome do
      {:failed, reason} -> send(key, {key, :failed, reason})
      {status, flag, bytes} -> send(key, {key, status, flag, bytes})
    end

    :ok
  end

  @doc "Ends a call that nobody waits for any more."
  @spec forget(t(), key()) :: t()
  def forget(calls, key) do
    {{stream, monitor}, keys} = Map.pop!(calls.keys, key)
    :counters.sub(calls.load, calls.index, 1)
    # A late message of it names a key that is not known.
    _ = :erlang.demonitor(monitor)
    streams = if stream, do: Map.delete(calls.streams, stream), else: calls.streams
    %{calls | keys: keys, streams: streams}
  end
end
