if Code.ensure_loaded?(Cluster.Strategy) do
  defmodule MeshxNode.Cluster.Libcluster do
    @moduledoc """
    A strategy for libcluster that goes by the mesh's catalogue.

        config :libcluster,
          topologies: [
            mesh: [strategy: MeshxNode.Cluster.Libcluster, config: [services: ["shop", "cart"]]]
          ]

    The config is that of `MeshxNode.Cluster`, which it runs, but for `:connect` and `:name`. It is there when libcluster
    is a dependency of the project.
    """
    use Cluster.Strategy

    @doc false
    def start_link([%Cluster.Strategy.State{} = state]) do
      connect = fn node ->
        Cluster.Strategy.connect_nodes(state.topology, state.connect, state.list_nodes, [node])
      end

      name = Module.concat(__MODULE__, state.topology)
      MeshxNode.Cluster.start_link([name: name, connect: connect] ++ List.wrap(state.config))
    end
  end
end
