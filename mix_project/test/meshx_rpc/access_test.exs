defmodule MeshxRpc.AccessTest do
  # Who may reach whom, where the options alone do not say it.
  use MeshxRpc.Case, async: true
  import ExUnit.CaptureLog

  alias MeshxRpc.{Frame, Hello, TestPeer}

  @key "a shared key of some length"

  defmodule Mesh do
    @moduledoc false
    # Gives the address that the service's name says.
    @behaviour Meshx.ServiceMesh

    @impl true
    def start({test, address}, _template, _force?, _timeout) do
      send(test, {:started, self()})
      {:ok, {:id, test}, address}
    end

    @impl true
    def stop({:id, test}) do
      send(test, :stopped)
      :ok
    end

    @impl true
    def connect([{_test, address}], _template, _proxy), do: {:ok, [{:ok, address}]}
    @impl true
    def disconnect([_service], _proxy, _restart?), do: {:ok, []}
  end

  defmodule Refusing do
    @moduledoc false
    # Takes each connection, as an agent does, and ends it; says why when it is asked.
    @behaviour Meshx.ServiceMesh

    @impl true
    def start(_params, _template, _force?, _timeout), do: {:error, :unused}
    @impl true
    def stop(_id), do: {:error, :unused}
    @impl true
    def connect([{_test, address, _ago}], _template, _proxy), do: {:ok, [{:ok, address}]}
    @impl true
    def disconnect([_service], _proxy, _restart?), do: {:ok, []}

    @impl true
    def refusal({test, _address, ago}) do
      send(test, :asked)
      at = System.os_time(:second) - ago
      {:ok, %{cause: :intention_denied, text: "web -> cart is denied", at: at}}
    end
  end

  # Nobody listens there, and nobody can: it is for documentation (RFC 5737).
  @elsewhere {:tcp, {192, 0, 2, 1}, 4_000}

  @tag :capture_log
  test "a mesh that gives a server an address beyond loopback: no start without a key" do
    Process.flag(:trap_exit, true)
    options = [module: TestServer, mesh: [adapter: Mesh, service: {self(), @elsewhere}]]

    log =
      capture_log(fn ->
        {:ok, server} = Server.Pool.start_link(unique("server"), options)
        assert_receive {:started, _listener}, 5_000
        # What was registered is given back, again and again until the supervisor gives up.
        assert_receive :stopped, 5_000
        assert_receive {:EXIT, ^server, :shutdown}, 10_000
      end)

    assert log =~ "the mesh's address 192.0.2.1 is not this host's alone and there is no shared_key"
    assert log =~ "insecure_no_auth: true"
  end

  @tag :capture_log
  test "with a key, or without by name, it listens where the mesh says" do
    # All of this host's addresses: beyond loopback, and still there to be called.
    everywhere = {:tcp, {0, 0, 0, 0}, 0}

    for access <- [[shared_key: @key], [insecure_no_auth: true]] do
      id = unique("server")
      mesh = [adapter: Mesh, service: {self(), everywhere}]
      start_supervised!(Server.Pool.child_spec(id, [module: TestServer, mesh: mesh] ++ access))
      assert_receive {:started, _listener}, 5_000
      {:ok, {:tcp, _ip, port}} = Server.Pool.address(id)
      client = client({:tcp, {127, 0, 0, 1}, port}, Keyword.delete(access, :insecure_no_auth))
      assert Client.Pool.call(client, :echo, 1) == 1
    end
  end

  @tag :capture_log
  test "a mesh that leads a client beyond loopback: no connection without a key" do
    mesh = [mesh: [adapter: Mesh, service: {self(), @elsewhere}]]
    client = client_down(nil, mesh)
    assert Client.Pool.call(client, :echo, 1, 5_000, 5, 10) == {:error_rpc, :closed}
    await(fn -> Client.Pool.info(client).down != [] end)
    assert [{:connect, {:auth, text}} | _] = Client.Pool.info(client).down
    assert text =~ "address 192.0.2.1 is not this host's alone"

    for access <- [[shared_key: @key], [insecure_no_auth: true]] do
      client = client_down(nil, mesh ++ access ++ [timeout_connect: 50])
      await(fn -> Client.Pool.info(client).down != [] end)
      refute match?([{:connect, {:auth, _}} | _], Client.Pool.info(client).down)
    end
  end

  test "both sides are told what does not fit, unless one is to be quiet" do
    for quiet <- [false, true], {mine, theirs} <- [{[checksum: :crc32], [checksum: :none]}] do
      log =
        capture_log(fn ->
          {server, address} = server([quiet_on_hsk_error?: quiet] ++ mine)
          client = client_down(address, [quiet_on_hsk_error?: quiet] ++ theirs)
          send(self(), {:pair, server, client})
          await(fn -> Client.Pool.info(client).down != [] end)
          told = Client.Pool.info(client).down

          if quiet,
            do: assert(told in [[:closed], [:econnreset]]),
            else: assert([{:settings, "checksums none are offered, wanted one of crc32"}] = told)
        end)

      assert_received {:pair, server, client}
      assert log =~ "MeshxRpc.Server #{inspect(server)} refuses" == not quiet

      # A client that is to be quiet says nothing of a server that is.
      assert log =~ "MeshxRpc.Client #{inspect(client)}: no connection to" == not quiet
    end
  end

  @tag :capture_log
  test "nor does a quiet server tell anybody else what it is" do
    for {options, bytes} <- [
          {[], "GET / HTTP/1.0\r\n\r\n"},
          {[], :binary.copy(<<0>>, 100)},
          {[], Frame.auth(<<0::256>>)},
          {[timeout_hsk: 50], ""},
          # Another one comes, and there is no room for two.
          {[max_hello: 1], :another},
          {[max_connections: 1], :another}
        ] do
      {server, address} = server([shared_key: @key, quiet_on_hsk_error?: true] ++ options)
      socket = raw(address)

      if bytes == :another do
        await(fn -> Server.Pool.info(server).in_hello == 1 end)
        second = raw(address)
        over = if options[:max_hello], do: socket, else: second
        assert read_all(over) == ""
      else
        :ok = :gen_tcp.send(socket, bytes)
        assert read_all(socket) == ""
      end
    end
  end

  @tag :capture_log
  test "nor a quiet client" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)

    for bytes <- ["HTTP/1.0 400 Bad Request\r\n\r\n", Frame.ready(), Frame.hello_ack("x"), ""] do
      options = [quiet_on_hsk_error?: true, timeout_hsk: 500]
      client = client_down({:tcp, {127, 0, 0, 1}, port}, options)
      {:ok, socket} = :gen_tcp.accept(listen, 10_000)
      assert {0x01, 0, _hello} = TestPeer.frame(socket)
      :ok = :gen_tcp.send(socket, bytes)
      assert read_all(socket) == ""
      stop_supervised!(client)
    end
  end

  @tag :capture_log
  test "a client that refuses tells the server, unless it is to be quiet" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)

    for quiet <- [false, true] do
      options = [shared_key: @key, quiet_on_hsk_error?: quiet]
      client = client_down({:tcp, {127, 0, 0, 1}, port}, options)
      {:ok, socket} = :gen_tcp.accept(listen, 10_000)
      {0x01, 0, hello} = TestPeer.frame(socket)
      false_server = TestPeer.config(keys: ["not the key of this client"])
      {:ok, _agreed, ack, _proofs} = Hello.answer(false_server, hello, Hello.nonce())
      :ok = :gen_tcp.send(socket, Frame.hello_ack(ack))

      if quiet do
        assert TestPeer.frame(socket) == :closed
      else
        assert {0x05, 0, <<9::16, text::binary>>} = TestPeer.frame(socket)
        assert text =~ "the server does not prove"
      end

      await(fn -> match?([{:auth, _text}], Client.Pool.info(client).down) end)
      stop_supervised!(client)
    end
  end

  def tell(event, _measurements, metadata, test),
    do: send(test, {List.last(event), metadata.result})

  defp refuse(listen) do
    {:ok, socket} = :gen_tcp.accept(listen)
    :gen_tcp.close(socket)
    refuse(listen)
  end

  test "what a mesh refuses is told in its words, what it refused before is not" do
    {:ok, listen} = :gen_tcp.listen(0, ip: {127, 0, 0, 1})
    {:ok, port} = :inet.port(listen)
    spawn_link(fn -> refuse(listen) end)
    test = self()

    for {ago, wanted} <- [{0, {:intention_denied, "web -> cart is denied"}}, {3_600, :reset}] do
      service = {test, {:tcp, {127, 0, 0, 1}, port}, ago}

      log =
        capture_log(fn ->
          client =
            client_down(nil,
              mesh: [adapter: Refusing, service: service],
              telemetry_handler: {__MODULE__, :tell, test}
            )

          assert_receive :asked, 5_000
          assert_receive {:hsk, {:error_rpc, reason}}, 5_000
          assert reason == wanted or (wanted == :reset and reason in [:closed, :econnreset])
          await(fn -> Client.Pool.info(client).down == [reason] end)
          stop_supervised!(client)
        end)

      assert log =~ "no connection to {:tcp, {127, 0, 0, 1}, #{port}}: " and
               log =~ if(ago == 0, do: "intention_denied: web -> cart is denied", else: ":")
    end
  end
end
