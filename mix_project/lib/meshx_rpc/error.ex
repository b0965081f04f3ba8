defmodule MeshxRpc.Error do
  @moduledoc """
  Raised by `call!` when a call failed otherwise than by an exception of the function.

  `:reason` is the reason of `{:error_rpc, reason}`, see `MeshxRpc.Client`.
  """
  defexception [:reason, :pool, :fun]

  @impl true
  def message(%{reason: reason, pool: pool, fun: fun}) do
    "calling #{inspect(fun)} through #{inspect(pool)} failed: " <>
      inspect(reason, limit: 20, printable_limit: 200)
  end
end
