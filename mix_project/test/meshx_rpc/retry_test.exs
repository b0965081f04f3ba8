defmodule MeshxRpc.RetryTest do
  # What is made again, and what is not.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Frame, TestPeer}

  @moduletag capture_log: true

  defmodule Gateway do
    @moduledoc false
    def pass({client, result}) do
      :counters.add(:persistent_term.get({MeshxRpc.RetryTest, client}), 1, 1)
      MeshxRpc.Client.Pool.call(client, :echo, result)
    end
  end

  # A server that reads requests and then does as the test says; counts how often it was asked.
  defp peer(options, answer) do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    test = self()

    spawn_link(fn ->
      Stream.repeatedly(fn -> TestPeer.accept(listen) end)
      |> Enum.each(fn socket ->
        request = TestPeer.frame(socket)
        send(test, :asked)
        answer.(socket, request)
      end)
    end)

    client_down({:tcp, {127, 0, 0, 1}, port}, [retry_idle_error: 1] ++ options)
  end

  defp asked do
    receive do
      :asked -> 1 + asked()
    after
      0 -> 0
    end
  end

  test "a request that was written and got no answer is not made again by default" do
    client = peer([], fn socket, _request -> :gen_tcp.close(socket) end)
    assert Client.Pool.call(client, :echo, 1, 20_000, 1_000, 5) == {:error_rpc, :tcp_closed}
    assert asked() == 1
    assert Client.may_have_run?(:tcp_closed)
  end

  test "with retry_unsafe it is, as often as was said" do
    client = peer([retry_unsafe: true], fn socket, _request -> :gen_tcp.close(socket) end)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    # Those that find no connection are tries, too.
    assert {:error_rpc, _reason} = Client.Pool.call(client, :echo, 1, 20_000, 100, 20)
    assert asked() in 2..101
  end

  test "what a server says it will not run is made again" do
    count = :counters.new(1, [])

    client =
      peer([], fn socket, {0x10, stream, _payload} ->
        :counters.add(count, 1, 1)

        if :counters.get(count, 1) < 3 do
          :gen_tcp.send(socket, Frame.goaway(stream - 1, :shutdown, ""))
          :gen_tcp.close(socket)
        else
          head = Frame.response_head(:result, 0, 4)
          :gen_tcp.send(socket, Frame.block(:response, true, 0, stream, [head, "done"], 14, nil))
        end
      end)

    assert Client.Pool.call(client, :echo, 1, 20_000, 1_000, 5) == "done"
    assert asked() == 3
  end

  test "a function that exits with the name of a lost connection is not made again" do
    {_server, address} = server()
    client = client(address)

    for reason <- [:closed, :tcp_closed, :full] do
      assert Client.Pool.call(client, :exit_it, reason) == {:error_rpc, {:exit, reason}}
      assert Client.may_have_run?({:exit, reason})
    end
  end

  test "a result that looks like the error of a lost connection is a result" do
    {_server, address} = server()

    # Such as that of a server which calls another.
    for reason <- [:closed, :tcp_closed] do
      {client, ran} = {client(address, retry_unsafe: true), :counters.new(1, [])}
      :persistent_term.put({__MODULE__, client}, ran)
      {server, address} = server(module: __MODULE__.Gateway)
      gateway = client(address, retry_unsafe: true)

      assert Client.Pool.call(gateway, :pass, {client, {:error_rpc, reason}}, 10_000, 100, 5) ==
               {:error_rpc, reason}

      assert :counters.get(ran, 1) == 1
      :ok = stop_supervised(gateway)
      :ok = stop_supervised(server)
    end
  end

  def deserialize(_bytes, reason, _flag), do: {:error, reason}
  def serialize({reason, _nil}, _argument), do: {:error, reason}
  def serialize(:no, _argument), do: throw(:no)
  def serialize(reason, _argument), do: exit(reason)

  test "a result that the client's own function refuses, for whatever reason, is not asked for again" do
    {server, address} = server()
    name = registered()

    for reason <- [:closed, :tcp_closed, :full] do
      client = client_down(address, deserialize_mfa: {__MODULE__, :deserialize, reason})
      await(fn -> Client.Pool.info(client).connected == 1 end)
      call = Task.async(fn -> Client.Pool.call(client, :wait, {name, reason}, 10_000, 3, 1) end)
      assert_receive {:running, pid, ^reason}, 10_000
      send(pid, {:answer, 1})
      assert Task.await(call) == {:error_rpc, {:exit, reason}}

      assert client
             |> Client.Async.send_request(:echo, 1)
             |> Client.Async.receive_response(10_000) == {:error_rpc, {:exit, reason}}
    end

    await(fn -> Server.Pool.info(server).running == 0 end)
    refute_received {:running, _pid, _reason}

    # Nor one of an argument.
    client = client_down(address, serialize_mfa: {__MODULE__, :serialize, []})
    stream = MeshxRpc.Stream.new([1])

    for failed <- [
          Client.Pool.call(client, :wait, :closed),
          Client.Pool.call(client, :wait, {:closed, stream}),
          Client.Pool.cast(client, :wait, :closed, ack: true),
          client |> Client.Async.send_request(:wait, :closed) |> Client.Async.receive_response()
        ],
        do: assert(failed == {:error_rpc, {:exit, :closed}})

    assert {:error_rpc, {{:nocatch, :no}, [{__MODULE__, :serialize, 2, _location} | _]}} =
             Client.Pool.call(client, :wait, :no)
  end

  test "a request that its caller wrote, to a connection that was just gone, may have run" do
    {_server, address} = server()
    client = client(address)
    [[socket_of]] = :ets.match(table(client), {{:direct, 1}, :_, :"$1"})
    [{1, pid, max, trace}] = :ets.lookup(table(client), 1)
    await(fn -> not MeshxRpc.Shared.busy?(socket_of.shared) end)

    # Its process is gone, and its socket and tables are not yet.
    {gone, monitor} = spawn_monitor(fn -> :ok end)
    assert_receive {:DOWN, ^monitor, :process, ^gone, _}, 10_000
    tables = MeshxRpc.Client.Direct.new(socket_of.shared) |> Map.take([:calls, :watched])
    :ets.insert(table(client), {1, gone, max, trace})
    :ets.insert(table(client), {{:direct, 1}, gone, Map.merge(socket_of, tables)})
    name = registered()

    assert Client.Pool.call(client, :wait, {name, 1}, 10_000, 3, 1) == {:error_rpc, :tcp_closed}
    assert_receive {:running, _server, 1}, 10_000
    assert Process.alive?(pid)
  end

  test "only two reasons say that nothing has run" do
    for reason <- [:closed, :full], do: refute(Client.may_have_run?(reason))

    for reason <- [
          :unread,
          :timeout,
          :killed,
          :invalid_cks,
          :error_too_long,
          %RuntimeError{},
          {:undef, []}
        ] do
      assert Client.may_have_run?(reason)
    end
  end
end
