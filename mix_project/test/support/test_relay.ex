defmodule MeshxRpc.TestRelay do
  @moduledoc """
  A plain TCP relay, as `ssh -L` is one: it knows nothing of the protocol. With several targets each new connection goes
  to the next of those that answer.
  """
  use GenServer

  def start_link(options), do: GenServer.start_link(__MODULE__, options)

  def child_spec(options),
    do: %{id: make_ref(), start: {__MODULE__, :start_link, [options]}, restart: :temporary}

  def address(relay), do: GenServer.call(relay, :address)

  @doc "Where new connections lead: an address or a list of them."
  def target(relay, targets), do: GenServer.call(relay, {:target, List.wrap(targets)})

  @doc "Closes all connections; new ones are taken."
  def cut(relay), do: GenServer.call(relay, :cut)

  @impl true
  def init(options) do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}, backlog: 512])
    {:ok, port} = :inet.port(listen)
    relay = self()
    spawn_link(fn -> accept(listen, relay) end)
    targets = List.wrap(options[:target])
    {:ok, %{address: {:tcp, {127, 0, 0, 1}, port}, targets: targets, pairs: %{}}}
  end

  @impl true
  def handle_call(:address, _from, state), do: {:reply, state.address, state}
  def handle_call({:target, targets}, _from, state), do: {:reply, :ok, %{state | targets: targets}}

  def handle_call(:cut, _from, state) do
    for {pid, _monitor} <- state.pairs, do: Process.exit(pid, :kill)
    {:reply, :ok, state}
  end

  @impl true
  def handle_info({:accepted, socket}, state) do
    targets = state.targets
    {pid, monitor} = spawn_monitor(fn -> relay(socket, targets) end)
    _ = :gen_tcp.controlling_process(socket, pid)
    send(pid, :go)
    turned = if targets == [], do: [], else: tl(targets) ++ [hd(targets)]
    {:noreply, %{state | targets: turned, pairs: Map.put(state.pairs, pid, monitor)}}
  end

  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state),
    do: {:noreply, %{state | pairs: Map.delete(state.pairs, pid)}}

  def handle_info(_other, state), do: {:noreply, state}

  defp accept(listen, relay) do
    with {:ok, socket} <- :gen_tcp.accept(listen) do
      _ = :gen_tcp.controlling_process(socket, relay)
      send(relay, {:accepted, socket})
      accept(listen, relay)
    end
  end

  defp relay(socket, targets) do
    receive do: (:go -> :ok)

    with {:ok, other} <- first(targets) do
      # One read at a time, so that a slow side holds the other up.
      for socket <- [socket, other], do: :inet.setopts(socket, active: :once, nodelay: true)
      pass(%{socket => other, other => socket})
    end
  end

  defp first([]), do: :error

  defp first([target | rest]) do
    {host, port} = with {:tcp, ip, port} <- target, do: {ip, port}

    case :gen_tcp.connect(host, port, [:binary, active: false], 1_000) do
      {:ok, socket} -> {:ok, socket}
      {:error, _refused} -> first(rest)
    end
  end

  defp pass(to) do
    receive do
      {:tcp, from, bytes} ->
        with :ok <- :gen_tcp.send(to[from], bytes), :ok <- :inet.setopts(from, active: :once) do
          pass(to)
        end

      {:tcp_closed, _from} ->
        :ok

      {:tcp_error, _from, _reason} ->
        :ok
    end
  end
end
