defmodule MeshxRpc.PoolTest do
  # How many connections there are, when they are made anew, and how a server leaves.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Shared, TestPeer, TestProxy, TestRelay, TestVm}
  alias MeshxRpc.Client.Direct

  @moduletag capture_log: true
  @moduletag timeout: 180_000

  defp connected(client, n), do: await(fn -> Client.Pool.info(client).connected == n end)

  defp waiting(client, name, n) do
    tasks = for i <- 1..n, do: Task.async(fn -> Client.Pool.call(client, :wait, {name, i}) end)

    pids =
      for _ <- 1..n,
          do:
            (receive do
               {:running, pid, _} -> pid
             after
               20_000 -> flunk("not running")
             end)

    {tasks, pids}
  end

  defp answer({tasks, pids}) do
    for pid <- pids, do: send(pid, {:answer, :ok})
    assert tasks |> Task.await_many(20_000) |> Enum.uniq() == [:ok]
  end

  # Stops a server, which waits for what it runs. What is asked from now on goes to others: the client has heard of it.
  defp stopping(client, server) do
    {:ok, {index, pid, _max_message, _trace}} = client |> Client.Pool.fetch!() |> Client.Pool.row()
    stop = Task.async(fn -> Supervisor.stop(server) end)
    await(fn -> not match?([{_index, ^pid, _max, _trace}], :ets.lookup(table(client), index)) end)
    stop
  end

  test "one that is started anew is there, however late the end of the one before is" do
    {server, address} = server()
    client = client(address)

    for {kind, id} <- [client: client, server: server] do
      %{entry: entry} = MeshxRpc.Entry.get({kind, id})
      monitor = Process.monitor(entry)
      true = :erlang.suspend_process(entry)
      Process.exit(Process.whereis(id), :kill)
      await(fn -> match?(%{entry: pid} when pid != entry, MeshxRpc.Entry.get({kind, id})) end)
      true = :erlang.resume_process(entry)
      assert_receive {:DOWN, ^monitor, :process, ^entry, :killed}, 10_000
      assert %{entry: _pid} = MeshxRpc.Entry.get({kind, id})
    end

    # With another port.
    {:ok, address} = Server.Pool.address(server)
    assert Client.Pool.call(client(address), :echo, 1) == 1
    assert Client.Pool.info(client).size == 1
  end

  test "what is asked of one that has ended since it was found is closed, and has not run" do
    {_server, address} = server()
    id = unique("client")
    {:ok, pid} = Client.Pool.start_link(id, address: address)
    Process.unlink(pid)
    await(fn -> Client.Pool.info(id).connected > 0 end)
    # Callers find it for as long as it is not heard of its end.
    %{entry: entry, table: table} = MeshxRpc.Entry.get({:client, id})
    true = :erlang.suspend_process(entry)
    Process.exit(pid, :kill)
    await(fn -> :ets.info(table) == :undefined end)

    assert Client.Pool.call(id, :echo, 1, 1_000, 0) == {:error_rpc, :closed}
    assert Client.Pool.cast(id, :echo, 1, ack: true) == {:error_rpc, :closed}
    request = Client.Async.send_request(id, :echo, 1)
    assert Client.Async.receive_response(request, 10_000) == {:error_rpc, :closed}

    closed =
      assert_raise MeshxRpc.Error, fn ->
        Enum.to_list(Client.Pool.stream(id, :echo, 1, retry: 0))
      end

    assert closed.reason == :closed
    true = :erlang.resume_process(entry)
  end

  # A server that another process can stop.
  defp leaving(options) do
    id = unique("leaving")
    options = [address: {:tcp, {127, 0, 0, 1}, 0}, module: TestServer] ++ options
    {:ok, pid} = Server.Pool.start_link(id, options)
    Process.unlink(pid)
    {:ok, address} = Server.Pool.address(id)
    {id, address}
  end

  test "calls take the connection with the fewest" do
    {_server, address} = server()
    client = client_down(address, pool_opts: [size: 4])
    connected(client, 4)
    name = registered()
    # One after the other: a connection counts most calls when it hears of them.
    {tasks, pids} = for(_ <- 1..40, do: waiting(client, name, 1)) |> Enum.unzip()
    calls = {Enum.concat(tasks), Enum.concat(pids)}

    loads =
      for {index, _, _, _} <- :ets.tab2list(table(client)),
          do: Client.Pool.in_flight(Client.Pool.fetch!(client), index)

    assert length(loads) == 4
    assert Enum.uniq(loads) == [10]
    answer(calls)
  end

  test "a pool grows while all its connections are busy, at most by max_overflow, and shrinks again" do
    {_server, address} = server()
    client = client_down(address, pool_opts: [size: 1, max_overflow: 2])
    connected(client, 1)
    name = registered()
    calls = waiting(client, name, 70)
    await(fn -> Client.Pool.call(client, :echo, 1) && Client.Pool.info(client).connected == 2 end)
    more = waiting(client, name, 150)
    await(fn -> Client.Pool.call(client, :echo, 1) && Client.Pool.info(client).connected == 3 end)
    further = waiting(client, name, 200)
    assert Client.Pool.info(client).connected == 3
    for calls <- [calls, more, further], do: answer(calls)
    connected(client, 1)
    assert Client.Pool.call(client, :echo, :still) == :still
    assert Client.Pool.info(client).in_flight == 0
  end

  test "a pool without max_overflow stays as it is" do
    {_server, address} = server()
    client = client_down(address, pool_opts: [size: 1])
    connected(client, 1)
    calls = waiting(client, registered(), 200)
    assert Client.Pool.info(client).connected == 1
    answer(calls)
  end

  test "a server that is silent is asked, and given up when it does not answer" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    client = client_down({:tcp, {127, 0, 0, 1}, port}, ping_interval: 2_000)
    socket = TestPeer.accept(listen)
    assert {0x21, 0, <<bytes::binary-size(8)>>} = TestPeer.frame(socket)
    :ok = :gen_tcp.send(socket, MeshxRpc.Codec.Wire.pong(bytes))
    # It has answered, so it is asked again. Then it does not.
    assert {0x21, 0, <<_::64>>} = TestPeer.frame(socket)
    call = Task.async(fn -> Client.Pool.call(client, :echo, 1, 20_000, 0) end)
    assert Task.await(call, 20_000) in [{:error_rpc, :tcp_closed}, {:error_rpc, :closed}]
    assert read_all(socket) |> is_binary()
    # And connected to anew.
    _ = TestPeer.accept(listen)
    connected(client, 1)
  end

  test "a server that answers is not given up, however quiet it is" do
    {server, address} = server()
    test = self()

    fun = fn direction, type, _frame ->
      if {direction, type} == {:response, 0x22}, do: send(test, :answered)
      :pass
    end

    proxy = start_supervised!({TestProxy, target: address, fun: fun})
    client = client_down(TestProxy.address(proxy), ping_interval: 2_000)
    connected(client, 1)
    name = registered()
    calls = waiting(client, name, 1)
    # Some questions later.
    for _ <- 1..2, do: assert_receive(:answered, 30_000)
    assert Server.Pool.info(server).connections == 1
    answer(calls)
  end

  test "a connection that nobody uses is made anew, one that is used is not" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    options = [ping_interval: 1_500, idle_reconnect: 100, pool_opts: [size: 1]]
    test = self()

    spawn_link(fn ->
      Stream.repeatedly(fn -> TestPeer.accept(listen) end)
      |> Enum.each(fn socket ->
        send(test, :accepted)
        quiet(socket, nil, 0)
      end)
    end)

    client = client_down({:tcp, {127, 0, 0, 1}, port}, options)
    for _ <- 1..3, do: assert_receive(:accepted, 20_000)
    # Its answer comes when the connection had been made anew long ago, had it been idle.
    assert Client.Pool.call(client, :echo, 1, 30_000, 1_000, 5) == "late"
  end

  # Answers questions, and a request after 2 more of them.
  defp quiet(socket, request, questions) do
    case TestPeer.frame(socket) do
      {0x21, 0, bytes} ->
        :ok = :gen_tcp.send(socket, MeshxRpc.Codec.Wire.pong(bytes))

        if request && questions == 2 do
          head = MeshxRpc.Frame.response_head(:result, 0, 4)
          frame = MeshxRpc.Frame.block(:response, true, 0, request, [head, "late"], 14, nil)
          _ = :gen_tcp.send(socket, frame)
        end

        quiet(socket, request, questions + 1)

      {0x10, stream, _request} ->
        quiet(socket, stream, 0)

      _closed ->
        :ok
    end
  end

  test "a server that stops lets what has begun end, and begins nothing" do
    {server, address} = leaving(drain: 20_000)
    client = client_down(address)
    connected(client, 1)
    name = registered()
    calls = waiting(client, name, 5)
    stop = Task.async(fn -> Supervisor.stop(server) end)
    connected(client, 0)
    assert Client.Pool.call(client, :echo, 1, 1_000, 0) == {:error_rpc, :closed}
    assert Task.yield(stop, 0) == nil
    answer(calls)
    assert Task.await(stop, 20_000) == :ok
  end

  test "it does not wait for ever" do
    {server, address} = leaving(drain: 50)
    client = client_down(address)
    connected(client, 1)
    {tasks, _pids} = waiting(client, registered(), 2)
    :ok = Supervisor.stop(server)
    assert Task.await_many(tasks, 20_000) |> Enum.uniq() == [{:error_rpc, :tcp_closed}]
  end

  test "while a connection drains, another takes its place" do
    {first, one} = leaving(drain: 20_000)
    {_second, two} = server()
    relay = start_supervised!({TestRelay, target: one})
    client = client_down(TestRelay.address(relay))
    connected(client, 1)
    calls = waiting(client, registered(), 3)
    TestRelay.target(relay, two)
    stop = stopping(client, first)
    # Answered while the calls of before still run.
    await(fn -> Client.Pool.call(client, :echo, 1, 1_000, 100, 5) == 1 end)
    assert Task.yield(stop, 0) == nil
    answer(calls)
    assert Task.await(stop, 20_000) == :ok
    assert Client.Pool.call(client, :echo, 2) == 2
  end

  test "what stands in for a connection that drains leaves when that one is back, however busy it is" do
    {first, one} = leaving(drain: 20_000)
    {_second, two} = server()
    relay = start_supervised!({TestRelay, target: one})
    client = client_down(TestRelay.address(relay))
    connected(client, 1)
    name = registered()
    calls = waiting(client, name, 3)
    TestRelay.target(relay, two)
    stop = stopping(client, first)
    await(fn -> Client.Pool.call(client, :echo, 1, 1_000, 100, 5) == 1 end)
    busy = waiting(client, name, 3)
    answer(calls)
    assert Task.await(stop, 20_000) == :ok
    # The stand-in has calls all the time, and takes no more.
    await(fn -> :ets.member(table(client), 1) and Client.Pool.info(client).connected == 1 end)
    more = waiting(client, name, 3)
    assert Client.Pool.in_flight(Client.Pool.fetch!(client), 1) == 3
    answer(busy)
    answer(more)
  end

  test "when a server stops whose connection stands in for another, a third goes on" do
    [{first, one}, {second, two}] = for _ <- 1..2, do: leaving(drain: 40_000)
    {_third, three} = server()
    relay = start_supervised!({TestRelay, target: one})
    client = client_down(TestRelay.address(relay))
    connected(client, 1)
    name = registered()

    {calls, stops} =
      for {server, next} <- [{first, two}, {second, three}] do
        calls = waiting(client, name, 1)
        TestRelay.target(relay, next)
        stop = stopping(client, server)
        await(fn -> Client.Pool.call(client, :echo, 1, 1_000, 100, 5) == 1 end)
        {calls, stop}
      end
      |> Enum.unzip()

    # Two servers wait for the first calls, and the third answers.
    for stop <- stops, do: assert(Task.yield(stop, 0) == nil)
    assert Client.Pool.call(client, :echo, 2) == 2
    for calls <- calls, do: answer(calls)
    for stop <- stops, do: assert(Task.await(stop, 20_000) == :ok)
    connected(client, 1)
  end

  test "no caller writes a request itself when the server has said GOAWAY" do
    {server, address} = leaving([])
    client = client(address)
    [{_key, connection, direct}] = :ets.lookup(table(client), {:direct, 1})
    enter = fn -> Direct.enter(direct, connection, Shared.take_id(direct.shared), make_ref()) end
    name = registered()
    calls = waiting(client, name, 1)
    stop = Task.async(fn -> Supervisor.stop(server) end)
    await(fn -> Client.Pool.info(client).connected == 0 end)
    # Its caller had found the connection before.
    refute enter.()
    assert :ets.info(direct.calls, :size) == 0
    answer(calls)
    assert Task.await(stop, 20_000) == :ok
    await(fn -> :ets.info(direct.calls) == :undefined end)
    assert_raise ArgumentError, enter
  end

  test "a rolling restart of three servers under load loses no call and no cast" do
    vms = for n <- 1..3, do: {n, start_supervised!({TestVm, []})}

    serve = fn {n, vm} ->
      TestVm.call(vm, TestVm, :serve, [
        :"rolling_#{n}",
        [module: MeshxRpc.FaultServer, address: {:tcp, {127, 0, 0, 1}, 0}, drain: 20_000]
      ])
    end

    addresses = Map.new(vms, &{&1, serve.(&1)})
    relay = start_supervised!({TestRelay, target: Map.values(addresses)})
    client = client_down(TestRelay.address(relay), pool_opts: [size: 3], retry_idle_error: 50)
    connected(client, 3)
    stopped = :atomics.new(1, [])

    load =
      for worker <- 1..12 do
        Task.async(fn ->
          Stream.iterate(0, &(&1 + 1))
          |> Stream.take_while(fn _ -> :atomics.get(stopped, 1) == 0 end)
          |> Enum.reduce({0, []}, fn n, {right, wrong} ->
            id = {worker, n}

            result =
              if rem(worker, 4) == 0,
                do:
                  Client.Pool.cast(client, :echo, id, ack: true, retry: 200, retry_sleep: 10) == :ok &&
                    id,
                else: Client.Pool.call(client, :slow_echo, id, 30_000, 200, 10)

            if result == id, do: {right + 1, wrong}, else: {right, [result | wrong]}
          end)
        end)
      end

    for {n, vm} = key <- vms, reduce: addresses do
      addresses ->
        # Nothing new comes to it, as a load balancer or a mesh would see to; what it has, ends.
        TestRelay.target(relay, addresses |> Map.delete(key) |> Map.values())
        :ok = TestVm.call(vm, TestVm, :stop_server, [:"rolling_#{n}"])
        addresses = Map.put(addresses, key, serve.(key))
        TestRelay.target(relay, Map.values(addresses))
        connected(client, 3)
        addresses
    end

    :atomics.put(stopped, 1, 1)
    results = Task.await_many(load, 60_000)
    assert Enum.flat_map(results, &elem(&1, 1)) == []
    assert results |> Enum.map(&elem(&1, 0)) |> Enum.sum() > 12
  end
end
