defmodule MeshxRpc.Stream.Incoming do
  @moduledoc false
  # A stream that comes from the client, as the Enumerable that a server's function gets. Batches wait in the requests
  # that brought them (`push`), which are answered when a batch is taken: so the client sends no further ahead than
  # it has requests open.

  alias MeshxRpc.{Stream, Term}
  alias MeshxRpc.Stream.Pieces

  @more 0
  @ended 1

  @doc "The Enumerable of stream number `index` of a call: one pass, in the call's process."
  @spec new(binary(), non_neg_integer(), map()) :: Enumerable.t()
  def new(token, index, config) do
    Elixir.Stream.resource(
      fn -> start(token, index) end,
      fn
        {:ended, ""} -> {:halt, :ended}
        {number, ""} -> next(token, index, number, config)
        {number, batch} -> pieces(batch, number, config)
      end,
      fn _where -> :ok end
    )
  end

  @doc "Hands a batch over, in the process of a request: returns when it was taken, or never will be."
  @spec push(pid(), binary(), byte(), non_neg_integer(), {0..2, binary()}) :: :ok
  def push(consumer, token, index, number, batch) do
    monitor = Process.monitor(consumer)
    send(consumer, {Stream, :push, token, index, number, self()})

    receive do
      {Stream, :take, ^token, ^consumer} -> send(consumer, {Stream, :taken, token, self(), batch})
      {Stream, :had, ^token, ^consumer} -> :ok
      {:DOWN, ^monitor, :process, _pid, _reason} -> :ok
    end

    :ok
  end

  defp start(token, index) do
    case Process.put({__MODULE__, token, index}, true) do
      nil -> {0, ""}
      true -> raise ArgumentError, "a stream that is an argument can be enumerated once"
    end
  end

  defp next(token, index, number, config) do
    case take(token, index, number) do
      {@more, batch} -> pieces(batch, number + 1, config)
      {@ended, batch} -> pieces(batch, :ended, config)
      {_failed, batch} -> failed(Pieces.decode(nil, batch, config))
    end
  end

  # Only the process of the call knows the token, but it may have handed the stream to another.
  defp take(token, index, number) do
    receive do
      # Its client did not hear that it was taken.
      {Stream, :push, ^token, ^index, earlier, from} when earlier < number ->
        send(from, {Stream, :had, token, self()})
        take(token, index, number)

      {Stream, :push, ^token, ^index, ^number, from} ->
        monitor = Process.monitor(from)
        send(from, {Stream, :take, token, self()})

        receive do
          {Stream, :taken, ^token, ^from, batch} ->
            Process.demonitor(monitor, [:flush])
            batch

          # It may come again: the client did not hear that it was taken.
          {:DOWN, ^monitor, :process, _pid, _reason} ->
            take(token, index, number)
        end
    end
  end

  defp pieces(batch, number, config) do
    case Pieces.decode(config.message, batch, config) do
      {:ok, pieces, rest} -> {pieces, {number, rest}}
      {:error, reason} -> raise MeshxRpc.Error, reason: reason
    end
  end

  defp failed({:ok, [reason], ""}),
    do: MeshxRpc.Error.raise_reason(Term.localize(reason), nil, nil)

  defp failed(_other), do: raise(MeshxRpc.Error, reason: :invalid_state)
end
