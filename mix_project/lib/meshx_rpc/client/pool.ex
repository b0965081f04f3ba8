defmodule MeshxRpc.Client.Pool do
  @moduledoc """
  A client without macros. `MeshxRpc.Client` says what the options and the results mean.

      children = [MeshxRpc.Client.Pool.child_spec(:api, address: {:tcp, {127, 0, 0, 1}, 4000})]
      MeshxRpc.Client.Pool.call(:api, :echo, "hello")
  """
  use Supervisor

  alias MeshxRpc.Client.{Call, Connection, Upstream}
  alias MeshxRpc.Options

  @typedoc "Why a call has no result: see `MeshxRpc.Client`."
  @type reason :: term()

  @doc "A child specification; raises `ArgumentError` when an option is wrong."
  @spec child_spec(atom(), keyword()) :: Supervisor.child_spec()
  def child_spec(id, options \\ []) do
    %{
      id: id,
      start: {__MODULE__, :start_link, [id, Options.client!(id, options)]},
      type: :supervisor
    }
  end

  @doc "Starts a client: `options` are a keyword list, or the map that `child_spec/2` made of it."
  @spec start_link(atom(), keyword() | map()) :: Supervisor.on_start()
  def start_link(id, options) when is_list(options),
    do: start_link(id, Options.client!(id, options))

  def start_link(id, config) when is_map(config),
    do: Supervisor.start_link(__MODULE__, config, name: id)

  @doc """
  Calls a function of the server with one argument and waits for its result, at most `timeout` ms in all.

  A call that certainly has not run (`:exec_retry_on_error`) is made again, `retry` times, after
  `retry_sleep` ms +-10 %.
  """
  @spec call(atom(), atom() | String.t(), term(), timeout(), non_neg_integer(), non_neg_integer()) ::
          term() | {:error_rpc, reason()}
  def call(pool, fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100),
    do: Call.call(pool, fun, args, timeout, retry, retry_sleep)

  @doc "As `call/6`, but raises: the exception that was raised there, or `MeshxRpc.Error`."
  @spec call!(atom(), atom() | String.t(), term(), timeout(), non_neg_integer(), non_neg_integer()) ::
          term()
  def call!(pool, fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100) do
    case Call.call(pool, fun, args, timeout, retry, retry_sleep) do
      {:error_rpc, reason} ->
        if exception?(reason),
          do: raise(reason),
          else: raise(MeshxRpc.Error, reason: reason, pool: pool, fun: fun)

      result ->
        result
    end
  end

  # What a server calls an exception need not be one here, and `message/1` of any other module is not to be called.
  defp exception?(%{__exception__: true, __struct__: module}) when is_atom(module),
    do: Code.ensure_loaded?(module) and function_exported?(module, :exception, 1)

  defp exception?(_reason), do: false

  @doc """
  Starts a function of the server and does not wait for it. Always `:ok`; `info/1` counts the failures.

  `timeout` is how long the function may run. A cast is made again as a call is, until a connection has
  taken it.
  """
  @spec cast(atom(), atom() | String.t(), term(), timeout(), non_neg_integer(), non_neg_integer()) ::
          :ok
  def cast(pool, fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100),
    do: Call.cast(pool, fun, args, timeout, retry, retry_sleep)

  @doc """
  How the pool does: `size`, `connected`, calls in `in_flight`, `cast_failures` since start, and why
  connections are `down`.
  """
  @spec info(atom()) :: %{
          size: pos_integer(),
          connected: non_neg_integer(),
          in_flight: non_neg_integer(),
          cast_failures: non_neg_integer(),
          down: [reason :: term()]
        }
  def info(pool) do
    %{table: table, size: size, load: load} = fetch!(pool)

    %{
      size: size,
      connected: Enum.count(1..size, &(:ets.lookup(table, &1) != [])),
      in_flight: Enum.sum(for(index <- 1..size, do: :counters.get(load, index))),
      cast_failures: :counters.get(load, size + 1),
      down: for([reason] <- :ets.match(table, {{:down, :_}, :"$1"}), do: reason)
    }
  end

  @impl true
  def init(config) do
    size = config.pool_opts.size

    # Owned by this supervisor, so it lives as long as the pool. One counter per connection, and one of
    # casts that failed.
    table = :ets.new(config.id, [:named_table, :public, read_concurrency: true])
    load = :counters.new(size + 1, [])

    pool =
      Map.take(config, [:codec, :guard, :message])
      |> Map.merge(%{table: table, size: size, load: load})

    :ets.insert(table, {:pool, Map.put(pool, :retry_on, config.exec_retry_on_error)})

    upstream = if config.mesh, do: [upstream(config, table)], else: []
    connections = for index <- 1..size, do: {Connection, {config, index, table, load}}
    Supervisor.init(upstream ++ connections, strategy: :one_for_one)
  end

  defp upstream(config, table) do
    %{id: :upstream, start: {__MODULE__, :start_upstream, [config, table]}, shutdown: 10_000}
  end

  @doc false
  def start_upstream(config, table) do
    with {:ok, pid} <- Upstream.start_link(config) do
      :ets.insert(table, {:upstream, pid})
      {:ok, pid}
    end
  end

  @doc false
  def fetch!(pool) do
    :ets.lookup_element(pool, :pool, 2)
  rescue
    ArgumentError ->
      reraise ArgumentError,
              [message: "no MeshxRpc client #{inspect(pool)} is started"],
              __STACKTRACE__
  end

  @doc false
  # The connection with the fewest calls, of those that are up.
  def connection(%{table: table, size: size, load: load}) do
    case for index <- 1..size,
             [row] <- [:ets.lookup(table, index)],
             do: {:counters.get(load, index), row} do
      [] ->
        :none

      rows ->
        {_load, {_index, pid, max_message}} = Enum.min_by(rows, &elem(&1, 0))
        {:ok, pid, max_message}
    end
  end

  @doc false
  def cast_failed(pool) do
    %{load: load, size: size} = fetch!(pool)
    :counters.add(load, size + 1, 1)
  end
end
