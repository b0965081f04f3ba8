defmodule MeshxNode.ClusterTest do
  use Meshx.DistCase, async: true

  test "nodes meet, call each other and see who is there", context do
    start_agent(context)
    shop = start_node(context, "shop@h1")
    cart = start_node(context, "cart@h2")

    assert TestNode.call(shop, MeshxNode, :connect, [:cart@h2]) == :ok
    assert TestNode.call(shop, MeshxNode, :connect, [:cart@h2]) == :ok
    assert TestNode.call(shop, :net_adm, :ping, [:cart@h2]) == :pong
    assert TestNode.call(cart, :erlang, :nodes, []) == [:shop@h1]
    assert TestNode.call(shop, :erpc, :call, [:cart@h2, :erlang, :node, []]) == :cart@h2
    assert TestNode.call(cart, :erpc, :call, [:shop@h1, :erlang, :node, []]) == :shop@h1

    assert {:ok, dialled} = TestNode.call(shop, MeshxNode, :peer, [:cart@h2])
    assert %{node: :cart@h2, direction: :outbound, spiffe: "spiffe://test/callee"} = dialled
    assert %{agent: "127.0.0.3:1", bytes_in: 10, bytes_out: 20, service: nil} = dialled
    assert dialled.certificate_expires_at == ~U[2033-05-18 03:33:21Z]
    assert dialled.since == ~U[2023-11-14 22:13:20Z]

    assert [%{node: :shop@h1, direction: :inbound, spiffe: "spiffe://test/caller"} = answered] =
             TestNode.call(cart, MeshxNode, :peers, [])

    assert answered.link == dialled.link

    assert TestNode.call(cart, MeshxNode, :peer, [:nobody@h2]) ==
             {:error, {:no_such_node, "there is no link to nobody@h2"}}

    assert {:ok, names} = TestNode.call(shop, MeshxNode, :names, [])
    assert names |> Enum.map(& &1.node) |> Enum.sort() == ["cart@h2", "shop@h1"]
  end

  test "short and long names meet, and host parts need no DNS", context do
    start_agent(context)
    short = launch(context, ["-sname", "shop@host-that-no-dns-knows"])
    long = start_node(context, "cart@no.dns.knows.this")
    :ok = TestNode.await_boot(short)

    assert TestNode.call(short, :net_adm, :ping, [:"cart@no.dns.knows.this"]) == :pong
    assert TestNode.call(long, :erlang, :nodes, []) == [:"shop@host-that-no-dns-knows"]
  end

  test "a dial from the long name to the short one works too", context do
    start_agent(context)
    short = launch(context, ["-sname", "shop@h1"])
    long = start_node(context, "cart@h2.example")
    :ok = TestNode.await_boot(short)
    assert TestNode.call(long, :net_adm, :ping, [:shop@h1]) == :pong
  end

  test "a 64 MiB message arrives whole, both ways", context do
    start_agent(context)
    shop = start_node(context, "shop@h1")
    start_node(context, "cart@h2")
    assert TestNode.call(shop, :meshx_test_node, :big_call, [:cart@h2, 64 * 1024 * 1024], 60_000)
  end

  test "monitors tell a process's end and a node's", context do
    start_agent(context)
    shop = start_node(context, "shop@h1")
    cart = start_node(context, "cart@h2")

    assert TestNode.call(shop, :meshx_test_node, :monitored_call, [:cart@h2, 60_000]) ==
             :killed_by_test

    ref = TestNode.cast(shop, :meshx_test_node, :nodedown_reason, [:cart@h2, 60_000])
    :ok = TestNode.await_output(shop, "@connected")
    :ok = TestNode.kill(cart)
    assert_receive {^ref, {:ok, :connection_closed}}, 60_000
  end

  test "a killed node comes back under its name with another creation", context do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1")
    cart = start_node(context, "cart@h2")
    assert TestNode.call(shop, :net_adm, :ping, [:cart@h2]) == :pong
    before = ScriptedAgent.nodes(agent)["cart@h2"].creation

    :ok = TestNode.kill(cart)
    # A node that has not noticed is still connected.
    :ok = TestNode.call(shop, :meshx_test_node, :await_nodes, [[], []])
    start_node(context, "cart@h2")
    assert ScriptedAgent.nodes(agent)["cart@h2"].creation != before
    assert TestNode.call(shop, MeshxNode, :connect, [:cart@h2]) == :ok
    assert TestNode.call(shop, :erpc, :call, [:cart@h2, :erlang, :node, []]) == :cart@h2
  end

  test "a node that is started before its killed namesake is gone from the agent waits for the name",
       context do
    agent = start_agent(context)
    counter = :counters.new(1, [])

    # The first answers are as if the old registration were still there.
    ScriptedAgent.set(agent, :control, fn
      id, :register_node, _ ->
        :counters.add(counter, 1, 1)

        if :counters.get(counter, 1) < 4,
          do: {:reply, {:reply, id, {:error, :name_taken, "taken"}}},
          else: :default

      _, _, _ ->
        :default
    end)

    start_node(context, "shop@h1")
    assert :counters.get(counter, 1) == 4
  end

  test "two nodes that dial each other at once get one link", context do
    start_agent(context)
    shop = start_node(context, "shop@h1")
    cart = start_node(context, "cart@h2")
    at = System.system_time(:millisecond) + 100
    one = TestNode.cast(shop, :meshx_test_node, :meet, [:cart@h2, at])
    two = TestNode.cast(cart, :meshx_test_node, :meet, [:shop@h1, at])
    assert_receive {^one, {:ok, true}}, 60_000
    assert_receive {^two, {:ok, true}}, 60_000
    assert TestNode.call(shop, :erpc, :call, [:cart@h2, :erlang, :nodes, []]) == [:shop@h1]
    assert [_] = TestNode.call(shop, MeshxNode, :peers, [])
    assert [_] = TestNode.call(cart, MeshxNode, :peers, [])
  end

  test "a hidden node is hidden", context do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1")
    tool = start_node(context, "tool@h1", ["-hidden"])
    assert ScriptedAgent.nodes(agent)["tool@h1"].hidden
    refute ScriptedAgent.nodes(agent)["shop@h1"].hidden
    assert TestNode.call(tool, :net_adm, :ping, [:shop@h1]) == :pong
    assert TestNode.call(shop, :erlang, :nodes, []) == []
    assert TestNode.call(shop, :erlang, :nodes, [:hidden]) == [:tool@h1]
  end

  test "distribution starts and stops while the VM runs", context do
    agent = start_agent(context)
    shop = launch(context, [])
    :ok = TestNode.await_boot(shop)
    start_node(context, "cart@h2")

    assert {:error, {:not_ready, _}} = TestNode.call(shop, MeshxNode, :connect, [:cart@h2])

    for _ <- 1..2 do
      assert {:ok, _} =
               TestNode.call(shop, :net_kernel, :start, [:shop@h1, %{name_domain: :longnames}])

      assert TestNode.call(shop, :net_adm, :ping, [:cart@h2]) == :pong
      socket = ScriptedAgent.nodes(agent)["shop@h1"].socket
      assert File.exists?(socket)
      assert TestNode.call(shop, :net_kernel, :stop, []) == :ok
      ScriptedAgent.await_gone(agent, "shop@h1")
      refute File.exists?(socket)
    end
  end

  test "a link between two nodes of one agent is counted from both ends", context do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1")
    cart = start_node(context, "cart@h1")
    assert TestNode.call(shop, :net_adm, :ping, [:cart@h1]) == :pong
    [{link, _, _}] = ScriptedAgent.links(agent)
    id = Base.encode16(link, case: :lower)

    ScriptedAgent.set(agent, :control, fn
      id_of_request, :links, _ ->
        local = %{id: id, direction: :local, since: 5, bytes_in: 1, bytes_out: 2}
        {:reply, {:reply, id_of_request, {:ok, %{links: [local]}}}}

      _, _, _ ->
        :default
    end)

    assert {:ok, %{bytes_in: 1, bytes_out: 2, certificate_expires_at: nil}} =
             TestNode.call(shop, MeshxNode, :peer, [:cart@h1])

    assert {:ok, %{bytes_in: 2, bytes_out: 1}} = TestNode.call(cart, MeshxNode, :peer, [:shop@h1])

    # Without an answer the verified names remain.
    ScriptedAgent.set(agent, :control, fn
      _, :links, _ -> :close
      _, _, _ -> :default
    end)

    assert {:ok, %{spiffe: "spiffe://test/callee", bytes_in: nil, since: nil}} =
             TestNode.call(shop, MeshxNode, :peer, [:cart@h1])
  end

  test "a node that does not listen, or is a tool, dials as a hidden session", context do
    agent = start_agent(context)
    cart = start_node(context, "cart@h2")

    for {name, args} <- [
          {:quiet@h1, ["-dist_listen", "false"]},
          {:"rem-1-cart@h1", []},
          {:console@h1, ["-meshx_session"]}
        ] do
      session = launch(context, ["-name", Atom.to_string(name) | args])
      :ok = TestNode.await_boot(session)
      assert TestNode.call(session, MeshxNode, :connect, [:cart@h2]) == :ok
      # The other end is connected a moment later.
      assert TestNode.call(session, :net_adm, :ping, [:cart@h2]) == :pong
      assert name in TestNode.call(cart, :erlang, :nodes, [:hidden])
      refute Map.has_key?(ScriptedAgent.nodes(agent), Atom.to_string(name))
    end
  end

  test "a node that has no name goes by the one that the other end gave it", context do
    start_agent(context)
    cart = start_node(context, "cart@h2")
    start_node(context, "search@h2")
    session = launch(context, ["-name", "undefined@h1"])
    :ok = TestNode.await_boot(session)
    assert TestNode.call(session, MeshxNode, :connect, [:cart@h2]) == :ok
    assert TestNode.call(session, :net_adm, :ping, [:cart@h2]) == :pong
    [name] = TestNode.call(cart, :erlang, :nodes, [:hidden])
    assert TestNode.call(session, :erlang, :node, []) == name
    assert {:ok, %{node: ^name}} = TestNode.call(cart, MeshxNode, :peer, [name])
    assert TestNode.call(session, MeshxNode, :connect, [:search@h2]) == :ok
  end

  test "an idle link ticks, and outlives several tick times", context do
    start_agent(context)
    # A busy machine may hold up a tick for a second or two.
    ticks = ["-kernel", "net_ticktime", "4"]
    shop = start_node(context, "shop@h1", ticks)
    start_node(context, "cart@h2", ticks)
    assert TestNode.call(shop, :net_adm, :ping, [:cart@h2]) == :pong
    # Four ticks to a tick time.
    assert TestNode.call(shop, :meshx_test_node, :ticked, [:cart@h2, 12])
  end

  test "a node that is stopped in its tracks is noticed by its silence", context do
    start_agent(context)
    ticks = ["-kernel", "net_ticktime", "1"]
    shop = start_node(context, "shop@h1", ticks)
    cart = start_node(context, "cart@h2", ticks)
    ref = TestNode.cast(shop, :meshx_test_node, :nodedown_reason, [:cart@h2, 60_000])
    :ok = TestNode.await_output(shop, "@connected")
    TestNode.signal(cart, "STOP")
    assert_receive {^ref, {:ok, :net_tick_timeout}}, 60_000
    TestNode.signal(cart, "CONT")
  end
end
