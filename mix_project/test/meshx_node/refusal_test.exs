defmodule MeshxNode.RefusalTest do
  use Meshx.DistCase, async: true

  defp pair(context, args \\ []) do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1", args)
    cart = start_node(context, "cart@h2")
    {agent, shop, cart}
  end

  defp connect(node), do: TestNode.call(node, MeshxNode, :connect, [:cart@h2])

  test "a node that is not in the mesh is refused with the cause, in the log too", context do
    start_agent(context)
    shop = start_node(context, "shop@h1")
    text = "cart@h2 is not in the catalogue"
    assert connect(shop) == {:error, {:no_such_node, text}}
    :ok = TestNode.await_output(shop, "meshx: cannot reach cart@h2: no_such_node: #{text}")

    assert {:ok, %{cause: :no_such_node, text: ^text}} =
             TestNode.call(shop, MeshxNode, :refusal, [:cart@h2])

    assert TestNode.call(shop, MeshxNode, :refusal, [:other@h2]) == :error
    assert TestNode.call(shop, :net_adm, :ping, [:cart@h2]) == :pang
  end

  test "one that stays the same is an error once to whom tries on and on, and each time to others",
       context do
    start_agent(context)
    shop = start_node(context, "shop@h1")
    true = TestNode.call(shop, :ets, :insert, [:meshx_links, {{:patient, :cart@h2}}])
    for _ <- 1..3, do: assert({:error, {:no_such_node, _}} = connect(shop))
    assert told(shop, :first@h2) == 1
    true = TestNode.call(shop, :ets, :delete, [:meshx_links, {:patient, :cart@h2}])
    for _ <- 1..2, do: assert({:error, {:no_such_node, _}} = connect(shop))
    assert told(shop, :second@h2) == 3
  end

  # How often the log has it. What is logged later is there when that of another node is.
  defp told(shop, other) do
    {:error, _} = TestNode.call(shop, MeshxNode, :connect, [other])
    :ok = TestNode.await_output(shop, "cannot reach #{other}: no_such_node")
    length(String.split(TestNode.output(shop), "cannot reach cart@h2: no_such_node")) - 1
  end

  test "each cause of the protocol arrives as it was sent, and the next attempt may succeed",
       context do
    {agent, shop, _} = pair(context)

    for cause <- TestNode.call(shop, :meshx_frame, :causes, []) do
      text = "why #{cause}: äöü"
      ScriptedAgent.set(agent, :dist, fn _, _ -> {:refuse, to_string(cause), text} end)
      assert connect(shop) == {:error, {cause, text}}
    end

    ScriptedAgent.set(agent, :dist, fn "shop@h1", "cart@h2" -> :ok end)
    assert connect(shop) == :ok
  end

  test "a cause that this version does not know makes no atom", context do
    {agent, shop, _} = pair(context)
    ScriptedAgent.set(agent, :dist, fn _, _ -> {:refuse, "cause_of_a_later_version", "later"} end)
    assert connect(shop) == {:error, {:unknown, "cause_of_a_later_version: later"}}

    assert_raise RuntimeError, ~r/badarg/, fn ->
      TestNode.call(shop, :erlang, :binary_to_existing_atom, ["cause_of_a_" <> "later_version"])
    end
  end

  test "garbage, half frames and closed connections are told apart", context do
    {agent, shop, _} = pair(context)

    for {answer, cause, text} <- [
          {{:raw, "x"}, :invalid_request, "1 bytes, wanted at least 2"},
          {{:raw, "GET / HTTP/1.1\r\n"}, :invalid_request,
           "version 71, type 69, wanted version 1, type 2 or 3"},
          {{:raw, <<1, 2, 0, 200, "short">>}, :invalid_request, "lengths do not add up"},
          {{:raw, <<1, 3, 5, "limit", 0, 9, "short">>}, :invalid_request, "lengths do not add up"},
          {{:raw, <<2, 2, 0, 0, 0, 0>>}, :invalid_request, "version 2, type 2"},
          {{:raw, :binary.copy("x", 3000)}, :unreachable, "gave no answer"},
          {:close, :unreachable, "closed"}
        ] do
      ScriptedAgent.set(agent, :dist, fn _, _ -> answer end)
      assert {:error, {^cause, seen}} = connect(shop)
      assert seen =~ text
    end
  end

  test "a silent agent is given up within the setup time", context do
    # It is an eighth of it before the time is over, which nothing would explain.
    {agent, shop, _} = pair(context, ["-kernel", "net_setuptime", "8"])
    ScriptedAgent.set(agent, :dist, fn _, _ -> :silent end)
    assert connect(shop) == {:error, {:timeout, "the agent did not answer in time"}}
  end

  test "a handshake that is not done within the setup time is told as that", context do
    # The agent has to answer within that time.
    {_agent, shop, cart} = pair(context, ["-kernel", "net_setuptime", "4"])
    TestNode.signal(cart, "STOP")
    assert {:error, {:timeout, text}} = connect(shop)
    assert text =~ "net_setuptime"
    TestNode.signal(cart, "CONT")
  end

  test "different cookies are told as a failed handshake", context do
    {_agent, shop, _cart} = pair(context)
    TestNode.call(shop, :erlang, :set_cookie, [:cart@h2, :other])
    assert {:error, {:handshake_failed, text}} = connect(shop)
    assert text =~ "recv_challenge"
  end

  test "names that are none are refused without asking the agent", context do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1")

    for name <- [:nohost, :"@h1", :a@, :a@b@c] do
      assert {:error, {:invalid_name, text}} = TestNode.call(shop, MeshxNode, :connect, [name])
      assert text =~ "wanted NAME@HOST"
    end

    assert ScriptedAgent.links(agent) == []
  end

  test "without an agent the cause names its absence, and links come back with it", context do
    {_agent, shop, _cart} = pair(context)
    stop_agent()
    :ok = TestNode.await_output(shop, "the agent closed the control connection")
    assert {:error, {cause, text}} = connect(shop)
    assert cause in [:unreachable, :not_ready]
    assert text =~ "agent"

    agent = start_agent(context)
    ScriptedAgent.await_node(agent, "shop@h1")
    ScriptedAgent.await_node(agent, "cart@h2")
    assert connect_again(shop, :cart@h2) == :ok
  end
end
