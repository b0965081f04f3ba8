defmodule Meshx.AgentTest do
  # The agent's client is one for the VM, and finds the agent by the environment.
  use MeshxRpc.Case, async: false
  import ExUnit.CaptureLog
  import Meshx.MeshCase, only: [ready: 1]
  alias Meshx.ScriptedAgent

  setup do
    directory = Path.join(System.tmp_dir!(), "mxa#{System.unique_integer([:positive])}")
    File.mkdir_p!(Path.join(directory, "up"))
    System.put_env("MESHX_DIR", directory)
    # As an agent of one host does: a service and its upstream meet in one Unix socket.
    path = Path.join([directory, "up", "cart.sock"])
    test = self()

    script = fn
      id, :register_service, args ->
        send(test, {:register_service, args})
        instance = Map.get(args, :id, "cart-h1-1")
        address = Map.get(args, :address, {:uds, path})

        {:reply,
         {:reply, id,
          {:ok, %{id: instance, service: "cart", spiffe: "spiffe://x", address: address}}}}

      id, :connect, args ->
        send(test, {:connect, args})
        {:reply, {:reply, id, {:ok, %{upstream: "u1", address: {:uds, path}}}}}

      id, command, args when command in [:deregister, :disconnect] ->
        send(test, {command, args})
        {:reply, {:reply, id, {:ok, %{}}}}

      _id, _command, _args ->
        :default
    end

    {:ok, agent} =
      start_supervised({ScriptedAgent, dir: directory, scripts: [control: script]}, id: :agent)

    {:ok, _client} = :meshx_agent.start()
    ready(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, agent: agent, directory: directory, script: script, path: path}
  end

  test "a server and a client meet through the agent, and give back what they got", %{path: path} do
    {server, {:uds, ^path}} = mesh_server()
    assert_receive {:register_service, %{name: "cart"}}
    client = client(nil, mesh: [service: "cart", as: "shop"])
    assert_receive {:connect, %{service: "cart", as: "shop"}}
    assert Client.Pool.call(client, :echo, :hi) == :hi

    stop_supervised!(client)
    assert_receive {:disconnect, %{upstream: "u1"}}, 5_000
    stop_supervised!(server)
    assert_receive {:deregister, %{id: "cart-h1-1"}}, 5_000
  end

  test "after the agent's restart the service is there again under its address", context do
    {_server, address} = mesh_server()
    assert_receive {:register_service, args}
    refute Map.has_key?(args, :id)

    capture_log(fn ->
      stop_supervised!(:agent)

      start_supervised!({ScriptedAgent, dir: context.directory, scripts: [control: context.script]},
        id: :agent
      )

      assert_receive {:register_service, %{id: "cart-h1-1", address: ^address}}, 20_000
    end)

    client = client(nil, mesh: [service: "cart", as: {"shop", "shop-1"}])
    assert Client.Pool.call(client, :echo, :hi) == :hi
  end

  test "a socket that the agent removed is made anew", context do
    {server, _address} = mesh_server()
    assert_receive {:register_service, _args}

    capture_log(fn ->
      stop_supervised!(:agent)
      File.rm!(context.path)

      start_supervised!({ScriptedAgent, dir: context.directory, scripts: [control: context.script]},
        id: :agent
      )

      assert_receive {:register_service, %{name: "cart"} = args}, 20_000
      refute Map.has_key?(args, :address)
      client = client(nil, mesh: [service: "cart", as: "shop"])
      assert Client.Pool.call(client, :echo, :hi) == :hi
    end)

    assert {:ok, {:uds, _path}} = Server.Pool.address(server)
  end

  test "a server waits for its agent, and says so", context do
    ScriptedAgent.set(context.agent, :control, fn
      id, :register_service, _args ->
        {:reply, {:reply, id, {:error, :not_permitted, "uid 0 may not be cart"}}}

      _id, _command, _args ->
        :default
    end)

    log =
      capture_log(fn ->
        id = unique("server")
        start_supervised!(Server.Pool.child_spec(id, module: TestServer, mesh: [service: "cart"]))
        assert Server.Pool.address(id) == {:error, :not_registered}
      end)

    assert log =~ "uid 0 may not be cart"
  end

  test "the adapter's answers, and its words for wrong requests", %{path: path} do
    assert {:ok, "cart-h1-1", {:uds, ^path}} = Meshx.Agent.start("cart", nil, false, 5_000)
    assert {:ok, :already_started} = Meshx.Agent.start(:cart, nil, false, 5_000)
    assert {:ok, "cart-h1-1", _} = Meshx.Agent.start({"cart", "cart-h1-1"}, nil, true, 5_000)
    assert Meshx.Agent.stop("cart-h1-1") == :ok
    assert {:error, {:invalid_request, text}} = Meshx.Agent.stop("cart-h1-1")
    assert text =~ "was not started by this VM"
    assert {:error, {:invalid_request, _}} = Meshx.Agent.start(7, nil, false, 5_000)
    assert {:error, {:invalid_request, _}} = Meshx.Agent.start("cart", %{}, false, 5_000)

    assert {:ok, [{:ok, {:uds, ^path}}, {:error, {:invalid_request, _}}]} =
             Meshx.Agent.connect(["cart", 7], nil, {"shop", "1"})

    assert {:ok, [{:error, {:invalid_request, text}}]} = Meshx.Agent.connect(["cart"], nil, nil)
    assert text =~ "no node of the mesh"
    assert {:ok, []} = Meshx.Agent.disconnect(["other"], nil, false)
  end

  test "what a process had ends with it", %{path: path} do
    {pid, monitor} =
      spawn_monitor(fn ->
        {:ok, _id, {:uds, ^path}} = Meshx.Agent.start("cart", nil, false, 5_000)
        {:ok, [{:ok, _}]} = Meshx.Agent.connect(["cart"], nil, {"shop", "1"})
      end)

    assert_receive {:DOWN, ^monitor, :process, ^pid, :normal}, 5_000
    assert_receive {:deregister, %{id: "cart-h1-1"}}, 5_000
    assert_receive {:disconnect, %{upstream: "u1"}}, 5_000
  end

  defp mesh_server do
    id = unique("server")
    start_supervised!(Server.Pool.child_spec(id, module: TestServer, mesh: [service: "cart"]))
    # Registration happens after the start; this call waits behind it.
    {:ok, address} = Server.Pool.address(id)
    {id, address}
  end
end
