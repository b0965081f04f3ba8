defmodule MeshxConsul do
  alias Meshx.Agent.{Ask, Server}
  alias MeshxConsul.{Config, Reporter, Template}

  @moduledoc """
  The service mesh adapter of Meshx 0.1: services and upstreams in Consul, with Mustache templates.

      iex> MeshxConsul.start("cart")
      {:ok, "cart-h1", {:tcp, {127, 0, 0, 1}, 1024}}
      iex> MeshxConsul.connect(["cart"])
      {:ok, [ok: {:tcp, {127, 0, 0, 1}, 65535}]}

  The agent of this host (`meshx agent`) does the work: it talks to Consul, refreshes the checks, carries the bytes
  with mutual TLS or runs the proxies. `Meshx.Agent` is the adapter to it without templates.

  Services and upstreams belong to this VM: they live until `stop/1` and `disconnect/3`, or until the application
  `:meshx` or the VM ends, however it ends. After a restart of the agent they are registered again under their ids and
  addresses. Only an upstream that is a Unix socket has another address then: ask `connect/3` again.

  What is different from 0.1, and why, is in docs/migration.md.

  ## Configuration

  `config :meshx_consul`, read and checked when the application `:meshx` starts, and again at each call:

  #{Meshx.Options.docs(Config.schema())}

  Variables of `:cli_env` reach a proxy command by way of `env`, and are to be seen in the list of processes until
  the command runs: no place for secrets but `CONSUL_HTTP_TOKEN`, which goes another way.

  ## Templates

  A template is made of maps, lists and strings. The strings are [Mustache](https://mustache.github.io/): variables,
  sections, inverted sections and comments; nothing is escaped. `"{{$port$}}"` becomes the value itself, a
  number here. A variable that is not among the parameters is an error.

  The parameters are `"name"`, `"id"`, `"address"` and `"port"`, or the map that `start/4` or `connect/3` is given, to which
  `"address"` and `"port"` are added: a free port of `:tcp_address`, unless the map has both. With
  `"socket" => path` it is a Unix socket, with `"socket" => true` one that the agent names.

  For `start/4` it is a keyword list; what it lacks is taken from here:

      [
        registration: %{
          "ID" => "{{id}}",
          "Name" => "{{name}}",
          "Checks" => [%{"Name" => "TTL check", "CheckID" => "ttl:{{id}}", "TTL" => "10s"}]
        },
        ttl: %{id: "ttl:{{id}}", status: "passing", ttl: 5_000}
      ]

    * `:registration` - fields of [Consul's registration](https://developer.hashicorp.com/consul/docs/services/configuration/services-configuration-reference);
      the agent's reference (docs/mesh-protocol.md) says which it takes. Of a check with `"TTL"` the agent takes
      that and `"DeregisterCriticalServiceAfter"`; it refreshes the check itself. `"SocketPath"` is a Unix
      socket that the service listens on
    * `:ttl` - 0.1's worker for that check; `:status` can only be `"passing"`, the rest has no effect
    * `:proxy` - the command line of a proxy that the agent starts, restarts and stops, `:envoy` or `:connect_proxy` for
      those of Consul, or `nil` for no program: the agent carries the bytes. Without it the agent does as it was told
      by `--data-plane`, which by default is the same

  For `connect/3` it is a map:

      %{
        "DestinationName" => "{{name}}",
        "LocalBindAddress" => "{{address}}",
        "LocalBindPort" => "{{$port$}}"
      }

  With `"LocalBindSocketPath" => ""` it is a Unix socket that the agent names.
  """
  @behaviour Meshx.ServiceMesh

  @timeout_max 300_000
  # The agent says itself that a service did not pass in time.
  @margin 1_000
  # Without waiting until it passes.
  @registered 5_000

  @doc """
  Registers a service and answers with its id and the address that it must listen on.

  `params` is a name (the id is then `NAME-HOST`), `{name, id}`, or a map for the template. `timeout` is how long to wait
  until the service passes in Consul, in milliseconds; 0 does not wait.

  Answers otherwise:

    * `{:ok, :already_started}` - this VM has a service of this id, and `force_registration?` is not set
    * `{:error, :service_not_owned}` - somebody else registered it; `force_registration?` takes over what did not come
      through this agent
    * `{:error, :service_alive_timeout}` - it did not pass in time, and is not registered any more
    * `{:error, :invalid_state}` - this VM has it, but the agent does not know it at present: it is being
      registered again
    * `{:error, {cause, text}}` - the causes of docs/mesh-protocol.md
  """
  @spec start(Meshx.ServiceMesh.params(), keyword() | nil, boolean(), timeout()) ::
          {:ok, id :: String.t(), Meshx.ServiceMesh.address()}
          | {:ok, :already_started}
          | {:error,
             :service_not_owned
             | :service_alive_timeout
             | :invalid_state
             | {cause :: atom(), text :: String.t()}}
  @impl Meshx.ServiceMesh
  def start(params, template \\ nil, force_registration? \\ false, timeout \\ 5_000) do
    with {:ok, config} <- Config.read(),
         {:ok, wait} <- timeout(timeout),
         {:ok, params} <- Template.service_params(params),
         {:ok, template} <- Template.service(template, config.service_template),
         {:ok, address} <- address(params, config, config.address, :up),
         params = Template.with_address(params, address),
         {:ok, service} <- Template.registration(template, params, address, config) do
      args =
        if force_registration? == true, do: Map.put(service.args, :force, true), else: service.args

      args = if wait > 0, do: Map.put(args, :wait, wait), else: args

      __MODULE__
      |> Server.register(
        Map.merge(service, %{
          args: args,
          owner: nil,
          force?: force_registration? == true,
          deadline: if(wait > 0, do: wait + @margin, else: @registered),
          lane: {:service, service.id}
        })
      )
      |> reason()
    end
  end

  defp reason({:error, :pending}), do: {:error, :invalid_state}
  defp reason({:error, {:name_taken, _text}}), do: {:error, :service_not_owned}
  defp reason({:error, {:timeout, _text}}), do: {:error, :service_alive_timeout}
  defp reason(other), do: other

  @doc """
  Ends a service of this VM: it is deregistered, and its proxy ended. The id of a proxy service of `connect/3` ends all
  its upstreams.
  """
  @spec stop(service_id :: atom() | String.t()) ::
          :ok | {:error, :service_not_owned | {atom(), String.t()}}
  @impl Meshx.ServiceMesh
  def stop(service_id) do
    with {:ok, id} <- Template.text(service_id, "service id"),
         {:ok, upstreams} <- owned_upstreams(id),
         answers when is_list(answers) <-
           Server.disconnect(__MODULE__, Enum.map(upstreams, &elem(&1, 0)), true),
         :unknown <- Server.deregister(__MODULE__, id),
         do: {:error, :service_not_owned}
  end

  @doc """
  Prepares upstreams: an address for each, in their order, or why there is none.

  `proxy` is the service on whose behalf they are, which the mesh's rules know, and its id; by default both are
  `upstream-HOST`. When this VM has started it with a proxy of its own, that proxy carries the upstreams;
  otherwise the agent does, and nothing is registered in Consul for it. An upstream that the proxy has
  already keeps its address.
  """
  @spec connect([Meshx.ServiceMesh.params()], map() | nil, {term(), term()} | nil) ::
          {:ok, [{:ok, Meshx.ServiceMesh.address()} | {:error, {atom(), String.t()}}]}
          | {:error, term()}
  @impl Meshx.ServiceMesh
  def connect(upstreams, template \\ nil, proxy \\ nil) when is_list(upstreams) do
    with {:ok, config} <- Config.read(),
         {:ok, template} <- Template.upstream(template, config.upstream_template),
         {:ok, {name, id}} <- proxy(proxy),
         {:ok, source} <- source(name, id, config) do
      Meshx.ServiceMesh.each(
        upstreams,
        &upstream(&1, template, id, source, config),
        &Server.connect(__MODULE__, &1)
      )
    end
  end

  defp upstream(params, template, proxy_id, source, config) do
    kind = if Template.socket?(template), do: :uds, else: config.address

    with {:ok, params} <- Template.upstream_params(params),
         {:ok, address} <- address(params, config, kind, :down),
         params = Template.with_address(params, address),
         {:ok, name, args} <- Template.connection(template, params, address, config) do
      {:ok,
       %{
         key: {proxy_id, name, args[:instance]},
         args: Map.merge(args, source),
         reuse?: true
       }}
    end
  end

  # The service that the upstreams are of. One without a proxy of its own need not be in Consul.
  defp source(name, id, config) do
    with services when is_map(services) <- Server.services(__MODULE__),
         {:ok, default} <- Template.service(nil, config.service_template) do
      case services do
        %{^id => %{sidecar?: true, name: name}} ->
          {:ok, %{as: name, via: id}}

        %{^id => %{name: name}} ->
          {:ok, %{as: name}}

        _unknown ->
          if Template.sidecar?(default) do
            with {:ok, _} <- started(start({name, id})), do: {:ok, %{as: name, via: id}}
          else
            with :ok <- Server.note(__MODULE__, %{id: id, name: name}), do: {:ok, %{as: name}}
          end
      end
    end
  end

  defp started({:ok, id, _address}), do: {:ok, id}
  defp started(other), do: other

  @doc """
  Removes upstreams of a proxy service, by default of `upstream-HOST`; answers with the names of those that were there.

  Connections that were made over them live on, unless `restart_proxy?`: then they are cut.
  """
  @spec disconnect([Meshx.ServiceMesh.params()], atom() | String.t() | nil, boolean()) ::
          {:ok, [String.t()]} | {:error, :service_not_owned | {atom(), String.t()}}
  @impl Meshx.ServiceMesh
  def disconnect(upstreams, proxy_id \\ nil, restart_proxy? \\ false) when is_list(upstreams) do
    with {:ok, known} <- owned_upstreams(proxy_id || default_proxy()) do
      keys =
        for upstream <- upstreams,
            {:ok, params} <- [Template.upstream_params(upstream)],
            {{_proxy, name, instance} = key, _upstream} <- known,
            name == params["name"] and instance == params["id"],
            do: key

      with answers when is_list(answers) <-
             Server.disconnect(__MODULE__, keys, restart_proxy? == true),
           do: {:ok, for({{_proxy, name, _id}, :ok} <- Enum.zip(keys, answers), do: name)}
    end
  end

  @doc "Why the last connection to an upstream was refused: `%{cause, text, at}`, `at` in unix seconds."
  @impl true
  def refusal(upstream) do
    with {:ok, %{"name" => name}} <- Template.upstream_params(upstream),
         do: Meshx.Agent.refusal(name),
         else: (_ -> :error)
  end

  @doc """
  What is known of a service, with Consul's names: `"ID"`, `"Service"`, `"Tags"`, `"Status"`, for one of this VM
  also where it listens and the rest of its registration.
  """
  @spec info(service_id :: atom() | String.t()) :: {:ok, map()} | {:error, {atom(), String.t()}}
  def info(service_id) do
    with {:ok, id} <- Template.text(service_id, "service id"),
         services when is_map(services) <- Server.services(__MODULE__),
         {:ok, all} <- catalogue(services[id]) do
      case {services[id], Enum.find(all, &match?(%{id: ^id}, &1))} do
        {nil, nil} ->
          {:error, {:no_such_service, "the agent knows no service #{id}"}}

        {own, entry} ->
          {:ok, Map.merge(own_info(own), entry_info(entry))}
      end
    end
  end

  # Known here only.
  defp catalogue(%{args: nil}), do: {:ok, []}

  defp catalogue(_service) do
    with {:ok, %{services: services}} when is_list(services) <- Ask.ask(:services, %{}),
         do: {:ok, services}
  end

  defp own_info(nil), do: %{}
  defp own_info(%{args: nil} = service), do: %{"ID" => service.id, "Service" => service.name}

  defp own_info(service) do
    service.registration
    |> Map.delete("Name")
    |> Map.merge(%{"ID" => service.id, "Service" => service.name})
    |> Map.merge(
      case service.address do
        {:tcp, ip, port} -> %{"Address" => to_string(:inet.ntoa(ip)), "Port" => port}
        {:uds, path} -> %{"SocketPath" => path}
      end
    )
  end

  defp entry_info(nil), do: %{}

  defp entry_info(entry) do
    %{
      "ID" => entry[:id],
      "Service" => entry[:name],
      "Tags" => entry[:tags] || [],
      "Status" => entry[:status]
    }
  end

  @doc "The ids of this VM's services, and of the proxy services of its upstreams."
  @spec list() :: [String.t()]
  def list do
    case Server.services(__MODULE__) do
      services when is_map(services) -> Map.keys(services)
      {:error, _not_running} -> []
    end
  end

  @doc "The names of the upstreams of a proxy service, by default of `upstream-HOST`."
  @spec list_upstream(atom() | String.t() | nil) ::
          [String.t()] | {:error, :service_not_owned | {atom(), String.t()}}
  def list_upstream(proxy_id \\ nil) do
    with {:ok, upstreams} <- owned_upstreams(proxy_id || default_proxy()),
         do: for({{_proxy, name, _instance}, _upstream} <- upstreams, do: name)
  end

  @doc false
  def child_spec(_argument) do
    children = [Reporter, Server.child_spec(__MODULE__, events: Reporter)]

    %{
      id: __MODULE__,
      type: :supervisor,
      start: {Supervisor, :start_link, [children, [strategy: :one_for_one]]}
    }
  end

  defp owned_upstreams(proxy_id) do
    with {:ok, proxy_id} <- Template.text(proxy_id, "proxy id"),
         services when is_map(services) <- Server.services(__MODULE__),
         upstreams when is_map(upstreams) <- Server.upstreams(__MODULE__) do
      if Map.has_key?(services, proxy_id),
        do: {:ok, Enum.filter(upstreams, &match?({{^proxy_id, _, _}, _}, &1))},
        else: {:error, :service_not_owned}
    end
  end

  defp default_proxy, do: "upstream-" <> Template.host()

  defp proxy(nil), do: {:ok, {default_proxy(), default_proxy()}}

  defp proxy(proxy) do
    with {:ok, %{"name" => name, "id" => id}} <-
           Template.service_params(if is_tuple(proxy), do: proxy, else: {proxy, proxy}),
         do: {:ok, {name, id}}
  end

  defp address(params, config, kind, direction) do
    case Template.address(params) do
      {:ok, :any} when kind == :uds ->
        {:ok, :agent}

      {:ok, :any} ->
        [ip: ip, port_range: range] = config.tcp_address

        with {:ok, port} <- Server.port(__MODULE__, ip, range, direction),
             do: {:ok, {:tcp, ip, port}}

      told ->
        told
    end
  end

  defp timeout(:infinity), do: {:ok, @timeout_max}

  defp timeout(timeout) when is_integer(timeout) and timeout >= 0,
    do: {:ok, min(timeout, @timeout_max)}

  defp timeout(other) do
    {:error,
     {:invalid_request, "timeout is #{inspect(other)}, wanted milliseconds (0 does not wait)"}}
  end
end
