defmodule MeshxConsulTest do
  # What `Meshx.ServiceMesh.Contract` does not ask for.
  use Meshx.MeshCase
  @moduletag :capture_log

  import ExUnit.CaptureLog
  alias Meshx.ScriptedAgent
  alias Meshx.ServiceMesh.Contract.Peer

  @host MeshxConsul.Template.host()
  @proxy "upstream-" <> @host

  setup do
    # What a test before this one has left: when it ended, its agent had gone before.
    for id <- MeshxConsul.list(), do: MeshxConsul.stop(id)
    assert MeshxConsul.list() == []

    on_exit(fn ->
      for id <- MeshxConsul.list(), do: MeshxConsul.stop(id)

      for {name, _} <- Application.get_all_env(:meshx_consul),
          do: Application.delete_env(:meshx_consul, name)
    end)
  end

  defp configure(options), do: Application.put_all_env([{:meshx_consul, options}])

  # What the agent was asked for.
  defp args(agent, id), do: ScriptedAgent.mesh(agent).services[id].args

  defp refuse(agent, command, cause) do
    ScriptedAgent.set(agent, :control, fn
      id, ^command, _args -> {:reply, {:reply, id, {:error, cause, "so it is"}}}
      _id, _command, _args -> :default
    end)
  end

  test "names, ids and ports are 0.1's", %{agent: agent} do
    id = "service1-" <> @host
    assert {:ok, ^id, {:tcp, {127, 0, 0, 1}, port}} = MeshxConsul.start(:service1)
    assert port in 1024..65_535
    assert {:ok, "id2", {:tcp, _ip, next}} = MeshxConsul.start({"service1", :id2})
    assert next != port
    assert MeshxConsul.start("service1") == {:ok, :already_started}
    assert Enum.sort(MeshxConsul.list()) == Enum.sort([id, "id2"])

    assert args(agent, "id2") ==
             %{name: "service1", id: "id2", address: {:tcp, "127.0.0.1", next}, wait: 5_000}

    assert {:ok, info} = MeshxConsul.info("id2")

    assert %{
             "ID" => "id2",
             "Service" => "service1",
             "Address" => "127.0.0.1",
             "Port" => ^next,
             "Status" => "passing",
             "Tags" => []
           } = info

    assert {:error, {:no_such_service, _}} = MeshxConsul.info("nobody")
    assert MeshxConsul.stop(id) == :ok
    assert MeshxConsul.stop(id) == {:error, :service_not_owned}
    assert MeshxConsul.list() == ["id2"]
  end

  test "upstreams are those of a proxy service", %{agent: agent} do
    assert MeshxConsul.list_upstream() == {:error, :service_not_owned}
    assert MeshxConsul.disconnect(["a"]) == {:error, :service_not_owned}

    assert {:ok, [ok: {:tcp, {127, 0, 0, 1}, a} = first, ok: {:tcp, {127, 0, 0, 1}, b}]} =
             MeshxConsul.connect(["a", :b])

    assert b < a
    # Nothing of it is in Consul.
    assert ScriptedAgent.mesh(agent).services == %{}
    assert MeshxConsul.list() == [@proxy]
    assert MeshxConsul.info(@proxy) == {:ok, %{"ID" => @proxy, "Service" => @proxy}}
    assert Enum.sort(MeshxConsul.list_upstream()) == ["a", "b"]
    # It has it already.
    assert {:ok, [ok: ^first]} = MeshxConsul.connect(["a"])
    assert MeshxConsul.disconnect(["b", "c"]) == {:ok, ["b"]}
    assert MeshxConsul.list_upstream(@proxy) == ["a"]
    # Another proxy, another upstream.
    assert {:ok, [ok: other]} = MeshxConsul.connect(["a"], nil, {"shop", "shop-1"})
    assert other != first

    assert ["shop", @proxy] ==
             Enum.sort(for {_, u} <- ScriptedAgent.mesh(agent).upstreams, do: u.args.as)

    assert MeshxConsul.stop(@proxy) == :ok
    assert MeshxConsul.list_upstream() == {:error, :service_not_owned}
    assert [%{args: %{as: "shop"}}] = Map.values(ScriptedAgent.mesh(agent).upstreams)
  end

  test "a proxy service with a proxy of its own carries its upstreams", %{agent: agent} do
    assert {:ok, "web-1", _address} = MeshxConsul.start({"web", "web-1"}, proxy: ["haproxy"])
    assert {:ok, [ok: _]} = MeshxConsul.connect(["db"], nil, {"web", "web-1"})
    assert [%{args: %{as: "web", via: "web-1"}}] = Map.values(ScriptedAgent.mesh(agent).upstreams)

    # So it is for the default one, when services have proxies by default.
    configure(service_template: [proxy: ["consul", "connect", "proxy", "-sidecar-for", "{{id}}"]])
    assert {:ok, [ok: _]} = MeshxConsul.connect(["db"])
    assert %{sidecar: {:command, [_, _, _, _, @proxy]}} = args(agent, @proxy)
    assert Enum.any?(ScriptedAgent.mesh(agent).upstreams, &match?({_, %{args: %{via: @proxy}}}, &1))

    # And when that one does not start, its error is the answer.
    MeshxConsul.stop(@proxy)
    refuse(agent, :register_service, :not_permitted)
    assert {:error, {:not_permitted, "so it is"}} = MeshxConsul.connect(["db"])
  end

  test "errors are 0.1's", %{agent: agent} do
    ScriptedAgent.foreign(agent, "cart-1")
    assert MeshxConsul.start({"cart", "cart-1"}) == {:error, :service_not_owned}
    assert {:ok, "cart-1", _address} = MeshxConsul.start({"cart", "cart-1"}, nil, true)
    assert %{force: true} = args(agent, "cart-1")

    refuse(agent, :register_service, :timeout)
    assert MeshxConsul.start("slow") == {:error, :service_alive_timeout}
    refuse(agent, :register_service, :unsupported)
    assert MeshxConsul.start("slow") == {:error, {:unsupported, "so it is"}}
    assert MeshxConsul.list() == ["cart-1"]

    # The agent came back without it, and will not have it.
    agent = restart_agent(MeshxConsulTest.directory(agent), control: &unready/3)
    assert MeshxConsul.start({"cart", "cart-1"}) == {:error, :invalid_state}
    ScriptedAgent.set(agent, :control, fn _, _, _ -> :default end)
    # Again by itself.
    eventually(fn -> MeshxConsul.start({"cart", "cart-1"}) == {:ok, :already_started} end)
  end

  def directory(agent), do: ScriptedAgent.mesh(agent).dir

  defp unready(id, :register_service, _args),
    do: {:reply, {:reply, id, {:error, :not_ready, "no certificate yet"}}}

  defp unready(_id, _command, _args), do: :default

  defp eventually(condition, left \\ 1_000) do
    cond do
      condition.() -> :ok
      left == 0 -> flunk("it never came about")
      true -> Process.sleep(10) && eventually(condition, left - 1)
    end
  end

  test "a service is not waited for with a timeout of 0", %{agent: agent} do
    assert {:ok, id, _address} = MeshxConsul.start("cart", nil, false, 0)
    refute Map.has_key?(args(agent, id), :wait)
    assert {:error, {:invalid_request, text}} = MeshxConsul.start("cart", nil, false, :soon)
    assert text =~ "timeout is :soon"
  end

  test "after the agent's restart everything is there again, under the same addresses", context do
    assert {:ok, "cart-1", address} =
             MeshxConsul.start({"cart", "cart-1"}, proxy: ["haproxy"], registration: tagged())

    assert {:ok, [ok: upstream]} = MeshxConsul.connect(["cart"])
    Peer.serve(address, "cart")
    assert {:ok, "cart", _} = Peer.ask(upstream)
    before = args(context.agent, "cart-1")

    agent = restart_agent(context.directory)
    assert {:ok, "cart", _} = Peer.ask_until(upstream, &match?({:ok, _, _}, &1))
    # It waits for nobody now.
    assert args(agent, "cart-1") == Map.delete(before, :wait)
    assert MeshxConsul.list_upstream() == ["cart"]
    assert MeshxConsul.disconnect(["cart"], nil, true) == {:ok, ["cart"]}
    assert MeshxConsul.stop("cart-1") == :ok
    assert %{services: none, upstreams: none} = ScriptedAgent.mesh(agent)
    assert none == %{}
  end

  defp tagged, do: %{"ID" => "{{id}}", "Name" => "{{name}}", "Tags" => ["v1"]}

  test "Unix sockets, by the options, the parameters and the template", context do
    assert {:ok, _id, {:tcp, _ip, _port}} = MeshxConsul.start("a")
    path = Path.join(context.directory, "mine")

    assert {:ok, _id, {:uds, ^path}} =
             MeshxConsul.start(%{"name" => "b", "id" => "b", "socket" => path})

    assert {:ok, "c", {:uds, chosen}} =
             MeshxConsul.start(%{"name" => "c", "id" => "c", "socket" => true})

    assert {:ok, %{"SocketPath" => ^chosen}} = MeshxConsul.info("c")
    template = %{"DestinationName" => "{{name}}", "LocalBindSocketPath" => ""}
    assert {:ok, [ok: {:uds, upstream}]} = MeshxConsul.connect(["c"], template)
    Peer.serve({:uds, chosen}, "c")
    assert {:ok, "c", _} = Peer.ask({:uds, upstream})

    configure(address: :uds)
    assert {:ok, _id, {:uds, _path}} = MeshxConsul.start("d")
    assert {:ok, [ok: {:uds, _path}]} = MeshxConsul.connect(["d"])
  end

  test "ports come from the range, each to one, and an end of them is told" do
    {:ok, busy} = :gen_tcp.listen(0, ip: {127, 0, 0, 1})
    {:ok, port} = :inet.port(busy)
    # One is in use by somebody else.
    configure(tcp_address: [port_range: port..(port + 2)])
    starts = for n <- 1..3, do: MeshxConsul.start("s#{n}")
    ports = for {:ok, _id, {:tcp, _ip, port}} <- starts, do: port
    assert ports == Enum.uniq(ports)
    refute port in ports
    assert length(ports) <= 2
    assert {:error, {:limit, text}} = List.last(starts)
    assert text =~ "no port of #{port}..#{port + 2} at 127.0.0.1 is free"
    assert {:ok, [error: {:limit, _}]} = MeshxConsul.connect(["a"])
    MeshxConsul.stop("s1-" <> @host)
    assert {:ok, _id, {:tcp, _ip, again}} = MeshxConsul.start("s4")
    assert again in ports
  end

  describe "what a proxy prints" do
    setup %{agent: agent} do
      test = self()

      configure(
        proxy_stdout_fun: fn id, stream, line ->
          send(test, {id, stream, line})
          if line == "crash", do: raise("no")
          if line == "kill", do: Process.exit(self(), :kill)
          if line == "hang", do: receive(do: (:never -> :ok))
        end,
        proxy_stderr_fun: fn id, stream, line -> send(test, {id, stream, line}) end,
        proxy_down_fun: fn id, pid, os_pid, reason, downs ->
          send(test, {:down, id, pid, os_pid, reason, downs})
        end
      )

      {:ok, "a", _} = MeshxConsul.start({"a", "a"}, proxy: ["p"])
      {:ok, "b", _} = MeshxConsul.start({"b", "b"}, proxy: ["p"])

      print = fn id, stream, line ->
        ScriptedAgent.push_service(
          agent,
          {:event, :proxy_output, %{id: id, stream: stream, line: line}}
        )
      end

      {:ok, print: print}
    end

    test "goes to the functions", %{print: print, agent: agent} do
      print.("a", :stdout, "one")
      print.("a", :stdout, "two")
      print.("a", :stderr, "three")
      assert_receive {"a", stream, "one"}, 5_000
      assert stream == :stdout
      assert_receive {"a", :stdout, "two"}, 5_000
      assert_receive {"a", :stderr, "three"}, 5_000

      for downs <- 0..1 do
        event = {:event, :proxy_down, %{id: "a", text: "exit status 1", final: downs == 1}}
        ScriptedAgent.push_service(agent, event)
        assert_receive {:down, "a", nil, nil, "exit status 1", ^downs}, 5_000
      end

      # Of services that are not ours nothing is told.
      print.("c", :stdout, "other")
      print.("a", :stdout, "last")
      assert_receive {"a", :stdout, "last"}, 5_000
      refute_received {"c", _, _}
    end

    test "disturbs nobody, whatever the functions do", %{print: print} do
      log =
        capture_log(fn ->
          print.("a", :stdout, "crash")
          print.("a", :stdout, "kill")
          assert_receive {"a", :stdout, "kill"}, 5_000

          # What was there when it was killed may be lost, what comes later is not.
          eventually(fn ->
            print.("a", :stdout, "on")
            match?({"a", :stdout, "on"}, receive(do: (m -> m), after: (50 -> nil)))
          end)
        end)

      assert log =~ "proxy_stdout_fun failed: ** (RuntimeError) no"

      print.("a", :stdout, "hang")
      assert_receive {"a", :stdout, "hang"}, 5_000
      print.("a", :stdout, "behind it")
      print.("b", :stdout, "beside it")
      assert_receive {"b", :stdout, "beside it"}, 5_000
      refute_received {"a", :stdout, "behind it"}
      assert {:ok, :already_started} = MeshxConsul.start({"a", "a"})
    end

    test "is not kept without end for a slow function", %{print: print} do
      print.("a", :stdout, "hang")
      assert_receive {"a", :stdout, "hang"}, 5_000
      for _ <- 1..1_200, do: print.("a", :stdout, "x")
      print.("b", :stdout, "done")
      assert_receive {"b", :stdout, "done"}, 20_000
      {:links, _} = Process.info(Process.whereis(MeshxConsul.Reporter), :links)
      %{"a" => worker} = :sys.get_state(MeshxConsul.Reporter)
      assert worker.lost > 0
      assert {:message_queue_len, waiting} = Process.info(worker.pid, :message_queue_len)
      assert waiting == 1_000
      assert worker.lost == 200

      # Its process ends with the service.
      monitor = Process.monitor(worker.pid)
      MeshxConsul.stop("a")
      assert_receive {:DOWN, ^monitor, :process, _pid, _reason}, 15_000
    end
  end

  test "the application ends with what it had", %{agent: agent} do
    assert {:ok, "cart-1", _address} = MeshxConsul.start({"cart", "cart-1"})
    assert {:ok, [ok: _]} = MeshxConsul.connect(["cart"])
    Application.stop(:meshx)
    on_exit(fn -> Application.ensure_all_started(:meshx) end)
    mesh = ScriptedAgent.mesh(agent)
    assert {mesh.services, mesh.upstreams} == {%{}, %{}}
  end
end
