# What libcluster gives a strategy, so that the one for it is compiled (libcluster is no dependency).
defmodule Cluster.Strategy do
  defmodule State do
    defstruct [:topology, :connect, :disconnect, :list_nodes, :meta, :config]
  end

  defmacro __using__(_options), do: nil

  def connect_nodes(topology, {module, function, [test]}, list_nodes, [node]),
    do: apply(module, function, [test, {topology, list_nodes, node}]) |> elem(0)
end

Code.compile_file("lib/meshx_node/cluster/libcluster.ex")

defmodule MeshxNode.AutoClusterTest do
  use ExUnit.Case, async: true
  import MeshxRpc.Case, only: [await: 1]

  alias MeshxNode.Cluster

  # What the agent would tell.
  defp tell(cluster, name, nodes) do
    nodes = for node <- nodes, do: %{node: node, service: hd(String.split(node, "@"))}
    send(cluster, {:meshx_agent, {:nodes, %{watch: Atom.to_string(name), nodes: nodes}}})
  end

  defp start(name, options) do
    test = self()

    connect = fn node ->
      send(test, {:dialled, node, self()})

      receive do
        answer -> answer
      end
    end

    options = [services: [:shop], name: name, connect: connect] ++ options
    start_supervised!({Cluster, options}, id: name)
  end

  defp dialled do
    assert_receive {:dialled, node, attempt}, 30_000
    {node, attempt}
  end

  test "dials what passes, once at a time, and again what it did not reach" do
    cluster = start(:auto_again, [])
    tell(cluster, :auto_again, ["shop@a1", "nonode@nohost"])
    {:shop@a1, attempt} = dialled()
    tell(cluster, :auto_again, ["shop@a1"])
    assert Cluster.wanted(:auto_again) == [:shop@a1]
    refute_received {:dialled, _, _}
    send(attempt, {:error, {:unreachable, "away"}})
    {:shop@a1, attempt} = dialled()
    # Gone from the catalogue: no further attempt, and back: at once.
    tell(cluster, :auto_again, [])
    assert Cluster.wanted(:auto_again) == []
    send(attempt, {:error, {:unreachable, "away"}})
    refute_receive {:dialled, _, _}, 500
    tell(cluster, :auto_again, ["shop@a1"])
    {:shop@a1, attempt} = dialled()
    # Lost as soon as it was there.
    send(attempt, :ok)
    {:shop@a1, _attempt} = dialled()
  end

  test "takes no more than the degree, and of those that are selected" do
    select = &(&1.service != "cart")
    cluster = start(:auto_degree, max_degree: 2, select: select)
    tell(cluster, :auto_degree, ["shop@b1", "shop@b2", "shop@b3", "cart@b4"])
    first = Cluster.wanted(:auto_degree)
    assert length(first) == 2 and :cart@b4 not in first
    # One that comes changes at most one of them, one that goes lets the others be.
    [left, kept] = first
    tell(cluster, :auto_degree, Enum.map([:shop@b1, :shop@b2, :shop@b3] -- [left], &to_string/1))
    second = Cluster.wanted(:auto_degree)
    assert kept in second and left not in second and length(second) == 2
  end

  test "takes those with the wanted metadata, whatever an earlier release's agent leaves out" do
    cluster = start(:auto_meta, meta: %{"tier" => "web", "zone" => "1"})

    nodes = [
      %{node: "shop@m1", service: "shop", meta: %{"tier" => "web", "zone" => "1", "more" => ""}},
      %{node: "shop@m2", service: "shop", meta: %{"tier" => "web", "zone" => "2"}},
      %{node: "shop@m3", service: "shop", meta: %{"zone" => "1"}},
      %{node: "shop@m4", service: "shop"}
    ]

    send(cluster, {:meshx_agent, {:nodes, %{watch: "auto_meta", nodes: nodes}}})
    assert Cluster.wanted(:auto_meta) == [:shop@m1]
  end

  test "does not listen to another's watch, and names at most eight at a time" do
    cluster = start(:auto_others, [])
    tell(cluster, :another, ["shop@c1"])
    assert Cluster.wanted(:auto_others) == []
    tell(cluster, :auto_others, for(i <- 1..20, do: "shop@d#{i}"))
    for _ <- 1..8, do: dialled()
    refute_receive {:dialled, _, _}, 200
  end

  test "those that were tried least often come first" do
    cluster = start(:auto_fair, [])
    tell(cluster, :auto_fair, for(i <- 1..17, do: "shop@f#{i}"))
    for _ <- 1..8, {_node, attempt} = dialled(), do: send(attempt, {:error, {:timeout, "hangs"}})
    [{_node, attempt} | _hang] = for _ <- 1..8, do: dialled()
    await(fn -> due_again(cluster) == 8 end)
    send(attempt, {:error, {:timeout, "hangs"}})
    assert {:shop@f17, _attempt} = dialled()
  end

  test "makes so many atoms and no more, says so once, and takes names that the VM knows" do
    name = :auto_atoms
    cluster = start(name, connect: fn _node -> :ok end)
    # As if it had made nearly all.
    :sys.replace_state(cluster, &%{&1 | atoms: 65_535})

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        for _ <- 1..2 do
          tell(cluster, name, ["shop@n#{unique()}", "shop@n#{unique()}", "shop@known"])
          Cluster.wanted(name)
        end
      end)

    assert :shop@known in Cluster.wanted(name)
    assert [_, _] = String.split(log, "65536 names of nodes were seen")
  end

  # Those that failed, and whose pause is over.
  defp due_again(cluster),
    do: Enum.count(:sys.get_state(cluster).later, &match?({_node, {1, nil}}, &1))

  defp unique, do: Base.encode16(:crypto.strong_rand_bytes(8))

  test "options are checked" do
    for wrong <- [
          [],
          [services: []],
          [services: "shop"],
          [services: [:a], max_degree: 0],
          [services: :any],
          [services: :all, meta: %{a: 1}]
        ] do
      assert_raise ArgumentError, ~r/MeshxNode.Cluster/, fn -> Cluster.start_link(wrong) end
    end
  end

  test "is a strategy of libcluster where that is" do
    state = %Elixir.Cluster.Strategy.State{
      topology: :mesh,
      connect: {Kernel, :send, [self()]},
      list_nodes: {:erlang, :nodes, [:connected]},
      config: [services: ["shop"], max_degree: 3]
    }

    strategy = MeshxNode.Cluster.Libcluster
    start_supervised!(%{id: :mesh, start: {strategy, :start_link, [[state]]}})
    tell(Module.concat(strategy, :mesh), Module.concat(strategy, :mesh), ["shop@e1"])
    assert_receive {:mesh, {:erlang, :nodes, [:connected]}, :shop@e1}, 30_000
  end
end
