defmodule MeshxRpc.ReloadTest do
  # Code is loaded anew while calls run. In a VM of its own: what goes wrong there kills processes.
  use ExUnit.Case, async: true

  @moduletag timeout: 240_000

  @common """
  defmodule Load do
    # Callers that count what they hear; each makes at least one more call after `stop`.
    def start(count) do
      stop = :atomics.new(1, [])
      tasks = for _ <- 1..count, do: Task.async(fn -> loop(stop, 0, []) end)
      {stop, tasks}
    end

    defp loop(stop, good, bad) do
      over = :atomics.get(stop, 1) == 1
      n = System.unique_integer()

      {good, bad} =
        case MeshxRpc.Client.Pool.call(:c, :echo, n) do
          ^n -> {good + 1, bad}
          other -> {good, [other | bad]}
        end

      if over, do: {good, bad}, else: loop(stop, good, bad)
    end

    def stop({stop, tasks}) do
      :atomics.put(stop, 1, 1)
      results = Task.await_many(tasks, 30_000)
      {results |> Enum.map(&elem(&1, 0)) |> Enum.sum(), Enum.flat_map(results, &elem(&1, 1))}
    end
  end

  {:ok, _} = Application.ensure_all_started(:meshx)
  Code.compiler_options(ignore_module_conflict: true)

  api = fn more ->
    Code.compile_string(\"\"\"
    defmodule Api do
      use MeshxRpc.Server, address: {:tcp, {127, 0, 0, 1}, 0}
      def echo(x), do: x
      def slow(x), do: (Process.sleep(x); x)
      \#{more}
    end
    \"\"\")
  end

  api.("def removed(_), do: :here")
  {:ok, _} = Supervisor.start_link([Api], strategy: :one_for_one)
  {:ok, address} = MeshxRpc.Server.Pool.address(Api)
  {:ok, client} = MeshxRpc.Client.Pool.start_link(:c, address: address, pool_opts: [size: 2])
  Process.unlink(client)
  call = &MeshxRpc.Client.Pool.call(:c, &1, &2, 20_000, 1_000, 10)
  1 = call.(:echo, 1)
  """

  defp in_peer(program) do
    {:ok, peer, _node} =
      :peer.start_link(%{
        connection: :standard_io,
        wait_boot: 60_000,
        args: Enum.flat_map(:code.get_path(), &[~c"-pa", &1])
      })

    {:ok, _} = :peer.call(peer, Application, :ensure_all_started, [:elixir])
    :ok = :peer.call(peer, :logger, :set_primary_config, [:level, :none])
    {answer, _binding} = :peer.call(peer, Code, :eval_string, [@common <> program], 200_000)
    :peer.stop(peer)
    answer
  end

  test "the server's module: calls go on, new functions are offered, removed ones are not" do
    assert {{good, []}, running, added, [removed, not_started]} =
             in_peer("""
             load = Load.start(4)
             running = Task.async(fn -> call.(:slow, 1_500) end)
             :here = call.(:removed, 1)
             cast = &MeshxRpc.Client.Pool.cast(:c, &1, 1, ack: true)
             :ok = cast.(:removed)
             {:error_rpc, {:undef, _}} = call.(:added, 1)
             Process.sleep(200)
             api.("def added(_), do: :new")
             added = call.(:added, 1)
             removed = [call.(:removed, 1), cast.(:removed)]
             # Once more: what is two versions old is purged, and there is none.
             running = Task.await(running)
             api.("def added(_), do: :newer")
             :newer = call.(:added, 1)
             {Load.stop(load), running, added, removed}
             """)

    assert good > 0
    assert running == 1_500
    assert added == :new
    assert {:error_rpc, {:undef, [{Api, :removed, 1, _} | _]}} = removed
    assert {:error_rpc, {:undef, [{Api, :removed, 1, _} | _]}} = not_started
  end

  test "each module of MeshxRpc, twice, as a release upgrade does: no call fails, no process is killed" do
    assert {{good, bad}, refused, purged, same} =
             in_peer("""
             load = Load.start(4)
             processes = fn -> for id <- [Api, :c], {_, pid, _, _} <- Supervisor.which_children(id), do: pid end
             before = processes.()
             {:ok, modules} = :application.get_key(:meshx, :modules)
             modules = for module <- modules, String.starts_with?(Atom.to_string(module), "Elixir.MeshxRpc"),
                           not String.contains?(Atom.to_string(module), "Test"), do: module

             Enum.each(modules, &Code.ensure_loaded!/1)

             # What waits in the old version goes on in the new one at its next turn.
             purge = fn purge, module, left ->
               cond do
                 :code.soft_purge(module) -> true
                 left == 0 -> false
                 true -> Process.sleep(100); purge.(purge, module, left - 1)
               end
             end

             results =
               for _ <- 1..2, module <- modules do
                 {module, purge.(purge, module, 300), :code.load_file(module)}
               end

             refused = for {module, _, {:error, reason}} <- results, uniq: true, do: {module, reason}
             purged = for {module, false, _} <- results, do: module
             {Load.stop(load), refused, purged, before == processes.()}
             """)

    assert good > 0 and bad == []
    assert purged == []
    # Native code stays as long as the VM.
    assert refused -- [{MeshxRpc.Codec.Nif.Native, :on_load_failure}] == []
    assert same
  end

  test "a second reload in a hurry, as `r/1` does it: listening goes on" do
    assert in_peer("""
           for _ <- 1..3, module <- [MeshxRpc.Server.Listener, MeshxRpc.Options, MeshxRpc.Secret] do
             :code.purge(module)
             {:module, _} = :code.load_file(module)
           end

           {:ok, ^address} = MeshxRpc.Server.Pool.address(Api)
           {:ok, _} = MeshxRpc.Client.Pool.start_link(:d, address: address)
           {call.(:echo, 2), MeshxRpc.Client.Pool.call(:d, :echo, 3, 20_000, 1_000, 10)}
           """) == {2, 3}
  end

  if MeshxRpc.Codec.impl() == MeshxRpc.Codec.Nif do
    test "the stubs of the NIF: refused while they are in use, anew when they were deleted" do
      assert {{good, []}, :on_load_failure, MeshxRpc.Codec.Nif, 2, 3, :ok} =
               in_peer("""
               native = MeshxRpc.Codec.Nif.Native
               load = Load.start(4)
               {:error, reason} = :code.load_file(native)
               {:error, ^reason} = :code.load_file(native)
               true = :code.soft_purge(native)
               two = call.(:echo, 2)
               load = Load.stop(load)

               # Nobody calls meanwhile: connections that have the old code's decoders end.
               :code.delete(native)
               {:module, _} = Code.ensure_loaded(native)
               {:ok, _} = MeshxRpc.Client.Pool.start_link(:d, address: address)
               three = MeshxRpc.Client.Pool.call(:d, :echo, 3, 20_000, 1_000, 10)
               {load, reason, MeshxRpc.Codec.impl(), two, three, native.status()}
               """)

      assert good > 0
    end
  end
end
