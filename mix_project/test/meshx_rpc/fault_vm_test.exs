defmodule MeshxRpc.FaultVmTest do
  # Peers that are real operating system processes: stopped, killed, out of sight of any agent. Alone, so that this VM's
  # memory is that of its test.
  use MeshxRpc.Case, async: false
  alias MeshxRpc.{TestRelay, TestVm}

  @moduletag capture_log: true
  @moduletag timeout: 180_000
  @mib 1_048_576

  alias MeshxRpc.FaultServer

  defp vm(options \\ []), do: start_supervised!({TestVm, options})

  defp serve(vm, options),
    do: TestVm.call(vm, TestVm, :serve, [unique("there"), [module: FaultServer] ++ options])

  defp tcp, do: [address: {:tcp, {127, 0, 0, 1}, 0}]

  defp connected(client), do: await(fn -> Client.Pool.info(client).connected > 0 end)

  describe "two VMs without a name, without an agent" do
    test "over TCP, a Unix socket, and through a plain relay" do
      path = Path.join(System.tmp_dir!(), "mr#{System.unique_integer([:positive])}")
      on_exit(fn -> File.rm(path) end)
      [one, two] = [vm(), vm()]
      address = serve(one, tcp())
      uds = serve(one, address: {:uds, path})
      relay = start_supervised!({TestRelay, target: address})

      for {address, n} <- Enum.with_index([address, uds, TestRelay.address(relay)]) do
        client = :"there_#{n}"
        _ = TestVm.call(two, TestVm, :connect, [client, [address: address]])

        call = fn fun, argument ->
          TestVm.call(two, Client.Pool, :call, [client, fun, argument, 20_000, 1_000, 5])
        end

        assert call.(:node, []) == {:nonode@nohost, false, nil}
        long = :binary.copy("x", 3 * @mib)
        assert call.(:echo, long) == long
        assert call.(:size, MeshxRpc.Stream.new(List.duplicate("piece", 1_000))) == 5_000
      end

      assert TestVm.call(two, Node, :self, []) == :nonode@nohost
    end
  end

  test "a peer that is stopped under load: deadlines hold, memory is bounded, and it goes on afterwards" do
    vm = vm()
    address = serve(vm, tcp())
    client = client_down(address, max_queue: 16 * @mib)
    connected(client)
    payload = :binary.copy("x", 256 * 1_024)
    assert Client.Pool.call(client, :echo, payload) == payload
    :ok = TestVm.signal(vm, "STOP")
    before = :erlang.memory(:total)
    started = System.monotonic_time(:millisecond)

    results =
      1..500
      |> Task.async_stream(fn _ -> Client.Pool.call(client, :echo, payload, 1_500, 0) end,
        max_concurrency: 500,
        timeout: 60_000
      )
      |> Enum.map(fn {:ok, result} -> result end)

    took = System.monotonic_time(:millisecond) - started
    grown = :erlang.memory(:total) - before

    assert Enum.all?(results, &(&1 in [{:error_rpc, :timeout}, {:error_rpc, :full}])),
           inspect(Enum.uniq(results), limit: 5, printable_limit: 100)

    assert {:error_rpc, :full} in results
    # Generous: the machine may be busy. Without a bound it would be for ever.
    assert took < 30_000
    assert grown < 400 * @mib
    :ok = TestVm.signal(vm, "CONT")
    # What nobody waits for any more vanishes; new calls are answered.
    await(fn -> Client.Pool.call(client, :echo, payload, 20_000, 100, 50) == payload end)
    await(fn -> Client.Pool.info(client).in_flight == 0 end)
  end

  test "a peer that is killed in the middle of transfers: every call and stream ends, memory comes back" do
    vm = vm()
    address = serve(vm, tcp())
    client = client_down(address, max_queue: 1_024 * @mib)
    connected(client)
    :erlang.garbage_collect()
    before = :erlang.memory(:binary)
    me = self()

    tasks =
      for n <- 1..8 do
        Task.async(fn ->
          case rem(n, 4) do
            0 ->
              Client.Pool.call(client, :make, 100 * @mib)

            1 ->
              Client.Pool.call(client, :echo, :binary.copy("y", 100 * @mib))

            2 ->
              Client.Pool.call(
                client,
                :size,
                MeshxRpc.Stream.new(Stream.cycle([:binary.copy("z", 65_536)]))
              )

            3 ->
              try do
                Client.Pool.stream(client, :blocks, {10_000_000, 65_536})
                |> Enum.each(fn _ -> send(me, :piece) end)
              rescue
                error in MeshxRpc.Error -> {:error_rpc, error.reason}
              end
          end
        end)
      end

    # Until something of it has come.
    assert_receive :piece, 20_000
    :ok = TestVm.kill(vm)

    for result <- Task.await_many(tasks, 60_000) do
      # Those that were done already are right.
      assert match?({:error_rpc, reason} when reason in [:tcp_closed, :closed, :unread], result) or
               byte_size(result) == 100 * @mib
    end

    await(fn -> Client.Pool.info(client).in_flight == 0 end)

    await(fn ->
      :erlang.garbage_collect()
      :erlang.memory(:binary) - before < 300 * @mib
    end)
  end

  test "a result of a gibibyte is refused, and the server's memory comes back" do
    vm = vm()
    address = serve(vm, tcp())
    client = client_down(address)
    connected(client)
    before = Client.Pool.call(client, :memory)
    assert Client.Pool.call(client, :make, 1_024 * @mib) == {:error_rpc, :error_too_long}
    await(fn -> Client.Pool.call(client, :memory) - before < 64 * @mib end)
  end
end
