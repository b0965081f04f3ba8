Code.require_file("real_agent.exs", __DIR__)

defmodule MeshxConsul.RealProxyTest do
  # MESHX_DIR=... mix test contract/meshx_consul_proxy_test.exs, with an agent on Consul: proxies are Consul's.
  use ExUnit.Case, async: false
  @moduletag :capture_log

  alias Meshx.ServiceMesh.Contract.Peer

  setup_all do: Meshx.RealAgent.setup()

  setup do
    test = self()
    tell = fn id, stream, line -> send(test, {id, stream, line}) end

    options = [
      proxy_stdout_fun: tell,
      proxy_stderr_fun: tell,
      proxy_down_fun: fn id, _pid, _os_pid, reason, downs ->
        send(test, {:down, id, reason, downs})
      end,
      max_proxy_restarts: 1,
      cli_env: [{"CONTRACT", "said"}]
    ]

    Application.put_all_env(meshx_consul: options)

    on_exit(fn ->
      for {name, _} <- options, do: Application.delete_env(:meshx_consul, name)
    end)

    name = Peer.name()
    on_exit(fn -> MeshxConsul.stop(name) end)
    {:ok, name: name}
  end

  test "a command runs with its environment, what it prints is told, and so is its end", %{
    name: name
  } do
    command = ["/bin/sh", "-c", "echo $CONTRACT {{name}}; echo also >&2; exec sleep 1000"]
    # It carries nothing, so the service does not pass by it.
    assert {:ok, ^name, _address} = MeshxConsul.start({name, name}, [proxy: command], false, 0)
    line = "said " <> name
    assert_receive {^name, :stdout, ^line}, 15_000
    assert_receive {^name, :stderr, "also"}, 15_000
    assert MeshxConsul.stop(name) == :ok
  end

  test "one that ends is started again, and then given up", %{name: name} do
    command = ["/bin/sh", "-c", "echo up; exit 3"]
    assert {:ok, ^name, _address} = MeshxConsul.start({name, name}, [proxy: command], false, 0)
    assert_receive {:down, ^name, reason, 0}, 30_000
    assert reason =~ "3"
    assert_receive {:down, ^name, _reason, 1}, 30_000
  end

  test "Consul's own proxy carries a service and its upstreams", %{name: name} do
    assert {:ok, ^name, address} =
             MeshxConsul.start({name, name}, [proxy: :connect_proxy], false, 30_000)

    Peer.serve(address, "one")
    caller = Peer.name()
    on_exit(fn -> MeshxConsul.stop(caller) end)

    assert {:ok, ^caller, _address} =
             MeshxConsul.start({caller, caller}, [proxy: :connect_proxy], false, 30_000)

    for proxy <- [{caller, caller}, nil] do
      assert {:ok, [ok: upstream]} = MeshxConsul.connect([name], nil, proxy)
      assert {:ok, "one", _} = Peer.ask_until(upstream, &match?({:ok, _, _}, &1))
    end
  end
end
