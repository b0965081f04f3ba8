defmodule MeshxRpc.Client.Growth do
  @moduledoc false
  # Connections beyond a pool's `size`: while all are busy (`max_overflow`), and one that stands in for each that drains,
  # so that a server that goes away leaves no gap.
  #
  # Those of the first kind leave when they have had nothing to do for a while, a stand-in when the connection that it
  # stands in for is up again. One that leaves takes no more calls, and ends when it has none.

  use GenServer

  alias MeshxRpc.Client.{Connection, Pool}

  # Requests on the connection that has the fewest.
  @busy 64
  @tick 5_000
  # Ticks without a request.
  @idle 2

  @doc "Requests that the least loaded connection has when another one is made."
  @spec busy() :: pos_integer()
  def busy, do: @busy

  @doc "How many there can be at most, beyond the pool's size: there is room for as many stand-ins that leave."
  @spec most(map()) :: pos_integer()
  def most(%{pool_opts: %{size: size, max_overflow: overflow}}), do: 2 * size + overflow

  def child_spec({config, _pool} = argument) do
    %{
      id: :growth,
      start: {GenServer, :start_link, [__MODULE__, argument, []]},
      restart: :permanent,
      shutdown: 5_000 + config.timeout_hsk
    }
  end

  @doc "Asks for another connection, because all are busy. Asking often costs nothing."
  @spec ask(map()) :: :ok
  def ask(%{table: table, growth: growth}) do
    if :atomics.compare_exchange(growth, 2, 0, 1) == :ok, do: tell(table, :grow)
    :ok
  end

  @doc "The connection at `index` takes no more calls: until it does again, another is to stand in for it."
  @spec drains(:ets.table(), pos_integer()) :: :ok
  def drains(table, index), do: tell(table, {:drains, index})

  @doc "The connection at `index` is up."
  @spec up(:ets.table(), pos_integer()) :: :ok
  def up(table, index), do: tell(table, {:up, index})

  defp tell(table, what) do
    with [{:growth, pid}] <- :ets.lookup(table, :growth), do: send(pid, what)
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
  def handle_info(:grow, %{config: config, extra: extra} = state) do
    busy = Enum.count(extra, fn {_index, {_pid, why, _idle}} -> why == :load end)
    room? = busy < config.pool_opts.max_overflow
    # One at a time: the next is for those who ask when this one is there, or cannot be.
    Process.send_after(self(), :again, 50)
    {:noreply, if(room?, do: add(state, :load), else: state)}
  end

  def handle_info(:again, state) do
    :atomics.put(state.pool.growth, 2, 0)
    {:noreply, state}
  end

  # A stand-in that drains itself: another goes on for it.
  def handle_info({:drains, index}, %{extra: extra} = state) when is_map_key(extra, index) do
    {_pid, why, _idle} = extra[index]
    state = leave(state, index)

    case why do
      {:instead_of, place} -> {:noreply, stand_in(state, place)}
      _not_needed -> {:noreply, state}
    end
  end

  def handle_info({:drains, index}, %{config: %{pool_opts: %{size: size}}} = state)
      when index <= size,
      do: {:noreply, stand_in(state, index)}

  def handle_info({:up, place}, state) do
    leaving = for {index, {_pid, {:instead_of, ^place}, _idle}} <- state.extra, do: index
    {:noreply, Enum.reduce(leaving, state, &leave(&2, &1))}
  end

  def handle_info({:EXIT, pid, _reason}, state) do
    gone = for {index, {^pid, _why, _idle}} <- state.extra, do: index
    for index <- gone, do: forget(state.pool, index)
    {:noreply, counted(%{state | extra: Map.drop(state.extra, gone)})}
  end

  def handle_info(:tick, state) do
    state =
      for {index, {pid, :load, idle}} <- state.extra, reduce: %{state | timer: nil} do
        state ->
          idle = if Pool.in_flight(state.pool, index) == 0, do: idle + 1, else: 0
          state = %{state | extra: Map.put(state.extra, index, {pid, :load, idle})}
          if idle >= @idle, do: leave(state, index), else: state
      end

    {:noreply, counted(state)}
  end

  def handle_info(_other, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    pids = for {_index, {pid, _why, _idle}} <- state.extra, do: pid
    for pid <- pids, do: Process.exit(pid, :shutdown)
    for pid <- pids, do: receive(do: ({:EXIT, ^pid, _reason} -> :ok))
  end

  defp stand_in(%{extra: extra} = state, place) do
    there? = Enum.any?(extra, fn {_index, {_pid, why, _idle}} -> why == {:instead_of, place} end)
    if there?, do: state, else: add(state, {:instead_of, place})
  end

  defp add(%{config: config, pool: pool, extra: extra} = state, why) do
    case Enum.find((pool.size + 1)..pool.most, &(not is_map_key(extra, &1))) do
      nil ->
        state

      index ->
        {:ok, pid} = Connection.start_link({config, index, pool.table, pool.load})
        counted(%{state | extra: Map.put(extra, index, {pid, why, 0})})
    end
  end

  defp leave(%{extra: extra} = state, index) do
    {pid, _why, _idle} = extra[index]
    send(pid, :leave)
    %{state | extra: %{extra | index => {pid, :leaving, 0}}}
  end

  defp forget(pool, index) do
    for key <- [index, {:direct, index}, {:down, index}], do: :ets.delete(pool.table, key)
    :counters.put(pool.load, index, 0)
  end

  # Callers look for them only when there are some.
  defp counted(%{extra: extra, timer: timer} = state) do
    :atomics.put(state.pool.growth, 1, map_size(extra))

    busy? = Enum.any?(extra, &match?({_index, {_pid, :load, _idle}}, &1))
    timer = if busy? and timer == nil, do: Process.send_after(self(), :tick, @tick), else: timer

    %{state | timer: timer}
  end
end
