defmodule MeshxRpc.Entry do
  @moduledoc false
  # What all processes need to know of a client's pool or of a server, where they find it without a copy.
  #
  # A copy for each call is dear: it holds references to counters and to memory of the NIF, whose own counts all
  # schedulers then change.

  use GenServer

  @compile {:inline, name: 1}

  @type key :: {:client | :server, atom()}

  @doc "Holds a value until its supervisor ends: the first to be started, so the last to go."
  @spec start_link({key(), map()}) :: GenServer.on_start()
  def start_link({key, value}), do: GenServer.start_link(__MODULE__, {key, value})

  @doc "The value, nil when there is none."
  @spec get(key()) :: map() | nil
  def get(key), do: :persistent_term.get(name(key), nil)

  @impl true
  def init({key, value}) do
    Process.flag(:trap_exit, true)
    entry = Map.put(value, :entry, self())
    alone(key, fn -> :persistent_term.put(name(key), entry) end)
    {:ok, key}
  end

  # Of a supervisor that was killed we may hear only when it has been started anew: that one's value is not ours.
  @impl true
  def terminate(_reason, key) do
    alone(key, fn ->
      if match?(%{entry: pid} when pid == self(), get(key)),
        do: :persistent_term.erase(name(key))
    end)
  end

  # Flat, since it is hashed and compared for each call.
  defp name({role, id}), do: {__MODULE__, role, id}

  defp alone(key, fun), do: :global.trans({{__MODULE__, key}, self()}, fun, [node()])
end
