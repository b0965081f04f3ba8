defmodule MeshxNode.AgentTest do
  # The agent's client: boot, restarts, and an agent that misbehaves.
  use Meshx.DistCase, async: true

  defp boot_fails(context, args \\ [], env \\ %{}) do
    node = launch(context, ["-name", "shop@h1" | args], env)
    assert {:exited, status} = TestNode.await_boot(node)
    assert status != 0
    output = TestNode.output(node)
    refute output =~ "crash"
    output
  end

  describe "at boot" do
    test "a missing agent is named with its directory and what to do", %{dir: dir} = context do
      output = boot_fails(context)
      assert output =~ "meshx: cannot start shop@h1: unreachable: no agent at #{dir}/control.sock"
      assert output =~ "start the agent (meshx agent)"
      assert output =~ "-meshx_dir DIR"
    end

    test "a missing directory is named", context do
      output = boot_fails(context, ["-meshx_dir", "/nonexistent/meshx"])
      assert output =~ "no agent: /nonexistent/meshx does not exist"
    end

    test "the flag comes before MESHX_DIR, which comes before XDG_RUNTIME_DIR",
         %{dir: dir} = context do
      assert boot_fails(context, ["-meshx_dir", "/nonexistent/1"], %{
               "XDG_RUNTIME_DIR" => "/nonexistent/2"
             }) =~
               "/nonexistent/1 does"

      assert boot_fails(context, [], %{"XDG_RUNTIME_DIR" => "/nonexistent/2"}) =~
               "#{dir}/control.sock"

      assert boot_fails(context, [], %{"MESHX_DIR" => "", "XDG_RUNTIME_DIR" => "/nonexistent/2"}) =~
               "/nonexistent/2/meshx does"

      {uid, 0} = System.cmd("id", ["-u"])

      assert boot_fails(context, [], %{"MESHX_DIR" => "", "XDG_RUNTIME_DIR" => ""}) =~
               "/tmp/meshx-#{String.trim(uid)}"
    end

    test "an agent that refuses the name ends the boot with its words", context do
      start_agent(context,
        control: fn
          id, :register_node, _ ->
            {:reply, {:reply, id, {:error, :host_not_owned, "hosts are h8, h9"}}}

          _, _, _ ->
            :default
        end
      )

      assert boot_fails(context) =~ "meshx: cannot start shop@h1: host_not_owned: hosts are h8, h9"
    end

    test "a name that stays taken ends the boot", context do
      start_agent(context)
      start_node(context, "shop@h1")
      assert boot_fails(context) =~ "meshx: cannot start shop@h1: name_taken: shop@h1 is registered"
    end

    test "a mesh that comes later is waited for, but not for ever", context do
      answers = :counters.new(1, [])

      start_agent(context,
        control: fn
          id, :register_node, _ ->
            :counters.add(answers, 1, 1)

            if :counters.get(answers, 1) < 4,
              do: {:reply, {:reply, id, {:error, :not_ready, "the mesh did not answer"}}},
              else: :default

          _, _, _ ->
            :default
        end
      )

      start_node(context, "shop@h1")
      assert :counters.get(answers, 1) == 4
      :counters.put(answers, 1, -1_000_000)

      assert boot_fails(context, ["-meshx_ready_within", "300"]) =~
               "meshx: cannot start shop@h1: not_ready: the mesh did not answer"
    end

    test "an agent of another version, or none at all, ends the boot with what was seen", context do
      agent = start_agent(context)

      for {answer, text} <- [
            {{:reply, {:reply, 0, {:error, :version_mismatch, "you 1..1, we 3..4"}}},
             "you 1..1, we 3..4"},
            {{:reply, {:reply, 0, {:ok, %{version: 9}}}}, "the agent chose version 9, wanted 1"},
            {{:reply, {:reply, 0, {:ok, %{version: 1}}}}, "wanted version, vm_dir and dist_socket"},
            {{:reply, {:event, :protocol_error, %{text: "what is that"}}}, "what is that"},
            {{:reply, :ok}, "neither a reply nor an event"},
            {{:reply, {:reply, 5, {:ok, %{}}}}, "answered request 5, which was not made"},
            {{:raw, "HTTP/1.1 400 Bad Request\r\n"}, "no external term"},
            {:close, "closed the control connection"}
          ] do
        ScriptedAgent.set(agent, :control, fn _, _, _ -> answer end)
        assert boot_fails(context) =~ text
      end
    end

    test "an agent that is silent ends the boot", context do
      start_agent(context, control: fn _, _, _ -> :silent end)
      assert boot_fails(context) =~ "did not answer hello within 5000 ms"
    end
  end

  describe "the directory" do
    test "is refused when others can write it", %{dir: dir} = context do
      start_agent(context)

      for mode <- [0o777, 0o702] do
        File.chmod!(dir, mode)

        assert boot_fails(context) =~
                 "#{dir} has mode #{Integer.to_string(mode, 8)}, so that others can write it"
      end

      File.chmod!(dir, 0o700)
      start_node(context, "shop@h1")
    end
  end

  describe "when the agent restarts" do
    test "the node comes back under its running creation, and links work", context do
      agent = start_agent(context)
      shop = start_node(context, "shop@h1")
      start_node(context, "cart@h2")
      assert TestNode.call(shop, :net_adm, :ping, [:cart@h2]) == :pong
      before = ScriptedAgent.nodes(agent)["shop@h1"]
      assert before.proof == nil

      stop_agent()
      agent = start_agent(context)
      again = ScriptedAgent.await_node(agent, "shop@h1")
      assert again.resumed
      assert again.creation == before.creation
      assert again.proof == before.secret
      assert again.secret != before.secret
      assert again.socket == before.socket

      ScriptedAgent.await_node(agent, "cart@h2")
      assert connect_again(shop, :cart@h2) == :ok
      assert TestNode.call(shop, :erpc, :call, [:cart@h2, :erlang, :node, []]) == :cart@h2
    end

    test "links come back by themselves, hidden ones hidden", context do
      start_agent(context)
      shop = start_node(context, "shop@h1")
      start_node(context, "cart@h2")
      start_node(context, "audit@h2")
      assert TestNode.call(shop, :net_kernel, :connect_node, [:cart@h2])
      assert TestNode.call(shop, :net_kernel, :hidden_connect_node, [:audit@h2])
      watch = TestNode.cast(shop, :meshx_test_node, :await_nodes, [[:cart@h2], [:audit@h2]])
      assert_receive {^watch, {:ok, :ok}}, 60_000
      # What comes back is what was up, to the last step of its handshake.
      for node <- [:cart@h2, :audit@h2],
          do: assert(TestNode.call(shop, :net_adm, :ping, [node]) == :pong)

      lost = TestNode.cast(shop, :meshx_test_node, :await_nodes, [[], []])
      stop_agent()
      assert_receive {^lost, {:ok, :ok}}, 60_000
      start_agent(context)
      back = TestNode.cast(shop, :meshx_test_node, :await_nodes, [[:cart@h2], [:audit@h2]])
      assert_receive {^back, {:ok, :ok}}, 60_000
    end

    test "a node that is refused then goes on asking", context do
      start_agent(context)
      shop = start_node(context, "shop@h1")
      stop_agent()
      counter = :counters.new(1, [])

      agent =
        start_agent(context,
          control: fn
            id, :register_node, _ ->
              :counters.add(counter, 1, 1)

              if :counters.get(counter, 1) < 3,
                do: {:reply, {:reply, id, {:error, :not_ready, "no certificate yet"}}},
                else: :default

            _, _, _ ->
              :default
          end
        )

      assert ScriptedAgent.await_node(agent, "shop@h1").resumed

      :ok =
        TestNode.await_output(shop, "the agent refuses this node: not_ready: no certificate yet")
    end

    test "subscribers are told", context do
      agent = start_agent(context)
      shop = start_node(context, "shop@h1")
      ref = TestNode.cast(shop, :meshx_test_node, :agent_events, [3])
      :ok = TestNode.await_output(shop, "@subscribed up")
      ScriptedAgent.push_raw(agent, "shop@h1", "garbage")
      :ok = TestNode.await_output(shop, "the agent sent a frame that is no external term")
      ScriptedAgent.await_node(agent, "shop@h1", 2)
      stop_agent()
      assert_receive {^ref, {:ok, [:down, :up, :down]}}, 60_000
    end
  end

  describe "requests" do
    setup context do
      agent = start_agent(context)
      # No node: a VM that uses the mesh without distribution.
      vm = launch(context, [])
      :ok = TestNode.await_boot(vm)
      {:ok, agent: agent, vm: vm}
    end

    test "need a client that runs, and work without distribution", %{vm: vm} do
      assert {:error, {:not_ready, text}} = TestNode.call(vm, MeshxNode, :names, [])
      assert text =~ "does not run"
      assert {:ok, pid} = TestNode.call(vm, :meshx_agent, :start, [])
      assert {:ok, ^pid} = TestNode.call(vm, :meshx_agent, :start, [])
      assert {:ok, %{agent: "scripted"}} = TestNode.call(vm, :meshx_agent, :await, [])
      assert {:ok, []} = TestNode.call(vm, MeshxNode, :names, [])
      assert {:error, {:invalid_request, _}} = TestNode.call(vm, :meshx_agent, :call, [:check, %{}])

      assert {:error, {:limit, _}} =
               TestNode.call(vm, :meshx_agent, :call, [:check, %{x: :binary.copy("x", 70_000)}])

      assert TestNode.call(vm, MeshxNode, :peers, []) == []
    end

    test "distribution that starts and stops later leaves the client alone", %{vm: vm, agent: agent} do
      {:ok, pid} = TestNode.call(vm, :meshx_agent, :start, [])

      assert {:ok, _} =
               TestNode.call(vm, :net_kernel, :start, [:shop@h1, %{name_domain: :longnames}])

      ScriptedAgent.await_node(agent, "shop@h1")
      assert TestNode.call(vm, :net_kernel, :stop, []) == :ok
      ScriptedAgent.await_gone(agent, "shop@h1")
      assert {:ok, ^pid} = TestNode.call(vm, :meshx_agent, :start, [])
      assert {:ok, []} = TestNode.call(vm, MeshxNode, :names, [])
    end

    test "answered with words of a later version fail alone", %{vm: vm, agent: agent} do
      {:ok, _} = TestNode.call(vm, :meshx_agent, :start, [])
      {:ok, _} = TestNode.call(vm, :meshx_agent, :await, [])

      ScriptedAgent.set(agent, :control, fn
        id, :names, _ -> {:raw, <<131, 104, 3, 119, 5, "reply", 97, id, 119, 9, "wordof2031">>}
        _, _, _ -> :default
      end)

      assert {:error, {:version_mismatch, _}} = TestNode.call(vm, MeshxNode, :names, [])
      assert {:ok, %{links: []}} = TestNode.call(vm, :meshx_agent, :call, [:links, %{}])
    end

    test "that are not answered time out, late answers are dropped, and too many are refused",
         context do
      %{vm: vm, agent: agent} = context
      {:ok, _} = TestNode.call(vm, :meshx_agent, :start, [])
      {:ok, _} = TestNode.call(vm, :meshx_agent, :await, [])
      test = self()

      ScriptedAgent.set(agent, :control, fn
        id, :names, _ ->
          send(test, {:asked, id})
          :silent

        _, _, _ ->
          :default
      end)

      assert {:error, {:timeout, text}} = TestNode.call(vm, :meshx_agent, :call, [:names, %{}, 50])
      assert text =~ "within 50 ms"
      assert_receive {:asked, _}, 60_000

      many = for _ <- 1..63, do: TestNode.cast(vm, :meshx_agent, :call, [:names, %{}, 60_000])
      for _ <- 1..63, do: assert_receive({:asked, _}, 60_000)
      assert {:error, {:limit, text}} = TestNode.call(vm, :meshx_agent, :call, [:links, %{}])
      assert text =~ "64 requests to the agent unanswered, at most 64"

      stop_agent()
      for ref <- many, do: assert_receive({^ref, {:ok, {:error, {:unreachable, _}}}}, 60_000)
    end

    test "an agent that leaves many unanswered is given up and dialled again", %{
      vm: vm,
      agent: agent
    } do
      {:ok, _} = TestNode.call(vm, :meshx_agent, :start, [])
      {:ok, _} = TestNode.call(vm, :meshx_agent, :await, [])

      ScriptedAgent.set(agent, :control, fn _, command, _ ->
        if command == :names, do: :silent, else: :default
      end)

      many = for _ <- 1..32, do: TestNode.cast(vm, :meshx_agent, :call, [:names, %{}, 50])
      for ref <- many, do: assert_receive({^ref, {:ok, {:error, {_, _}}}}, 60_000)
      :ok = TestNode.await_output(vm, "the agent left 32 requests unanswered")
      assert {:ok, %{agent: "scripted"}} = TestNode.call(vm, :meshx_agent, :await, [])
    end

    test "garbage from the agent ends the connection and is said; the next one works", %{
      vm: vm,
      agent: agent
    } do
      {:ok, _} = TestNode.call(vm, :meshx_agent, :start, [])
      {:ok, _} = TestNode.call(vm, :meshx_agent, :await, [])

      for {bytes, text} <- [
            {"garbage", "no external term"},
            {:erlang.term_to_binary({:reply, 1, {:ok, %{text: :binary.copy("x", 1000)}}},
               compressed: 9
             ), "compressed"},
            {:erlang.term_to_binary({:reply, 77_777, {:ok, %{}}}),
             "request 77777, which was not made"}
          ] do
        ScriptedAgent.set(agent, :control, fn _, command, _ ->
          if command == :names, do: {:raw, bytes}, else: :default
        end)

        assert {:error, {:invalid_request, seen}} = TestNode.call(vm, MeshxNode, :names, [])
        assert seen =~ text
        assert {:ok, %{agent: "scripted"}} = TestNode.call(vm, :meshx_agent, :await, [])
      end
    end

    test "a frame above the limit is not read", %{vm: vm, agent: agent} do
      {:ok, _} = TestNode.call(vm, :meshx_agent, :start, [])
      {:ok, _} = TestNode.call(vm, :meshx_agent, :await, [])
      huge = :binary.copy("x", 16 * 1024 * 1024 + 1)

      ScriptedAgent.set(agent, :control, fn _, command, _ ->
        if command == :names, do: {:raw, huge}, else: :default
      end)

      assert {:error, {:unreachable, text}} = TestNode.call(vm, MeshxNode, :names, [])
      assert text =~ "emsgsize"
      assert {:ok, _} = TestNode.call(vm, :meshx_agent, :await, [])
    end
  end

  test "a killed VM's connection closes with it", context do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1")
    :ok = TestNode.kill(shop)
    assert ScriptedAgent.await_gone(agent, "shop@h1") == :ok
  end

  test "the secret is in no printed state", context do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1")
    %{secret: secret} = ScriptedAgent.nodes(agent)["shop@h1"]
    status = TestNode.call(shop, :meshx_test_node, :printed_status, [])
    assert status =~ "shop@h1"
    refute status =~ secret |> :binary.bin_to_list() |> Enum.take(6) |> Enum.join(",")
  end

  test "when the client crashes, the node's links and socket end too: nobody could cut them",
       context do
    start_agent(context)
    vm = launch(context, [])
    :ok = TestNode.await_boot(vm)
    cart = start_node(context, "cart@h2")
    {:ok, _} = TestNode.call(vm, :meshx_agent, :start, [])
    assert {:ok, _} = TestNode.call(vm, :net_kernel, :start, [:shop@h1, %{name_domain: :longnames}])
    ref = TestNode.cast(cart, :meshx_test_node, :nodedown_reason, [:shop@h1, 60_000])
    :ok = TestNode.await_output(cart, "@connected")
    TestNode.call(vm, :meshx_test_node, :kill_client, [])
    assert_receive {^ref, {:ok, :connection_closed}}, 60_000
  end
end
