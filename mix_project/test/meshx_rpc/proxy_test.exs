defmodule MeshxRpc.ProxyTest do
  # What happens between a client and a server when the way between them does something.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.TestProxy

  @moduletag capture_log: true

  @request 0x10
  @data 0x12
  @cancel 0x13
  @window 0x20

  def sha(block, algorithm), do: :crypto.hash(algorithm, block)

  defp forged(frame) do
    body = binary_part(frame, 0, byte_size(frame) - 4)
    body = :binary.replace(body, "MARK", "mARK")
    body <> <<:erlang.crc32(body)::32>>
  end

  defp between(codec, fun, options) do
    {server, address} = server([codec: codec] ++ options)
    proxy = start_supervised!({TestProxy, target: address, fun: fun}, id: make_ref())
    client = client(TestProxy.address(proxy), [codec: codec] ++ options)
    {server, client, proxy}
  end

  for codec <- MeshxRpc.Case.codecs() do
    describe "#{inspect(codec)}" do
      @describetag codec: codec

      test "a corrupted block costs its own call only, in both directions", %{codec: codec} do
        for direction <- [:request, :response],
            options <- [
              [checksum: :crc32],
              [checksum: :crc32c],
              [cks_mfa: {MeshxRpc.Protocol.Default, :checksum, []}],
              [cks_mfa: {__MODULE__, :sha, :sha256}]
            ] do
          fun = fn
            ^direction, _type, frame ->
              if :binary.match(frame, "MARK") != :nomatch,
                do: :binary.replace(frame, "MARK", "mARK"),
                else: :pass

            _other, _type, _frame ->
              :pass
          end

          {_server, client, _proxy} = between(codec, fun, options)

          bystander =
            Task.async(fn -> Client.Pool.call(client, :echo, :binary.copy("x", 3_000_000)) end)

          assert Client.Pool.call(client, :echo, "MARK") == {:error_rpc, :invalid_cks}
          long = :binary.copy("y", 500_000) <> "MARK" <> :binary.copy("z", 500_000)
          assert Client.Pool.call(client, :echo, long) == {:error_rpc, :invalid_cks}
          assert byte_size(Task.await(bystander, 60_000)) == 3_000_000
          assert Client.Pool.call(client, :echo, "fine") == "fine"
        end
      end

      test "what changes a block with its CRC is found by a checksum of the user's own",
           %{codec: codec} do
        for direction <- [:request, :response] do
          fun = fn
            ^direction, _type, frame ->
              if :binary.match(frame, "MARK") != :nomatch, do: forged(frame), else: :pass

            _other, _type, _frame ->
              :pass
          end

          {_server, client, _proxy} = between(codec, fun, cks_mfa: {__MODULE__, :sha, :sha256})

          bystander =
            Task.async(fn -> Client.Pool.call(client, :echo, :binary.copy("x", 300_000)) end)

          assert Client.Pool.call(client, :echo, "MARK") == {:error_rpc, :invalid_cks}
          assert byte_size(Task.await(bystander, 60_000)) == 300_000
        end
      end

      test "small calls pass a bulk transfer that its window holds up", %{codec: codec} do
        test = self()

        fun = fn
          :response, @window, <<_::64, stream::32, _::binary>> when stream > 0 ->
            send(test, :stalled)
            :hold

          _direction, _type, _frame ->
            :pass
        end

        {_server, client, proxy} = between(codec, fun, stream_window: 100_000)
        bulk = Task.async(fn -> Client.Pool.call(client, :size, :binary.copy("x", 2_000_000)) end)
        assert_receive :stalled, 5_000
        for n <- 1..20, do: assert(Client.Pool.call(client, :echo, n) == n)
        assert Task.yield(bulk, 0) == nil
        TestProxy.release(proxy)
        assert Task.await(bulk) == 2_000_000
      end

      test "a bulk call that is cancelled on its way does not hold up the next", %{codec: codec} do
        test = self()

        fun = fn
          :response, @window, <<_::64, stream::32, _::binary>> when stream > 0 ->
            send(test, :stalled)
            :hold

          :request, @cancel, _frame ->
            send(test, :cancelled)
            :pass

          _direction, _type, _frame ->
            :pass
        end

        {server, client, _proxy} = between(codec, fun, stream_window: 100_000)

        for _ <- 1..6 do
          {caller, _} =
            spawn_monitor(fn -> Client.Pool.call(client, :size, :binary.copy("x", 2_000_000)) end)

          assert_receive :stalled, 5_000
          Process.exit(caller, :kill)
          assert_receive :cancelled, 5_000
        end

        assert Client.Pool.call(client, :size, :binary.copy("x", 90_000)) == 90_000
        await(fn -> Server.Pool.info(server).running == 0 end)
        await(fn -> Client.Pool.info(client).in_flight == 0 end)
      end

      test "a connection that is cut: what ran is :tcp_closed, what was not wholly sent is made again",
           %{codec: codec} do
        test = self()

        fun = fn
          :request, type, frame when type in [@request, @data] ->
            if :binary.match(frame, "STOP") != :nomatch, do: send(test, :stop)
            :pass

          :response, @window, <<_::64, stream::32, _::binary>> when stream > 0 ->
            :hold

          _direction, _type, _frame ->
            :pass
        end

        {server, client, _proxy} = between(codec, fun, stream_window: 100_000)
        name = registered()
        ran = Task.async(fn -> Client.Pool.call(client, :wait, {name, 1}) end)
        assert_receive {:running, pid, 1}, 5_000
        monitor = Process.monitor(pid)

        bulk =
          Task.async(fn ->
            Client.Pool.call(client, :size, "STOP" <> :binary.copy("x", 1_000_000), :infinity, 0)
          end)

        assert_receive :stop, 5_000

        {_, supervisor, _, _} =
          server |> Supervisor.which_children() |> List.keyfind!(:connections, 0)

        [{_, connection, _, _}] = DynamicSupervisor.which_children(supervisor)
        Process.exit(connection, :kill)
        assert_receive {:DOWN, ^monitor, :process, ^pid, _killed}, 5_000
        assert Task.await(ran) == {:error_rpc, :tcp_closed}
        assert Task.await(bulk) == {:error_rpc, :closed}
        # The connection that was killed had a request that ran: its place is free again.
        assert Client.Pool.call(client, :echo, 1, 20_000, 1_000, 10) == 1
        await(fn -> Server.Pool.info(server).running == 0 end)
      end
    end
  end

  test "a connection whose callers were killed before they could tell their stream ids is replaced in time" do
    {_server, address} = server()
    client = client(address)
    pool = Client.Pool.fetch!(client)

    for round <- 1..4 do
      {:ok, {index, connection, _max, _trace}} = Client.Pool.row(pool)
      %{shared: shared} = Client.Pool.direct(pool, index, connection)

      # As callers do that are killed right after. The server ends a connection with more than 1,024 of them.
      for _ <- 1..600, do: MeshxRpc.Shared.take_id(shared)
      assert Client.Pool.call(client, :echo, round, 20_000, 0) == round
      await(fn -> match?({:ok, {_, pid, _, _}} when pid != connection, Client.Pool.row(pool)) end)
      assert Client.Pool.call(client, :echo, round, 20_000, 0) == round
    end
  end

  test "a client that runs out of stream ids makes a new connection beside the old one, and no call fails" do
    {server, address} = server()
    id = unique("client")
    config = MeshxRpc.Options.client!(id, address: address, pool_opts: [size: 1])
    config = Map.put(config, :writer, last_stream: 4_000)
    start_supervised!(%{id: id, start: {Client.Pool, :start_link, [id, config]}})
    assert Client.Pool.call(id, :echo, 1, 10_000, 1_000, 5) == 1
    name = registered()
    # One that is older than its connection's last call.
    long = Task.async(fn -> Client.Pool.call(id, :wait, {name, 1}) end)
    assert_receive {:running, pid, 1}, 10_000
    before = Client.Pool.row(Client.Pool.fetch!(id))

    callers =
      for caller <- 1..4 do
        Task.async(fn ->
          for n <- 1..2_500,
              do: assert(Client.Pool.call(id, :echo, {caller, n}, 30_000, 0) == {caller, n})
        end)
      end

    Task.await_many(callers, 120_000)
    assert Client.Pool.row(Client.Pool.fetch!(id)) != before
    assert Server.Pool.info(server).connections > 1
    send(pid, {:answer, :not_disturbed})
    assert Task.await(long) == :not_disturbed
    # The old ones go, and leave nothing.
    await(fn -> Server.Pool.info(server).connections == 1 end)
    await(fn -> length(Supervisor.which_children(id)) == 4 end)
    assert Client.Pool.info(id).in_flight == 0
  end
end
