defmodule MeshxRpc.Client.Dial do
  @moduledoc false
  # Where a client's connection goes to, and its socket.

  alias MeshxRpc.{Address, Options, Telemetry}
  alias MeshxRpc.Client.Upstream

  @doc """
  A socket and its address. `failed` is an address that did not answer before: a mesh may give another.

  What fails is `:mesh`, which gives no address, or `{:connect, address}`.
  """
  @spec socket(map(), :ets.table(), nil | Address.t()) ::
          {:ok, Address.t(), port()} | {:error, :mesh | {:connect, Address.t()}, term()}
  def socket(config, table, failed) do
    with {:ok, address} <- address(config, table, failed),
         # The mesh may give an address that leads away from this host.
         :ok <- at(address, protected(config, address)),
         {:ok, socket} <-
           at(address, Address.connect(address, config.timeout_connect, config.socket_opts)),
         do: {:ok, address, socket}
  end

  @doc """
  Why there is nobody behind a connection that ended with `reason` before its hello. A mesh takes each connection, and
  ends it when it is refused further on: then it knows more.
  """
  @spec why(map(), reason :: atom()) :: atom() | {atom(), String.t()}
  def why(%{config: %{mesh: nil}}, reason), do: reason

  def why(%{table: table, since: since}, reason) do
    began = System.os_time(:microsecond) - (Telemetry.now() - since)
    [{:upstream, upstream}] = :ets.lookup(table, :upstream)
    Upstream.refusal(upstream, div(began, 1_000_000)) || reason
  end

  defp address(%{mesh: nil, address: address}, _table, _failed), do: {:ok, address}

  defp address(_config, table, failed) do
    [{:upstream, upstream}] = :ets.lookup(table, :upstream)
    with {:error, reason} <- Upstream.address(upstream, failed), do: {:error, :mesh, reason}
  end

  defp protected(config, address) do
    with {:error, text} <- Options.protected(config, address), do: {:error, {:auth, text}}
  end

  defp at(address, {:error, reason}), do: {:error, {:connect, address}, reason}
  defp at(_address, done), do: done
end
