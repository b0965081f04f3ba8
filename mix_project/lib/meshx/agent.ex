defmodule Meshx.Agent do
  alias Meshx.Agent.{Ask, Options, Server}

  @moduledoc """
  The service mesh behind the meshx agent of this host: the adapter to its control socket
  (`docs/mesh-protocol.md`, "Control socket").

      use MeshxRpc.Server, mesh: [adapter: Meshx.Agent, service: "cart"]
      use MeshxRpc.Client, mesh: [adapter: Meshx.Agent, service: "cart"]

  What a process starts or connects is its own: it ends with that process, and with this VM. After the
  agent was restarted, services are registered again under the same id and address; upstreams are made
  again when they are asked for again, those with a port of their own at once. When a service's address no longer
  works, its process gets `{Meshx.Agent, :lost, service_id}`.

  An upstream has a source service, the one that the mesh's rules know: `proxy` names it; by default it is
  the service of this VM's node. A VM that is no node of the mesh must name it.

  Errors are `{cause, text}` with the causes of `docs/mesh-protocol.md`. What the agent's mesh has not is refused
  with `:unsupported`.

  ## Templates

  A template is `nil` or a keyword list. For `start/4`:

  #{Meshx.Options.docs(Options.service())}

  For `connect/3`:

  #{Meshx.Options.docs(Options.upstream())}
  """
  @behaviour Meshx.ServiceMesh

  @timeout_max 300_000
  # The agent says itself that the time of `:wait` is over.
  @margin 1_000

  @impl Meshx.ServiceMesh
  def start(params, template \\ nil, force_registration? \\ false, timeout \\ 5_000) do
    with {:ok, name, id} <- params(params),
         {:ok, timeout} <- timeout(timeout),
         {:ok, args} <- Options.arguments(Options.service(), template) do
      {wait?, args} = Map.pop(args, :wait)
      args = if wait?, do: Map.put(args, :wait, timeout), else: args

      result =
        Server.register(__MODULE__, %{
          name: name,
          id: id,
          args: Map.merge(args, if(id, do: %{name: name, id: id}, else: %{name: name})),
          owner: self(),
          force?: force_registration? == true,
          deadline: if(wait?, do: timeout + @margin, else: timeout),
          lane: {:service, name}
        })

      with {:error, :pending} <- result,
           do: {:error, {:not_ready, "#{name} is being registered again"}}
    end
  end

  @impl Meshx.ServiceMesh
  def stop(service_id) when is_binary(service_id) or is_atom(service_id) do
    with :unknown <- Server.deregister(__MODULE__, to_string(service_id)),
         do: invalid("service #{service_id} was not started by this VM")
  end

  def stop(other), do: invalid("service id is #{inspect(other)}, wanted an atom or a binary")

  @impl Meshx.ServiceMesh
  def connect(upstreams, template \\ nil, proxy \\ nil) when is_list(upstreams) do
    with {:ok, args} <- Options.arguments(Options.upstream(), template),
         {:ok, as} <- source(proxy) do
      Meshx.ServiceMesh.each(upstreams, &upstream(&1, args, as), fn requests ->
        Server.connect(__MODULE__, requests)
      end)
    end
  end

  @impl Meshx.ServiceMesh
  def disconnect(upstreams, _proxy_id \\ nil, restart_proxy? \\ false) when is_list(upstreams) do
    keys = for upstream <- upstreams, {:ok, name, id} <- [params(upstream)], do: {self(), name, id}

    with answers when is_list(answers) <-
           Server.disconnect(__MODULE__, keys, restart_proxy? == true),
         do: {:ok, for({{_owner, name, _id}, :ok} <- Enum.zip(keys, answers), do: name)}
  end

  @impl Meshx.ServiceMesh
  def refusal(upstream) do
    with {:ok, name, _id} <- params(upstream),
         {:ok, %{cause: cause, text: text, at: at} = refusal}
         when is_atom(cause) and is_binary(text) and is_integer(at) <-
           :meshx_agent.call(:refusal, %{node: name}, 1_000) do
      {:ok, Map.take(refusal, [:cause, :text, :at])}
    else
      _nothing_known -> :error
    end
  end

  @doc false
  def child_spec(_argument), do: Server.child_spec(__MODULE__, [])

  defp upstream(params, args, as) do
    with {:ok, name, id} <- params(params) do
      args = Map.put(args, :service, name)
      args = if id, do: Map.put(args, :instance, id), else: args

      {:ok,
       %{
         key: {self(), name, id},
         owner: self(),
         reuse?: false,
         args: fn -> with {:ok, as} <- own(as), do: {:ok, Map.put(args, :as, as)} end
       }}
    end
  end

  defp source(nil), do: {:ok, nil}

  defp source(proxy) do
    with {:ok, name, _id} <- params(proxy), do: {:ok, name}
  end

  defp own(nil) do
    me = Atom.to_string(node())

    with {:ok, %{nodes: nodes}} <- Ask.ask(:names, %{}) do
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

  defp own(as), do: {:ok, as}

  defp params({name, nil}), do: params(name)

  defp params({name, id}) when is_binary(id) or is_atom(id),
    do: params(name, to_string(id))

  defp params(%{name: name, id: id}), do: params({name, id})
  defp params(%{name: name}), do: params(name)
  defp params(name) when is_binary(name) or is_atom(name), do: params(name, nil)

  defp params(other),
    do: invalid("service is #{inspect(other)}, wanted a name, {name, id} or a map with :name")

  defp params(name, id) when (is_binary(name) or is_atom(name)) and name not in [nil, ""],
    do: {:ok, to_string(name), id}

  defp params(name, _id),
    do: invalid("service name is #{inspect(name)}, wanted an atom or a binary")

  defp timeout(:infinity), do: {:ok, @timeout_max}

  defp timeout(timeout) when is_integer(timeout) and timeout > 0,
    do: {:ok, min(timeout, @timeout_max)}

  defp timeout(other),
    do: invalid("timeout is #{inspect(other)}, wanted milliseconds (at least 1) or :infinity")

  defp invalid(text), do: {:error, {:invalid_request, text}}
end
