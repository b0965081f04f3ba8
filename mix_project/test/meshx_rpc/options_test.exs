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
    assert server_error(address: @loopback, guard: %{depth: 1}) =~ "MeshxRpc.Guard"
    assert server_error(address: @loopback, codec: Enum) =~ "implements MeshxRpc.Codec"
  end

  test "a key is never shown" do
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
               Server.Pool.child_spec(:a_server,
                 address: {:tcp, ip, 0},
                 shared_key: "sixteen bytes at least"
               )

      assert %{} = Server.Pool.child_spec(:a_server, address: {:tcp, ip, 0}, insecure_no_auth: true)
    end

    for ip <- [{127, 1, 2, 3}, {0, 0, 0, 0, 0, 0, 0, 1}, {0, 0, 0, 0, 0, 0xFFFF, 0x7F00, 1}] do
      assert %{} = Server.Pool.child_spec(:a_server, address: {:tcp, ip, 0})
    end
  end

  test "what 0.1 took is taken" do
    assert %{} =
             Client.Pool.child_spec(:a_client,
               address: {:tcp, {127, 0, 0, 1}, 1},
               pool_opts: [size: 10, max_overflow: 5],
               blk_max_size: 16_384,
               cks_mfa: {MeshxRpc.Protocol.Default, :checksum, []},
               shared_key: "",
               timeout_connect: 5_000
             )

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
