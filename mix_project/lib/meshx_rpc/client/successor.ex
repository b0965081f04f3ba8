defmodule MeshxRpc.Client.Successor do
  @moduledoc false
  # How a connection and the one that takes its place stand under their supervisor.

  @doc "`before` is the connection that it is to replace, or nil."
  @spec child_spec(tuple(), term(), nil | pid()) :: Supervisor.child_spec()
  def child_spec(argument, id, before) do
    # One that has made room for another ends normally, and is not started again.
    %{
      id: id,
      start: {MeshxRpc.Client.Connection, :start_link, [argument, id, before]},
      restart: :transient
    }
  end

  @doc "Starts one that takes the caller's place as soon as it is up."
  @spec start(map()) :: pid()
  def start(state) do
    %{config: config, index: index, table: table, calls: calls} = state
    {name, index_or_more} = state.id || {config.id, index}
    {place, generation} = if is_tuple(index_or_more), do: index_or_more, else: {index_or_more, 0}
    id = {name, {place, generation + 1}}
    spec = child_spec({config, index, table, calls.load}, id, self())
    # The supervisor may be waiting for us.
    spawn(fn -> Supervisor.start_child(config.id, spec) end)
  end

  @doc "Removes the caller from its supervisor when it has ended."
  @spec delete_me(map()) :: pid()
  def delete_me(%{config: config, id: id, index: index}) do
    old = self()

    spawn(fn ->
      monitor = Process.monitor(old)
      receive do: ({:DOWN, ^monitor, :process, _pid, _reason} -> :ok)
      Supervisor.delete_child(config.id, id || {config.id, index})
    end)
  end
end
