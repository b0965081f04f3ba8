defmodule MeshxConsul.Reporter do
  @moduledoc false
  # Runs `proxy_stdout_fun`, `proxy_stderr_fun` and `proxy_down_fun`: each service in a process of its own, in the order of
  # its lines, so that a slow or crashing function disturbs nobody else.

  use GenServer
  require Logger

  alias MeshxConsul.Config

  # Lines of one service that wait for its function; further ones are lost, and counted.
  @max_waiting 1_000
  # How long a function may go on with a service that is gone.
  @last_words 5_000

  def start_link(_argument), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @impl true
  def init(nil), do: {:ok, %{}}

  @impl true
  def handle_info({:proxy_output, %{id: id, stream: stream, line: line}}, state)
      when stream in [:stdout, :stderr] and is_binary(line),
      do: {:noreply, tell(state, id, {stream, [id, stream, line]})}

  def handle_info({:proxy_down, %{id: id, text: text}}, state) when is_binary(text) do
    downs = if worker = state[id], do: worker.downs, else: 0
    state = tell(state, id, {:down, [id, nil, nil, text, downs]})
    {:noreply, put_in(state[id].downs, downs + 1)}
  end

  def handle_info({:gone, id}, state) do
    {worker, state} = Map.pop(state, id)

    if worker do
      send(worker.pid, :stop)
      :timer.kill_after(@last_words, worker.pid)
    end

    {:noreply, state}
  end

  # A function that ended its process: the next line gets another one.
  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    case Enum.find(state, fn {_id, worker} -> worker.pid == pid end) do
      {id, worker} -> {:noreply, Map.put(state, id, %{start(worker.downs) | lost: worker.lost})}
      nil -> {:noreply, state}
    end
  end

  def handle_info(_other, state), do: {:noreply, state}

  defp tell(state, id, call) do
    worker = state[id] || start(0)

    worker =
      case Process.info(worker.pid, :message_queue_len) do
        {:message_queue_len, length} when length >= @max_waiting ->
          %{worker | lost: worker.lost + 1}

        _there_is_room ->
          if worker.lost > 0 do
            Logger.warning(
              "MeshxConsul: #{worker.lost} lines of the proxy of #{id} are lost: the functions for them are slow"
            )
          end

          send(worker.pid, call)
          %{worker | lost: 0}
      end

    Map.put(state, id, worker)
  end

  defp start(downs) do
    {pid, _monitor} = spawn_monitor(&work/0)
    %{pid: pid, downs: downs, lost: 0}
  end

  defp work do
    receive do
      :stop ->
        :ok

      {kind, args} ->
        run(kind, args)
        work()
    end
  end

  defp run(kind, args) do
    with {:ok, config} <- Config.read(), do: apply(fun(kind, config), args)
  catch
    # Not the arguments: they are what a program printed.
    class, reason ->
      Logger.error(
        "MeshxConsul: proxy_#{kind}_fun failed: " <>
          Exception.format_banner(class, reason, __STACKTRACE__)
      )
  end

  defp fun(:stdout, config), do: config.proxy_stdout_fun
  defp fun(:stderr, config), do: config.proxy_stderr_fun
  defp fun(:down, config), do: config.proxy_down_fun

  ## The functions that are called unless others are configured

  def stdout(_id, _stream, ""), do: :ok
  def stdout(id, stream, line), do: Logger.debug("[#{id}][#{stream}]: #{line}")

  def stderr(_id, _stream, ""), do: :ok
  def stderr(id, stream, line), do: Logger.error("[#{id}][#{stream}]: #{line}")

  def down(id, _pid, _os_pid, reason, downs),
    do: Logger.error("[#{id}]: the proxy ended, for the #{downs + 1}. time: #{reason}")
end
