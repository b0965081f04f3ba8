defmodule MeshxRpc.AsyncTest do
  use MeshxRpc.Case, async: true
  alias MeshxRpc.Client.Async
  alias MeshxRpc.TestPeer

  @moduletag capture_log: true

  setup do
    {server, address} = server()
    {:ok, server: server, client: client(address)}
  end

  test "responses are what calls answer with, in any order", %{client: client} do
    ids = for n <- 1..50, do: Async.send_request(client, :echo, n)

    assert ids |> Enum.reverse() |> Enum.map(&Async.receive_response(&1, 10_000)) ==
             Enum.to_list(50..1//-1)

    failed = Async.send_request(client, :fail)
    assert {:error_rpc, %ArgumentError{}} = Async.receive_response(failed)

    assert {:error_rpc, {:undef, _}} =
             client |> Async.send_request(:nothing) |> Async.receive_response()

    assert_raise ArgumentError, fn ->
      Async.send_request(client, :echo, MeshxRpc.Stream.new([1]))
    end
  end

  test "a response can be waited for again, and be recognised among messages", %{client: client} do
    name = registered()
    id = Async.send_request(client, :wait, {name, 1})
    assert_receive {:running, pid, 1}, 5_000
    assert Async.wait_response(id, 0) == :no_response
    assert Async.wait_response(id, 10) == :no_response
    send(pid, {:answer, :late})
    assert Async.wait_response(id, 10_000) == {:response, :late}

    id = Async.send_request(client, :echo, :mine)
    send(self(), :other)
    assert_receive message when message != :other, 10_000
    assert Async.check_response(:other, id) == :no_response
    assert Async.check_response(message, id) == {:response, :mine}
  end

  test "a request that is abandoned, in time or of a process that dies ends its work", %{
    client: client,
    server: server
  } do
    name = registered()
    id = Async.send_request(client, :wait, {name, 1})
    assert_receive {:running, pid, 1}, 5_000
    monitor = Process.monitor(pid)
    assert Async.receive_response(id, 10) == {:error_rpc, :timeout}
    assert_receive {:DOWN, ^monitor, :process, ^pid, _killed}, 5_000

    caller =
      spawn(fn ->
        Async.send_request(client, :wait, {name, 2})
        Process.sleep(:infinity)
      end)

    assert_receive {:running, pid, 2}, 5_000
    monitor = Process.monitor(pid)
    Process.exit(caller, :kill)
    assert_receive {:DOWN, ^monitor, :process, ^pid, _killed}, 5_000

    id = Async.send_request(client, :wait, {name, 3}, 50)
    assert Async.receive_response(id, 10_000) == {:error_rpc, :timeout}
    await(fn -> Server.Pool.info(server).running == 0 end)
    await(fn -> Client.Pool.info(client).in_flight == 0 end)
    # It may have been over before it ran.
    receive(do: ({:running, _pid, 3} -> :ok), after: (0 -> :ok))
    assert Process.info(self(), :message_queue_len) == {:message_queue_len, 0}
  end

  test "a collection gives whichever comes first", %{client: client} do
    name = registered()

    requests =
      Enum.reduce(
        1..3,
        Async.new(),
        &Async.send_request(client, :wait, {name, &1}, :infinity, &1, &2)
      )

    assert Async.size(requests) == 3

    pids =
      for n <- 1..3,
          into: %{},
          do:
            (receive do
               {:running, pid, ^n} -> {n, pid}
             after
               5_000 -> flunk("not running")
             end)

    assert Async.receive_any(requests, 10) == :timeout

    left =
      for n <- [2, 3, 1], reduce: requests do
        requests ->
          send(pids[n], {:answer, n * 10})
          assert {result, ^n, rest} = Async.receive_any(requests, 10_000)
          assert result == n * 10
          rest
      end

    assert Async.receive_any(left) == :no_request
  end

  test "several servers at once, the one that is away too", %{client: client} do
    {_server, address} = server()
    other = client(address)
    away = client_down({:tcp, {127, 0, 0, 1}, 1})
    assert Async.multicall([client, away, other], :echo, 7, 10_000) == [7, {:error_rpc, :closed}, 7]

    name = registered()

    assert_raise ArgumentError, ~r/no MeshxRpc client :not_started/, fn ->
      Async.multicall([client, :not_started], :wait, {name, 0}, 10_000)
    end

    # What was sent on that connection is answered before the next.
    assert Async.multicall([client], :echo, 7, 10_000) == [7]
    refute_received {:running, _pid, 0}

    assert [{:error_rpc, :timeout}, {:error_rpc, :timeout}] =
             Async.multicall([client, other], :wait, {name, 1}, 200)
  end

  test "one to a server that says nothing any more ends in time, however it is waited for" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    client = client_down({:tcp, {127, 0, 0, 1}, port})
    socket = TestPeer.accept(listen)
    await(fn -> Client.Pool.info(client).connected == 1 end)

    first = Async.send_request(client, :echo, 1, 200)
    assert Async.receive_response(first) == {:error_rpc, :timeout}
    second = Async.send_request(client, :echo, 2, 200)
    assert_receive message, 10_000
    assert Async.check_response(message, second) == {:response, {:error_rpc, :timeout}}
    third = Async.send_request(client, :echo, 3, 200, :third, Async.new())
    assert Async.receive_any(third) == {{:error_rpc, :timeout}, :third, []}

    # The server is told, should it listen again.
    frames = for _ <- 1..6, do: TestPeer.frame(socket)
    assert for({0x13, stream, ""} <- frames, do: stream) == for({0x10, s, _} <- frames, do: s)
    await(fn -> Client.Pool.info(client).in_flight == 0 end)
    assert Process.info(self(), :message_queue_len) == {:message_queue_len, 0}
  end
end
