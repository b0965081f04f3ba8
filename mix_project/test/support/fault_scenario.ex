defmodule MeshxRpc.FaultScenario do
  @moduledoc """
  What fault tests run in a VM of their own (`MeshxRpc.TestVm`), so that all it has can be counted before and after.
  """
  alias MeshxRpc.{Client, Server, TestRelay}

  defmodule Ledger do
    @moduledoc "A server that counts how often each cast has run."
    def echo(argument), do: argument
    def note(id), do: :ets.update_counter(__MODULE__, id, 1, {id, 0})
    def numbers(n), do: 1..n
    def sum(numbers), do: Enum.sum(numbers)
    def crash(_argument), do: raise("no")
    def unencodable(_argument), do: fn -> :no end
    def hang(_argument), do: Process.sleep(:infinity)
  end

  @doc """
  Calls, casts and streams for so many milliseconds over a connection that is cut again and again. Answers with what was
  wrong (`[]`), what was counted, and what the VM had before and after.
  """
  def flap(milliseconds) do
    # What is loaded and made by the first run stays. It does not come everywhere, and each module has atoms of its own.
    _ = Application.load(:meshx)
    Enum.each(Application.spec(:meshx, :modules), &Code.ensure_loaded/1)
    _ = flapping(min(milliseconds, 3_000))
    _ = counted()
    before = counted()
    report = flapping(milliseconds)
    Map.merge(report, %{before: before, after: settled(before, 200)})
  end

  defp flapping(milliseconds) do
    :ets.new(Ledger, [:named_table, :public, write_concurrency: true])

    {:ok, server} =
      Server.Pool.start_link(:ledger, address: {:tcp, {127, 0, 0, 1}, 0}, module: Ledger)

    {:ok, address} = Server.Pool.address(:ledger)
    {:ok, relay} = TestRelay.start_link(target: address)

    {:ok, client} =
      Client.Pool.start_link(:flapping,
        address: TestRelay.address(relay),
        pool_opts: [size: 3],
        retry_idle_error: 20,
        retry_proxy_fail: 20,
        retry_hsk_fail: 20,
        checksum: :crc32
      )

    until = System.monotonic_time(:millisecond) + milliseconds
    cutter = spawn_link(fn -> cut(relay) end)

    workers =
      for(
        {kind, count} <- [calls: 16, bulk: 3, keyed: 4, casts: 4, down: 2, up: 2, broken: 2],
        n <- 1..count,
        do: {kind, n}
      )
      |> Enum.map(fn {kind, n} -> Task.async(fn -> work(kind, n, until, 0, %{}) end) end)

    counts =
      workers
      |> Task.await_many(milliseconds + 60_000)
      |> Enum.reduce(&Map.merge(&1, &2, fn _, a, b -> a + b end))

    Process.unlink(cutter)
    Process.exit(cutter, :kill)
    # An answer that was lost may belong to a cast that still runs.
    await(fn ->
      Server.Pool.info(:ledger).casts == 0 and Client.Pool.info(:flapping).in_flight == 0
    end)

    twice = for {id, n} <- :ets.tab2list(Ledger), n > 1, do: {:ran, n, id}
    stop = &Supervisor.stop(&1, :shutdown, 30_000)
    for pid <- [client, server], do: Process.unlink(pid)
    stop.(client)
    stop.(server)
    Process.unlink(relay)
    GenServer.stop(relay)
    :ets.delete(Ledger)
    {wrong, counts} = Map.split(counts, for({{:wrong, _} = key, _} <- counts, do: key))
    %{wrong: Map.keys(wrong) ++ twice, counts: counts}
  end

  defp cut(relay) do
    Process.sleep(20 + :rand.uniform(130))
    TestRelay.cut(relay)
    cut(relay)
  end

  defp work(kind, n, until, round, counts) do
    if System.monotonic_time(:millisecond) < until do
      outcome = one(kind, {kind, n, round})
      # Where there is no connection there is nothing to do but wait.
      if outcome == :failed, do: Process.sleep(2)
      work(kind, n, until, round + 1, Map.update(counts, {kind, outcome}, 1, &(&1 + 1)))
    else
      counts
    end
  rescue
    error -> Map.put(counts, {:wrong, {kind, error}}, 1)
  end

  defp one(:calls, id), do: same(Client.Pool.call(:flapping, :echo, id, 20_000), id)

  defp one(:bulk, id) do
    block = :binary.copy(:erlang.term_to_binary(id), 20_000)
    same(Client.Pool.call(:flapping, :echo, block, 20_000), block)
  end

  defp one(kind, id) when kind in [:keyed, :casts] do
    options = [ack: true, timeout: 20_000] ++ if(kind == :keyed, do: [key: elem(id, 1)], else: [])

    case Client.Pool.cast(:flapping, :note, id, options) do
      :ok ->
        if :ets.lookup(Ledger, id) == [{id, 1}] or ran?(id, 500),
          do: :done,
          else: {:wrong, {:acknowledged_and_lost, id}}

      {:error_rpc, _reason} ->
        :failed
    end
  end

  defp one(:down, id) do
    numbers = Client.Pool.stream(:flapping, :numbers, 2_000, timeout: 20_000)
    same(Enum.to_list(numbers), Enum.to_list(1..2_000))
  rescue
    error in MeshxRpc.Error ->
      if error.reason in [:closed, :tcp_closed], do: :failed, else: {:wrong, {id, error.reason}}
  end

  defp one(:up, _id),
    do: same(Client.Pool.call(:flapping, :sum, MeshxRpc.Stream.new(1..2_000), 20_000), 2_001_000)

  defp one(:broken, {_, n, round} = id) do
    case {rem(n + round, 3),
          Client.Pool.call(
            :flapping,
            Enum.at([:crash, :unencodable, :hang], rem(n + round, 3)),
            [],
            50
          )} do
      {_any, {:error_rpc, reason}} when reason in [:closed, :tcp_closed, :timeout] -> :failed
      {0, {:error_rpc, %RuntimeError{message: "no"}}} -> :done
      {1, {:error_rpc, :serialization_fail}} -> :done
      {_kind, other} -> {:wrong, {id, other}}
    end
  end

  defp same(result, result), do: :done
  defp same({:error_rpc, reason}, _wanted) when reason in [:closed, :tcp_closed], do: :failed
  defp same(other, wanted), do: {:wrong, {wanted, other}}

  # It is acknowledged when it starts, and counts a moment later.
  defp ran?(_id, 0), do: false

  defp ran?(id, tries) do
    Process.sleep(2)
    :ets.lookup(Ledger, id) == [{id, 1}] or ran?(id, tries - 1)
  end

  @doc "Ten thousand callers at once: how many got what."
  def crowd(callers, options) do
    {:ok, server} =
      Server.Pool.start_link(
        :crowd,
        [address: {:tcp, {127, 0, 0, 1}, 0}, module: Ledger] ++ options
      )

    {:ok, address} = Server.Pool.address(:crowd)
    {:ok, client} = Client.Pool.start_link(:crowding, address: address, pool_opts: [size: 2])
    await(fn -> Client.Pool.info(:crowding).connected == 2 end)
    me = self()

    pids =
      for n <- 1..callers do
        spawn_link(fn ->
          receive do: (:go -> :ok)
          result = Client.Pool.call(:crowding, :echo, {:caller, n}, 60_000, 0)
          send(me, {:answer, if(result == {:caller, n}, do: :right, else: result)})
        end)
      end

    Enum.each(pids, &send(&1, :go))
    answers = for _ <- 1..callers, do: receive(do: ({:answer, answer} -> answer))

    await(fn ->
      Client.Pool.info(:crowding).in_flight == 0 and Server.Pool.info(:crowd).running == 0
    end)

    for pid <- [client, server] do
      Process.unlink(pid)
      Supervisor.stop(pid, :shutdown, 30_000)
    end

    Enum.frequencies(answers)
  end

  @doc "What a VM has: nothing of it may grow."
  def counted do
    for pid <- Process.list(), do: :erlang.garbage_collect(pid)

    %{
      processes: length(Process.list()),
      ports: length(Port.list()),
      tables: length(:ets.all()),
      atoms: :erlang.system_info(:atom_count),
      # Of what is ours; what the emulator keeps for itself comes and goes by 20 MiB.
      bytes: [:processes, :binary, :ets] |> :erlang.memory() |> Keyword.values() |> Enum.sum()
    }
  end

  # The emulator gives back a little later what a port or another scheduler had.
  @slack 1_048_576

  @doc "What there is once it is no more than before, or after so many tries."
  def settled(before, tries) do
    now = counted()

    if tries == 0 or
         (now.processes <= before.processes and now.ports <= before.ports and
            now.bytes <= before.bytes + @slack) do
      now
    else
      Process.sleep(50)
      settled(before, tries - 1)
    end
  end

  defp await(condition) do
    unless condition.() do
      Process.sleep(5)
      await(condition)
    end
  end
end
