defmodule MeshxRpc.Client.Growth do
  @moduledoc false
  # Connections beyond a pool's `size`: while all are busy (`max_overflow`), and one in the place of each that drains, so
  # that a server that goes away leaves no gap. They end when they have had nothing to do for a while, and are not
  # made again when they are lost.

  use GenServer

  alias MeshxRpc.Client.Connection

  # Requests on the connection that has the fewest.
  @busy 64
  @tick 5_000
  # Ticks without a request.
  @idle 2

  @doc "Requests that the least loaded connection has when another one is made."
  @spec busy() :: pos_integer()
  def busy, do: @busy

  @doc "How many there can be at most, beyond the pool's size."
  @spec most(map()) :: pos_integer()
  def most(%{pool_opts: %{size: size, max_overflow: overflow}}), do: size + overflow

  def child_spec({config, _pool} = argument) do
    %{
      id: :growth,
      start: {GenServer, :start_link, [__MODULE__, argument, []]},
      restart: :permanent,
      shutdown: 5_000 + config.timeout_hsk
    }
  end

  @doc "Asks for another connection, because of load or in the place of one that drains. Asking often costs nothing."
  @spec ask(map(), :load | :drain) :: :ok
  def ask(%{table: table, growth: growth}, :load) do
    if :atomics.compare_exchange(growth, 2, 0, 1) == :ok, do: tell(table, :load)
    :ok
  end

  def ask(%{table: table}, :drain), do: tell(table, :drain)

  defp tell(table, why) do
    case :ets.lookup(table, :growth) do
      [{:growth, pid}] -> send(pid, {:grow, why})
      [] -> :ok
    end

    :ok
  end

  @impl true
  def init({config, pool}) do
    Process.flag(:trap_exit, true)
    :ets.insert(pool.table, {:growth, self()})
    :atomics.put(pool.growth, 1, 0)
    :atomics.put(pool.growth, 2, 0)
    # An earlier one's have ended with it.
    for index <- (pool.size + 1)..pool.most//1, do: forget(pool, index)
    {:ok, %{config: config, pool: pool, extra: %{}, timer: nil}}
  end

  @impl true
  def handle_info({:grow, why}, state) do
    state = grow(state, why)
    # One at a time: the next is for those who ask when this one is there, or cannot be.
    if why == :load, do: Process.send_after(self(), :again, 50)
    {:noreply, state}
  end

  def handle_info(:again, state) do
    :atomics.put(state.pool.growth, 2, 0)
    {:noreply, state}
  end

  def handle_info({:EXIT, pid, _reason}, state) do
    gone = for {index, {^pid, _why, _idle}} <- state.extra, do: index
    for index <- gone, do: forget(state.pool, index)
    {:noreply, counted(%{state | extra: Map.drop(state.extra, gone)})}
  end

  def handle_info(:tick, state) do
    extra =
      Map.new(state.extra, fn {index, {pid, why, idle}} ->
        idle = if :counters.get(state.pool.load, index) == 0, do: idle + 1, else: 0
        if idle >= @idle, do: send(pid, :retire)
        {index, {pid, why, idle}}
      end)

    {:noreply, counted(%{state | extra: extra, timer: nil})}
  end

  def handle_info(_other, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    pids = for {_index, {pid, _why, _idle}} <- state.extra, do: pid
    for pid <- pids, do: Process.exit(pid, :shutdown)
    for pid <- pids, do: receive(do: ({:EXIT, ^pid, _reason} -> :ok))
  end

  defp grow(%{config: config, pool: pool, extra: extra} = state, why) do
    %{size: size, max_overflow: overflow} = config.pool_opts
    room = if why == :load, do: overflow, else: size
    taken = Enum.count(extra, fn {_index, {_pid, other, _idle}} -> other == why end)
    index = Enum.find((size + 1)..(size + most(config)), &(not is_map_key(extra, &1)))

    if taken < room and index do
      {:ok, pid} = Connection.start_link({config, index, pool.table, pool.load})
      counted(%{state | extra: Map.put(extra, index, {pid, why, 0})})
    else
      state
    end
  end

  defp forget(pool, index) do
    :ets.delete(pool.table, index)
    :counters.put(pool.load, index, 0)
  end

  # Callers look for them only when there are some.
  defp counted(%{extra: extra, timer: timer} = state) do
    :atomics.put(state.pool.growth, 1, map_size(extra))

    timer =
      if extra != %{} and timer == nil, do: Process.send_after(self(), :tick, @tick), else: timer

    %{state | timer: timer}
  end
end
