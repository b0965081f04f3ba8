defmodule MeshxConsul.Config do
  @moduledoc false
  # `config :meshx_consul`, all options of 0.1 and what is new.

  require Logger

  alias Meshx.Options
  alias MeshxConsul.{Reporter, Template}

  @app :meshx_consul
  # The agent has its own connection to Consul.
  @idle [:uri, :httpc_opts, :httpc_request_http_options, :httpc_request_options]

  def schema do
    [
      cli_env: [
        type: {:custom, &env/1, "a list of {name, value}, both binaries"},
        default: [],
        secret: true,
        doc:
          "environment of a proxy command; `CONSUL_HTTP_TOKEN` goes to the agent as the token of the service"
      ],
      httpc_headers: [
        type: {:custom, &headers/1, "a list of {name, value}, both binaries or charlists"},
        default: [],
        secret: true,
        doc: "`X-Consul-Token` goes to the agent as the token of services and upstreams"
      ],
      service_template: [
        type: {:custom, &service_template/1, "a template for start/4, see below"},
        default: [],
        doc: "default of the `template` of `start/4`"
      ],
      upstream_template: [
        type: {:custom, &upstream_template/1, "a template for connect/3, see below"},
        doc: "default of the `template` of `connect/3`"
      ],
      tcp_address: [
        type:
          {:custom, &tcp_address/1,
           "[ip: ip, port_range: first..last] with an ip tuple and ports from 1 to 65,535"},
        default: [ip: {127, 0, 0, 1}, port_range: 1024..65_535],
        doc: "where free ports are looked for: of services upwards, of upstreams downwards"
      ],
      address: [
        type: {:one_of, [:tcp, :uds]},
        default: :tcp,
        doc:
          "what services and upstreams listen on that say nothing themselves: a port, or a Unix socket that the agent names"
      ],
      proxy_stdout_fun: [
        type: {:custom, &function(&1, 3), "a function of 3 arguments"},
        default: &Reporter.stdout/3,
        doc: "called with service id, `:stdout` and a line of a proxy"
      ],
      proxy_stderr_fun: [
        type: {:custom, &function(&1, 3), "a function of 3 arguments"},
        default: &Reporter.stderr/3,
        doc: "called with service id, `:stderr` and a line of a proxy"
      ],
      proxy_down_fun: [
        type: {:custom, &function(&1, 5), "a function of 5 arguments"},
        default: &Reporter.down/5,
        doc:
          "called with service id, nil, nil, the reason as text, and how often it was down before, when a proxy ended"
      ],
      max_proxy_restarts: [
        type: {:range, 0, 1_000},
        default: 5,
        doc: "restarts of a proxy within a minute before it is given up"
      ],
      uri: idle("`%URI{}` of Consul"),
      httpc_opts: idle("options of `:httpc`"),
      httpc_request_http_options: idle("options of `:httpc`"),
      httpc_request_options: idle("options of `:httpc`")
    ]
  end

  defp idle(what),
    do: [type: :any, doc: "#{what}; no effect: `meshx agent` says where Consul is"]

  @doc "The options as they are now."
  @spec read() :: {:ok, map()} | {:error, {:invalid_request, String.t()}}
  def read do
    {:ok, read!()}
  rescue
    error in ArgumentError -> {:error, {:invalid_request, error.message}}
  end

  @doc "Checks them when the application starts, and says which do nothing."
  @spec check!() :: :ok
  def check! do
    _config = read!()

    case for {name, _value} <- Application.get_all_env(@app), name in @idle, do: name do
      [] ->
        :ok

      names ->
        Logger.warning(
          "config :meshx_consul: not used any more: #{Enum.map_join(names, ", ", &inspect/1)}; the agent talks to " <>
            "Consul, and `meshx agent` says where that is"
        )
    end
  end

  defp read!, do: Options.validate!(schema(), Application.get_all_env(@app), "config :meshx_consul")

  @doc "The token for services and upstreams, as `Meshx.Agent.Ask` takes it, or nil."
  @spec token(map()) :: (() -> String.t()) | nil
  def token(config) do
    header =
      Enum.find_value(config.httpc_headers, fn {name, value} ->
        String.downcase(name) == "x-consul-token" && value
      end)

    case {header, List.keyfind(config.cli_env, "CONSUL_HTTP_TOKEN", 0)} do
      {header, _env} when header not in [nil, ""] -> fn -> header end
      {_none, {_name, value}} when value != "" -> fn -> value end
      _none -> nil
    end
  end

  defp env(env), do: pairs(env, &(&1 =~ ~r/\A[A-Za-z_][A-Za-z0-9_]*\z/))
  defp headers(headers), do: pairs(headers, &(&1 != ""))

  defp pairs(pairs, name?) when is_list(pairs) do
    texts? =
      Enum.all?(pairs, fn
        {name, value} -> text?(name) and text?(value) and name?.(to_string(name))
        _other -> false
      end)

    if texts?,
      do: {:ok, for({name, value} <- pairs, do: {to_string(name), to_string(value)})},
      else: :error
  end

  defp pairs(_other, _name?), do: :error

  defp text?(text), do: is_binary(text) or (is_list(text) and List.ascii_printable?(text))

  defp service_template(template), do: checked(Template.service(template, []), template)
  defp upstream_template(template), do: checked(Template.upstream(template, nil), template)

  defp checked({:ok, _template}, template), do: {:ok, template}
  defp checked({:error, _reason}, _template), do: :error

  defp tcp_address(options) when is_list(options) do
    with true <- Keyword.keyword?(options) and Keyword.keys(options) -- [:ip, :port_range] == [],
         ip = Keyword.get(options, :ip, {127, 0, 0, 1}),
         true <- :inet.is_ip_address(ip),
         %Range{first: a, last: b} <- Keyword.get(options, :port_range, 1024..65_535),
         {first, last} = {min(a, b), max(a, b)},
         true <- first >= 1 and last <= 65_535 do
      {:ok, [ip: ip, port_range: first..last//1]}
    else
      _wrong -> :error
    end
  end

  defp tcp_address(_other), do: :error

  defp function(fun, arity), do: if(is_function(fun, arity), do: {:ok, fun}, else: :error)
end
