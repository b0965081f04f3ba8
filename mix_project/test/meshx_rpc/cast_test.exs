defmodule MeshxRpc.CastTest do
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{TestPeer, TestProxy}

  @moduletag capture_log: true

  defmodule Log do
    @moduledoc false
    # Tells the test that it runs, and waits until it may end.
    def hold({name, n}) do
      tell(name, {:started, self(), n})

      receive do
        :go -> tell(name, {:ended, n})
      end
    end

    def note({name, n}), do: tell(name, {:noted, n})
    def fail(_argument), do: raise("no")

    defp tell(name, message),
      do: name |> :erlang.binary_to_existing_atom() |> Process.whereis() |> send(message)
  end

  defp pair(options \\ []) do
    {server, address} = server([module: Log] ++ options)
    client = client_down(address)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    {server, client, address}
  end

  defp through(fun, options \\ []) do
    {server, address} = server(module: Log)
    proxy = start_supervised!({TestProxy, target: address, fun: fun}, id: make_ref())
    client = client_down(TestProxy.address(proxy), options)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    {server, client, proxy}
  end

  test "a cast is acknowledged when its function starts, not when it ends" do
    {_server, client, _address} = pair()
    name = registered()
    assert Client.Pool.cast(client, :hold, {name, 1}, ack: true) == :ok
    assert_receive {:started, pid, 1}, 10_000
    await(fn -> Client.Pool.info(client).casts == 0 end)
    send(pid, :go)
    assert_receive {:ended, 1}, 5_000

    assert {:error_rpc, {:undef, _}} = Client.Pool.cast(client, :nothing, 1, ack: true)

    assert {:error_rpc, :serialization_fail} =
             Client.Pool.cast(client, :note, fn -> 1 end, ack: true)

    assert Client.Pool.cast(client, :nothing) == :ok
    await(fn -> Client.Pool.info(client).cast_failures == 3 end)
    assert_raise ArgumentError, fn -> Client.Pool.cast(client, :note, 1, unknown: 1) end

    assert_raise ArgumentError, ~r/a stream cannot be sent/, fn ->
      Client.Pool.cast(client, :note, {1, MeshxRpc.Stream.new([1])})
    end
  end

  test "what cannot be made again is refused where it is asked for, and disturbs no other cast" do
    {_server, client, address} = pair()
    name = registered()

    for {retry, sleep} <- [{:infinity, 1}, {-1, 1}, {1.5, 1}, {1, :infinity}, {1, -5}, {1, 1.5}] do
      options = [retry: retry, retry_sleep: sleep]
      wanted = ~r/retry is .*wanted a number, 0 or more/

      assert_raise ArgumentError, wanted, fn ->
        Client.Pool.cast(client, :note, {name, 1}, options)
      end

      assert_raise ArgumentError, wanted, fn ->
        Client.Pool.call(client, :note, {name, 1}, 1_000, retry, sleep)
      end

      assert_raise ArgumentError, wanted, fn ->
        Client.Pool.stream(client, :note, {name, 1}, options)
      end
    end

    # With a server that is not there it is made again.
    down = client_down(put_elem(address, 2, 1), retry_proxy_fail: 60_000)
    keeper = :ets.lookup_element(table(down), :casts, 2)
    options = [retry: 1, retry_sleep: 0, ack: true]
    assert Client.Pool.cast(down, :note, {name, 1}, options) == {:error_rpc, :closed}
    assert :ets.lookup_element(table(down), :casts, 2) == keeper
  end

  test "who waits for its start waits no longer than the timeout, whatever is before it" do
    {_server, client, _address} = pair()
    name = registered()
    assert Client.Pool.cast(client, :hold, {name, 1}, key: :a, ack: true) == :ok
    assert_receive {:started, first, 1}, 10_000
    # It waits at the server, and the next one for it.
    assert Client.Pool.cast(client, :note, {name, 2}, key: :a) == :ok
    options = [key: :a, ack: true, timeout: 100]
    assert Client.Pool.cast(client, :note, {name, 3}, options) == {:error_rpc, :timeout}
    send(first, :go)
    assert_receive {:noted, 2}, 5_000
    await(fn -> Client.Pool.info(client).casts == 0 end)
    assert Client.Pool.info(client).cast_failures == 1

    down = client_down({:tcp, {127, 0, 0, 1}, 1}, retry_proxy_fail: 60_000)
    options = [ack: true, timeout: 100, retry_sleep: 100_000]
    assert Client.Pool.cast(down, :note, {name, 4}, options) == {:error_rpc, :timeout}
    refute_received {:noted, _}
  end

  test "a function that fails was started: the server counts it" do
    {server, client, _address} = pair()
    assert Client.Pool.cast(client, :fail, 1, ack: true) == :ok
    await(fn -> Server.Pool.info(server).cast_failures == 1 end)
    assert Client.Pool.info(client).cast_failures == 0
  end

  test "a cast runs on when its connection, or its client, is gone" do
    {server, client, _address} = pair()
    name = registered()
    assert Client.Pool.cast(client, :hold, {name, 1}, ack: true) == :ok
    assert_receive {:started, pid, 1}, 10_000
    :ok = stop_supervised(client)
    await(fn -> Server.Pool.info(server).connections == 0 end)
    assert Server.Pool.info(server).casts == 1
    send(pid, :go)
    assert_receive {:ended, 1}, 5_000
    await(fn -> Server.Pool.info(server).casts == 0 end)
  end

  test "a timeout ends a cast that runs, and one that waits" do
    {server, client, _address} = pair()
    name = registered()
    assert Client.Pool.cast(client, :hold, {name, 1}, ack: true, timeout: 3_000, key: :k) == :ok
    assert_receive {:started, pid, 1}, 10_000
    monitor = Process.monitor(pid)

    assert Client.Pool.cast(client, :hold, {name, 2}, ack: true, timeout: 1, key: :k) ==
             {:error_rpc, :timeout}

    assert_receive {:DOWN, ^monitor, :process, ^pid, :killed}, 9_000
    await(fn -> Server.Pool.info(server).casts == 0 end)
    refute_received {:started, _pid, 2}
  end

  test "casts that run are bounded" do
    {server, client, _address} = pair(max_concurrency: 2)
    name = registered()
    for n <- 1..2, do: :ok = Client.Pool.cast(client, :hold, {name, n}, ack: true)
    assert Client.Pool.cast(client, :hold, {name, 3}, ack: true) == {:error_rpc, :full}
    for _ <- 1..2, do: receive(do: ({:started, pid, _n} -> send(pid, :go)))
    await(fn -> Server.Pool.info(server).casts == 0 end)
    assert Client.Pool.cast(client, :note, {name, 4}, ack: true) == :ok
  end

  test "casts with a key start in order and run one after the other, others beside them" do
    {_server, client, _address} = pair()
    name = registered()
    for n <- 1..3, do: :ok = Client.Pool.cast(client, :hold, {name, n}, key: {:user, 1})
    :ok = Client.Pool.cast(client, :hold, {name, :other}, key: {:user, 2})
    :ok = Client.Pool.cast(client, :hold, {name, :none})

    for n <- 1..3 do
      assert_receive {:started, pid, ^n}, 5_000

      if n == 1,
        do: for(other <- [:other, :none], do: assert_receive({:started, _pid, ^other}, 5_000))

      refute_received {:started, _pid, _next}
      send(pid, :go)
      assert_receive {:ended, ^n}, 5_000
    end
  end

  test "thousands of casts with keys keep their order" do
    {_server, client, _address} = pair()
    name = registered()

    for n <- 1..500,
        key <- 1..4,
        do: :ok = Client.Pool.cast(client, :note, {name, {key, n}}, key: key)

    noted =
      for _ <- 1..2_000,
          do:
            (receive do
               {:noted, x} -> x
             after
               20_000 -> flunk("lost")
             end)

    for key <- 1..4, do: assert(for({^key, n} <- noted, do: n) == Enum.to_list(1..500))
    assert Client.Pool.info(client).cast_failures == 0
  end

  test "a cast that was never written survives the loss of its connection" do
    options = [:binary, active: false, ip: {127, 0, 0, 1}, reuseaddr: true]
    {:ok, listen} = :gen_tcp.listen(0, options)
    {:ok, port} = :inet.port(listen)
    address = {:tcp, {127, 0, 0, 1}, port}
    client = client_down(address)
    socket = TestPeer.accept(listen)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    # The server goes away and has run nothing.
    :ok = :gen_tcp.send(socket, MeshxRpc.Frame.goaway(0, :shutdown, "bye"))
    await(fn -> Client.Pool.info(client).connected == 0 end)
    name = registered()
    :ok = Client.Pool.cast(client, :note, {name, 1}, retry: 1_000, retry_sleep: 5)
    :gen_tcp.close(socket)
    :gen_tcp.close(listen)
    assert Client.Pool.info(client).casts == 1
    server(module: Log, address: address)
    assert_receive {:noted, 1}, 20_000
    await(fn -> Client.Pool.info(client).casts == 0 end)
    assert Client.Pool.info(client).cast_failures == 0
    refute_received {:noted, 1}
  end

  test "one that may have run is not made again without a key" do
    {_server, client, proxy} =
      through(fn
        :response, 0x11, _frame -> :hold
        _direction, _type, _frame -> :pass
      end)

    name = registered()
    cast = Task.async(fn -> Client.Pool.cast(client, :note, {name, 1}, ack: true) end)
    assert_receive {:noted, 1}, 5_000
    TestProxy.cut(proxy)
    assert Task.await(cast, 20_000) == {:error_rpc, :tcp_closed}
    await(fn -> Client.Pool.info(client).connected == 1 end)
    refute_received {:noted, 1}
    assert Client.Pool.info(client).cast_failures == 1
  end

  test "with a key it is made again, and runs once" do
    test = self()

    {_server, client, proxy} =
      through(fn
        # The answer to the second: that it has started never arrives, the first time.
        :response, 0x11, <<_::96, 0, 1, _total::64, started::binary>> = frame ->
          send(test, {:answer, self(), :erlang.binary_to_term(started), frame})
          receive(do: ({:verdict, verdict} -> verdict))

        _direction, _type, _frame ->
          :pass
      end)

    name = registered()
    cast = Task.async(fn -> Client.Pool.cast(client, :note, {name, 1}, ack: true, key: 1) end)
    # The first learns which instance this is.
    assert_receive {:answer, from, {:other, instance}, _frame}, 5_000
    send(from, {:verdict, :pass})
    assert_receive {:answer, from, {:started, ^instance}, _frame}, 5_000
    assert_receive {:noted, 1}, 5_000
    send(from, {:verdict, :hold})
    TestProxy.cut(proxy)
    assert_receive {:answer, from, {:started, ^instance}, _frame}, 5_000
    send(from, {:verdict, :pass})
    assert Task.await(cast, 20_000) == :ok
    refute_received {:noted, 1}
    assert Client.Pool.info(client).cast_failures == 0
  end

  test "with a key it does not run at another instance when it may have run at the first" do
    {server, client, proxy} =
      through(fn
        :response, 0x11, <<_::96, 0, 1, _total::64, started::binary>> ->
          if match?({:started, _}, :erlang.binary_to_term(started)), do: :hold, else: :pass

        _direction, _type, _frame ->
          :pass
      end)

    name = registered()

    cast =
      Task.async(fn ->
        Client.Pool.cast(client, :note, {name, 1}, ack: true, key: 1, retry: 1_000, retry_sleep: 5)
      end)

    assert_receive {:noted, 1}, 5_000
    :ok = stop_supervised(server)
    {_second, address} = server(module: Log)
    TestProxy.target(proxy, address)
    TestProxy.cut(proxy)
    assert Task.await(cast, 20_000) == {:error_rpc, :tcp_closed}
    refute_received {:noted, 1}
    TestProxy.release(proxy)
    # The next one is for the new instance.
    assert Client.Pool.cast(client, :note, {name, 2}, ack: true, key: 1) == :ok
    assert_receive {:noted, 2}, 5_000
  end

  test "a number that a lane has seen does not run, whoever sends it again" do
    {server, _client, address} = pair()
    name = registered()
    socket = TestPeer.connect(address)
    lane = <<1::128, 2::128>>
    argument = :erlang.term_to_binary({name, 7})

    cast = fn stream, number, instance ->
      bytes =
        <<0xFFFF_FFFF::32, 1, 4, 1, lane::binary, number::64, instance::binary, "note",
          argument::binary>>

      :ok = :gen_tcp.send(socket, TestPeer.request(stream, "\0cast", 0, bytes))
      {0x11, ^stream, <<0, 1, _total::64, answer::binary>>} = TestPeer.frame(socket)
      :erlang.binary_to_term(answer)
    end

    assert {:other, instance} = cast.(1, 5, <<0::128>>)
    refute_received {:noted, 7}
    assert {:started, ^instance} = cast.(2, 5, instance)
    assert_receive {:noted, 7}, 5_000
    assert {:started, ^instance} = cast.(3, 5, instance)
    assert {:started, ^instance} = cast.(4, 4, instance)
    await(fn -> Server.Pool.info(server).casts == 0 end)
    refute_received {:noted, 7}
    assert {:started, ^instance} = cast.(5, 6, instance)
    assert_receive {:noted, 7}, 5_000
  end
end
