defmodule MeshxRpc.Server.Streams do
  @moduledoc false
  # Which process runs the call that a stream's token names. Requests for pieces are requests of their own and may
  # come before that process runs: they wait for it.

  use GenServer

  @type table :: :ets.table()

  @doc "The table: made by the server's supervisor, read by every request."
  @spec table() :: table()
  def table, do: :ets.new(__MODULE__, [:set, :public, read_concurrency: true])

  def start_link(table), do: GenServer.start_link(__MODULE__, table)

  @doc "The calling process runs this call, until it ends. False when another does."
  @spec register(table(), key :: term()) :: boolean()
  def register(table, token), do: GenServer.call(keeper(table), {:register, token}, :infinity)

  @doc "The process that runs it; waits for it when it has not begun. Whoever asks for one that is over waits until cancelled."
  @spec whereis(table(), key :: term()) :: pid()
  def whereis(table, token) do
    case :ets.lookup(table, token) do
      [{^token, pid}] -> pid
      [] -> GenServer.call(keeper(table), {:await, token}, :infinity)
    end
  end

  defp keeper(table), do: :ets.lookup_element(table, :keeper, 2)

  @impl true
  def init(table) do
    # What an earlier one knew has ended with it, or has nobody to forget it.
    :ets.delete_all_objects(table)
    :ets.insert(table, {:keeper, self()})
    {:ok, %{table: table, running: %{}, waiting: %{}, waiters: %{}}}
  end

  @impl true
  def handle_call({:register, token}, {pid, _tag}, state) do
    if :ets.insert_new(state.table, {token, pid}) do
      running = Map.put(state.running, Process.monitor(pid), token)
      {waiting, rest} = Map.pop(state.waiting, token, %{})
      for {monitor, from} <- waiting, do: found(monitor, from, pid)
      waiters = Map.drop(state.waiters, Map.keys(waiting))
      {:reply, true, %{state | running: running, waiting: rest, waiters: waiters}}
    else
      {:reply, false, state}
    end
  end

  def handle_call({:await, token}, {pid, _tag} = from, state) do
    case :ets.lookup(state.table, token) do
      [{^token, running}] ->
        {:reply, running, state}

      [] ->
        monitor = Process.monitor(pid)
        waiting = Map.update(state.waiting, token, %{monitor => from}, &Map.put(&1, monitor, from))
        waiters = Map.put(state.waiters, monitor, token)
        {:noreply, %{state | waiting: waiting, waiters: waiters}}
    end
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state) do
    case state do
      %{running: %{^monitor => token}} ->
        :ets.delete(state.table, token)
        {:noreply, %{state | running: Map.delete(state.running, monitor)}}

      %{waiters: %{^monitor => token}} ->
        left = Map.delete(state.waiting[token], monitor)

        waiting =
          if left == %{},
            do: Map.delete(state.waiting, token),
            else: Map.put(state.waiting, token, left)

        {:noreply, %{state | waiting: waiting, waiters: Map.delete(state.waiters, monitor)}}

      _ ->
        {:noreply, state}
    end
  end

  def handle_info(_other, state), do: {:noreply, state}

  defp found(monitor, from, pid) do
    Process.demonitor(monitor, [:flush])
    GenServer.reply(from, pid)
  end
end
