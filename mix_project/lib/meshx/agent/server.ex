defmodule Meshx.Agent.Server do
  @moduledoc false
  # What one adapter has at the agent: services and upstreams, which are made there again after the agent's restart.
  #
  # What asks the agent is a job, a process of its own, so many run side by side. Those that touch the same thing
  # share a lane and run one after the other. A job goes on when its caller has given up: what it brings then is
  # given back, so nothing stays at the agent that nobody knows of.
  #
  # An owner is the process with which a service or upstream ends; without one it lives as long as this server.

  use GenServer

  alias Meshx.Agent.Ports
  alias Meshx.Agent.Server.{Lanes, Work}

  @retry_min 500
  @retry_max 30_000
  # How long a server that stops waits for jobs, and for the agent to let go.
  @drain 2_000
  @farewell 5_000

  defstruct [
    :name,
    :events,
    :client,
    # Whether the client is connected.
    up?: false,
    # Counts the connections that were lost: what was made before is not there any more.
    epoch: 0,
    services: %{},
    upstreams: %{},
    owners: %{},
    # Busy lanes, each with what waits in it.
    lanes: %{},
    jobs: %{},
    waiting: :queue.new(),
    # Callers that still wait: from => timer or nil.
    callers: %{},
    ports: %{}
  ]

  @type owner :: pid() | nil
  @type address :: Meshx.ServiceMesh.address()

  ## Callers

  @doc """
  Registers a service: `{:ok, id, address}`, `{:ok, :already_started}`, `{:error, :pending}` when it is being
  registered again, `{:error, {cause, text}}`.

  `:args` are those of `register_service`; `:force?` registers again what this owner has; `:deadline` is in milliseconds
  from now. The rest of the map is kept with the service.
  """
  def register(server, %{name: _, args: _, owner: _, force?: _, deadline: _, lane: _} = service),
    do: run(server, Map.put(service, :do, :register))

  @doc "Notes a service that the agent knows nothing of, unless there is one of this id."
  def note(server, %{id: id, name: _} = service),
    do: run(server, Map.merge(service, %{do: :note, lane: {:service, id}}))

  @doc "`:ok`, or `:unknown`."
  def deregister(server, id), do: run(server, %{do: :deregister, id: id})

  @doc """
  Makes upstreams, all at once: `[{:ok, address} | {:error, {cause, text}}]`. `:key` names an upstream here, `:args` are
  those of `connect`, or a function that finds them out; `:reuse?` answers with the one that is there.
  """
  def connect(server, upstreams) do
    run_all(
      server,
      for(
        %{key: key} = upstream <- upstreams,
        do: Map.merge(upstream, %{do: :connect, lane: {:upstream, key}})
      )
    )
  end

  @doc "Ends upstreams: `[:ok | :unknown]`."
  def disconnect(server, keys, cut?) do
    run_all(
      server,
      for(key <- keys, do: %{do: :disconnect, key: key, cut?: cut?, lane: {:upstream, key}})
    )
  end

  @doc "A port of `range` at `ip` that nobody listens on and that was not given to others, upwards or downwards."
  def port(server, ip, range, direction), do: call(server, {:port, ip, range, direction})

  def services(server), do: call(server, :services)
  def upstreams(server), do: call(server, :upstreams)

  defp run(server, request), do: call(server, {:run, request})

  defp run_all(server, requests) do
    with :ok <- ensure_started(server) do
      requests
      |> Enum.map(&:gen_server.send_request(server, {:run, &1}))
      |> Enum.map(fn id ->
        case :gen_server.receive_response(id, :infinity) do
          {:reply, reply} -> reply
          {:error, {_reason, _server}} -> ended(server)
        end
      end)
    end
  end

  # It has its own deadlines.
  defp call(server, request) do
    with :ok <- ensure_started(server), do: GenServer.call(server, request, :infinity)
  catch
    :exit, {_reason, {GenServer, :call, _}} -> ended(server)
  end

  defp ended(server),
    do: {:error, {:not_ready, "#{inspect(server)} ended while it was asked"}}

  # Servers run from their first use on.
  defp ensure_started(server) do
    if Process.whereis(server) do
      :ok
    else
      with {:ok, _started} <- Application.ensure_all_started(:meshx) do
        case Supervisor.start_child(Meshx.Supervisor, server.child_spec(nil)) do
          {:ok, _pid} ->
            :ok

          {:error, {:already_started, _pid}} ->
            :ok

          {:error, reason} ->
            {:error, {:not_ready, "#{inspect(server)} does not start: #{inspect(reason)}"}}
        end
      end
    end
  end

  @doc "`:events` names the process that gets the agent's events about this adapter's proxies."
  def child_spec(name, options \\ []) do
    %{
      id: name,
      start: {__MODULE__, :start_link, [name, options]},
      shutdown: @drain + @farewell + 3_000
    }
  end

  def start_link(name, options),
    do: GenServer.start_link(__MODULE__, {name, options}, name: name)

  ## Server

  @impl true
  def init({name, options}) do
    # So that what it has is given back when it stops.
    Process.flag(:trap_exit, true)
    {:ok, %__MODULE__{name: name, events: options[:events]}}
  end

  @impl true
  def handle_call(:services, _from, state), do: {:reply, state.services, state}
  def handle_call(:upstreams, _from, state), do: {:reply, state.upstreams, state}

  def handle_call({:port, ip, range, direction}, _from, state) do
    key = {ip, range, direction}

    case Ports.find(ip, range, direction, state.ports[key], taken(state, ip)) do
      {:ok, port, next} ->
        {:reply, {:ok, port}, put_in(state.ports[key], next)}

      {:error, :in_use} ->
        text = "no port of #{inspect(range)} at #{:inet.ntoa(ip)} is free"
        {:reply, {:error, {:limit, text}}, state}

      {:error, reason} ->
        text =
          "nobody can listen at #{:inet.ntoa(ip)}: #{:inet.format_error(reason)}, wanted an address of this host"

        {:reply, {:error, {:invalid_request, text}}, state}
    end
  end

  def handle_call({:run, request}, from, state) do
    timer =
      if deadline = request[:deadline], do: Process.send_after(self(), {:late, from}, deadline)

    request = request |> Map.put_new(:lane, Lanes.lane(state, request)) |> Map.put(:from, from)
    state = put_in(state.callers[from], timer)
    {:noreply, state |> own(request[:owner]) |> Lanes.enqueue(request)}
  end

  @impl true
  def handle_info({:meshx_agent, :down}, state), do: {:noreply, Work.lost(state)}
  def handle_info({:meshx_agent, :up}, state), do: {:noreply, Work.again(%{state | up?: true})}

  def handle_info({:meshx_agent, {event, %{id: id} = args}}, state) do
    known? = Map.has_key?(state.services, id) or Map.has_key?(state.lanes, {:service, id})
    if state.events && known?, do: Work.tell_events(state, {event, args})
    {:noreply, state}
  end

  def handle_info({:DOWN, monitor, :process, pid, reason}, state) do
    cond do
      Map.has_key?(state.jobs, monitor) ->
        {:noreply, Lanes.done(state, monitor, reason)}

      monitor == state.client ->
        Process.send_after(self(), :client, @retry_min)
        {:noreply, Work.lost(%{state | client: nil})}

      Map.has_key?(state.owners, pid) ->
        {:noreply, bereaved(%{state | owners: Map.delete(state.owners, pid)}, pid)}

      true ->
        {:noreply, state}
    end
  end

  def handle_info(:client, state) do
    case Work.client(state) do
      {:ok, state} ->
        {:noreply, state}

      {:error, _reason} ->
        Process.send_after(self(), :client, @retry_max)
        {:noreply, state}
    end
  end

  def handle_info({:late, from}, state) do
    case Map.pop(state.callers, from, :answered) do
      {:answered, _callers} ->
        {:noreply, state}

      {_timer, callers} ->
        GenServer.reply(from, {:error, {:timeout, "the agent did not answer in time"}})
        {:noreply, %{state | callers: callers}}
    end
  end

  def handle_info({:again, request}, state), do: {:noreply, Lanes.enqueue(state, request)}
  def handle_info(_other, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    state = drain(state, System.monotonic_time(:millisecond) + @drain)

    services =
      for {id, %{registered?: true, args: %{}}} <- state.services,
          do: {:deregister, %{id: id}}

    upstreams =
      for {_key, %{id: id, connected?: true}} <- state.upstreams,
          do: {:disconnect, %{upstream: id}}

    (services ++ upstreams)
    |> Task.async_stream(fn {command, args} -> :meshx_agent.call(command, args, @farewell) end,
      max_concurrency: Lanes.max_jobs(),
      timeout: @farewell,
      on_timeout: :kill_task,
      ordered: false
    )
    |> Stream.run()

    # Whatever ended us, they may begin anew; not so when all of this VM ends.
    unless match?({:stopping, _}, :init.get_status()) do
      for {id, %{owner: owner}} when is_pid(owner) <- state.services,
          do: send(owner, {state.name, :lost, id})
    end
  end

  # Jobs that still run may bring a registration.
  defp drain(state, deadline) when map_size(state.jobs) > 0 do
    receive do
      {:DOWN, monitor, :process, _pid, reason} when is_map_key(state.jobs, monitor) ->
        # No further one is started.
        {request, jobs} = Map.pop(state.jobs, monitor)
        {_reply, state} = Work.finish(request, Lanes.result(reason), %{state | jobs: jobs})
        drain(state, deadline)
    after
      max(0, deadline - System.monotonic_time(:millisecond)) -> state
    end
  end

  defp drain(state, _deadline), do: state

  ## Owners

  defp own(state, nil), do: state

  defp own(state, owner) do
    if Map.has_key?(state.owners, owner),
      do: state,
      else: put_in(state.owners[owner], Process.monitor(owner))
  end

  # What is still on its way finds its owner gone.
  defp bereaved(state, owner) do
    state =
      for {id, %{owner: ^owner} = service} <- state.services, reduce: state do
        state -> Lanes.enqueue(state, Work.deregistration(id, service.lane))
      end

    for {key, %{owner: ^owner}} <- state.upstreams, reduce: state do
      state -> Lanes.enqueue(state, Work.disconnection(key))
    end
  end

  # Ports that were given to services and upstreams, or to requests for them.
  defp taken(state, ip) do
    queued = for {_lane, waiting} <- state.lanes, request <- :queue.to_list(waiting), do: request

    running = for {request, _fun} <- :queue.to_list(state.waiting), do: request

    for %{args: %{address: {:tcp, text, port}}} <-
          Map.values(state.services) ++
            Map.values(state.upstreams) ++ Map.values(state.jobs) ++ queued ++ running,
        text == to_string(:inet.ntoa(ip)),
        into: MapSet.new(),
        do: port
  end
end
