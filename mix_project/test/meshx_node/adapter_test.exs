defmodule MeshxNode.AdapterTest do
  # Nodes over a mesh adapter: what examples/adapter does not show.
  use Meshx.DistCase, async: true

  alias Meshx.TestAdapter

  defp vm(env \\ %{}) do
    node =
      start_supervised!({TestNode, args: [], env: env, carrier: "Elixir.MeshxNode"}, id: make_ref())

    :ok = TestNode.await_boot(node)
    {:ok, _} = TestNode.call(node, :application, :ensure_all_started, [:meshx])
    node
  end

  defp configure(vm, options), do: TestNode.call(vm, Application, :put_all_env, [options])

  defp adapter(vm, answers),
    do: configure(vm, meshx_node: [mesh_adapter: TestAdapter], meshx_test_adapter: answers)

  defp at(dir, name), do: {:uds, Path.join(dir, name)}

  defp node_vm(dir, name, answers \\ []) do
    vm = vm()
    adapter(vm, Keyword.merge([start: {:ok, name, at(dir, name)}, stop: :ok], answers))
    {:ok, _pid} = start(vm, name)
    vm
  end

  defp start(vm, name, cookie \\ :one),
    do: TestNode.call(vm, MeshxNode, :start, [:"#{name}@h", cookie])

  test "the adapter is asked as in 0.1, and gets the service back", %{dir: dir} do
    a = node_vm(dir, "a", connect: {:ok, [{:ok, at(dir, "b")}]})
    TestNode.await_output(a, ~s|asked: {:start, [{"a@h", "a@h"}, [], false, 5000]}|)
    _b = node_vm(dir, "b")
    assert TestNode.call(a, MeshxNode, :connect, [:b@h]) == :ok
    TestNode.await_output(a, "asked: {:connect, [[:b@h], nil, {:a@h, :a@h}]}")
    assert TestNode.call(a, :erpc, :call, [:b@h, :erlang, :node, []]) == :b@h
    assert TestNode.call(a, :meshx_test_node, :big_call, [:b@h, 10_000_000])
    # The cookie alone tells who that is.
    assert TestNode.call(a, MeshxNode, :peers, []) == []

    {:uds, path} = at(dir, "a")
    assert %{mode: mode} = File.stat!(path)
    assert Bitwise.band(mode, 0o777) == 0o600
    assert TestNode.call(a, Node, :stop, []) == :ok
    TestNode.await_output(a, ~s|asked: {:stop, ["a"]}|)
    refute File.exists?(path)
    # And again, otherwise.
    configure(a,
      meshx_node: [
        service_params: &Function.identity/1,
        service_reg: [kind: :uds],
        force_registration?: true,
        timeout: 7
      ]
    )

    assert {:error, _} = start(a, "a")
    TestNode.await_output(a, "service_params is")
  end

  test "a node with another cookie is refused, and it is said", %{dir: dir} do
    a = vm()
    adapter(a, start: {:ok, "a", at(dir, "a")}, connect: {:ok, [{:ok, at(dir, "b")}]}, stop: :ok)
    {:ok, _pid} = start(a, "a", :another)
    b = node_vm(dir, "b")
    assert {:error, {:handshake_failed, text}} = TestNode.call(a, MeshxNode, :connect, [:b@h])
    assert text =~ "different cookies"
    assert TestNode.call(b, :erlang, :nodes, [:connected]) == []
  end

  test "addresses beyond this host are refused, both ways", %{dir: dir} do
    a = vm()
    adapter(a, start: {:ok, "a", {:tcp, {0, 0, 0, 0}, 7_777}}, stop: :ok)
    assert {:error, _} = start(a, "a")
    TestNode.await_output(a, "not_permitted: the node listens at {:tcp, {0, 0, 0, 0}, 7777}")
    # The adapter gets it back.
    TestNode.await_output(a, ~s|asked: {:stop, ["a"]}|)

    a = node_vm(dir, "a", connect: {:ok, [{:ok, {:tcp, {192, 0, 2, 1}, 7_777}}]})
    assert {:error, {:not_permitted, text}} = TestNode.call(a, MeshxNode, :connect, [:b@h])
    assert text =~ "wanted a Unix socket or an address of loopback"
  end

  test "whatever an adapter answers, the VM and the node live on", %{dir: dir} do
    a = vm()

    for {answer, text} <- [
          {:raise, "no answer"},
          {:exit, "no_answer"},
          {:nonsense, "start/4 answered :nonsense"},
          {{:ok, :already_started}, "name_taken"},
          {{:error, :service_alive_timeout}, ":service_alive_timeout"},
          {{:error, {:not_ready, "no mesh"}}, "not_ready: no mesh"},
          {{:ok, "a", :nowhere}, "the node listens at :nowhere"},
          {{:ok, "a", {:uds, "/nowhere/a"}}, "listening at {:uds, \"/nowhere/a\"} failed: :enoent"}
        ] do
      adapter(a, start: answer, stop: :ok)
      assert {:error, _} = start(a, "a")
      TestNode.await_output(a, text)
    end

    adapter(a, start: {:ok, "a", at(dir, "a")}, stop: :raise)
    assert {:ok, _pid} = start(a, "a")

    for {answer, cause} <- [
          {:raise, :unreachable},
          {:exit, :unreachable},
          {{:ok, []}, :invalid_request},
          {{:error, :service_not_owned}, :unreachable},
          {{:ok, [{:error, {:no_such_service, "none"}}]}, :no_such_service},
          {{:ok, [{:ok, at(dir, "nobody")}]}, :unreachable}
        ] do
      adapter(a, connect: answer)
      assert {:error, {^cause, _text}} = TestNode.call(a, MeshxNode, :connect, [:b@h])
    end

    assert TestNode.call(a, Node, :stop, []) == :ok
    adapter(a, stop: :ok)
    assert {:ok, _pid} = start(a, "a")
  end

  test "options are checked, and the wrong one is named", %{dir: dir} do
    a = vm()
    assert {:error, _} = start(a, "a")
    TestNode.await_output(a, "option :mesh_adapter is missing")
    configure(a, meshx_node: [mesh_adapter: String])
    assert {:error, _} = start(a, "a")
    TestNode.await_output(a, "option :mesh_adapter is String, wanted a module with the functions")
    adapter(a, start: {:ok, "a", at(dir, "a")})
    configure(a, meshx_node: [service: 1])
    assert {:error, _} = start(a, "a")
    TestNode.await_output(a, "option :service is not known")
  end

  test "connections that say nothing keep no node out", %{dir: dir} do
    a = node_vm(dir, "a")
    {:uds, path} = at(dir, "a")

    open = fn -> :gen_tcp.connect({:local, path}, 0, [:binary, :local, active: true]) end
    {:ok, oldest} = open.()
    for _ <- 1..64, do: {:ok, _socket} = open.()
    assert_receive {:tcp_closed, ^oldest}, 60_000
    TestNode.await_output(a, "more than 64 handshakes at once")

    b = node_vm(dir, "b", connect: {:ok, [{:ok, at(dir, "a")}]})
    assert TestNode.call(b, MeshxNode, :connect, [:a@h]) == :ok
    # Links that are up are no handshakes: what came after b is ended, b is not.
    {:ok, later} = open.()
    for _ <- 1..64, do: {:ok, _socket} = open.()
    assert_receive {:tcp_closed, ^later}, 60_000
    assert TestNode.call(b, :erpc, :call, [:a@h, :erlang, :node, []]) == :a@h
    # By the link that was there.
    assert b |> TestNode.output() |> String.split("asked: {:connect") |> length() == 2
  end

  test "over the agent it is the carrier that proves identities", %{dir: dir} = context do
    agent = start_agent(context)
    a = vm(%{"MESHX_DIR" => dir})
    configure(a, meshx_node: [mesh_adapter: MeshxConsul])
    assert {:ok, _pid} = TestNode.call(a, MeshxNode, :start, [:a@h1, :meshxtest])
    ScriptedAgent.await_node(agent, "a@h1")
    _b = start_node(context, "b@h1")
    assert TestNode.call(a, MeshxNode, :connect, [:b@h1]) == :ok
    assert TestNode.call(a, :net_adm, :ping, [:b@h1]) == :pong

    assert [%{node: :b@h1, spiffe: "spiffe://test/callee"}] =
             TestNode.call(a, MeshxNode, :peers, [])
  end
end
