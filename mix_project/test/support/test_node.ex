defmodule Meshx.TestNode do
  @moduledoc """
  A real BEAM with `-proto_dist meshx`, started as a port.

  The port's stdin is its leash: when the owner ends, however it ends, the BEAM reads the end of its input and
  halts.
  """
  use GenServer

  @boot_timeout 60_000

  @doc "Starts a BEAM: `args` follow `erl`'s own; `env` is a map of strings, `carrier` another one than `meshx`."
  def start_link(opts), do: GenServer.start_link(__MODULE__, opts)

  def child_spec(opts),
    do: %{id: make_ref(), start: {__MODULE__, :start_link, [opts]}, restart: :temporary}

  @doc "Waits until the node is up, or has ended: `:ok` or `{:exited, status}`."
  def await_boot(node), do: GenServer.call(node, :await_boot, @boot_timeout)

  @doc "Runs a function there and gives its value; raises when it failed."
  def call(node, module, fun, args, timeout \\ 60_000) do
    case GenServer.call(node, {:call, {module, fun, args}}, timeout) do
      {:ok, value} -> value
      other -> raise "#{inspect(module)}.#{fun}/#{length(args)} failed: #{inspect(other)}"
    end
  end

  @doc "Starts a call whose answer comes as `{reference, {:ok, value}}`."
  def cast(node, module, fun, args) do
    ref = make_ref()
    GenServer.cast(node, {:call, {module, fun, args}, {self(), ref}})
    ref
  end

  @doc "Waits until the output (log included) matches."
  def await_output(node, pattern, timeout \\ 60_000),
    do: GenServer.call(node, {:await_output, pattern}, timeout)

  @doc "All output so far."
  def output(node), do: GenServer.call(node, :output)

  @doc "SIGKILL; returns when the process is gone."
  def kill(node), do: GenServer.call(node, :kill, 60_000)

  @doc "Sends a signal, `STOP` for example."
  def signal(node, name), do: GenServer.call(node, {:signal, name})

  @impl true
  def init(opts) do
    args = Keyword.fetch!(opts, :args)
    env = for {k, v} <- Keyword.get(opts, :env, %{}), do: {to_charlist(k), to_charlist(v)}

    paths =
      for app <- [:meshx, :elixir, :logger],
          do: ["-pa", Path.join(to_string(:code.lib_dir(app)), "ebin")]

    port =
      Port.open({:spawn_executable, System.find_executable("erl")}, [
        :binary,
        :exit_status,
        :stderr_to_stdout,
        {:line, 100_000},
        {:env, [{~c"ERL_CRASH_DUMP_BYTES", ~c"0"} | env]},
        {:args,
         [
           "-noshell",
           "-proto_dist",
           Keyword.get(opts, :carrier, "meshx"),
           "-no_epmd",
           "-setcookie",
           "meshxtest"
         ] ++
           List.flatten(paths) ++ args ++ ["-s", "meshx_test_node"]}
      ])

    {:os_pid, os_pid} = Port.info(port, :os_pid)

    {:ok,
     %{
       port: port,
       os_pid: os_pid,
       boot: nil,
       lines: [],
       calls: %{},
       next: 1,
       booting: [],
       output: [],
       ended: [],
       partial: ""
     }}
  end

  @impl true
  def handle_call(:await_boot, from, state),
    do: {:noreply, %{state | booting: [from | state.booting]} |> tell_boot()}

  def handle_call({:call, mfa}, from, state), do: {:noreply, send_call(state, mfa, from)}
  def handle_call(:output, _from, state), do: {:reply, text(state), state}

  def handle_call({:await_output, pattern}, from, state),
    do: {:noreply, tell_output(%{state | output: [{pattern, from} | state.output]})}

  def handle_call(:kill, from, state) do
    send_signal("KILL", state)
    {:noreply, %{state | ended: [from | state.ended]}}
  end

  def handle_call({:signal, name}, _from, state), do: {:reply, send_signal(name, state), state}

  @impl true
  def handle_cast({:call, mfa, to}, state), do: {:noreply, send_call(state, mfa, to)}

  @impl true
  def handle_info({port, {:data, {:noeol, part}}}, %{port: port} = state),
    do: {:noreply, %{state | partial: state.partial <> part}}

  def handle_info({port, {:data, {:eol, part}}}, %{port: port} = state),
    do: {:noreply, line(state.partial <> part, %{state | partial: ""})}

  def handle_info({port, {:exit_status, status}}, %{port: port} = state) do
    for from <- state.ended, do: GenServer.reply(from, :ok)
    {:noreply, tell_boot(%{state | boot: {:exited, status}, ended: []})}
  end

  defp send_signal(name, state) do
    {_, 0} = System.cmd("kill", ["-" <> name, to_string(state.os_pid)])
    :ok
  end

  defp send_call(state, {module, fun, args}, to) do
    line = Base.encode64(:erlang.term_to_binary({state.next, module, fun, args}))
    Port.command(state.port, [line, ?\n])
    %{state | calls: Map.put(state.calls, state.next, to), next: state.next + 1}
  end

  defp line("@ready", state), do: tell_boot(%{state | boot: :ok})

  defp line("@" <> rest = line, state) do
    with {id, " " <> encoded} <- Integer.parse(rest),
         {to, calls} when to != nil <- Map.pop(state.calls, id) do
      reply(to, :erlang.binary_to_term(Base.decode64!(encoded)))
      %{state | calls: calls}
    else
      _ -> logged(line, state)
    end
  end

  defp line(line, state), do: logged(line, state)

  defp logged(line, state), do: tell_output(%{state | lines: [line | state.lines]})

  defp reply({pid, ref}, value) when is_reference(ref) and is_pid(pid), do: send(pid, {ref, value})
  defp reply(from, value), do: GenServer.reply(from, value)

  defp tell_boot(%{boot: nil} = state), do: state

  defp tell_boot(state) do
    for from <- state.booting, do: GenServer.reply(from, state.boot)
    %{state | booting: []}
  end

  defp tell_output(state) do
    text = text(state)
    {found, waiting} = Enum.split_with(state.output, fn {pattern, _} -> text =~ pattern end)
    for {_, from} <- found, do: GenServer.reply(from, :ok)
    %{state | output: waiting}
  end

  defp text(state), do: state.lines |> Enum.reverse() |> Enum.join("\n")
end
