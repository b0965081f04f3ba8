defmodule MeshxConsul.Template do
  @moduledoc false
  # From parameters and templates, as 0.1 had them, to what the agent is asked for.

  alias MeshxConsul.{Config, Json, Mustache}

  # As the agent has them: what says the same is left out, since a mesh that is no Consul has no such options.
  @ttl 10_000
  @deregister_after 60_000
  @restarts 5

  @registration %{
    "ID" => "{{id}}",
    "Name" => "{{name}}",
    "Checks" => [%{"Name" => "TTL check", "CheckID" => "ttl:{{id}}", "TTL" => "10s"}]
  }
  @check %{id: "ttl:{{id}}", status: "passing", ttl: 5_000}
  @upstream %{
    "DestinationName" => "{{name}}",
    "LocalBindAddress" => "{{address}}",
    "LocalBindPort" => "{{$port$}}"
  }
  # Proxies that the agent knows how to start.
  @planes [:native, :connect_proxy, :envoy]

  @doc "The host part of ids and of the default proxy."
  def host do
    {:ok, host} = :inet.gethostname()
    to_string(host)
  end

  ## Parameters

  @doc "The values for a service's template, but for its address."
  def service_params(name) when is_atom(name) or is_binary(name) do
    with {:ok, name} <- text(name, "name"),
         do: {:ok, %{"name" => name, "id" => name <> "-" <> host()}}
  end

  def service_params({name, id}) do
    with {:ok, name} <- text(name, "name"),
         {:ok, id} <- text(id, "id"),
         do: {:ok, %{"name" => name, "id" => id}}
  end

  def service_params(%{} = params) do
    with {:ok, params} <- map_params(params) do
      case params do
        %{"name" => name} when is_binary(name) ->
          {:ok, Map.put_new(params, "id", name <> "-" <> host())}

        %{"name" => other} ->
          with {:ok, name} <- text(other, "name"), do: service_params(%{params | "name" => name})

        _other ->
          {:ok, params}
      end
    end
  end

  def service_params(other), do: unknown_params(other)

  @doc "The values for an upstream's template, but for its address."
  def upstream_params(name) when is_atom(name) or is_binary(name) do
    with {:ok, name} <- text(name, "name"), do: {:ok, %{"name" => name}}
  end

  def upstream_params({_name, _id} = both), do: service_params(both)
  def upstream_params(%{} = params), do: map_params(params)
  def upstream_params(other), do: unknown_params(other)

  defp unknown_params(other) do
    invalid(
      "service is #{inspect(other, limit: 5)}, wanted a name, {name, id} or a map for the template"
    )
  end

  defp map_params(params) when not is_struct(params) do
    if Enum.all?(Map.keys(params), &(is_binary(&1) or is_atom(&1))),
      do: {:ok, Map.new(params, fn {key, value} -> {to_string(key), value} end)},
      else: invalid("parameters are #{inspect(params, limit: 5)}, wanted names as keys")
  end

  defp map_params(params), do: unknown_params(params)

  @doc "An atom or a binary as a binary; `what` is named when it is neither."
  def text(text, what) when (is_atom(text) or is_binary(text)) and text not in [nil, ""] do
    text = to_string(text)
    if String.valid?(text), do: {:ok, text}, else: invalid("#{what} is not UTF-8")
  end

  def text(other, what),
    do: invalid("#{what} is #{inspect(other, limit: 5)}, wanted an atom or a binary")

  @doc "Where parameters say that the service or upstream listens: an address, `:agent` for a socket that the agent names, or `:any`."
  def address(%{"socket" => true}), do: {:ok, :agent}
  def address(%{"socket" => path}) when is_binary(path), do: {:ok, {:uds, path}}

  def address(%{"address" => address, "port" => port})
      when is_binary(address) and address != "" and is_integer(port) do
    case :inet.parse_strict_address(to_charlist(address)) do
      {:ok, ip} when port in 1..65_535 ->
        {:ok, {:tcp, ip, port}}

      _wrong ->
        invalid("address is #{inspect(address)}, port #{port}, wanted an ip and 1 to 65,535")
    end
  end

  def address(%{"address" => address, "port" => port}) when address != "" do
    invalid(
      "address is #{inspect(address, limit: 5)}, port #{inspect(port, limit: 5)}, wanted an ip as a binary and 1 to 65,535"
    )
  end

  def address(%{"socket" => other}),
    do: invalid("socket is #{inspect(other, limit: 5)}, wanted a path or true")

  def address(_params), do: {:ok, :any}

  @doc "The parameters with their address."
  def with_address(params, {:tcp, ip, port}),
    do: Map.merge(params, %{"address" => to_string(:inet.ntoa(ip)), "port" => port})

  def with_address(params, {:uds, path}),
    do: Map.merge(params, %{"address" => path, "port" => 0})

  def with_address(params, :agent), do: Map.merge(params, %{"address" => "", "port" => 0})

  ## Services

  @doc "A template for `start/4` with all its keys; `default` is taken for nil."
  def service(template, default) do
    template = if template == nil, do: default, else: template

    with {:ok, template} <- keys(template),
         {:ok, registration} <- registration_map(Map.get(template, :registration, @registration)),
         {:ok, check} <- check(Map.get(template, :ttl, @check)),
         {:ok, proxy} <- proxy(Map.get(template, :proxy, :default)),
         do: {:ok, %{registration: registration, check: check, proxy: proxy}}
  end

  defp keys(template) do
    cond do
      not Keyword.keyword?(template) ->
        invalid("template is #{inspect(template, limit: 5)}, wanted a keyword list")

      (unknown = Keyword.keys(template) -- [:registration, :ttl, :proxy]) != [] ->
        invalid(
          "template: #{inspect(hd(unknown))} is not known, known are :registration, :ttl, :proxy"
        )

      true ->
        {:ok, Map.new(template)}
    end
  end

  defp registration_map(%{"Name" => _name} = registration), do: {:ok, registration}

  defp registration_map(other),
    do:
      invalid(
        "template: registration is #{inspect(other, limit: 5)}, wanted a map with the key \"Name\""
      )

  defp check(none) when none in [nil, [], "", %{}], do: {:ok, nil}

  defp check(%{id: _id} = check) do
    case Map.keys(check) -- [:id, :status, :ttl] do
      [] -> {:ok, check}
      [key | _] -> invalid("template: ttl: #{inspect(key)} is not known")
    end
  end

  defp check(other),
    do:
      invalid(
        "template: ttl is #{inspect(other, limit: 5)}, wanted nil or a map with :id, :status, :ttl"
      )

  defp proxy(none) when none in [nil, [], ""], do: {:ok, :native}
  defp proxy(:default), do: {:ok, :default}
  defp proxy(plane) when plane in @planes, do: {:ok, plane}

  defp proxy([_program | _] = words) do
    if Enum.all?(words, &is_binary/1), do: {:ok, words}, else: wrong_proxy(words)
  end

  defp proxy(other), do: wrong_proxy(other)

  defp wrong_proxy(proxy) do
    invalid(
      "template: proxy is #{inspect(proxy, limit: 5)}, wanted nil, a list of strings, " <>
        Enum.map_join(@planes, ", ", &inspect/1)
    )
  end

  @doc "Whether a template has a proxy that is not the agent itself."
  def sidecar?(%{proxy: proxy}), do: proxy not in [:default, :native]

  @doc "What the agent is asked for: `%{name:, id:, args:, registration:, sidecar?:}`."
  def registration(template, params, address, config) do
    with {:ok, rendered} <- Mustache.render(template.registration, params),
         {:ok, name} <- text(rendered["Name"], "template: registration: Name"),
         {:ok, id} <- text(rendered["ID"] || name, "template: registration: ID"),
         {:ok, check} <- Mustache.render(template.check, params),
         :ok <- passing(check && check[:status]),
         {:ok, proxy} <- Mustache.render(template.proxy, params),
         {:ok, times, rest} <- times(rendered),
         {:ok, json} <- json(rest) do
      args =
        %{name: name, id: id}
        |> put(:address, wire(socket(rendered) || address))
        |> put(:registration, json)
        |> put(:token, Config.token(config))
        |> Map.merge(times)
        |> Map.merge(proxy_args(proxy, config))

      {:ok,
       %{
         name: name,
         id: id,
         args: args,
         registration: rendered,
         sidecar?: sidecar?(template)
       }}
    end
  end

  defp put(args, _key, nil), do: args
  defp put(args, key, value), do: Map.put(args, key, value)

  defp wire(:agent), do: nil
  defp wire(address), do: Meshx.Agent.Ask.wire(address)

  # Consul's own name for a service that listens on a Unix socket.
  defp socket(%{"SocketPath" => path}) when is_binary(path) and path != "", do: {:uds, path}
  defp socket(_registration), do: nil

  defp passing(status) when status in [nil, "passing"], do: :ok

  defp passing(status),
    do:
      {:error,
       {:unsupported,
        "template: ttl: status is #{inspect(status)}; the agent's check passes while the service's VM lives"}}

  # The agent has a check of its own with a time to live: those of the template say only which.
  defp times(registration) do
    checks = List.wrap(registration["Check"]) ++ List.wrap(registration["Checks"])
    {own, others} = Enum.split_with(checks, &match?(%{"TTL" => _}, &1))
    own = List.first(own) || %{}

    with :ok <- passing(own["Status"]),
         {:ok, ttl} <- duration(own["TTL"], @ttl),
         {:ok, after_} <- duration(own["DeregisterCriticalServiceAfter"], @deregister_after) do
      args =
        %{}
        |> put(:ttl, unless(ttl == @ttl, do: ttl))
        |> put(:deregister_after, unless(after_ == @deregister_after, do: after_))

      {:ok, args, registration |> Map.drop(["Check"]) |> Map.put("Checks", others)}
    end
  end

  # As Go writes them: 10s, 1m30s, 500ms.
  defp duration(nil, default), do: {:ok, default}

  defp duration(text, _default) when is_binary(text) do
    units = %{"ms" => 1, "s" => 1_000, "m" => 60_000, "h" => 3_600_000}

    if text =~ ~r/\A(\d{1,9}(ms|s|m|h))+\z/ do
      parts = Regex.scan(~r/(\d+)(ms|s|m|h)/, text, capture: :all_but_first)
      {:ok, parts |> Enum.map(fn [n, unit] -> String.to_integer(n) * units[unit] end) |> Enum.sum()}
    else
      duration(:wrong, text)
    end
  end

  defp duration(_other, seen),
    do: invalid("template: registration: Checks: #{inspect(seen)} is no time, wanted 10s or 1m30s")

  # Further fields of Consul's registration. What the agent says itself, and what is empty, is left out.
  defp json(registration) do
    rest =
      registration
      |> Map.drop(["Name", "ID", "Address", "Port", "SocketPath"])
      |> Map.update("Connect", nil, &connect/1)
      |> Map.reject(fn {_key, value} -> value in [nil, [], %{}, ""] end)

    {:ok, if(rest != %{}, do: Json.encode!(rest))}
  rescue
    error in ArgumentError -> invalid("template: registration: " <> error.message)
  end

  # The agent knows where the service listens, and what the proxy is.
  defp connect(%{"SidecarService" => %{} = sidecar} = connect) do
    sidecar =
      sidecar
      |> Map.update("Proxy", nil, fn
        %{} = proxy -> Map.drop(proxy, ["LocalServiceAddress", "LocalServicePort"])
        other -> other
      end)
      |> Map.reject(fn {_key, value} -> value in [nil, %{}] end)

    if sidecar == %{},
      do: Map.delete(connect, "SidecarService"),
      else: %{connect | "SidecarService" => sidecar}
  end

  defp connect(other), do: other

  defp proxy_args(:default, _config), do: %{}
  defp proxy_args(:native, _config), do: %{sidecar: :native}
  defp proxy_args(plane, config) when is_atom(plane), do: watched(plane, config)

  # env(1) is gone from the list of processes once the command runs. Consul's token has a way of its own.
  defp proxy_args(words, config) do
    case for {name, value} <- config.cli_env, name != "CONSUL_HTTP_TOKEN", do: "#{name}=#{value}" do
      [] -> watched({:command, words}, config)
      env -> watched({:command, ["env" | env] ++ words}, config)
    end
  end

  defp watched(sidecar, config) do
    %{sidecar: sidecar, proxy_output: true}
    |> put(
      :max_proxy_restarts,
      unless(config.max_proxy_restarts == @restarts, do: config.max_proxy_restarts)
    )
  end

  ## Upstreams

  @doc "A template for `connect/3`; `default` is taken for nothing."
  def upstream(template, default) when template in [nil, [], %{}],
    do: if(default in [nil, [], %{}], do: {:ok, @upstream}, else: upstream(default, nil))

  def upstream(%{"DestinationName" => _} = template, _default)
      when is_map_key(template, "LocalBindPort") or is_map_key(template, "LocalBindSocketPath"),
      do: {:ok, template}

  def upstream(other, _default) do
    invalid(
      "template is #{inspect(other, limit: 5)}, wanted a map with the keys \"DestinationName\" and \"LocalBindPort\""
    )
  end

  @doc "Whether a template asks for a Unix socket."
  def socket?(template), do: is_map_key(template, "LocalBindSocketPath")

  @doc "What the agent is asked for: its name and arguments, but for the source service."
  def connection(template, params, address, config) do
    with {:ok, rendered} <- Mustache.render(template, params),
         {:ok, name} <- text(rendered["DestinationName"], "template: DestinationName"),
         {:ok, address} <- bound(rendered, address),
         :ok <- nothing_else(rendered) do
      args =
        %{service: name, address: address}
        |> put(:instance, params["id"])
        |> put(:token, Config.token(config))

      {:ok, name, args}
    end
  end

  defp bound(_rendered, :agent), do: {:ok, :uds}

  defp bound(_rendered, {:uds, path}),
    do:
      {:error,
       {:unsupported,
        "socket is #{inspect(path)}; the agent names the sockets of upstreams, wanted true"}}

  # A template may have a port of its own.
  defp bound(rendered, {:tcp, ip, port}) do
    address = rendered["LocalBindAddress"] || to_string(:inet.ntoa(ip))
    port = rendered["LocalBindPort"] || port

    with true <- is_binary(address) and is_integer(port) and port in 1..65_535,
         {:ok, _ip} <- :inet.parse_strict_address(to_charlist(address)) do
      {:ok, {:tcp, address, port}}
    else
      _wrong ->
        invalid(
          "template: LocalBindAddress is #{inspect(address)}, LocalBindPort #{inspect(port)}, wanted an ip and 1 to 65,535"
        )
    end
  end

  defp nothing_else(rendered) do
    known = ["DestinationName", "LocalBindAddress", "LocalBindPort", "LocalBindSocketPath"]

    rendered
    |> Map.drop(known)
    |> Enum.reject(fn pair ->
      match?({"DestinationType", "service"}, pair) or elem(pair, 1) in [nil, "", %{}, []]
    end)
    |> case do
      [] ->
        :ok

      [{key, _value} | _] ->
        {:error,
         {:unsupported,
          "template: the agent's upstreams have no #{inspect(key)}; let a proxy of your own carry it"}}
    end
  end

  defp invalid(text), do: {:error, {:invalid_request, text}}
end
