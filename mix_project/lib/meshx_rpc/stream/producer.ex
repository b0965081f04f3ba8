defmodule MeshxRpc.Stream.Producer do
  @moduledoc false
  # A stream that goes to the client: its call's process enumerates, and gives batch n to the request that asks for it
  # (`pull`). While nobody asks it collects until a batch is full, and then waits: that is the back-pressure. When
  # somebody waits already a batch goes at once, so pieces that come slowly are not held back.

  alias MeshxRpc.{Message, Stream, Term}
  alias MeshxRpc.Stream.{Batch, Pieces}

  @doc """
  Runs the function and enumerates what it returns, in the call's process. The answer is `{:done, batches}` or
  `{:failed, batches, reason}`.
  """
  @spec run(binary(), non_neg_integer(), Message.t(), (() -> Enumerable.t())) ::
          {:done, non_neg_integer()} | {:failed, non_neg_integer(), term()}
  def run(token, want, message, fun) do
    key = {__MODULE__, token}
    Process.put(key, %{token: token, message: message, batch: %Batch{}, number: 0, want: want})

    outcome =
      try do
        Enum.each(fun.(), fn piece ->
          Process.put(key, piece |> add(Process.get(key)) |> offer())
        end)
      catch
        kind, reason -> {:failed, Term.failure(kind, reason, __STACKTRACE__)}
      end

    state = Process.delete(key)
    state = if state.batch.size > 0, do: give(state, asked(state)), else: state

    case outcome do
      :ok -> {:done, state.number}
      {:failed, reason} -> {:failed, state.number, reason}
    end
  end

  @doc "Asks for a batch, in the process of a request: about `want` bytes, one piece more at most."
  @spec pull(pid(), binary(), non_neg_integer(), pos_integer()) ::
          {:ok, [binary()], non_neg_integer()} | :over
  def pull(producer, token, number, want) do
    monitor = Process.monitor(producer)
    send(producer, {Stream, :pull, token, number, self(), want})

    receive do
      {Stream, :batch, ^token, iovec, size} -> {:ok, iovec, size}
      {:DOWN, ^monitor, :process, _pid, _reason} -> :over
    end
  end

  defp add(piece, state),
    do: %{state | batch: Batch.add(state.batch, Pieces.encode(state.message, piece))}

  defp offer(%{token: token, number: number} = state) do
    receive do
      {Stream, :pull, ^token, ^number, from, want} -> give(state, {from, want})
    after
      0 -> if state.batch.size >= state.want, do: give(state, asked(state)), else: state
    end
  end

  defp asked(%{token: token, number: number}) do
    receive do
      {Stream, :pull, ^token, ^number, from, want} -> {from, want}
    end
  end

  defp give(state, {from, want}) do
    {iovec, size} = Batch.iovec(state.batch)
    send(from, {Stream, :batch, state.token, iovec, size})
    %{state | batch: %Batch{}, number: state.number + 1, want: want}
  end
end
