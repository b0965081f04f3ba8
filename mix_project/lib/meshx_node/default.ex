defmodule MeshxNode.Default do
  @moduledoc """
  What a node's service and its upstreams are called over a mesh adapter, unless `config :meshx_node` says otherwise.
  """

  @doc "The first argument of `c:Meshx.ServiceMesh.start/4`: `{\"name@host\", \"name@host\"}`."
  @spec service_params(name :: atom(), host :: charlist()) :: {String.t(), String.t()}
  def service_params(name, host) do
    node = "#{name}@#{host}"
    {node, node}
  end

  @doc "What stands for another node in the first argument of `c:Meshx.ServiceMesh.connect/3`: its name."
  @spec upstream_params(node()) :: node()
  def upstream_params(node), do: node

  @doc "The third argument of `c:Meshx.ServiceMesh.connect/3`: this node's own service."
  @spec upstream_proxy(node(), my_node :: node()) :: {node(), node()}
  def upstream_proxy(_node, my_node), do: {my_node, my_node}
end
