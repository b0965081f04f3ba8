defmodule MeshxRpc.Client.Listing do
  @moduledoc false
  # The rows of a pool's table by which callers find a connection:
  #
  #   {index, pid, max_message, traced?}     while it is up
  #   {{:direct, index}, pid, direct}        for callers that write themselves
  #   {{:metadata, pid}, metadata}           for measured calls, until its socket is closed
  #   {{:down, index}, reason}               while there is none

  @doc "The connection is up."
  @spec enter(map(), metadata :: map()) :: true
  def enter(%{table: table, index: index, link: link, agreed: agreed, calls: calls}, metadata) do
    :ets.delete(table, {:down, index})
    # Calls ask for it, and only measured ones.
    :ets.insert(table, {{:metadata, self()}, metadata})

    direct = %{
      socket: link.socket,
      shared: link.shared,
      block: min(agreed.block, agreed.peer_stream_window),
      crc: link.writer.crc,
      look: calls.direct.look,
      calls: calls.direct.calls,
      watched: calls.direct.watched
    }

    row = {index, self(), agreed.peer_max_message, agreed.trace}
    :ets.insert(table, [row, {{:direct, index}, self(), direct}])
  end

  @doc "Calls are not to come here any more. Another connection may have taken the place."
  @spec leave(map()) :: map()
  def leave(%{table: table, index: index} = state) do
    :ets.match_delete(table, {index, self(), :_, :_})
    :ets.match_delete(table, {{:direct, index}, self(), :_})
    state
  end

  @doc "The connection is over, or was never there."
  @spec down(:ets.table(), pos_integer(), reason :: term()) :: true
  def down(table, index, reason), do: :ets.insert(table, {{:down, index}, reason})

  @doc "Its metadata are not asked for any more."
  @spec forget(:ets.table()) :: true
  def forget(table), do: :ets.delete(table, {:metadata, self()})

  @doc "What a connection that crashed has left at this place."
  @spec clear(:ets.table(), pos_integer()) :: true
  def clear(table, index) do
    :ets.delete(table, index)
    :ets.delete(table, {:direct, index})
  end

  @doc "The metadata that connections which crashed have left."
  @spec forget_dead(:ets.table()) :: :ok
  def forget_dead(table) do
    for [pid] <- :ets.match(table, {{:metadata, :"$1"}, :_}),
        not Process.alive?(pid),
        do: :ets.delete(table, {:metadata, pid})

    :ok
  end
end
