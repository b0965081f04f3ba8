defmodule MeshxRpc.Client.Upstream do
  @moduledoc false
  # Asks the mesh for the address that leads to the service, once for all connections of a pool, and again
  # when one of them could not use it: after an agent's restart the old address is gone.

  use GenServer

  def start_link(config), do: GenServer.start_link(__MODULE__, config)

  @doc "The address; `failed` is the one that did not work, or nil."
  @spec address(pid(), MeshxRpc.Address.t() | nil) :: {:ok, MeshxRpc.Address.t()} | {:error, term()}
  def address(upstream, failed), do: GenServer.call(upstream, {:address, failed}, :infinity)

  @impl true
  def init(config) do
    Process.flag(:trap_exit, true)
    {:ok, %{mesh: config.mesh, address: nil}}
  end

  @impl true
  def handle_call({:address, failed}, _from, state) do
    state = if state.address != nil and state.address == failed, do: drop(state), else: state

    case state.address || connect(state.mesh) do
      {:error, reason} -> {:reply, {:error, reason}, state}
      address -> {:reply, {:ok, address}, %{state | address: address}}
    end
  end

  @impl true
  def handle_info(_other, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state), do: drop(state)

  defp connect(mesh) do
    case mesh.adapter.connect([mesh.service], mesh.template, mesh.as) do
      {:ok, [{:ok, address}]} -> address
      {:ok, [{:error, reason}]} -> {:error, reason}
      {:error, reason} -> {:error, reason}
    end
  end

  defp drop(%{address: nil} = state), do: state

  defp drop(%{mesh: mesh} = state) do
    _ = mesh.adapter.disconnect([mesh.service], proxy_id(mesh.as), false)
    %{state | address: nil}
  end

  defp proxy_id({_name, id}), do: id
  defp proxy_id(_name), do: nil
end
