defmodule MeshxRpc.Server.Listener do
  @moduledoc false
  # Listens, lets acceptors in, and knows the connections: how many there are, which are in their hello,
  # and what must be given back when one dies. When too many are in their hello the oldest of them goes, so
  # that silent ones never keep the others out. With `:mesh` it registers the service first, as long as it takes.

  use GenServer
  require Logger

  alias MeshxRpc.{Address, Frame, Options, Telemetry}
  alias MeshxRpc.Server.{Casts, Connection, Room}

  @retry 1_000
  # Then an acceptor goes on in the newest version of this module.
  @accept 5_000
  # While it registers with the mesh, it answers nobody.
  @ask 30_000

  @enforce_keys [:config, :supervisor]
  defstruct [
    :config,
    :supervisor,
    :connections_supervisor,
    :socket,
    :address,
    :registration,
    # Why it is not registered, as it was told last.
    :unregistered,
    connections: %{},
    waiting: :queue.new(),
    hellos: 0
  ]

  def start_link({config, supervisor}), do: GenServer.start_link(__MODULE__, {config, supervisor})

  @spec address(pid()) :: {:ok, Address.t()} | {:error, :not_registered}
  def address(listener), do: GenServer.call(listener, :address, @ask)

  @spec info(pid()) :: map()
  def info(listener), do: GenServer.call(listener, :info, @ask)

  @impl true
  def init({config, supervisor}) do
    Process.flag(:trap_exit, true)
    state = %__MODULE__{config: config, supervisor: supervisor}

    if config.mesh do
      {:ok, state, {:continue, :start}}
    else
      case listen(state, config.address) do
        {:ok, state} ->
          {:ok, state, {:continue, :start}}

        {:error, reason} ->
          tell(state, {:listen, reason})
          {:stop, {:listen, config.address, reason}}
      end
    end
  end

  @impl true
  def handle_continue(:start, state) do
    {_id, connections, _type, _modules} =
      state.supervisor |> Supervisor.which_children() |> List.keyfind!(:connections, 0)

    state = %{state | connections_supervisor: connections}
    if state.socket, do: {:noreply, accept(state, state.config.acceptors)}, else: register(state)
  end

  @impl true
  def handle_call(:address, _from, %{socket: nil} = state),
    do: {:reply, {:error, :not_registered}, state}

  def handle_call(:address, _from, state), do: {:reply, {:ok, state.address}, state}

  def handle_call(:info, _from, state) do
    casts = Casts.info(state.config.streams)

    info = %{
      connections: map_size(state.connections),
      in_hello: state.hellos,
      running: Room.count(state.config.running),
      casts: casts.running,
      cast_failures: casts.failures
    }

    {:reply, info, state}
  end

  def handle_call(:admit, _from, %{config: config} = state) do
    cond do
      map_size(state.connections) >= config.max_connections ->
        text = "#{config.max_connections} connections are open (max_connections)"
        {:reply, {:error, if(config.quiet_on_hsk_error?, do: :full, else: text)}, state}

      true ->
        state = if state.hellos >= config.max_hello, do: evict(state), else: state
        held = Room.held()
        child = {Connection, {config, self(), held}}

        case DynamicSupervisor.start_child(state.connections_supervisor, child) do
          {:ok, pid} ->
            {:reply, {:ok, pid}, entered(state, pid, held)}

          # By `gen_statem_opts` it may have had too little time.
          {:error, reason} ->
            Logger.error(
              "MeshxRpc.Server #{inspect(config.id)}: a connection did not start: #{inspect(reason)}"
            )

            {:reply, {:error, :not_started}, state}
        end
    end
  end

  defp entered(state, pid, held) do
    Process.monitor(pid)
    connections = Map.put(state.connections, pid, {:hello, held})
    waiting = :queue.in(pid, state.waiting)
    %{state | connections: connections, waiting: waiting, hellos: state.hellos + 1}
  end

  @impl true
  def handle_info({:up, pid}, state) do
    case state.connections do
      %{^pid => {:hello, held}} ->
        connections = %{state.connections | pid => {:up, held}}
        {:noreply, shorten(%{state | connections: connections, hellos: state.hellos - 1})}

      _gone ->
        {:noreply, state}
    end
  end

  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    case Map.pop(state.connections, pid) do
      {nil, _connections} ->
        {:noreply, state}

      {{phase, held}, connections} ->
        Room.leave_all(state.config, held)
        state.config.codec.give_back(state.config.budget, :counters.get(held, 2))
        hellos = if phase == :hello, do: state.hellos - 1, else: state.hellos
        {:noreply, shorten(%{state | connections: connections, hellos: hellos})}
    end
  end

  # What was registered is lost for good: start anew.
  def handle_info(
        {adapter, :lost, id},
        %{registration: id, config: %{mesh: %{adapter: adapter}}} = state
      ),
      do: {:stop, {:shutdown, :registration_lost}, %{state | registration: nil}}

  def handle_info(:register, state), do: register(state)

  # Killed with the version of our code that it waited in, which a second reload purges.
  def handle_info({:EXIT, _acceptor, :killed}, state), do: {:noreply, accept(state, 1)}
  def handle_info({:EXIT, _acceptor, reason}, state), do: {:stop, reason, state}
  def handle_info(_other, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    if state.socket do
      :gen_tcp.close(state.socket)
      Address.remove(state.address)
    end

    for {pid, _connection} <- state.connections, do: send(pid, :drain)
    timer = :erlang.start_timer(state.config.drain, self(), :drained)
    drain(state.connections, timer)

    # Last: the mesh cuts the connections of what is not registered any more. Who dials meanwhile is taken to another
    # instance, since nobody listens here.
    if state.registration, do: state.config.mesh.adapter.stop(state.registration)
  end

  # What is left after that ends with its supervisor.
  defp drain(connections, _timer) when connections == %{}, do: :ok

  defp drain(connections, timer) do
    receive do
      {:DOWN, _monitor, :process, pid, _reason} -> drain(Map.delete(connections, pid), timer)
      {:timeout, ^timer, :drained} -> :ok
    end
  end

  defp listen(state, address) do
    with {:ok, socket, address} <-
           Address.listen(address, state.config.backlog, state.config.socket_opts),
         do: {:ok, tell(%{state | socket: socket, address: address}, :ok)}
  end

  defp tell(%{config: config} = state, reason) do
    if Telemetry.on?(config.telemetry, :init) do
      metadata = %{address: state.address || config.address, result: Telemetry.cause(reason)}
      measurements = Telemetry.measurements([])
      Telemetry.emit_aside(config.telemetry, :init, measurements, Map.put(metadata, :state, :init))
    end

    state
  end

  # Most leave in the order in which they came: the queue stays short.
  defp shorten(state) do
    with {:value, pid} <- :queue.peek(state.waiting),
         false <- match?(%{^pid => {:hello, _held}}, state.connections) do
      shorten(%{state | waiting: :queue.drop(state.waiting)})
    else
      _empty_or_in_hello -> state
    end
  end

  # `waiting` has those in their hello, oldest first, and some that no longer are.
  defp evict(state) do
    {{:value, pid}, waiting} = :queue.out(state.waiting)
    state = %{state | waiting: waiting}

    case state.connections do
      %{^pid => {:hello, held}} ->
        send(pid, :evicted)
        connections = %{state.connections | pid => {:evicted, held}}
        %{state | connections: connections, hellos: state.hellos - 1}

      _in_use_or_gone ->
        evict(state)
    end
  end

  # The agent, or the mesh behind it, may come later than we do.
  defp register(%{config: %{mesh: mesh} = config} = state) do
    with {:ok, id, address} <- mesh.adapter.start(mesh.service, mesh.template, true, mesh.timeout),
         {:ok, _id} <- protected(config, id, address),
         {:ok, state} <- listen(state, address) do
      {:noreply, accept(%{state | registration: id, unregistered: nil}, config.acceptors)}
    else
      # Another try would give no other address: the server does not start.
      {:unprotected, id, text} ->
        Logger.error("MeshxRpc.Server #{inspect(config.id)}: the mesh's #{text}")
        {:stop, {:no_shared_key, text}, %{state | registration: id}}

      other ->
        # Once for each reason, not once for each try.
        if other != state.unregistered do
          Logger.warning(
            "MeshxRpc.Server #{inspect(config.id)}: service #{inspect(mesh.service)} is not registered: " <>
              "#{inspect(other)}, next tries each #{@retry} ms"
          )
        end

        tell(state, {:mesh, if(match?({:error, _}, other), do: elem(other, 1), else: other)})
        Process.send_after(self(), :register, @retry)
        {:noreply, %{state | unregistered: other}}
    end
  end

  defp protected(config, id, address) do
    case Options.protected(config, address) do
      :ok -> {:ok, id}
      {:error, text} -> {:unprotected, id, text}
    end
  end

  defp accept(%{socket: socket} = state, acceptors) do
    for _ <- 1..acceptors, do: spawn_link(__MODULE__, :acceptor, [self(), socket])
    state
  end

  @doc false
  def acceptor(listener, socket) do
    case :gen_tcp.accept(socket, @accept) do
      {:ok, accepted} ->
        admit(listener, accepted)
        __MODULE__.acceptor(listener, socket)

      {:error, :timeout} ->
        __MODULE__.acceptor(listener, socket)

      {:error, reason} when reason in [:emfile, :enfile, :enobufs, :enomem] ->
        Logger.error(
          "MeshxRpc.Server: accepting a connection failed: #{reason}, next try in 100 ms"
        )

        Process.sleep(100)
        __MODULE__.acceptor(listener, socket)

      {:error, :closed} ->
        exit(:normal)

      {:error, _that_connection} ->
        __MODULE__.acceptor(listener, socket)
    end
  end

  defp admit(listener, accepted) do
    with {:ok, pid} <- GenServer.call(listener, :admit, :infinity),
         :ok <- :gen_tcp.controlling_process(accepted, pid) do
      send(pid, {:socket, accepted})
    else
      {:error, text} when is_binary(text) ->
        _ = :gen_tcp.send(accepted, Frame.refused(:full, text))
        :gen_tcp.close(accepted)

      {:error, _quiet_or_closed} ->
        :gen_tcp.close(accepted)
    end
  end
end
