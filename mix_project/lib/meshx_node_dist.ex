defmodule MeshxNode_dist do
  @moduledoc false
  # `-proto_dist Elixir.MeshxNode`, as 0.1 had it: the node's carrier by `config :meshx_node, mesh_adapter: ...`. Those that are the
  # agent anyway get the carrier that proves identities, any other adapter the one that goes by its functions.

  @agents [Meshx.Agent, MeshxConsul]

  defp carrier do
    # Erlang's: this may run where Elixir is not.
    case :application.get_env(:meshx_node, :mesh_adapter) do
      {:ok, adapter} when adapter in @agents -> :meshx_dist
      _other -> :meshx_adapter_dist
    end
  end

  def childspecs, do: carrier().childspecs()
  def listen(name), do: carrier().listen(name)
  def listen(name, host), do: carrier().listen(name, host)
  def accept(listen), do: carrier().accept(listen)

  def accept_connection(acceptor, socket, node, allowed, setup_time),
    do: carrier().accept_connection(acceptor, socket, node, allowed, setup_time)

  def setup(node, type, my_node, names, setup_time),
    do: carrier().setup(node, type, my_node, names, setup_time)

  def close(listen), do: carrier().close(listen)
  def select(node), do: carrier().select(node)
  def address, do: carrier().address()
  def is_node_name(node), do: :meshx_dist.is_node_name(node)
  def setopts(socket, options), do: carrier().setopts(socket, options)
  def getopts(socket, options), do: carrier().getopts(socket, options)
end
