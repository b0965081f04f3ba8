defmodule MeshxRpc.Stream.Producer do
  @moduledoc false
  # A stream that goes to the client: its call's process enumerates, another one gives batch n to the request that asks
  # for it (`pull`), as soon as there is a piece. While nobody asks, pieces collect until there are as many as a batch
  # may have, and the Enumerable waits: that is the back-pressure.

  alias MeshxRpc.Term
  alias MeshxRpc.Server.Streams
  alias MeshxRpc.Stream.{Batch, Source}

  @doc """
  Runs the function and enumerates what it returns, in the call's process. The answer is `{:done, batches}` or
  `{:failed, batches, reason}`.
  """
  @spec run(binary(), non_neg_integer(), map(), (() -> Enumerable.t())) ::
          {:done, non_neg_integer()} | {:failed, non_neg_integer(), term()}
  def run(token, want, config, fun) do
    source = self()
    sender = spawn_link(fn -> start(token, source, config.streams) end)

    outcome =
      try do
        Source.run(fun.(), sender, config.message, want)
      catch
        kind, reason -> {:failed, Term.failure(kind, reason, __STACKTRACE__)}
      end

    send(sender, {__MODULE__, :finish})

    receive do
      {__MODULE__, :finished, ^sender, batches} ->
        case outcome do
          :ok -> {:done, batches}
          {:failed, reason} -> {:failed, batches, reason}
        end
    end
  end

  @doc "Asks for a batch, in the process of a request."
  @spec pull(Streams.table(), binary(), non_neg_integer()) ::
          {:ok, [binary()], non_neg_integer()} | :over
  def pull(table, token, number) do
    sender = Streams.whereis(table, {:pull, token})
    monitor = Process.monitor(sender)
    send(sender, {__MODULE__, :pull, number, self()})

    receive do
      {__MODULE__, :batch, ^sender, iovec, size} -> {:ok, iovec, size}
      {:DOWN, ^monitor, :process, _pid, _reason} -> :over
    end
  end

  defp start(token, source, table) do
    # Its call has the token for itself.
    true = Streams.register(table, {:pull, token})
    loop(%{source: source, batch: %Batch{}, number: 0, asking: %{}, finish: false})
  end

  defp loop(%{finish: true, batch: %{size: 0}} = state),
    do: send(state.source, {__MODULE__, :finished, self(), state.number})

  defp loop(state) do
    receive do
      {Source, :piece, encoded} -> give(%{state | batch: Batch.add(state.batch, encoded)})
      {__MODULE__, :pull, number, from} -> give(put_in(state.asking[number], from))
      {__MODULE__, :finish} -> give(%{state | finish: true})
    end
  end

  defp give(%{batch: %{size: size}, number: number, asking: asking} = state)
       when size > 0 and is_map_key(asking, number) do
    {from, asking} = Map.pop!(asking, number)
    {iovec, size} = Batch.iovec(state.batch)
    send(from, {__MODULE__, :batch, self(), iovec, size})
    Source.taken(state.source, size)
    loop(%{state | batch: %Batch{}, number: number + 1, asking: asking})
  end

  defp give(state), do: loop(state)
end
