defmodule MeshxNode.AcceptTest do
  # What comes in at a node's own socket.
  use Meshx.DistCase, async: true
  import MeshxRpc.Case, only: [await: 1]

  setup context do
    agent = start_agent(context)
    shop = start_node(context, "shop@h1")
    cart = start_node(context, "cart@h2")
    {:ok, agent: agent, shop: shop, cart: cart}
  end

  defp dial(agent, name) do
    %{socket: path} = ScriptedAgent.nodes(agent)[name]
    {:ok, socket} = :gen_tcp.connect({:local, path}, 0, [:binary, packet: 2, active: false])
    socket
  end

  # The first message of a distribution handshake, which a node answers with a status.
  defp send_name(socket, name) do
    :gen_tcp.send(socket, <<?N, 0x0000000D07DF7FBC::64, 5::32, byte_size(name)::16, name::binary>>)
  end

  test "the right secret is let through to the handshake", %{agent: agent} do
    socket = dial(agent, "cart@h2")
    %{secret: secret} = ScriptedAgent.nodes(agent)["cart@h2"]
    :ok = :gen_tcp.send(socket, ScriptedAgent.accept_frame(<<1::128>>, secret, "shop@h1"))
    :ok = send_name(socket, "shop@h1")
    assert {:ok, "sok"} = :gen_tcp.recv(socket, 0, 10_000)
  end

  test "a wrong secret closes the connection, whichever bit is wrong", %{agent: agent, cart: cart} do
    %{secret: secret} = ScriptedAgent.nodes(agent)["cart@h2"]

    for bit <- [0, 7, 128, 255] do
      wrong = :crypto.exor(secret, <<0::size(bit), 1::1, 0::size(255 - bit)>>)
      socket = dial(agent, "cart@h2")
      :ok = :gen_tcp.send(socket, ScriptedAgent.accept_frame(<<1::128>>, wrong, "shop@h1"))
      _ = send_name(socket, "shop@h1")
      assert {:error, _} = :gen_tcp.recv(socket, 0, 10_000)
    end

    :ok = TestNode.await_output(cart, "its secret is not the one of this node's registration")
    refute TestNode.output(cart) =~ inspect(secret)
  end

  test "who leaves without a word only looked whether somebody listens", context do
    for _ <- 1..3, do: :ok = :gen_tcp.close(dial(context.agent, "cart@h2"))
    socket = dial(context.agent, "cart@h2")
    :ok = :gen_tcp.send(socket, "x")
    assert {:error, _} = :gen_tcp.recv(socket, 0, 10_000)
    told = "closed a connection to this node's socket"
    :ok = TestNode.await_output(context.cart, told)
    assert context.cart |> TestNode.output() |> String.split(told) |> length() == 2
  end

  test "another node's secret is a wrong one", %{agent: agent} do
    %{secret: secret} = ScriptedAgent.nodes(agent)["shop@h1"]
    socket = dial(agent, "cart@h2")
    :ok = :gen_tcp.send(socket, ScriptedAgent.accept_frame(<<1::128>>, secret, "shop@h1"))
    _ = send_name(socket, "shop@h1")
    assert {:error, _} = :gen_tcp.recv(socket, 0, 10_000)
  end

  test "a name in the handshake that the agent did not speak of is refused", context do
    ScriptedAgent.set(context.agent, :dist, fn _, _ -> {:accept, node: "mallory@h9"} end)

    assert {:error, {:handshake_failed, _}} =
             TestNode.call(context.shop, MeshxNode, :connect, [:cart@h2])

    :ok =
      TestNode.await_output(context.cart, ~S(the handshake names "shop@h1", the agent mallory@h9))

    refute :shop@h1 in TestNode.call(context.cart, :erlang, :nodes, [:known])
  end

  test "a handshake that begins with something else is refused", %{agent: agent, cart: cart} do
    %{secret: secret} = ScriptedAgent.nodes(agent)["cart@h2"]

    for first <- [
          "",
          "N",
          "garbage",
          <<?N, 0::96, 200::16, "shop@h1">>,
          <<?n, 5::16, 0::32, "shop@h1">>
        ] do
      socket = dial(agent, "cart@h2")
      :ok = :gen_tcp.send(socket, ScriptedAgent.accept_frame(<<1::128>>, secret, "shop@h1"))
      :ok = :gen_tcp.send(socket, first)
      assert {:ok, "snot_allowed"} = :gen_tcp.recv(socket, 0, 10_000)
      assert {:error, :closed} = :gen_tcp.recv(socket, 0, 10_000)
    end

    :ok = TestNode.await_output(cart, "no name message")
  end

  test "garbage is closed, and said", %{agent: agent, cart: cart, shop: shop} do
    for {bytes, text} <- [
          {"", "0 bytes, wanted at least 2"},
          {"GET / HTTP/1.1\r\n\r\n", "version 71, type 69, wanted version 1, type 4"},
          {<<1, 4, 0::size(48)-unit(8), 255, 255>>, "lengths do not add up"},
          {<<1, 1, 0::size(48)-unit(8), 0, 0>>, "version 1, type 1"},
          {:binary.copy("x", 2100), "more than 2048 bytes"}
        ] do
      socket = dial(agent, "cart@h2")
      :ok = :gen_tcp.send(socket, bytes)
      assert {:error, _} = :gen_tcp.recv(socket, 0, 10_000)
      :ok = TestNode.await_output(cart, text)
    end

    assert TestNode.call(shop, MeshxNode, :connect, [:cart@h2]) == :ok
  end

  test "silent and half-open connections hold up nobody", %{agent: agent, cart: cart, shop: shop} do
    # More than may be unproven, fewer than the socket's backlog: a full one refuses whoever comes.
    silent =
      for i <- 1..100 do
        socket = dial(agent, "cart@h2")
        # Half of a length, half of a frame, nothing at all.
        _ = :inet.setopts(socket, packet: 0)
        # The oldest are closed by now.
        _ = :gen_tcp.send(socket, Enum.at([<<0>>, <<0, 84, 1, 4>>, ""], rem(i, 3)))
        socket
      end

    assert TestNode.call(shop, MeshxNode, :connect, [:cart@h2]) == :ok
    :ok = TestNode.await_output(cart, "more than 64 unproven connections")

    # All end by their deadline at the latest.
    for socket <- silent, do: assert({:error, _} = :gen_tcp.recv(socket, 0, 20_000))
    assert TestNode.call(shop, :erpc, :call, [:cart@h2, :erlang, :node, []]) == :cart@h2
  end

  test "a cut link ends with its cause as nodedown reason", %{agent: agent, shop: shop, cart: cart} do
    ref = TestNode.cast(shop, :meshx_test_node, :nodedown_reason, [:cart@h2, 60_000])
    :ok = TestNode.await_output(shop, "@connected")
    [{link, "shop@h1", "cart@h2"}] = ScriptedAgent.links(agent)
    other = TestNode.cast(cart, :meshx_test_node, :nodedown_reason, [:shop@h1, 60_000])
    :ok = TestNode.await_output(cart, "@connected")

    # A link that is not there is no fault.
    ScriptedAgent.push(
      agent,
      "shop@h1",
      {:event, :cut, %{link: <<0::128>>, cause: :limit, text: "none"}}
    )

    cut =
      {:event, :cut, %{link: link, cause: :intention_denied, text: "rule 7 denies shop to cart"}}

    ScriptedAgent.push(agent, "shop@h1", cut)
    assert_receive {^ref, {:ok, {:meshx, :intention_denied}}}, 60_000

    :ok =
      TestNode.await_output(shop, "a link was cut: intention_denied: rule 7 denies shop to cart")

    # The other end may have dialled anew by now.
    cut = Base.encode16(link, case: :lower)
    await(fn -> not Enum.any?(TestNode.call(shop, MeshxNode, :peers, []), &(&1.link == cut)) end)

    # The other end sees a closed connection, and sees it later.
    assert_receive {^other, {:ok, :connection_closed}}, 60_000

    # The accepting end can be told as well.
    ref = TestNode.cast(cart, :meshx_test_node, :nodedown_reason, [:shop@h1, 60_000])
    :ok = TestNode.await_output(cart, ~r/@connected.*@connected/s)
    assert TestNode.call(cart, :net_adm, :ping, [:shop@h1]) == :pong
    {:ok, %{link: id}} = TestNode.call(cart, MeshxNode, :peer, [:shop@h1])
    link = Base.decode16!(id, case: :lower)

    ScriptedAgent.push(
      agent,
      "shop@h1",
      {:event, :cut, %{link: link, cause: :certificate_invalid, text: "expired"}}
    )

    assert_receive {^ref, {:ok, :connection_closed}}, 60_000
  end
end
