defmodule MeshxRpc.HostileTest do
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Frame, TestPeer}

  @moduletag capture_log: true

  @refused 0x05
  @reset 0x14
  @full 3
  @auth 9
  @timeout 11
  @refused_term 14
  @protocol 1

  defp refusal(socket), do: socket |> TestPeer.frame() |> refusal_of()
  defp refusal_of({@refused, 0, <<cause::16, text::binary>>}), do: {cause, text}
  defp refusal_of(other), do: other

  defp connections(server) do
    {_, supervisor, _, _} = server |> Supervisor.which_children() |> List.keyfind!(:connections, 0)
    for {_, pid, _, _} <- DynamicSupervisor.which_children(supervisor), do: pid
  end

  for codec <- MeshxRpc.Case.codecs() do
    describe "#{inspect(codec)}: a hello that is" do
      @describetag codec: codec

      setup %{codec: codec} do
        {server, address} = server(codec: codec, timeout_hsk: 300)
        client = client(address, codec: codec)
        name = registered()
        running = Task.async(fn -> Client.Pool.call(client, :wait, {name, 1}) end)
        assert_receive {:running, pid, 1}, 5_000

        # Whatever happens, the others notice nothing.
        others = fn ->
          assert Client.Pool.call(client, :echo, 1) == 1
          send(pid, {:answer, :undisturbed})
          assert Task.await(running) == :undisturbed
        end

        {:ok, server: server, address: address, others: others}
      end

      test "garbage", %{address: address, others: others} do
        for garbage <- [
              "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
              :binary.copy(<<0>>, 64),
              :binary.copy(<<0xFF>>, 100_000)
            ] do
          socket = raw(address)
          _ = :gen_tcp.send(socket, garbage)
          assert {_cause, text} = refusal(socket)
          assert text != ""
          assert TestPeer.frame(socket) == :closed
        end

        others.()
      end

      test "half", %{address: address, others: others} do
        socket = raw(address)
        :ok = :gen_tcp.send(socket, <<100::24, 1, 0, 0::24, 0::32, "only so much">>)
        assert {@timeout, text} = refusal(socket)
        assert text =~ "300 ms"
        others.()
      end

      test "too large", %{address: address, others: others} do
        socket = raw(address)
        :ok = :gen_tcp.send(socket, <<4_097::24, 1, 0, 0::24, 0::32>>)
        assert {_cause, text} = refusal(socket)
        assert text =~ "4096" or text =~ "4097"
        others.()
      end

      test "silence", %{address: address, others: others} do
        socket = raw(address)
        assert {@timeout, _text} = refusal(socket)
        others.()
      end

      test "slow, a byte now and then", %{address: address, others: others} do
        socket = raw(address)
        # Each byte is sent when the one before has arrived; none of them prolongs the time.
        :ok = :gen_tcp.send(socket, <<0>>)
        :ok = :gen_tcp.send(socket, <<0>>)
        assert {@timeout, _text} = refusal(socket)
        others.()
      end

      test "followed by frames out of turn", %{address: address, others: others} do
        socket = raw(address)
        :ok = :gen_tcp.send(socket, TestPeer.request(1, "echo", 0, "x"))
        assert {_cause, _text} = refusal(socket)
        others.()
      end
    end
  end

  test "the limits on connections hold, and are named" do
    {server, address} = server(max_connections: 2, max_hello: 1, timeout_hsk: 60_000)
    first = TestPeer.connect(address)
    await(fn -> Server.Pool.info(server).in_hello == 0 end)
    silent = raw(address)
    await(fn -> Server.Pool.info(server).connections == 2 end)
    third = raw(address)
    assert {@full, text} = refusal(third)
    assert text =~ "max_connections"
    :ok = :gen_tcp.close(first)
    await_connections(server, 1)
    # A silent connection makes room for the next one.
    _ = TestPeer.connect(address)
    assert {@full, text} = refusal(silent)
    assert text =~ "max_hello"
  end

  test "a connection that must go before it has its socket still says why" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    socket = raw({:tcp, {127, 0, 0, 1}, port})
    {:ok, accepted} = :gen_tcp.accept(listen, 5_000)

    config = MeshxRpc.Options.server!(TestServer, address: {:tcp, {127, 0, 0, 1}, 0})
    config = Map.put(config, :offered, Server.Functions.new(TestServer, :all))
    config = MeshxRpc.Options.telemetry(config)
    config = Map.put(config, :budget, config.codec.budget(1))
    argument = {config, self(), :counters.new(2, [])}
    {:ok, connection} = Server.Connection.start_link(argument)
    send(connection, :evicted)
    :ok = :gen_tcp.controlling_process(accepted, connection)
    send(connection, {:socket, accepted})
    assert {@full, text} = refusal(socket)
    assert text =~ "max_hello"
  end

  test "a peer that reads nothing is given up in time, and the connection never waits in the port" do
    {server, address} = server(timeout_send: 300)
    friend = TestPeer.connect(address)
    deaf = TestPeer.connect(address)
    block = :binary.copy("x", 60_000)

    # Blocks when both ways are full: the end of the connection ends it.
    Task.start_link(fn ->
      Enum.find(1..2_000, &(:gen_tcp.send(deaf, TestPeer.request(&1, "echo", 0, block)) != :ok))
    end)

    await(fn -> Server.Pool.info(server).connections == 1 end)
    :ok = :gen_tcp.send(friend, TestPeer.request(1, "echo", 0, "x"))
    assert {0x11, 1, <<0, 0, 1::64, "x">>} = TestPeer.frame(friend)
  end

  test "a crowd of silent connections keeps nobody out, and its members are gone in time" do
    {server, address} = server(max_connections: 40, max_hello: 8, timeout_hsk: 60_000)
    friend = TestPeer.connect(address)

    for round <- 1..5 do
      crowd = for _ <- 1..8, do: raw(address)
      await(fn -> Server.Pool.info(server).in_hello == 8 end)
      _ = TestPeer.connect(address)
      :ok = :gen_tcp.send(friend, TestPeer.request(round, "echo", 0, "x"))
      assert {0x11, ^round, <<0, 0, 1::64, "x">>} = TestPeer.frame(friend)
      Enum.each(crowd, &:gen_tcp.close/1)
      await(fn -> Server.Pool.info(server).in_hello == 0 end)
    end
  end

  test "nor do those that were refused already, and stay" do
    {server, address} = server(max_connections: 20, max_hello: 4, timeout_hsk: 60_000)

    crowd =
      for _ <- 1..60 do
        socket = raw(address)
        :ok = :gen_tcp.send(socket, Frame.auth(<<0::256>>))
        # Not `full` by `max_connections`.
        assert {@protocol, _text} = refusal(socket)
        socket
      end

    _ = TestPeer.connect(address)
    Enum.each(crowd, &:gen_tcp.close/1)
    await_connections(server, 1)
  end

  test "a connection that does not start in time is one that is not there, and no more" do
    {server, address} = server(gen_statem_opts: [timeout: 0])
    %{^server => listener} = listeners([server])
    socket = raw(address)
    assert {:error, reason} = :gen_tcp.recv(socket, 0, 10_000)
    assert reason in [:closed, :econnreset]
    assert Server.Pool.address(server) == {:ok, address}
    assert listeners([server]) == %{server => listener}
  end

  defp listeners(servers) do
    for server <- servers, into: %{} do
      {:listener, pid, _, _} = server |> Supervisor.which_children() |> List.keyfind!(:listener, 0)

      {server, pid}
    end
  end

  # The listener hears of a connection's end a moment after us.
  defp await_connections(server, wanted),
    do: await(fn -> Server.Pool.info(server).connections <= wanted end)

  test "a compressed term is refused, and only its call" do
    {_server, address} = server()
    socket = TestPeer.connect(address)
    bomb = :erlang.term_to_binary(List.duplicate(0, 1_000_000), compressed: 9)
    :ok = :gen_tcp.send(socket, TestPeer.request(1, "echo", 1, bomb))
    assert {@reset, 1, <<@refused_term::16, _text::binary>>} = TestPeer.frame(socket)
    :ok = :gen_tcp.send(socket, TestPeer.request(2, "echo", 0, "x"))
    assert {0x11, 2, <<0, 0, 1::64, "x">>} = TestPeer.frame(socket)
  end

  test "what the peer would not take is not sent to it" do
    {_server, address} = server()
    socket = TestPeer.connect(address, max_message: 100)
    :ok = :gen_tcp.send(socket, TestPeer.request(1, "make", 1, :erlang.term_to_binary(101)))
    assert {0x11, 1, <<1, 1, _total::64, reason::binary>>} = TestPeer.frame(socket)
    assert :erlang.binary_to_term(reason) == :error_too_long

    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    client = client_down({:tcp, {127, 0, 0, 1}, port})
    socket = TestPeer.accept(listen, max_message: 100)
    long = :binary.copy("x", 101)
    assert Client.Pool.call(client, :echo, long, 5_000, 500, 5) == {:error_rpc, :error_too_long}
    :ok = Client.Pool.cast(client, :echo, "y")

    # The first that comes is the next one: timeout, term, length of the name, no key, name, argument.
    assert {0x10, 1, <<1, _deadline::32, 12::64, 0, 5, "\0cast", cast::binary>>} =
             TestPeer.frame(socket)

    assert cast == <<0xFFFF_FFFF::32, 0, 4, 0, "echo", "y">>
  end

  test "what a server calls an exception and is none is raised as our own" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    client = client_down({:tcp, {127, 0, 0, 1}, port})
    socket = TestPeer.accept(listen)

    for reason <- [
          %{__exception__: true},
          %{__exception__: true, __struct__: :lists},
          %{__exception__: true, __struct__: "text"}
        ] do
      call = Task.async(fn -> catch_error(Client.Pool.call!(client, :echo, 1, 10_000, 500, 5)) end)
      assert {0x10, stream, _payload} = TestPeer.frame(socket)
      bytes = :erlang.term_to_binary(reason)
      head = Frame.response_head(:error, 1, byte_size(bytes))
      size = byte_size(head) + byte_size(bytes)
      frame = Frame.block(:response, true, 0, stream, [head, bytes], size, nil)
      :ok = :gen_tcp.send(socket, frame)
      assert %MeshxRpc.Error{reason: ^reason} = Task.await(call)
    end
  end

  test "malformed and unknown terms are refused, and make no atoms" do
    {_server, address} = server()
    socket = TestPeer.connect(address)

    for {term, n} <-
          Enum.with_index(
            [<<131, 100, 0, 9, "no_such_a">>, <<131, 255>>, <<>>, <<131, 97, 1, 0>>],
            1
          ) do
      :ok = :gen_tcp.send(socket, TestPeer.request(n, "echo", 1, term))
      assert {@reset, ^n, <<@refused_term::16, _text::binary>>} = TestPeer.frame(socket)
    end

    :ok = :gen_tcp.send(socket, TestPeer.request(9, "echo", 7, "x"))
    assert {@reset, 9, <<@refused_term::16, _text::binary>>} = TestPeer.frame(socket)
  end

  test "what waits for a client that does not read is bounded" do
    {server, address} = server(max_queue: 1_000_000, timeout_send: 60_000)
    socket = TestPeer.connect(address)
    [connection] = connections(server)
    name = registered()

    # The first results fill what sockets hold, and then the queue.
    argument = :erlang.term_to_binary(2_000_000)
    :ok = :gen_tcp.send(socket, for(n <- 1..30, do: TestPeer.request(n, "make", 1, argument)))
    wait = TestPeer.request(31, "wait", 1, :erlang.term_to_binary({name, 1}))
    :ok = :gen_tcp.send(socket, wait)
    assert_receive {:running, pid, 1}, 10_000
    task = Process.monitor(pid)
    # All others have handed their results over; what the connection keeps of them is bounded.
    await(fn -> Server.Pool.info(server).running == 1 end)
    :erlang.garbage_collect(connection)
    {:binary, binaries} = Process.info(connection, :binary)
    held = binaries |> Enum.uniq_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1)) |> Enum.sum()
    assert held < 20_000_000

    # When it goes, so does what still runs for it.
    :ok = :gen_tcp.close(socket)
    assert_receive {:DOWN, ^task, :process, ^pid, _killed}, 10_000
    await_connections(server, 0)
    assert %{connections: 0, in_hello: 0, running: 0} = Server.Pool.info(server)
  end

  test "a client that does not read is closed after timeout_send" do
    {server, address} = server(timeout_send: 100)
    socket = TestPeer.connect(address)
    [connection] = connections(server)
    monitor = Process.monitor(connection)
    argument = :erlang.term_to_binary(8_000_000)
    :ok = :gen_tcp.send(socket, TestPeer.request(1, "make", 1, argument))
    assert_receive {:DOWN, ^monitor, :process, ^connection, _reason}, 10_000
    await_connections(server, 0)
  end

  test "whoever has read all in the end is not taken for one who does not read" do
    {server, address} = server()
    client = client(address)
    {:ok, {_index, caller, _max, _traced}} = Client.Pool.row(Client.Pool.fetch!(client))
    [answerer] = connections(server)

    for {module, pid} <- [{Client.Connection, caller}, {Server.Connection, answerer}] do
      state = :sys.get_state(pid)
      timer = :erlang.start_timer(60_000, self(), :send)
      # All is written, and the port has not yet taken all of it.
      blocked = %{state | link: %{state.link | blocked: true, dirty: false}, send_timer: timer}
      assert {:noreply, idle} = module.handle_info({:drained, state.link.socket}, blocked)
      assert %{send_timer: nil, link: %{blocked: false}} = idle
      assert :erlang.read_timer(timer) == false
    end
  end

  test "a server that does not read: further calls are :full, then the connection is given up" do
    {:ok, listen} =
      :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}, recbuf: 4_096, buffer: 4_096])

    {:ok, port} = :inet.port(listen)
    client = client_down({:tcp, {127, 0, 0, 1}, port}, max_queue: 1_000_000, timeout_send: 5_000)
    socket = TestPeer.accept(listen)
    big = :binary.copy("x", 20_000_000)

    first = Task.async(fn -> Client.Pool.call(client, :echo, big, 60_000, 100, 5) end)
    # The first is queued when a part of it has come: then there is no room for another.
    assert {:ok, _header} = :gen_tcp.recv(socket, 12, 10_000)
    assert full(client) == {:error_rpc, :full}
    assert {:error_rpc, reason} = Task.await(first, 30_000)
    assert reason in [:closed, :timeout]

    # It is told after its calls are.
    if reason == :closed,
      do: await(fn -> match?([{:timeout, _text}], Client.Pool.info(client).down) end)
  end

  defp full(client) do
    case Client.Pool.call(client, :echo, :binary.copy("y", 999_999), 100, 1_000, 5) do
      {:error_rpc, :timeout} -> full(client)
      other -> other
    end
  end

  test "a connection's window that is made too large ends that connection" do
    {server, address} = server()
    socket = TestPeer.connect(address)
    :ok = :gen_tcp.send(socket, <<4::24, 0x20, 0, 0::24, 0::32, 1::32>>)
    assert {0x23, 0, <<0::32, 1::16, text::binary>>} = TestPeer.frame(socket)
    assert text =~ "2147483647"
    await_connections(server, 0)
  end

  describe "shared keys:" do
    @key "a shared key of some length"

    test "right, wrong and missing ones" do
      {_server, address} = server(shared_key: [@key, "the old key of this server"])
      assert Client.Pool.call(client(address, shared_key: @key), :echo, 1) == 1

      # A client that was given the new key, and still proves with the old one.
      both = ["the old key of this server", @key]
      assert Client.Pool.call(client(address, shared_key: both), :echo, 1) == 1

      for options <- [[shared_key: "not the key of this server"], []] do
        client = client_down(address, options)
        assert Client.Pool.call(client, :echo, 1, 5_000, 20, 10) == {:error_rpc, :closed}
        await(fn -> match?([{:auth, _text}], Client.Pool.info(client).down) end)
      end
    end

    test "a client that says its key is right without proving it is refused" do
      {_server, address} = server(shared_key: @key)
      socket = raw(address)

      hello =
        MeshxRpc.Hello.hello(
          TestPeer.config(keys: ["not the key of this server"]),
          MeshxRpc.Hello.nonce()
        )

      :ok = :gen_tcp.send(socket, Frame.hello(hello))
      assert {0x02, 0, _ack} = TestPeer.frame(socket)
      :ok = :gen_tcp.send(socket, Frame.auth(:crypto.strong_rand_bytes(32)))
      assert {@auth, text} = refusal(socket)
      assert text =~ "does not prove"
    end

    test "a recorded exchange is of no use, neither to a false client nor to a false server" do
      {_server, address} = server(shared_key: @key)
      proxy = start_supervised!({MeshxRpc.TestProxy, target: address, fun: fn _, _, _ -> :pass end})
      client = client(MeshxRpc.TestProxy.address(proxy), shared_key: @key)
      assert Client.Pool.call(client, :echo, 1) == 1
      [hello, auth | _] = sent = MeshxRpc.TestProxy.seen(proxy, :request)
      [ack, ready | _] = answered = MeshxRpc.TestProxy.seen(proxy, :response)
      assert :binary.match(:erlang.iolist_to_binary([sent, answered]), @key) == :nomatch

      socket = raw(address)
      :ok = :gen_tcp.send(socket, hello)
      assert {0x02, 0, _ack} = TestPeer.frame(socket)
      :ok = :gen_tcp.send(socket, auth)
      assert {@auth, _text} = refusal(socket)

      {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
      {:ok, port} = :inet.port(listen)
      deceived = client_down({:tcp, {127, 0, 0, 1}, port}, shared_key: @key)
      {:ok, socket} = :gen_tcp.accept(listen, 5_000)
      {0x01, 0, _hello} = TestPeer.frame(socket)
      :ok = :gen_tcp.send(socket, [ack, ready])
      assert {@auth, text} = refusal(socket)
      assert text =~ "the server does not prove"
      assert Client.Pool.call(deceived, :echo, 1, 1_000, 0) == {:error_rpc, :closed}
    end
  end

  test "a cast of the wire's own kind, which our clients do not send, is answered when its function starts" do
    {_server, address} = server()
    socket = TestPeer.connect(address)
    argument = :erlang.term_to_binary({registered(), 1})
    frames = TestPeer.request(1, "wait", 1, argument)
    <<header::binary-size(12), 1, rest::binary>> = IO.iodata_to_binary(frames)
    :ok = :gen_tcp.send(socket, [header, 2, rest])
    assert {0x11, 1, <<2, 0, 0::64>>} = TestPeer.frame(socket)
    assert_receive {:running, pid, 1}, 20_000
    send(pid, {:answer, :ok})
    # Nothing follows when it ends.
    :ok = :gen_tcp.send(socket, TestPeer.request(2, "echo", 0, "x"))
    assert {0x11, 2, <<0, 0, 1::64, "x">>} = TestPeer.frame(socket)
  end
end
