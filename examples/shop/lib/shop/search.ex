defmodule Shop.Search do
  @moduledoc """
  Asks the search worker, a node written in Rust (`examples/search_node`), as any `GenServer` is asked.

  The worker may come and go: what is missing is an error to the caller, never an exit.
  """

  @doc "Documents in which all words of `text` are; `node` is the worker's."
  @spec find(node(), String.t()) :: {:ok, [map()]} | {:error, term()}
  def find(node, text) do
    case ask(node, {:find, text}) do
      {:ok, documents} when is_list(documents) -> {:ok, documents}
      {:ok, {:error, reason}} -> {:error, reason}
      {:error, reason} -> {:error, reason}
    end
  end

  @doc "How much the worker has in its index, and how often it was asked."
  @spec stats(node()) :: {:ok, map()} | {:error, term()}
  def stats(node), do: ask(node, {:stats})

  defp ask(node, request) do
    {:ok, GenServer.call({:search, node}, request, 2_000)}
  catch
    # noproc, nodedown or timeout
    :exit, {reason, _call} -> {:error, reason}
  end
end
