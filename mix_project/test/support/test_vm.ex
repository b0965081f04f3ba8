defmodule MeshxRpc.TestVm do
  @moduledoc """
  A BEAM of its own without distribution (`nonode@nohost`), which the test steers over MeshxRpc.

  Its stdin is its leash: it halts when the port that started it is closed.
  """
  use GenServer
  alias MeshxRpc.Client

  defmodule Api do
    @moduledoc false
    # For tests only: it does what it is told.
    # Whole terms as binaries, so that atoms may be new.
    def apply(encoded) do
      {module, fun, args} = :erlang.binary_to_term(encoded)
      module |> Kernel.apply(fun, args) |> :erlang.term_to_binary()
    end
  end

  def child_spec(options),
    do: %{id: make_ref(), start: {__MODULE__, :start_link, [options]}, restart: :temporary}

  def start_link(options \\ []), do: GenServer.start_link(__MODULE__, options)

  @doc "Runs a function there and gives its value; raises when it failed."
  def call(vm, module, fun, args, timeout \\ 120_000) do
    case ask(client(vm), {module, fun, args}, timeout, 0) do
      {:error_rpc, reason} -> raise "#{inspect(module)}.#{fun} failed there: #{inspect(reason)}"
      result -> :erlang.binary_to_term(result)
    end
  end

  @doc "Sends it a signal. After `STOP` it returns when all of its threads have stopped: they go on for a moment."
  def signal(vm, name) do
    :ok = GenServer.call(vm, {:signal, name})
    tasks = "/proc/#{GenServer.call(vm, :os_pid)}/task"

    if name == "STOP",
      do: MeshxRpc.Case.await(fn -> Enum.all?(File.ls!(tasks), &stopped?(tasks, &1)) end)

    :ok
  end

  # `PID (COMMAND) STATE ...`, where a command may have spaces.
  defp stopped?(tasks, task), do: File.read!("#{tasks}/#{task}/stat") =~ ~r/\) T \d/

  @doc "SIGKILL; returns when it is gone."
  def kill(vm), do: GenServer.call(vm, :kill, 30_000)

  @doc "Bytes of memory that the operating system has given it, in use now."
  def resident(vm) do
    status = File.read!("/proc/#{GenServer.call(vm, :os_pid)}/status")
    [_, kib] = Regex.run(~r/VmRSS:\s+(\d+) kB/, status)
    String.to_integer(kib) * 1_024
  end

  defp client(vm), do: GenServer.call(vm, :client, 60_000)

  defp ask(client, mfa, timeout, retry),
    do: Client.Pool.call(client, :apply, :erlang.term_to_binary(mfa), timeout, retry, 5)

  ## There

  @doc "What the BEAM runs."
  def main do
    {:ok, _apps} = Application.ensure_all_started(:logger)
    Logger.configure(level: :error)
    options = [address: {:tcp, {127, 0, 0, 1}, 0}, module: Api, drain: 0]
    {:ok, server} = MeshxRpc.Server.Pool.start_link(:control, options)
    Process.unlink(server)
    {:ok, {:tcp, _ip, port}} = MeshxRpc.Server.Pool.address(:control)
    IO.puts("@port #{port}")
    _ = IO.read(:stdio, :line)
    System.halt(0)
  end

  @doc "Starts children there that stay."
  def start(specs) do
    {:ok, pid} = Supervisor.start_link(specs, strategy: :one_for_one)
    Process.unlink(pid)
    pid
  end

  @doc "Starts a server there, and gives its address."
  def serve(id, options) do
    spec = MeshxRpc.Server.Pool.child_spec(id, options)
    start([Map.put(spec, :restart, :temporary)])
    {:ok, address} = MeshxRpc.Server.Pool.address(id)
    address
  end

  @doc "Starts a client there."
  def connect(id, options), do: start([Client.Pool.child_spec(id, options)])

  @doc "Stops a server there, as a supervisor would."
  def stop_server(id), do: Supervisor.stop(id, :shutdown, 60_000)

  ## Here

  @impl true
  def init(options) do
    Process.flag(:trap_exit, true)
    # Not the parent that logs and steers, but what is needed to run.
    paths =
      for app <- [:meshx, :elixir, :logger, :ex_unit],
          do: ["-pa", Path.join(to_string(:code.lib_dir(app)), "ebin")]

    port =
      Port.open({:spawn_executable, System.find_executable("erl")}, [
        :binary,
        :exit_status,
        {:line, 10_000},
        # It has no agent, whatever tests before this one had.
        {:env, [{~c"ERL_CRASH_DUMP_BYTES", ~c"0"}, {~c"MESHX_DIR", false}]},
        {:args,
         ["-noshell" | List.flatten(paths)] ++
           Keyword.get(options, :args, []) ++ ["-s", "Elixir.MeshxRpc.TestVm", "main"]}
      ])

    {:os_pid, os_pid} = Port.info(port, :os_pid)
    {:ok, %{port: port, os_pid: os_pid, client: nil, waiting: [], gone: nil}}
  end

  @impl true
  def handle_call(:client, from, %{client: nil} = state),
    do: {:noreply, %{state | waiting: [from | state.waiting]}}

  def handle_call(:client, _from, state), do: {:reply, state.client, state}
  def handle_call(:os_pid, _from, state), do: {:reply, state.os_pid, state}

  def handle_call({:signal, name}, _from, state), do: {:reply, signal_to(state, name), state}

  def handle_call(:kill, from, state) do
    signal_to(state, "KILL")
    {:noreply, %{state | gone: from}}
  end

  @impl true
  def handle_info({port, {:data, {:eol, "@port " <> number}}}, %{port: port} = state) do
    id = :"vm_#{System.unique_integer([:positive])}"
    address = {:tcp, {127, 0, 0, 1}, String.to_integer(number)}
    options = [address: address, pool_opts: [size: 1], max_message: 512 * 1_048_576]
    {:ok, _pid} = Client.Pool.start_link(id, options)
    # Up before anybody uses it.
    true = is_binary(ask(id, {:erlang, :node, []}, 30_000, 1_000))
    for from <- state.waiting, do: GenServer.reply(from, id)
    {:noreply, %{state | client: id, waiting: []}}
  end

  def handle_info({port, {:data, {_eol, line}}}, %{port: port} = state) do
    IO.puts(:stderr, "test VM: " <> line)
    {:noreply, state}
  end

  def handle_info({port, {:exit_status, _status}}, %{port: port} = state) do
    if state.gone, do: GenServer.reply(state.gone, :ok)
    {:stop, :normal, state}
  end

  def handle_info(_other, state), do: {:noreply, state}

  # One that is stopped would not see its leash.
  @impl true
  def terminate(_reason, state) do
    if Port.info(state.port), do: signal_to(state, "KILL")
    if state.client, do: Supervisor.stop(state.client)
  catch
    :exit, _gone -> :ok
  end

  defp signal_to(state, name) do
    {_, 0} = System.cmd("kill", ["-" <> name, to_string(state.os_pid)])
    :ok
  end
end
