defmodule MeshxRpc.OptionsTest do
  use MeshxRpc.Case, async: true

  @loopback {:tcp, {127, 0, 0, 1}, 0}

  defp server_error(options) do
    assert_raise(ArgumentError, fn ->
      Server.Pool.child_spec(:a_server, [module: TestServer] ++ options)
    end).message
  end

  test "a wrong option is refused with its name, its value and what is allowed" do
    assert server_error(address: @loopback, timeout_hsk: 0) ==
             "MeshxRpc.Server :a_server: option :timeout_hsk is 0, wanted an integer from 1 to 600000"

    assert server_error(address: @loopback, timeout_hks: 1) =~
             "option :timeout_hks is not known, known are :address"

    assert server_error(address: {:tcp, "localhost", 1}) =~
             "wanted {:tcp, ip, port} with an ip tuple"

    assert server_error([]) =~ "wanted one of the options :address and :mesh"
    assert server_error(address: @loopback, mesh: [service: "x"]) =~ "wanted one of the options"
    assert server_error(mesh: []) =~ "option :service is missing"

    assert server_error(address: @loopback, stream_window: 20_000_000) =~
             "wanted at most connection_window (16777216)"

    assert server_error(address: @loopback, checksum: :md5) =~ "wanted :none, :crc32"

    for checksum <- [:md5, [1], [a: 1], ~c"abc", []],
        do: assert(server_error(address: @loopback, checksum: checksum) =~ "wanted :none, :crc32")

    assert server_error(address: @loopback, guard: %{depth: 1}) =~ "MeshxRpc.Guard"
    assert server_error(address: @loopback, codec: Enum) =~ "implements MeshxRpc.Codec"
  end

  test "a key is never shown" do
    for options <- [%{shared_key: "a secret"}, [{:shared_key, "a secret"}, :oops], {"a secret"}] do
      text =
        assert_raise(ArgumentError, fn -> Server.Pool.child_spec(:a_server, options) end).message

      assert text =~ "wanted a keyword list"
      refute text =~ "a secret"
    end

    text = server_error(address: @loopback, shared_key: "a short key")

    assert text =~
             "option :shared_key is not of the right form, wanted a binary or a list of binaries"

    refute text =~ "a short key"
  end

  test "nor does a process or a child specification show it" do
    key = "sixteen bytes at least"
    {server, address} = server(shared_key: key)
    client = client(address, shared_key: key)
    assert Client.Pool.call(client, :echo, 1) == 1

    shown =
      for id <- [server, client],
          {_id, pid, _type, _modules} <- Supervisor.which_children(id),
          process <- [Process.whereis(id), pid | children(pid)],
          do: inspect(:sys.get_status(process), limit: :infinity, printable_limit: :infinity)

    assert length(shown) >= 5
    refute Enum.any?(shown, &(&1 =~ key))

    refute inspect(Client.Pool.child_spec(:x, address: address, shared_key: key), limit: :infinity) =~
             key
  end

  defp children(pid) do
    case :sys.get_state(pid) do
      %DynamicSupervisor{} ->
        for {_, child, _, _} <- DynamicSupervisor.which_children(pid), do: child

      _other ->
        []
    end
  end

  test "a server beyond loopback needs a key, or must say that it has none" do
    for ip <- [{0, 0, 0, 0}, {10, 0, 0, 1}, {0, 0, 0, 0, 0, 0, 0, 0}, {0xFE80, 0, 0, 0, 0, 0, 0, 1}] do
      assert server_error(address: {:tcp, ip, 0}) =~ "insecure_no_auth: true"

      assert %{} =
               Server.Pool.child_spec(TestServer,
                 address: {:tcp, ip, 0},
                 shared_key: "sixteen bytes at least"
               )

      assert %{} =
               Server.Pool.child_spec(TestServer, address: {:tcp, ip, 0}, insecure_no_auth: true)
    end

    for ip <- [{127, 1, 2, 3}, {0, 0, 0, 0, 0, 0, 0, 1}, {0, 0, 0, 0, 0, 0xFFFF, 0x7F00, 1}] do
      assert %{} = Server.Pool.child_spec(TestServer, address: {:tcp, ip, 0})
    end
  end

  test "a client beyond loopback needs a key too: it would believe whoever answers" do
    for ip <- [{10, 0, 0, 1}, {0xFE80, 0, 0, 0, 0, 0, 0, 1}] do
      assert_raise ArgumentError, ~r/insecure_no_auth: true/, fn ->
        Client.Pool.child_spec(:a_client, address: {:tcp, ip, 1})
      end

      for options <- [[shared_key: "sixteen bytes at least"], [insecure_no_auth: true]],
          do: assert(%{} = Client.Pool.child_spec(:a_client, [address: {:tcp, ip, 1}] ++ options))
    end
  end

  test "functions that cannot be called are refused at start" do
    for name <- [:nothing, :two, :module_info, :child_spec, :__info__] do
      text = server_error(address: @loopback, functions: [:echo, name])
      assert text =~ "option :functions has #{inspect(name)}" and text =~ ":badarith"
    end

    assert server_error(address: @loopback, functions: ["echo"]) =~ "a list of function names"

    assert_raise ArgumentError, ~r/module :no_such_module cannot be loaded/, fn ->
      Server.Pool.child_spec(:no_such_module, address: @loopback)
    end
  end

  @common_of_0_1 [
    blk_max_size: 16_384,
    cks_mfa: {MeshxRpc.Protocol.Default, :checksum, []},
    conn_ref_mfa: {MeshxRpc.Protocol.Default, :conn_ref, []},
    node_ref_mfa: {MeshxRpc.Protocol.Default, :node_ref, []},
    svc_ref_mfa: "a service",
    serialize_mfa: {MeshxRpc.Protocol.Default, :serialize, []},
    deserialize_mfa: {MeshxRpc.Protocol.Default, :deserialize, []},
    hsk_dgt_mfa: {MeshxRpc.Protocol.Default, :checksum, []},
    quiet_on_hsk_error?: true,
    shared_key: "",
    socket_opts: [nodelay: true, recbuf: 100_000],
    telemetry_prefix: [:my_app, :rpc],
    timeout_hsk: 5_000,
    timeout_cks: 500,
    gen_statem_opts: [hibernate_after: 1_000]
  ]

  test "what 0.1 took is taken" do
    {_server, address} =
      server(
        @common_of_0_1 ++
          [timeout_execute: 15_000, pool_opts: [num_acceptors: 2, max_connections: 10]]
      )

    client =
      client(
        address,
        @common_of_0_1 ++
          [
            pool_opts: [size: 2, max_overflow: 5, strategy: :fifo],
            retry_idle_error: 1_000,
            retry_hsk_fail: 5_000,
            retry_proxy_fail: 1_000,
            timeout_connect: 5_000,
            exec_retry_on_error: [:closed, :tcp_closed]
          ]
      )

    assert Client.Pool.call(client, :echo, %{a: 1}) == %{a: 1}
  end

  test "and checked: name, value, what is allowed" do
    for {name, value, wanted} <- [
          {:cks_mfa, {MeshxRpc.Protocol.Default, :nothing, []}, "of a function/2 that exists"},
          {:serialize_mfa, nil, "of a function/2 that exists"},
          {:deserialize_mfa, {:no_module, :f, []}, "of a function/3 that exists"},
          {:conn_ref_mfa, {MeshxRpc.Protocol.Default, :conn_ref, [1]}, "{module, function, args}"},
          {:node_ref_mfa, 7, "a text or atom of at most 255 bytes"},
          {:svc_ref_mfa, String.duplicate("x", 256), "at most 255 bytes"},
          {:hsk_dgt_mfa, :crc32, "{module, function, argument}"},
          {:socket_opts, [packet: 4], "cannot be changed"},
          {:socket_opts, [{:active, true}], "cannot be changed"},
          {:socket_opts, [:nodelay | :improper], "a list of"},
          {:socket_opts, [nodelay: 1], "values as for :inet"},
          {:socket_opts, [buffer: "big"], "values as for :inet"},
          {:socket_opts, [buffer: -1], "values as for :inet"},
          {:socket_opts, [linger: {true, -1}], "values as for :inet"},
          {:socket_opts, [linger: true], "values as for :inet"},
          {:socket_opts, [bind_to_device: :lo], "values as for :inet"},
          {:gen_statem_opts, [name: :a], "keyword list of :debug"},
          {:gen_statem_opts, [timeout: -1], "as for GenServer"},
          {:gen_statem_opts, [hibernate_after: :never], "as for GenServer"},
          {:gen_statem_opts, [debug: :trace], "as for GenServer"},
          {:gen_statem_opts, [spawn_opt: :link], "as for GenServer"},
          {:gen_statem_opts, [spawn_opt: [:unknown]], "as for GenServer"},
          {:gen_statem_opts, [spawn_opt: [:monitor]], "as for GenServer"},
          {:gen_statem_opts, [spawn_opt: [priority: :very]], "as for GenServer"},
          {:telemetry_prefix, [], "a list of atoms"},
          {:telemetry_prefix, ["a"], "a list of atoms"},
          {:telemetry_handler, {Kernel, :send, 1}, "of a function/4 that exists"},
          {:timeout_cks, :infinity, "an integer from 1"},
          {:quiet_on_hsk_error?, 1, "true or false"},
          {:strict_settings, nil, "true or false"},
          {:shared_key, ["sixteen bytes at least" | "improper"], "a list of binaries"},
          {:pool_opts, [size: 1], ":num_acceptors"},
          {:timeout_execute, 0, "milliseconds"}
        ] do
      text = server_error([{:address, @loopback}, {name, value}])
      assert text =~ "MeshxRpc.Server :a_server: option #{inspect(name)} is "
      assert text =~ wanted
    end

    assert server_error(address: @loopback, pool_opts: [num_acceptors: 1], acceptors: 1) =~
             "say the same"
  end

  test "a digest of the hello of one's own is taken, and told to have no effect" do
    log =
      ExUnit.CaptureLog.capture_log(fn ->
        Server.Pool.child_spec(TestServer, address: @loopback, hsk_dgt_mfa: {:m, :f, []})
      end)

    assert log =~ "MeshxRpc.Server MeshxRpc.TestServer: option :hsk_dgt_mfa has no effect"
  end

  test "a client's address has a port" do
    assert_raise ArgumentError, ~r/port 0/, fn ->
      Client.Pool.child_spec(:a_client, address: @loopback)
    end
  end

  test "a client that is not started says so" do
    assert_raise ArgumentError, "no MeshxRpc client :nobody is started", fn ->
      Client.Pool.call(:nobody, :echo)
    end
  end

  test "a function name is 1 to 255 bytes" do
    {_server, address} = server()
    client = client(address)
    assert_raise ArgumentError, fn -> Client.Pool.call(client, "") end
    assert_raise ArgumentError, fn -> Client.Pool.call(client, String.duplicate("x", 256)) end
    assert {:error_rpc, {:undef, _}} = Client.Pool.call(client, String.duplicate("x", 255))
  end
end
