defmodule MeshxRpc.Client.Direct do
  @moduledoc false
  # Calls whose callers have written the request themselves. A message to the connection for each would wake it once
  # more than the answer does, so callers put a row into a table that the connection looks into:
  #
  #   calls      {stream, key, caller}
  #   watched    {caller}                those whose end the connection is told of
  #
  # Both are of one socket: stream ids of another mean other calls. A caller looks whether it is watched, and whether
  # calls are still taken, after it has entered its own; the connection ends either before it looks for calls. So one
  # of the two always sees the other.

  alias MeshxRpc.{Client.Look, Shared}

  @enforce_keys [:calls, :watched, :shared, :look]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          calls: :ets.table(),
          watched: :ets.table(),
          shared: Shared.t(),
          look: Look.t()
        }
  @type call :: {caller :: pid(), key :: reference()}

  @doc "For a socket; the tables go with the connection, or by `delete/1`."
  @spec new(Shared.t()) :: t()
  def new(shared) do
    [calls, watched] = for name <- [:meshx_rpc_direct, :meshx_rpc_watched], do: table(name)
    %__MODULE__{calls: calls, watched: watched, shared: shared, look: Look.new()}
  end

  defp table(name), do: :ets.new(name, [:public])

  @doc """
  The caller's half: this process is about to write the request of a call. False: it must not.

  Raises `ArgumentError` when the socket's time is over.
  """
  @spec enter(t() | map(), pid(), pos_integer(), reference()) :: boolean()
  def enter(%{calls: calls, watched: watched, shared: shared}, connection, stream, key) do
    # Killed after that, it leaves nothing of which the connection does not hear.
    watched? = :ets.member(watched, self())
    unless watched?, do: send(connection, {:watch, self()})
    :ets.insert(calls, {stream, key, self()})
    # It may have been given up meanwhile, as one without a call.
    if watched? and not :ets.member(watched, self()), do: send(connection, {:watch, self()})
    # When the connection was faster, it knows of the call.
    not (Shared.over?(shared) and :ets.take(calls, stream) != [])
  end

  @doc "Callers enter no more calls; those that are there are still there."
  @spec close(t()) :: :ok
  def close(direct), do: Shared.over(direct.shared)

  @doc "Takes the call of a stream."
  @spec take(nil | t(), pos_integer()) :: {:ok, call()} | :error
  def take(nil, _stream), do: :error

  def take(direct, stream) do
    case :ets.take(direct.calls, stream) do
      [{_stream, key, caller}] -> {:ok, {caller, key}}
      [] -> :error
    end
  end

  @doc "Takes all calls."
  @spec take_all(nil | t()) :: [{call(), pos_integer()}]
  def take_all(nil), do: []

  def take_all(direct) do
    for {stream, _key, _caller} <- :ets.tab2list(direct.calls),
        {:ok, call} <- [take(direct, stream)],
        do: {call, stream}
  end

  @doc "How many calls there are."
  @spec count(nil | t() | map()) :: non_neg_integer()
  def count(nil), do: 0

  def count(%{calls: calls}) do
    case :ets.info(calls, :size) do
      # Of a socket whose time is over.
      :undefined -> 0
      size -> size
    end
  end

  @doc "The callers that have calls."
  @spec callers(nil | t()) :: [pid()]
  def callers(nil), do: []
  def callers(direct), do: for({_stream, _key, caller} <- :ets.tab2list(direct.calls), do: caller)

  @doc "The connection is told of this caller's end."
  @spec watched(nil | t(), pid()) :: boolean()
  def watched(nil, _caller), do: true
  def watched(direct, caller), do: :ets.insert(direct.watched, {caller})

  @doc "And now it is not."
  @spec unwatched(nil | t(), pid()) :: boolean()
  def unwatched(nil, _caller), do: true
  def unwatched(direct, caller), do: :ets.delete(direct.watched, caller)

  @spec delete(nil | t()) :: :ok
  def delete(nil), do: :ok

  def delete(direct) do
    :ets.delete(direct.calls)
    :ets.delete(direct.watched)
    :ok
  end
end
