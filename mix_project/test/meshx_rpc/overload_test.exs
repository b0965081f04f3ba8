defmodule MeshxRpc.OverloadTest do
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Codec.Wire, Frame, TestPeer}

  @moduletag capture_log: true
  @moduletag timeout: 180_000

  defp listen do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    {listen, {:tcp, {127, 0, 0, 1}, port}}
  end

  test "a server that stops names the last request it began, not the last that became whole" do
    {server, address} = server()
    name = registered()
    socket = TestPeer.connect(address)
    argument = :erlang.term_to_binary({name, 1})
    size = byte_size(argument)
    {first, rest} = :erlang.split_binary(argument, 3)
    head = Frame.request_head(:infinity, size, 1, "wait")

    # Request 1 begins, request 2 runs, then request 1 becomes whole and runs too.
    part = Frame.block(:request, false, 0, 1, [head, first], byte_size(head) + 3, nil)
    :ok = :gen_tcp.send(socket, [part, TestPeer.request(2, "wait", 1, argument)])
    assert_receive {:running, _pid, 1}, 5_000
    :ok = :gen_tcp.send(socket, Frame.block(:data, true, 1, 1, rest, size - 3, nil))
    assert_receive {:running, _pid, 1}, 5_000
    :ok = stop_supervised(server)
    assert {0x23, 0, <<last::32, _cause::16, _text::binary>>} = TestPeer.frame(socket)
    assert last == 2
  end

  for codec <- MeshxRpc.Case.codecs() do
    test "#{inspect(codec)}: a server that is full for long costs no call that runs" do
      codec = unquote(codec)
      {_server, address} = server(max_concurrency: 1)
      client = client(address, codec: codec)
      name = registered()
      running = Task.async(fn -> Client.Pool.call(client, :wait, {name, 1}) end)
      assert_receive {:running, pid, 1}, 5_000
      me = self()

      # More refusals than a peer may send of frames that answer nothing, as fast as they come.
      for _ <- 1..30 do
        spawn_link(fn ->
          answers = for _ <- 1..1_000, do: Client.Pool.call(client, :echo, 1, 60_000, 0)
          send(me, {:answers, Enum.uniq(answers)})
        end)
      end

      for _ <- 1..30, do: assert_receive({:answers, [{:error_rpc, :full}]}, 60_000)
      send(pid, {:answer, :undisturbed})
      assert Task.await(running) == :undisturbed
    end
  end

  test "refusals that a client does not read are bounded" do
    {server, address} = server(max_concurrency: 1)
    name = registered()
    socket = TestPeer.connect(address)
    wait = TestPeer.request(1, "wait", 1, :erlang.term_to_binary({name, 1}))
    :ok = :gen_tcp.send(socket, wait)
    assert_receive {:running, pid, 1}, 5_000
    task = Process.monitor(pid)

    flood = fn ->
      # A server that closes reads on for a second, and throws away very much in it.
      Enum.find(0..100_000, fn batch ->
        requests = for n <- 1..5_000, do: TestPeer.request(1 + batch * 5_000 + n, "echo", 0, "")
        :gen_tcp.send(socket, requests) != :ok
      end)
    end

    sender = Task.async(flood)
    assert_receive {:DOWN, ^task, :process, ^pid, _killed}, 60_000
    await(fn -> Server.Pool.info(server).connections == 0 end)

    # Before the sender has said it all. It may hear of the end only when its system asks for room again: a reset that
    # lies beyond what its full buffer admits is ignored.
    refute match?({:ok, nil}, Task.shutdown(sender, :brutal_kill))
  end

  test "casts that a server does not answer are bounded" do
    {listen, address} = listen()
    client = client_down(address, max_queue: 1_000_000)
    _socket = TestPeer.accept(listen)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    for _ <- 1..2_000, do: :ok = Client.Pool.cast(client, :echo, [], :infinity, 0)
    info = Client.Pool.info(client)
    assert info.casts in 500..1_000
    assert info.cast_failures == 2_000 - info.casts
  end

  test "a text of the peer is shown as what it is" do
    import ExUnit.CaptureLog
    {listen, address} = listen()

    log =
      capture_log(fn ->
        client = client_down(address)
        {:ok, socket} = :gen_tcp.accept(listen, 5_000)
        {0x01, 0, _hello} = TestPeer.frame(socket)
        text = <<"no\n12:00:00 [error] forged \e[31m", 255>>
        :ok = :gen_tcp.send(socket, Wire.refused(:auth, text))
        {:error, :closed} = :gen_tcp.recv(socket, 0, 5_000)
        # It closes first and logs then.
        children = Supervisor.which_children(client)
        {_id, connection, :worker, _modules} = List.keyfind(children, {client, 1}, 0)
        _ = :sys.get_state(connection)
      end)

    assert log =~ ~S(auth: no\n12:00:00 [error] forged \e[31m\xFF)
  end
end
