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
  require Logger

  alias Meshx.Agent.{Ask, Ports}

  # The agent takes 64 unanswered requests of a VM. Two adapters leave room for others.
  @max_jobs 24
  @retry_min 500
  @retry_max 30_000
  # How long a server that stops waits for jobs, and for the agent to let go.
  @drain 2_000
  @farewell 5_000
  # What may be otherwise at the next try.
  @passing_causes [:not_ready, :timeout, :unreachable, :limit, :name_taken]

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

      :error ->
        text = "no port of #{inspect(range)} at #{:inet.ntoa(ip)} is free"
        {:reply, {:error, {:limit, text}}, state}
    end
  end

  def handle_call({:run, request}, from, state) do
    timer =
      if deadline = request[:deadline], do: Process.send_after(self(), {:late, from}, deadline)

    request = request |> Map.put_new(:lane, lane(state, request)) |> Map.put(:from, from)
    state = put_in(state.callers[from], timer)
    {:noreply, state |> own(request[:owner]) |> enqueue(request)}
  end

  @impl true
  def handle_info({:meshx_agent, :down}, state), do: {:noreply, lost(state)}
  def handle_info({:meshx_agent, :up}, state), do: {:noreply, again(%{state | up?: true})}

  def handle_info({:meshx_agent, {event, %{id: id} = args}}, state) do
    known? = Map.has_key?(state.services, id) or Map.has_key?(state.lanes, {:service, id})
    if state.events && known?, do: tell_events(state, {event, args})
    {:noreply, state}
  end

  def handle_info({:DOWN, monitor, :process, pid, reason}, state) do
    cond do
      Map.has_key?(state.jobs, monitor) ->
        {:noreply, done(state, monitor, reason)}

      monitor == state.client ->
        Process.send_after(self(), :client, @retry_min)
        {:noreply, lost(%{state | client: nil})}

      Map.has_key?(state.owners, pid) ->
        {:noreply, bereaved(%{state | owners: Map.delete(state.owners, pid)}, pid)}

      true ->
        {:noreply, state}
    end
  end

  def handle_info(:client, state) do
    case client(state) do
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

  def handle_info({:again, request}, state), do: {:noreply, enqueue(state, request)}
  def handle_info(_other, state), do: {:noreply, state}

  @impl true
  def terminate(reason, state) do
    state = drain(state, System.monotonic_time(:millisecond) + @drain)

    services =
      for {id, %{registered?: true, args: %{}}} <- state.services,
          do: {:deregister, %{id: id}}

    upstreams =
      for {_key, %{id: id, connected?: true}} <- state.upstreams,
          do: {:disconnect, %{upstream: id}}

    (services ++ upstreams)
    |> Task.async_stream(fn {command, args} -> :meshx_agent.call(command, args, @farewell) end,
      max_concurrency: @max_jobs,
      timeout: @farewell,
      on_timeout: :kill_task,
      ordered: false
    )
    |> Stream.run()

    unless reason == :normal or reason == :shutdown or match?({:shutdown, _}, reason) do
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
        {_reply, state} = finish(request, result(reason), %{state | jobs: jobs})
        drain(state, deadline)
    after
      max(0, deadline - System.monotonic_time(:millisecond)) -> state
    end
  end

  defp drain(state, _deadline), do: state

  ## Lanes and jobs

  defp lane(state, %{id: id}) do
    case state.services do
      %{^id => %{lane: lane}} -> lane
      _unknown -> {:service, id}
    end
  end

  defp lane(_state, _request), do: nil

  defp enqueue(state, %{lane: lane} = request) do
    case state.lanes do
      %{^lane => waiting} -> put_in(state.lanes[lane], :queue.in(request, waiting))
      _free -> run_next(put_in(state.lanes[lane], :queue.from_list([request])), lane)
    end
  end

  defp run_next(state, lane) do
    case :queue.out(state.lanes[lane]) do
      {:empty, _waiting} ->
        %{state | lanes: Map.delete(state.lanes, lane)}

      {{:value, request}, waiting} ->
        case begin(request, put_in(state.lanes[lane], waiting)) do
          {:reply, reply, state} -> state |> answer(request, reply) |> run_next(lane)
          {:job, fun, state} -> start_job(state, {request, fun})
        end
    end
  end

  defp start_job(state, job) when map_size(state.jobs) >= @max_jobs,
    do: %{state | waiting: :queue.in(job, state.waiting)}

  defp start_job(state, {request, fun}) do
    {_pid, monitor} = spawn_monitor(fn -> exit({:done, fun.()}) end)
    put_in(state.jobs[monitor], Map.put(request, :epoch, state.epoch))
  end

  defp done(state, monitor, reason) do
    {request, jobs} = Map.pop(state.jobs, monitor)
    {reply, state} = finish(request, result(reason), %{state | jobs: jobs})
    state = state |> answer(request, reply) |> run_next(request.lane)

    case :queue.out(state.waiting) do
      {{:value, job}, waiting} -> start_job(%{state | waiting: waiting}, job)
      {:empty, _waiting} -> state
    end
  end

  defp result({:done, result}), do: result

  # Not the reason itself: it may have arguments, and one of them is a token.
  defp result(_crash), do: {:error, {:not_ready, "asking the agent failed, see the log"}}

  defp answer(state, %{from: nil}, _reply), do: state

  defp answer(state, %{from: from}, reply) do
    case Map.pop(state.callers, from, :answered) do
      {:answered, _callers} ->
        state

      {timer, callers} ->
        if timer, do: Process.cancel_timer(timer)
        GenServer.reply(from, reply)
        %{state | callers: callers}
    end
  end

  # Nobody wants it any more: the caller gave up, or the owner ended.
  defp unwanted?(%{from: from} = request, state) do
    (from != nil and not Map.has_key?(state.callers, from)) or not alive?(request[:owner])
  end

  defp alive?(nil), do: true
  defp alive?(owner), do: Process.alive?(owner)

  ## What begins: a reply, or a job

  defp begin(%{do: :register} = request, state) do
    known = known(state.services, request)

    cond do
      unwanted?(request, state) ->
        {:reply, {:error, {:timeout, "the caller gave up"}}, state}

      known == nil ->
        job(state, fn -> Ask.register(request.args) end)

      alive?(known.owner) and request.force? and known.owner != request.owner ->
        text =
          "service #{known.id} is registered by another process of this VM, #{inspect(known.owner)}"

        {:reply, {:error, {:name_taken, text}}, state}

      alive?(known.owner) and not request.force? ->
        {:reply, if(known.registered?, do: {:ok, :already_started}, else: {:error, :pending}),
         state}

      true ->
        job(forget(state, known.id), fn ->
          _ = Ask.ask(:deregister, %{id: known.id})
          Ask.register(request.args)
        end)
    end
  end

  defp begin(%{do: :note, id: id} = request, state) do
    service =
      request
      |> Map.drop([:do, :from])
      |> Map.merge(%{args: nil, owner: nil, address: nil, registered?: true})

    {:reply, :ok, %{state | services: Map.put_new(state.services, id, service)}}
  end

  defp begin(%{do: :deregister, id: id}, state) do
    case state.services do
      %{^id => %{args: nil}} -> {:reply, :ok, forget(state, id)}
      %{^id => _service} -> job(forget(state, id), fn -> Ask.ask(:deregister, %{id: id}) end)
      _unknown -> {:reply, :unknown, state}
    end
  end

  # After the agent's restart.
  defp begin(%{do: :again, id: id} = request, state) do
    case state.services do
      %{^id => %{registered?: false} = service} ->
        job(state, fn ->
          if request[:anew?], do: Ask.ask(:deregister, %{id: id})

          with :ok <- Ask.present(service.address),
               do: Ask.register(Map.delete(service.args, :wait))
        end)

      _gone_or_there ->
        {:reply, :ok, state}
    end
  end

  defp begin(%{do: :connect, key: key} = request, state) do
    case {state.upstreams, request.reuse?} do
      {%{^key => %{connected?: true, address: address}}, true} ->
        {:reply, {:ok, address}, state}

      {%{^key => %{args: args}}, true} ->
        job(state, fn -> Ask.connect(args) end)

      {%{^key => %{id: id}}, false} ->
        job(%{state | upstreams: Map.delete(state.upstreams, key)}, fn ->
          _ = Ask.ask(:disconnect, %{upstream: id, cut: false})
          Ask.connect(request.args)
        end)

      {_unknown, _reuse?} ->
        job(state, fn -> Ask.connect(request.args) end)
    end
  end

  defp begin(%{do: :reconnect, key: key}, state) do
    case state.upstreams do
      %{^key => %{connected?: false, args: args}} -> job(state, fn -> Ask.connect(args) end)
      _gone_or_there -> {:reply, :ok, state}
    end
  end

  defp begin(%{do: :disconnect, key: key} = request, state) do
    case Map.pop(state.upstreams, key) do
      {nil, _upstreams} ->
        {:reply, :unknown, state}

      {%{id: id}, upstreams} ->
        job(%{state | upstreams: upstreams}, fn ->
          Ask.ask(:disconnect, %{upstream: id, cut: request.cut?})
        end)
    end
  end

  defp job(state, fun) do
    case client(state) do
      {:ok, state} -> {:job, fun, state}
      {:error, _reason} = error -> {:job, fn -> error end, state}
    end
  end

  defp known(services, %{id: id}) when id != nil, do: services[id]

  defp known(services, %{name: name}),
    do: Enum.find_value(services, fn {_id, service} -> service.name == name && service end)

  ## What is finished: its reply

  defp finish(%{do: :register} = request, {:ok, %{id: id} = made}, state) do
    service =
      request
      |> Map.drop([:do, :from, :force?, :deadline, :epoch])
      |> Map.merge(%{
        id: id,
        args: Map.merge(request.args, %{id: id, address: made.wire}),
        address: made.address,
        registered?: current?(request, state)
      })

    state = put_in(state.services[id], service)

    state =
      cond do
        unwanted?(request, state) -> enqueue(state, deregistration(id, request.lane))
        service.registered? -> state
        true -> enqueue(state, again(id, request.lane, %{anew?: true}))
      end

    {{:ok, id, made.address}, state}
  end

  defp finish(%{do: :again, id: id} = request, result, state) do
    case {state.services, result} do
      {%{^id => service}, {:ok, _registered}} ->
        service =
          Map.drop(%{service | registered?: current?(request, state)}, [:tries, :failure, :timer])

        {:ok, put_in(state.services[id], service)}

      {%{^id => service}, {:error, reason}} ->
        {:ok, not_again(state, service, reason, request)}

      _gone ->
        {:ok, state}
    end
  end

  defp finish(%{do: doing, key: key} = request, result, state)
       when doing in [:connect, :reconnect] do
    known = state.upstreams[key]

    case result do
      {:ok, made} ->
        upstream =
          (known || Map.drop(request, [:do, :lane, :from, :key, :reuse?, :epoch]))
          |> Map.drop([:tries, :failure, :timer])
          |> Map.merge(made)
          |> Map.put(:connected?, current?(request, state))

        cond do
          unwanted?(request, state) ->
            state = put_in(state.upstreams[key], upstream)
            {{:ok, made.address}, enqueue(state, disconnection(key))}

          upstream.connected? ->
            {{:ok, made.address}, put_in(state.upstreams[key], upstream)}

          fixed?(upstream) ->
            {{:ok, made.address}, reconnect(put_in(state.upstreams[key], upstream), key)}

          true ->
            {{:error, {:unreachable, "the agent went away"}}, state}
        end

      {:error, reason} when known != nil and doing == :reconnect ->
        {{:error, reason}, retry(state, :upstreams, key, reason, request)}

      {:error, reason} ->
        {{:error, reason}, state}
    end
  end

  defp finish(%{do: :deregister, id: id}, _result, state) do
    tell_events(state, {:gone, id})
    {:ok, state}
  end

  defp finish(%{do: :disconnect}, _result, state), do: {:ok, state}

  defp finish(%{do: :register} = request, {:error, reason}, state) do
    # Its proxy may have printed something.
    if request.id, do: tell_events(state, {:gone, request.id})
    {{:error, reason}, state}
  end

  # Whether it was made through the connection that there is now.
  defp current?(request, state), do: request.epoch == state.epoch

  # Its owner starts anew; what belongs to the VM has nobody who would.
  defp not_again(state, %{owner: owner, id: id} = service, reason, request) do
    passing? = is_tuple(reason) and elem(reason, 0) in @passing_causes

    if owner == nil or passing? do
      retry(state, :services, id, reason, request)
    else
      Logger.warning(
        "#{inspect(state.name)}: service #{id} is not registered again: #{inspect(reason)}"
      )

      send(service.owner, {state.name, :lost, id})
      forget(state, id)
    end
  end

  # Its return begins anew.
  defp retry(%{up?: false} = state, _kind, _key, _reason, _request), do: state

  defp retry(state, kind, key, reason, request) do
    entry = state |> Map.fetch!(kind) |> Map.fetch!(key)

    if entry[:failure] != reason do
      Logger.warning(
        "#{inspect(state.name)}: #{inspect(key)} is not there again: #{inspect(reason)}; trying on"
      )
    end

    if entry[:timer], do: Process.cancel_timer(entry.timer)
    tries = Map.get(entry, :tries, 0)
    timer = Process.send_after(self(), {:again, Map.delete(request, :epoch)}, backoff(tries))
    entry = Map.merge(entry, %{tries: tries + 1, failure: reason, timer: timer})
    Map.update!(state, kind, &Map.put(&1, key, entry))
  end

  defp backoff(tries) do
    ceiling = min(@retry_max, @retry_min * Bitwise.bsl(1, min(tries, 16)))
    div(ceiling, 2) + :rand.uniform(div(ceiling, 2))
  end

  ## The agent comes and goes

  defp client(%{client: nil} = state) do
    with {:ok, pid} <- :meshx_agent.start(),
         {:ok, %{state: now}} <- :meshx_agent.subscribe() do
      state = %{state | client: Process.monitor(pid)}
      {:ok, if(now == :up, do: again(%{state | up?: true}), else: state)}
    else
      {:error, {cause, text}} when is_binary(text) ->
        {:error, {cause, text}}

      {:error, reason} ->
        {:error, {:not_ready, "the agent's client does not start: #{inspect(reason)}"}}
    end
  end

  defp client(state), do: {:ok, state}

  defp lost(state) do
    services =
      Map.new(state.services, fn
        {id, %{args: nil} = service} -> {id, service}
        {id, service} -> {id, %{service | registered?: false}}
      end)

    # The agent chooses another socket for those that it chose one for: they are asked for again.
    upstreams =
      for {key, upstream} <- state.upstreams,
          fixed?(upstream),
          into: %{},
          do: {key, %{upstream | connected?: false}}

    %{state | up?: false, epoch: state.epoch + 1, services: services, upstreams: upstreams}
  end

  defp again(state) do
    state =
      for {id, %{registered?: false} = service} <- state.services, reduce: state do
        state -> enqueue(state, again(id, service.lane))
      end

    for {key, %{connected?: false}} <- state.upstreams, reduce: state do
      state -> reconnect(state, key)
    end
  end

  defp fixed?(%{args: args}), do: match?(%{address: {:tcp, _ip, _port}}, args)

  defp reconnect(state, key), do: enqueue(state, reconnection(key))

  defp reconnection(key), do: %{do: :reconnect, key: key, lane: {:upstream, key}, from: nil}

  defp again(id, lane, more \\ %{}),
    do: Map.merge(%{do: :again, id: id, lane: lane, from: nil}, more)

  defp deregistration(id, lane), do: %{do: :deregister, id: id, lane: lane, from: nil}

  defp disconnection(key),
    do: %{do: :disconnect, key: key, cut?: true, lane: {:upstream, key}, from: nil}

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
        state -> enqueue(state, deregistration(id, service.lane))
      end

    for {key, %{owner: ^owner}} <- state.upstreams, reduce: state do
      state -> enqueue(state, disconnection(key))
    end
  end

  defp forget(state, id), do: %{state | services: Map.delete(state.services, id)}

  defp tell_events(%{events: nil}, _event), do: :ok

  defp tell_events(%{events: events}, event) do
    if pid = Process.whereis(events), do: send(pid, event)
    :ok
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
