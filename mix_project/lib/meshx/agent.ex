defmodule Meshx.Agent do
  @moduledoc """
  The service mesh behind the meshx agent of this host: the adapter to its control socket
  (`docs/mesh-protocol.md`, "Control socket").

      use MeshxRpc.Server, mesh: [adapter: Meshx.Agent, service: "cart"]
      use MeshxRpc.Client, mesh: [adapter: Meshx.Agent, service: "cart"]

  What a process starts or connects is its own: it ends with that process, and with this VM. After the
  agent was restarted, services are registered again under the same id and address; upstreams are made
  again when they are asked for again. When a service's address no longer works, its process gets
  `{Meshx.Agent, :lost, service_id}`.

  An upstream has a source service, the one that the mesh's rules know: `proxy` names it; by default it is
  the service of this VM's node. A VM that is no node of the mesh must name it.

  There are no templates: `template` must be `nil`. Errors are `{cause, text}` with the causes of
  `docs/mesh-protocol.md`.
  """
  @behaviour Meshx.ServiceMesh
  use GenServer, restart: :permanent
  require Logger

  @retry 1_000

  @impl Meshx.ServiceMesh
  def start(params, template \\ nil, force_registration? \\ false, timeout \\ 5_000)

  def start(params, nil, force_registration?, timeout) do
    with {:ok, name, id} <- params(params),
         do: ask({:start, name, id, force_registration?, timeout})
  end

  def start(_params, template, _force_registration?, _timeout), do: template_error(template)

  @impl Meshx.ServiceMesh
  def stop(service_id), do: ask({:stop, to_string(service_id)})

  @impl Meshx.ServiceMesh
  def connect(upstreams, template \\ nil, proxy \\ nil)

  def connect(upstreams, nil, proxy) when is_list(upstreams) do
    as = source(proxy)
    {:ok, Enum.map(upstreams, &connect_one(&1, as))}
  end

  def connect(_upstreams, template, _proxy), do: template_error(template)

  @impl Meshx.ServiceMesh
  def disconnect(upstreams, _proxy_id \\ nil, _restart_proxy? \\ false) when is_list(upstreams) do
    deleted =
      for upstream <- upstreams,
          {:ok, name, _id} <- [params(upstream)],
          ask({:disconnect, name}) == :ok,
          do: name

    {:ok, deleted}
  end

  @doc false
  def start_link(_argument), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  # Callers

  defp connect_one(upstream, as) do
    with {:ok, name, instance} <- params(upstream), do: ask({:connect, name, instance, as})
  end

  defp source(nil), do: nil
  defp source({name, _id}), do: to_string(name)
  defp source(name), do: to_string(name)

  defp params({name, id}) when id != nil, do: params(name, to_string(id))
  defp params(%{name: name} = params), do: params(name, params[:id] && to_string(params[:id]))
  defp params(name) when is_binary(name) or is_atom(name), do: params(name, nil)

  defp params(other),
    do: invalid("service is #{inspect(other)}, wanted a name, {name, id} or a map with :name")

  defp params(name, id) when (is_binary(name) or is_atom(name)) and name not in [nil, ""],
    do: {:ok, to_string(name), id}

  defp params(name, _id),
    do: invalid("service name is #{inspect(name)}, wanted an atom or a binary")

  defp template_error(template),
    do:
      invalid("template is #{inspect(template, limit: 5)}, wanted nil: the agent has no templates")

  defp invalid(text), do: {:error, {:invalid_request, text}}

  # The server runs from the first use on. It waits for the agent at most as long as `:meshx_agent` does.
  defp ask(request) do
    with :ok <- ensure_started(), do: GenServer.call(__MODULE__, request, :infinity)
  end

  defp ensure_started do
    if Process.whereis(__MODULE__) do
      :ok
    else
      with {:ok, _started} <- Application.ensure_all_started(:meshx) do
        case Supervisor.start_child(Meshx.Supervisor, {__MODULE__, nil}) do
          {:ok, _pid} ->
            :ok

          {:error, {:already_started, _pid}} ->
            :ok

          {:error, reason} ->
            {:error, {:not_ready, "Meshx.Agent does not start: #{inspect(reason)}"}}
        end
      end
    end
  end

  # Server: services and upstreams of this VM, each with the process that owns it

  @impl GenServer
  def init(nil), do: {:ok, %{client: nil, services: %{}, upstreams: %{}, owners: %{}}}

  @impl GenServer
  def handle_call({:start, name, id, force?, timeout}, {owner, _tag}, state) do
    known =
      Enum.find(state.services, fn {known, service} ->
        service.name == name and id in [nil, known]
      end)

    case {known, force?} do
      {{_id, %{owner: other}}, true} when other != owner ->
        text = "service #{name} is registered by another process of this VM, #{inspect(other)}"
        {:reply, {:error, {:name_taken, text}}, state}

      {{_id, _service}, false} ->
        {:reply, {:ok, :already_started}, state}

      {{known_id, _service}, true} ->
        state = deregister(state, known_id)
        register(state, owner, name, id, timeout)

      {nil, _force?} ->
        register(state, owner, name, id, timeout)
    end
  end

  def handle_call({:stop, id}, _from, state) do
    if Map.has_key?(state.services, id),
      do: {:reply, :ok, deregister(state, id)},
      else: {:reply, invalid("service #{id} was not started by this VM"), state}
  end

  def handle_call({:connect, name, instance, as}, {owner, _tag}, state) do
    state = disconnect_upstream(state, {owner, name})

    with {:ok, state} <- client(state),
         {:ok, as} <- own_service(as),
         args =
           Map.merge(%{service: name, as: as}, if(instance, do: %{instance: instance}, else: %{})),
         {:ok, %{upstream: id, address: address}} <- :meshx_agent.call(:connect, args),
         {:ok, address} <- address(address) do
      state = put_in(state.upstreams[{owner, name}], id)
      {:reply, {:ok, address}, own(state, owner)}
    else
      {:error, reason} -> {:reply, {:error, reason}, state}
    end
  end

  def handle_call({:disconnect, name}, {owner, _tag}, state) do
    reply = if Map.has_key?(state.upstreams, {owner, name}), do: :ok, else: :unknown
    {:reply, reply, disconnect_upstream(state, {owner, name})}
  end

  @impl GenServer
  def handle_info({:meshx_agent, :down}, state), do: {:noreply, %{state | upstreams: %{}}}
  def handle_info({:meshx_agent, :up}, state), do: {:noreply, again(state)}

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, %{client: monitor} = state) do
    Process.send_after(self(), :client, @retry)
    {:noreply, %{state | client: nil, upstreams: %{}}}
  end

  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    ids = for {id, %{owner: ^pid}} <- state.services, do: id
    keys = for {{^pid, _name} = key, _id} <- state.upstreams, do: key
    state = Enum.reduce(ids, state, &deregister(&2, &1))
    state = Enum.reduce(keys, state, &disconnect_upstream(&2, &1))
    {:noreply, %{state | owners: Map.delete(state.owners, pid)}}
  end

  def handle_info(:client, state) do
    case client(state) do
      {:ok, state} ->
        {:noreply, again(state)}

      {:error, _reason} ->
        Process.send_after(self(), :client, @retry)
        {:noreply, state}
    end
  end

  def handle_info(_other, state), do: {:noreply, state}

  defp client(%{client: nil} = state) do
    with {:ok, pid} <- :meshx_agent.start(),
         {:ok, _state} <- :meshx_agent.subscribe(),
         {:ok, _hello} <- :meshx_agent.await() do
      {:ok, %{state | client: Process.monitor(pid)}}
    else
      {:error, {cause, text}} when is_binary(text) ->
        {:error, {cause, text}}

      {:error, reason} ->
        {:error, {:not_ready, "the agent's client does not start: #{inspect(reason)}"}}
    end
  end

  defp client(state) do
    with {:ok, _hello} <- :meshx_agent.await(), do: {:ok, state}
  end

  defp register(state, owner, name, id, timeout) do
    args = Map.merge(%{name: name}, if(id, do: %{id: id}, else: %{}))

    with {:ok, state} <- client(state),
         {:ok, %{id: id, address: address} = result} <-
           :meshx_agent.call(:register_service, args, timeout),
         {:ok, address} <- address(address) do
      service = %{name: name, owner: owner, wire: result.address, address: address}
      {:reply, {:ok, id, address}, own(put_in(state.services[id], service), owner)}
    else
      {:error, reason} -> {:reply, {:error, reason}, state}
    end
  end

  # The agent came back and knows nothing of us.
  defp again(state) do
    Enum.reduce(state.services, state, fn {id, service}, state ->
      with :ok <- present(service.address),
           args = %{name: service.name, id: id, address: service.wire},
           {:ok, _registered} <- :meshx_agent.call(:register_service, args) do
        state
      else
        reason ->
          Logger.warning("Meshx.Agent: service #{id} is not registered again: #{inspect(reason)}")
          send(service.owner, {__MODULE__, :lost, id})
          %{state | services: Map.delete(state.services, id)}
      end
    end)
  end

  defp present({:uds, path}),
    do: if(File.exists?(path), do: :ok, else: {:error, "its socket #{path} is gone"})

  defp present(_tcp), do: :ok

  defp deregister(state, id) do
    _ = :meshx_agent.call(:deregister, %{id: id})
    %{state | services: Map.delete(state.services, id)}
  end

  defp disconnect_upstream(state, key) do
    case Map.pop(state.upstreams, key) do
      {nil, _upstreams} ->
        state

      {id, upstreams} ->
        _ = :meshx_agent.call(:disconnect, %{upstream: id})
        %{state | upstreams: upstreams}
    end
  end

  defp own_service(nil) do
    me = Atom.to_string(node())

    with {:ok, %{nodes: nodes}} <- :meshx_agent.call(:names, %{}) do
      case Enum.find(nodes, &match?(%{node: ^me, local: true}, &1)) do
        %{service: service} ->
          {:ok, service}

        nil ->
          invalid(
            "this VM is no node of the mesh, so the service that calls must be named: mesh: [as: ...]"
          )
      end
    end
  end

  defp own_service(as), do: {:ok, as}

  defp own(state, owner) do
    if Map.has_key?(state.owners, owner),
      do: state,
      else: put_in(state.owners[owner], Process.monitor(owner))
  end

  defp address({:uds, path}) when is_binary(path), do: {:ok, {:uds, path}}

  defp address({:tcp, ip, port}) when is_binary(ip) and port in 1..65_535 do
    case :inet.parse_strict_address(to_charlist(ip)) do
      {:ok, ip} -> {:ok, {:tcp, ip, port}}
      {:error, _} -> invalid("the agent's address has the ip #{inspect(ip)}")
    end
  end

  defp address(other),
    do: invalid("the agent's address is #{inspect(other)}, wanted {:tcp, ip, port} or {:uds, path}")
end
