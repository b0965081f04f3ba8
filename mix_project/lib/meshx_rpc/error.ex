defmodule MeshxRpc.Error do
  @moduledoc """
  Raised by `call!`, and by streams, when a call failed otherwise than by an exception of the function.

  `:reason` is the reason of `{:error_rpc, reason}`, see `MeshxRpc.Client`; `:pool` and `:fun` say what was called, and are nil where that is
  not known.
  """
  defexception [:reason, :pool, :fun]

  @impl true
  def message(%{reason: reason, pool: pool, fun: fun}) do
    what = if fun, do: "calling #{inspect(fun)} through #{inspect(pool)}", else: "a stream"
    "#{what} failed: " <> inspect(reason, limit: 20, printable_limit: 200)
  end

  @doc false
  # Raises the exception that the other side raised, or ours with its reason.
  @spec raise_reason(term(), atom(), term()) :: no_return()
  def raise_reason(reason, pool, fun) do
    if exception?(reason),
      do: raise(reason),
      else: raise(__MODULE__, reason: reason, pool: pool, fun: fun)
  end

  # What a peer calls an exception need not be one here, and `message/1` of any other module is not to be called.
  defp exception?(%{__exception__: true, __struct__: module}) when is_atom(module),
    do: Code.ensure_loaded?(module) and function_exported?(module, :exception, 1)

  defp exception?(_reason), do: false
end
