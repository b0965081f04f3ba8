defmodule Meshx.Agent.Server.Work do
  @moduledoc false
  # What a request does: what begins it, what it changes when it is finished, and what is made again after the agent's
  # restart.

  require Logger

  alias Meshx.Agent.Ask
  alias Meshx.Agent.Server.Lanes

  @retry_min 500
  @retry_max 30_000
  # What may be otherwise at the next try.
  @passing_causes [:not_ready, :timeout, :unreachable, :limit, :name_taken]

  ## What begins: a reply, or a job

  def begin(%{do: :register} = request, state) do
    known = known(state.services, request)

    cond do
      Lanes.unwanted?(request, state) ->
        {:reply, {:error, {:timeout, "the caller gave up"}}, state}

      known == nil ->
        job(state, fn -> Ask.register(request.args) end)

      Lanes.alive?(known.owner) and request.force? and known.owner != request.owner ->
        text =
          "service #{known.id} is registered by another process of this VM, #{inspect(known.owner)}"

        {:reply, {:error, {:name_taken, text}}, state}

      Lanes.alive?(known.owner) and not request.force? ->
        {:reply, if(known.registered?, do: {:ok, :already_started}, else: {:error, :pending}),
         state}

      true ->
        job(forget(state, known.id), fn ->
          _ = Ask.ask(:deregister, %{id: known.id})
          Ask.register(request.args)
        end)
    end
  end

  def begin(%{do: :note, id: id} = request, state) do
    service =
      request
      |> Map.drop([:do, :from])
      |> Map.merge(%{args: nil, owner: nil, address: nil, registered?: true})

    {:reply, :ok, %{state | services: Map.put_new(state.services, id, service)}}
  end

  def begin(%{do: :deregister, id: id}, state) do
    case state.services do
      %{^id => %{args: nil}} -> {:reply, :ok, forget(state, id)}
      %{^id => _service} -> job(forget(state, id), fn -> Ask.ask(:deregister, %{id: id}) end)
      _unknown -> {:reply, :unknown, state}
    end
  end

  # After the agent's restart.
  def begin(%{do: :again, id: id} = request, state) do
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

  def begin(%{do: :connect, key: key} = request, state) do
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

  def begin(%{do: :reconnect, key: key}, state) do
    case state.upstreams do
      %{^key => %{connected?: false, args: args}} -> job(state, fn -> Ask.connect(args) end)
      _gone_or_there -> {:reply, :ok, state}
    end
  end

  def begin(%{do: :disconnect, key: key} = request, state) do
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

  def finish(%{do: :register} = request, {:ok, %{id: id} = made}, state) do
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
        Lanes.unwanted?(request, state) -> Lanes.enqueue(state, deregistration(id, request.lane))
        service.registered? -> state
        true -> Lanes.enqueue(state, again(id, request.lane, %{anew?: true}))
      end

    {{:ok, id, made.address}, state}
  end

  def finish(%{do: :again, id: id} = request, result, state) do
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

  def finish(%{do: doing, key: key} = request, result, state)
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
          Lanes.unwanted?(request, state) ->
            state = put_in(state.upstreams[key], upstream)
            {{:ok, made.address}, Lanes.enqueue(state, disconnection(key))}

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

  def finish(%{do: :deregister, id: id}, _result, state) do
    tell_events(state, {:gone, id})
    {:ok, state}
  end

  def finish(%{do: :disconnect}, _result, state), do: {:ok, state}

  def finish(%{do: :register} = request, {:error, reason}, state) do
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

  def client(%{client: nil} = state) do
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

  def client(state), do: {:ok, state}

  def lost(state) do
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

  def again(state) do
    state =
      for {id, %{registered?: false} = service} <- state.services, reduce: state do
        state -> Lanes.enqueue(state, again(id, service.lane))
      end

    for {key, %{connected?: false}} <- state.upstreams, reduce: state do
      state -> reconnect(state, key)
    end
  end

  defp fixed?(%{args: args}), do: match?(%{address: {:tcp, _ip, _port}}, args)

  defp reconnect(state, key), do: Lanes.enqueue(state, reconnection(key))

  defp reconnection(key), do: %{do: :reconnect, key: key, lane: {:upstream, key}, from: nil}

  defp again(id, lane, more \\ %{}),
    do: Map.merge(%{do: :again, id: id, lane: lane, from: nil}, more)

  def deregistration(id, lane), do: %{do: :deregister, id: id, lane: lane, from: nil}

  def disconnection(key),
    do: %{do: :disconnect, key: key, cut?: true, lane: {:upstream, key}, from: nil}

  def forget(state, id), do: %{state | services: Map.delete(state.services, id)}

  def tell_events(%{events: nil}, _event), do: :ok

  def tell_events(%{events: events}, event) do
    if pid = Process.whereis(events), do: send(pid, event)
    :ok
  end
end
