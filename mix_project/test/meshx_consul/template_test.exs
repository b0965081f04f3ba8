defmodule MeshxConsul.TemplateTest do
  use ExUnit.Case, async: false
  alias MeshxConsul.{Config, Template}

  # The options are the VM's.
  defp config(options \\ []) do
    for {name, _} <- Application.get_all_env(:meshx_consul),
        do: Application.delete_env(:meshx_consul, name)

    Application.put_all_env([{:meshx_consul, options}])
    on_exit(fn -> for {name, _} <- options, do: Application.delete_env(:meshx_consul, name) end)
    Config.read()
  end

  defp registration(template, options \\ [], params \\ %{"name" => "cart", "id" => "cart-1"}) do
    {:ok, config} = config(options)
    address = {:tcp, {127, 0, 0, 1}, 1024}

    with {:ok, template} <- Template.service(template, config.service_template) do
      Template.registration(template, Template.with_address(params, address), address, config)
    end
  end

  defp args(template, options \\ []) do
    {:ok, %{args: args}} = registration(template, options)
    args
  end

  # What the default template asks for is what every mesh has.
  @plain %{name: "cart", id: "cart-1", address: {:tcp, "127.0.0.1", 1024}}

  test "the defaults ask for nothing but name, id and address" do
    assert args(nil) == @plain
    assert args([]) == @plain
  end

  test "proxies" do
    assert args(proxy: nil) == Map.put(@plain, :sidecar, :native)
    assert args(proxy: []) == Map.put(@plain, :sidecar, :native)
    assert args(proxy: :envoy) == Map.merge(@plain, %{sidecar: :envoy, proxy_output: true})
    words = ["/bin/sh", "-c", "consul connect proxy -sidecar-for {{id}} {{address}}:{{port}}"]

    rendered = ["/bin/sh", "-c", "consul connect proxy -sidecar-for cart-1 127.0.0.1:1024"]
    assert %{sidecar: {:command, ^rendered}, proxy_output: true} = args(proxy: words)

    assert %{sidecar: {:command, ["env", "A=b" | ^rendered]}, max_proxy_restarts: 3} =
             args([proxy: words],
               cli_env: [{"A", "b"}, {"CONSUL_HTTP_TOKEN", ""}],
               max_proxy_restarts: 3
             )
  end

  test "tokens, which show nowhere" do
    for options <- [
          [httpc_headers: [{~c"x-consul-token", ~c"s3cret"}]],
          [httpc_headers: [{"X-Consul-Token", "s3cret"}], cli_env: [{"CONSUL_HTTP_TOKEN", "b"}]],
          [cli_env: [{"CONSUL_HTTP_TOKEN", "s3cret"}], httpc_headers: []]
        ] do
      args = args([proxy: ["p"]], options)
      assert args.token.() == "s3cret"
      refute inspect(args) =~ "s3cret"
    end

    refute Map.has_key?(args(nil, httpc_headers: [{~c"X-Consul-Token", ~c""}]), :token)
  end

  test "checks with a time to live are the agent's, others stay" do
    http = %{"HTTP" => "http://{{address}}:{{port}}/", "Interval" => "5s"}

    own = %{
      "TTL" => "1m30s",
      "DeregisterCriticalServiceAfter" => "2h",
      "CheckID" => "x",
      "Status" => "passing"
    }

    registration = %{"Name" => "{{name}}", "ID" => "{{id}}", "Checks" => [http, own]}
    args = args(registration: registration)
    assert %{ttl: 90_000, deregister_after: 7_200_000} = args

    assert args.registration ==
             ~S({"Checks":[{"HTTP":"http://127.0.0.1:1024/","Interval":"5s"}]})

    plain = %{"Name" => "{{name}}", "ID" => "{{id}}", "Check" => %{"TTL" => "10s"}}
    assert args(registration: plain) == @plain
    # As in 0.1 the id is the name's, when there is none.
    assert args(registration: %{"Name" => "{{name}}"}) == %{@plain | id: "cart"}
  end

  test "0.1's default registration, written out, is what the agent does anyway" do
    registration = %{
      "ID" => "{{id}}",
      "Name" => "{{name}}",
      "Checks" => [%{"Name" => "TTL check", "CheckID" => "ttl:{{id}}", "TTL" => "10s"}],
      "Connect" => %{
        "SidecarService" => %{
          "Proxy" => %{
            "LocalServiceAddress" => "{{address}}",
            "LocalServicePort" => "{{$port$}}"
          }
        }
      }
    }

    assert args(registration: registration) == @plain

    more = put_in(registration, ["Connect", "SidecarService", "Proxy", "Config"], %{"a" => 1})

    assert args(registration: more).registration ==
             ~S({"Connect":{"SidecarService":{"Proxy":{"Config":{"a":1}}}}})
  end

  test "other fields go to the agent, as JSON" do
    registration = %{
      "ID" => "{{id}}",
      "Name" => "{{name}}",
      "Tags" => ["v1", "{{name}}"],
      "Address" => "{{address}}",
      "Port" => "{{$port$}}"
    }

    assert args(registration: registration) ==
             Map.put(@plain, :registration, ~S({"Tags":["v1","cart"]}))
  end

  test "a Unix socket by the template" do
    registration = %{"ID" => "{{id}}", "Name" => "{{name}}", "SocketPath" => "/run/{{name}}.sock"}
    assert args(registration: registration) == %{@plain | address: {:uds, "/run/cart.sock"}}
  end

  test "what is wrong with a template is said" do
    own = &%{"ID" => "a", "Name" => "a", "Checks" => [Map.put(&1, "TTL", &1["TTL"] || "10s")]}

    for {template, cause, text} <- [
          {7, :invalid_request, "template is 7, wanted a keyword list"},
          {[other: 1], :invalid_request, ":other is not known"},
          {[registration: %{}], :invalid_request, "wanted a map with the key \"Name\""},
          {[registration: %{"Name" => 7}], :invalid_request, "Name is 7"},
          {[registration: %{"Name" => "{{no}}"}], :invalid_request, "{{no}} is not among"},
          {[registration: %{"Name" => "a", "Tags" => {1}}], :invalid_request, "no form in JSON"},
          {[registration: own.(%{"TTL" => "soon"})], :invalid_request, "\"soon\" is no time"},
          {[registration: own.(%{"Status" => "critical"})], :unsupported, "\"critical\""},
          {[ttl: 7], :invalid_request, "ttl is 7"},
          {[ttl: %{id: "a", how: 1}], :invalid_request, ":how is not known"},
          {[ttl: %{id: "a", status: "warning"}], :unsupported, "\"warning\""},
          {[proxy: "envoy"], :invalid_request, "proxy is \"envoy\""},
          {[proxy: [:a]], :invalid_request, "proxy is [:a]"}
        ] do
      assert {:error, {^cause, seen}} = registration(template)
      assert seen =~ text
    end
  end

  test "parameters" do
    host = Template.host()
    assert Template.service_params(:a) == {:ok, %{"name" => "a", "id" => "a-" <> host}}
    assert Template.service_params({:a, "b"}) == {:ok, %{"name" => "a", "id" => "b"}}

    assert Template.service_params(%{name: "a", zone: 1}) ==
             {:ok, %{"name" => "a", "id" => "a-" <> host, "zone" => 1}}

    assert {:error, {:invalid_request, "name is 1, wanted" <> _}} =
             Template.service_params(%{name: 1})

    assert Template.address(%{"address" => "::1", "port" => 5}) ==
             {:ok, {:tcp, {0, 0, 0, 0, 0, 0, 0, 1}, 5}}

    assert Template.address(%{"socket" => "/a"}) == {:ok, {:uds, "/a"}}
    assert Template.address(%{"socket" => true}) == {:ok, :agent}
    assert Template.address(%{"address" => "", "port" => 5}) == {:ok, :any}

    for wrong <- [
          %{"address" => "undefined", "port" => 5},
          %{"address" => "127.0.0.1", "port" => -1},
          %{"address" => "127.0.0.1", "port" => "34567"},
          %{"address" => {127, 0, 0, 1}, "port" => 5},
          %{"socket" => 7}
        ],
        do: assert({:error, {:invalid_request, _}} = Template.address(wrong))
  end

  test "upstreams" do
    {:ok, config} = config()
    address = {:tcp, {127, 0, 0, 1}, 65_535}

    connection = fn template, params, address ->
      with {:ok, template} <- Template.upstream(template, config.upstream_template),
           params = Template.with_address(params, address),
           do: Template.connection(template, params, address, config)
    end

    for none <- [nil, [], %{}] do
      assert connection.(none, %{"name" => "db"}, address) ==
               {:ok, "db", %{service: "db", address: {:tcp, "127.0.0.1", 65_535}}}
    end

    own = %{
      "DestinationName" => "{{name}}-v2",
      "DestinationType" => "service",
      "LocalBindPort" => 7_000,
      "MeshGateway" => %{}
    }

    assert {:ok, "db-v2", %{address: {:tcp, "127.0.0.1", 7_000}}} =
             connection.(own, %{"name" => "db"}, address)

    socket = %{"DestinationName" => "{{name}}", "LocalBindSocketPath" => ""}
    assert Template.socket?(socket)
    assert {:ok, "db", %{address: :uds}} = connection.(socket, %{"name" => "db"}, :agent)

    for {template, params, address, cause} <- [
          {%{"DestinationName" => "a"}, %{}, address, :invalid_request},
          {7, %{}, address, :invalid_request},
          {Map.put(own, "LocalBindPort", "x"), %{"name" => "a"}, address, :invalid_request},
          {Map.put(own, "Datacenter", "dc2"), %{"name" => "a"}, address, :unsupported},
          {nil, %{"name" => "a"}, {:uds, "/a"}, :unsupported}
        ],
        do: assert({:error, {^cause, _}} = connection.(template, params, address))
  end

  test "options are checked, and the wrong one is named" do
    for {options, text} <- [
          {[consul: 1], "config :meshx_consul: option :consul is not known"},
          {[max_proxy_restarts: -1], "option :max_proxy_restarts is -1"},
          {[tcp_address: [ip: "127.0.0.1"]], "option :tcp_address"},
          {[tcp_address: [port_range: 0..10]], "option :tcp_address"},
          {[tcp_address: [port: 1]], "option :tcp_address"},
          {[proxy_down_fun: &is_atom/1], "wanted a function of 5 arguments"},
          {[service_template: [proxy: 7]], "option :service_template"},
          {[upstream_template: %{"a" => 1}], "option :upstream_template"},
          {[cli_env: [{"A=B", "s3cret"}]], "option :cli_env is not of the right form"},
          {[httpc_headers: [{"X-Consul-Token", :s3cret}]], "option :httpc_headers is not of"}
        ] do
      assert {:error, {:invalid_request, seen}} = config(options)
      assert seen =~ text
      refute seen =~ "s3cret"
      assert_raise ArgumentError, fn -> Config.check!() end
      for {name, _} <- options, do: Application.delete_env(:meshx_consul, name)
    end
  end

  test "options that do nothing any more are told of" do
    import ExUnit.CaptureLog
    {:ok, _config} = config(uri: %URI{scheme: "http", host: ""}, httpc_opts: [ipfamily: :local])
    log = capture_log(fn -> assert Config.check!() == :ok end)
    assert log =~ "not used any more"
    assert log =~ ":httpc_opts"
    assert log =~ ":uri"
  end
end
