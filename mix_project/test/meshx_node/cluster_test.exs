defmodule MeshxNode.ClusterTest do
  use Meshx.DistCase, async: true

  test "nodes with -name meet and call each other", context do
    start_agent(context)
    shop = start_node(context, "shop@h1")
    cart = start_node(context, "cart@h2")

    assert TestNode.call(shop, MeshxNode, :connect, [:cart@h2]) == :ok
    assert TestNode.call(shop, :net_adm, :ping, [:cart@h2]) == :pong
    assert TestNode.call(cart, :erlang, :nodes, []) == [:shop@h1]
    assert TestNode.call(shop, :erpc, :call, [:cart@h2, :erlang, :node, []]) == :cart@h2
    assert TestNode.call(cart, :erpc, :call, [:shop@h1, :erlang, :node, []]) == :shop@h1
  end
end
