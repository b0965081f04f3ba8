defmodule MeshxRpc.RollingTest do
  # Settings change on three servers and their client, one after the other, while calls run.
  use MeshxRpc.Case, async: true

  @moduletag timeout: 180_000

  @old "the key that everybody has had"
  @new "the key that everybody shall have"

  test "a key and a block size roll through three servers under load, and no call fails" do
    directory = Path.join(System.tmp_dir!(), "meshx-#{System.unique_integer([:positive])}")
    File.mkdir_p!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    servers = for n <- 1..3, do: {unique("server"), {:uds, Path.join(directory, "s#{n}")}}
    roll_servers(servers, shared_key: @old, blk_max_size: 65_536)
    pools = :ets.new(:pools, [:public])
    roll_clients(pools, servers, shared_key: @old, blk_max_size: 65_536)

    stop = :atomics.new(1, [])
    callers = for n <- 1..6, do: Task.async(fn -> caller(pools, rem(n, 3), stop, 0) end)

    # Each side takes both keys before the other proves the new one.
    for {side, options} <- [
          servers: [shared_key: [@old, @new], blk_max_size: 16_384],
          clients: [shared_key: [@new, @old], blk_max_size: 300],
          servers: [shared_key: [@new], blk_max_size: 5_000],
          clients: [shared_key: @new, blk_max_size: 65_536]
        ] do
      before = made(pools)

      case side do
        :servers -> roll_servers(servers, options)
        :clients -> roll_clients(pools, servers, options)
      end

      # The load is there at each step.
      await(fn -> made(pools) > before + 20 end)
    end

    :atomics.put(stop, 1, 1)
    assert Enum.all?(Task.await_many(callers, 60_000), &(&1 > 0))

    [{_id, address} | _] = servers
    late = client_down(address, shared_key: @old)
    assert Client.Pool.call(late, :echo, 1, 5_000, 20, 10) == {:error_rpc, :closed}
    await(fn -> match?([{:auth, _text}], Client.Pool.info(late).down) end)
  end

  defp roll_servers(servers, options) do
    for {id, address} <- servers do
      _ = stop_supervised(id)
      options = [address: address, module: TestServer] ++ options
      start_supervised!(Supervisor.child_spec(Server.Pool.child_spec(id, options), id: id))
      await(fn -> match?({:ok, _address}, Server.Pool.address(id)) end)
    end
  end

  # New calls go through a new pool; the old one ends when its calls are done.
  defp roll_clients(pools, servers, options) do
    for {{_id, address}, n} <- Enum.with_index(servers) do
      new = client(address, options)
      old = :ets.lookup(pools, n)
      :ets.insert(pools, {n, new})

      with [{^n, old}] <- old do
        await(fn -> :ets.lookup(pools, {:uses, old}) in [[], [{{:uses, old}, 0}]] end)
        stop_supervised!(old)
      end
    end
  end

  defp caller(pools, n, stop, count) do
    [{^n, pool}] = :ets.lookup(pools, n)
    :ets.update_counter(pools, {:uses, pool}, 1, {{:uses, pool}, 0})

    # It may have been exchanged before it was known to be in use.
    count =
      if :ets.lookup(pools, n) == [{n, pool}] do
        term = :binary.copy(<<count::32>>, :rand.uniform(20_000))
        assert Client.Pool.call(pool, :echo, {count, term}, 60_000, 1_000, 10) == {count, term}
        :ets.update_counter(pools, :made, 1, {:made, 0})
        count + 1
      else
        count
      end

    :ets.update_counter(pools, {:uses, pool}, -1)
    if :atomics.get(stop, 1) == 1, do: count, else: caller(pools, n, stop, count)
  end

  defp made(pools) do
    case :ets.lookup(pools, :made) do
      [{:made, count}] -> count
      [] -> 0
    end
  end
end
