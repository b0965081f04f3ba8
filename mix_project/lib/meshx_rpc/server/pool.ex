defmodule MeshxRpc.Server.Pool do
  @moduledoc """
  A server without macros. `MeshxRpc.Server` says what the options mean.

      children = [MeshxRpc.Server.Pool.child_spec(MyApp.Api, address: {:tcp, {127, 0, 0, 1}, 0})]
  """
  use Supervisor

  # What requests need: a map that is small enough to be found in without hashing.
  @rules [:id, :module, :functions, :offered, :message, :codec, :guard, :telemetry, :running] ++
           [:streams, :max_concurrency, :max_queue, :timeout_execute, :address, :blk_max_size]

  alias MeshxRpc.{Entry, Options}
  alias MeshxRpc.Server.{Casts, Functions, Listener, Room, Streams}

  @doc "A child specification; raises `ArgumentError` when an option is wrong."
  @spec child_spec(atom(), keyword()) :: Supervisor.child_spec()
  def child_spec(id, options \\ []) do
    %{
      id: id,
      start: {__MODULE__, :start_link, [id, Options.server!(id, options)]},
      type: :supervisor
    }
  end

  @doc "Starts a server: `options` are a keyword list, or the map that `child_spec/2` made of it."
  @spec start_link(atom(), keyword() | map()) :: Supervisor.on_start()
  def start_link(id, options) when is_list(options),
    do: start_link(id, Options.server!(id, options))

  def start_link(id, config) when is_map(config),
    do: Supervisor.start_link(__MODULE__, config, name: id)

  @doc "The address that the server listens on: with its port when that was 0."
  @spec address(atom()) :: {:ok, Meshx.ServiceMesh.address()} | {:error, :not_registered}
  def address(id), do: id |> listener() |> Listener.address()

  @doc """
  Counts: `connections`, how many of them are `in_hello`, `running` requests, `casts` that run, and
  `cast_failures` since start.
  """
  @spec info(atom()) :: %{
          connections: non_neg_integer(),
          in_hello: non_neg_integer(),
          running: non_neg_integer(),
          casts: non_neg_integer(),
          cast_failures: non_neg_integer()
        }
  def info(id), do: id |> listener() |> Listener.info()

  @impl true
  def init(config) do
    config =
      config
      |> Options.telemetry()
      |> Map.merge(%{
        offered: Functions.new(config.module, config.functions),
        running: Room.running(),
        streams: Streams.table(),
        budget: config.codec.budget(config.max_bytes),
        guard: config.codec.policy(config.guard)
      })

    children = [
      {Entry, {{:server, config.id}, Map.take(config, @rules)}},
      {Streams, config.streams},
      {Casts, config},
      Supervisor.child_spec({DynamicSupervisor, strategy: :one_for_one}, id: :connections),
      Supervisor.child_spec({Listener, {config, self()}},
        id: :listener,
        shutdown: config.drain + 10_000
      )
    ]

    Supervisor.init(children, strategy: :one_for_all)
  end

  defp listener(id) do
    {:listener, pid, _type, _modules} =
      id |> Supervisor.which_children() |> List.keyfind!(:listener, 0)

    pid
  end
end
