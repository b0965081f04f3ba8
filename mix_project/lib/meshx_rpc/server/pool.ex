defmodule MeshxRpc.Server.Pool do
  @moduledoc """
  A server without macros. `MeshxRpc.Server` says what the options mean.

      children = [MeshxRpc.Server.Pool.child_spec(MyApp.Api, address: {:tcp, {127, 0, 0, 1}, 0})]
  """
  use Supervisor

  alias MeshxRpc.Options
  alias MeshxRpc.Server.Listener

  # What compilers and behaviours export beside what people write.
  @injected [:module_info, :__info__, :behaviour_info, :child_spec]
  # Their callbacks are for OTP to call. A behaviour of the user's own may well describe the functions of a server.
  @otp [
    Agent,
    Application,
    DynamicSupervisor,
    GenServer,
    Supervisor,
    :application,
    :gen_event,
    :gen_server,
    :gen_statem,
    :supervisor,
    :supervisor_bridge
  ]

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

  @doc "Counts: `connections`, how many of them are `in_hello`, and `running` requests."
  @spec info(atom()) :: %{
          connections: non_neg_integer(),
          in_hello: non_neg_integer(),
          running: non_neg_integer()
        }
  def info(id), do: id |> listener() |> Listener.info()

  @impl true
  def init(config) do
    {:module, _module} = Code.ensure_loaded(config.module)
    config = Map.merge(config, %{functions: functions(config), running: :atomics.new(1, [])})

    children = [
      Supervisor.child_spec({DynamicSupervisor, strategy: :one_for_one}, id: :connections),
      Supervisor.child_spec({Listener, {config, self()}}, id: :listener, shutdown: 10_000)
    ]

    Supervisor.init(children, strategy: :one_for_all)
  end

  defp listener(id) do
    {:listener, pid, _type, _modules} =
      id |> Supervisor.which_children() |> List.keyfind!(:listener, 0)

    pid
  end

  # The names that a peer may say, as binaries: looking one up makes no atom.
  defp functions(%{module: module, functions: allowed}) do
    callbacks = callbacks(module)

    for {name, 1} <- module.module_info(:exports),
        name not in @injected and name not in callbacks,
        text = Atom.to_string(name),
        not String.starts_with?(text, "MACRO-") and not String.starts_with?(text, "__"),
        allowed == :all or name in allowed,
        into: %{},
        do: {text, name}
  end

  defp callbacks(module) do
    behaviours =
      for {key, modules} <- module.module_info(:attributes),
          key in [:behaviour, :behavior],
          behaviour <- modules,
          behaviour in @otp and function_exported?(behaviour, :behaviour_info, 1),
          do: behaviour

    for behaviour <- behaviours, {name, 1} <- behaviour.behaviour_info(:callbacks), do: name
  end
end
