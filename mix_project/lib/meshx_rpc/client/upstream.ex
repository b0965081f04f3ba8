defmodule MeshxRpc.Client.Upstream do
  @moduledoc false
  # Asks the mesh for the address that leads to the service, once for all connections of a pool, and again
  # when one of them could not use it: after an agent's restart the old address is gone.

  use GenServer

  def start_link(config), do: GenServer.start_link(__MODULE__, config)

  @doc "The address; `failed` is the one that did not work, or nil."
  @spec address(pid(), MeshxRpc.Address.t() | nil) :: {:ok, MeshxRpc.Address.t()} | {:error, term()}
  def address(upstream, failed), do: GenServer.call(upstream, {:address, failed}, :infinity)

  # It may be asking the agent.
  @answer 1_500

  @doc "Why the mesh has ended a connection that was made since then (unix seconds): `{cause, text}`, nil if it tells none."
  @spec refusal(pid(), integer()) :: {atom(), String.t()} | nil
  def refusal(upstream, since) do
    GenServer.call(upstream, {:refusal, since}, @answer)
  catch
    :exit, _silent_or_gone -> nil
  end

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

  def handle_call({:refusal, since}, _from, %{mesh: mesh} = state),
    do: {:reply, why(mesh, since), state}

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

  defp why(mesh, since) do
    with true <- function_exported?(mesh.adapter, :refusal, 1),
         {:ok, %{cause: cause, text: text, at: at}} when at >= since <-
           mesh.adapter.refusal(mesh.service) do
      {cause, text}
    else
      _nothing_new -> nil
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
