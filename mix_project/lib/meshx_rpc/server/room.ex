defmodule MeshxRpc.Server.Room do
  @moduledoc false
  # How many requests run at once: `running` counts those of all connections, `held` those of one, which are given back
  # when it dies.
  #
  # Requests for pieces of streams have room of their own. In that of calls a stream that runs could wait for ever for
  # a place that only its own end, or that of others like it, makes free.

  @calls 1
  # `held` has bytes of the budget at 2.
  @pieces 3
  # For each call that may run: eight pulls, and eight pushes.
  @each 16

  @type place :: 1 | 3

  @doc "What a server's connections share."
  @spec running() :: :atomics.atomics_ref()
  def running, do: :atomics.new(3, [])

  @doc "What one connection has."
  @spec held() :: :counters.counters_ref()
  def held, do: :counters.new(3, [])

  @doc "The place that a function's request takes."
  @spec place(atom() | {:internal, atom()}) :: place()
  def place({:internal, name}) when name in [:pull, :push], do: @pieces
  def place(_fun), do: @calls

  @doc "Requests that a connection may have at once: one more than may run, so that the refusal names what is full."
  @spec most(map()) :: pos_integer()
  def most(%{max_concurrency: max}), do: max + @each * max + 1

  @doc "Takes so many places, if there are as many. Never more, also not for a moment: others may find the last one."
  @spec take?(map(), :counters.counters_ref(), place(), pos_integer()) :: boolean()
  def take?(%{running: running, max_concurrency: max} = rules, held, place, count) do
    most = if place == @pieces, do: @each * max, else: max
    taken = :atomics.get(running, place)

    cond do
      taken + count > most ->
        false

      :atomics.compare_exchange(running, place, taken, taken + count) == :ok ->
        :counters.add(held, place, count)
        true

      true ->
        take?(rules, held, place, count)
    end
  end

  @doc "Leaves them."
  @spec leave(map(), :counters.counters_ref(), place(), non_neg_integer()) :: :ok
  def leave(%{running: running}, held, place, count) do
    :counters.sub(held, place, count)
    :atomics.sub(running, place, count)
  end

  @doc "Leaves all that a connection had which is dead."
  @spec leave_all(map(), :counters.counters_ref()) :: :ok
  def leave_all(%{running: running}, held) do
    for place <- [@calls, @pieces], do: :atomics.sub(running, place, :counters.get(held, place))
    :ok
  end

  @doc "Requests that run."
  @spec count(:atomics.atomics_ref()) :: non_neg_integer()
  def count(running), do: calls(running) + :atomics.get(running, @pieces)

  @doc "The same without those for pieces."
  @spec calls(:atomics.atomics_ref()) :: non_neg_integer()
  def calls(running), do: :atomics.get(running, @calls)
end
