defmodule MeshxRpc.Client.Pool do
  @moduledoc """
  A client without macros. `MeshxRpc.Client` says what the options and the results mean.

      children = [MeshxRpc.Client.Pool.child_spec(:api, address: {:tcp, {127, 0, 0, 1}, 4000})]
      MeshxRpc.Client.Pool.call(:api, :echo, "hello")
  """
  use Supervisor

  alias MeshxRpc.Client.{Call, Casts, Connection, Direct, Growth, Streams, Upstream}
  alias MeshxRpc.{Entry, Options, Stream}

  @compile {:inline, only: 1}

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
  Calls a function of the server with one argument and waits for its result, at most `timeout` ms in all: checksums of
  your own count, too. A serializer of your own and the function for traceparents run in this process and have no limit.

  A call that certainly has not run (`:exec_retry_on_error`) is made again, `retry` times, after
  `retry_sleep` ms +-10 %.
  """
  @spec call(atom(), atom() | String.t(), term(), timeout(), non_neg_integer(), non_neg_integer()) ::
          term() | {:error_rpc, reason()}
  def call(pool, fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100) do
    if Stream.in?(args),
      do: Streams.call(pool, fun, args, timeout, retry, retry_sleep),
      else: Call.call(pool, fun, args, timeout, retry, retry_sleep)
  end

  @doc "As `call/6`, but raises: the exception that was raised there, or `MeshxRpc.Error`."
  @spec call!(atom(), atom() | String.t(), term(), timeout(), non_neg_integer(), non_neg_integer()) ::
          term()
  def call!(pool, fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100) do
    case call(pool, fun, args, timeout, retry, retry_sleep) do
      {:error_rpc, reason} -> MeshxRpc.Error.raise_reason(reason, pool, fun)
      result -> result
    end
  end

  @doc """
  Calls a function whose result is an Enumerable, and gives a lazy Enumerable of its pieces: see
  `MeshxRpc.Stream`. Options: `:timeout` for all of it (`:infinity`), `:window`, the bytes that may be on their way
  (1 MiB), `:retry` (5) and `:retry_sleep` (100 ms) for when there is no connection.
  """
  @spec stream(atom(), atom() | String.t(), term(), keyword()) :: Enumerable.t()
  def stream(pool, fun, args \\ [], options \\ []), do: Streams.stream(pool, fun, args, options)

  @doc """
  Has the server start a function, at most once, and does not wait for it. Always `:ok`; `info/1` counts the failures.

  The server acknowledges a cast when its function starts; until then it waits in the pool, and survives the loss of
  a connection on which it certainly has not run: it is made again as a call is. Once started it runs on when the connection is
  lost. An argument cannot have streams. In the place of `timeout`, which is how long it may wait and run together, there can be options:

  | Option | Default | |
  |---|---|---|
  | `:key` | none | casts of this pool with the same key start in the order in which they were made, each after the one before has started, and one server runs them one after the other |
  | `:ack` | `false` | wait until the function starts: `:ok`, or `{:error_rpc, reason}` |
  | `:timeout`, `:retry`, `:retry_sleep` | | as the arguments |

  A cast with a key is also made again when it may have run, within 30 s and to the same server instance, which remembers
  for a minute after a key's last cast what it has started: it does not run twice. `:tcp_closed` is the reason when nobody can tell.
  """
  @spec cast(
          atom(),
          atom() | String.t(),
          term(),
          timeout() | keyword(),
          non_neg_integer(),
          non_neg_integer()
        ) ::
          :ok | {:error_rpc, reason()}
  def cast(pool, fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100)

  def cast(pool, fun, args, options, _retry, _retry_sleep) when is_list(options),
    do: Casts.cast(pool, fun, args, options)

  def cast(pool, fun, args, timeout, retry, retry_sleep),
    do: Casts.cast(pool, fun, args, timeout: timeout, retry: retry, retry_sleep: retry_sleep)

  @doc """
  How the pool does: `size`, `connected`, calls in `in_flight`, `casts` that have not started, `cast_failures` since
  start, and why connections are `down`.
  """
  @spec info(atom()) :: %{
          size: pos_integer(),
          connected: non_neg_integer(),
          in_flight: non_neg_integer(),
          casts: non_neg_integer(),
          cast_failures: non_neg_integer(),
          down: [reason :: term()]
        }
  def info(pool) do
    %{table: table, size: size, most: most, casts: casts} = pool = fetch!(pool)

    %{
      size: size,
      connected: Enum.count(1..most, &(lookup(table, &1) != [])),
      in_flight: Enum.sum(for(index <- 1..most, do: in_flight(pool, index))),
      casts: Casts.waiting(pool),
      cast_failures: :atomics.get(casts, 3),
      down: for([reason] <- :ets.match(table, {{:down, :_}, :"$1"}), do: reason)
    }
  end

  @doc false
  # The calls of a connection, with those that callers have written themselves.
  def in_flight(%{table: table, load: load}, index) do
    case lookup(table, {:direct, index}) do
      [{_key, _pid, direct}] -> :counters.get(load, index) + Direct.count(direct)
      [] -> :counters.get(load, index)
    end
  end

  @impl true
  def init(config) do
    config = Options.telemetry(config)
    size = config.pool_opts.size

    # Owned by this supervisor, so it lives as long as the pool. One counter per connection. Of casts: the bytes that wait, how many do, and how many failed.
    table = :ets.new(config.id, [:public, read_concurrency: true])
    # And of connections beyond `size`: how many there are, and whether one is being made.
    load = :counters.new(size + Growth.most(config), [])
    growth = :atomics.new(2, [])
    casts = :atomics.new(3, [])

    pool =
      config
      |> Map.take([:codec, :message, :max_queue, :telemetry, :traceparent])
      |> Map.merge(%{table: table, size: size, load: load, casts: casts, growth: growth})
      |> Map.merge(%{most: size + Growth.most(config), overflow: config.pool_opts.max_overflow})
      |> Map.put(:retry_on, retry_on(config))
      |> Map.put(:guard, config.codec.policy(config.guard))

    entry = {Entry, {{:client, config.id}, pool}}
    upstream = if config.mesh, do: [upstream(config, table)], else: []
    connections = for index <- 1..size, do: {Connection, {config, index, table, load}}
    others = [{Growth, {config, pool}}, {Casts, pool}]
    Supervisor.init([entry | upstream] ++ connections ++ others, strategy: :one_for_one)
  end

  defp retry_on(%{retry_unsafe: true} = config), do: [:tcp_closed | config.exec_retry_on_error]
  defp retry_on(config), do: config.exec_retry_on_error

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
    Entry.get({:client, pool}) ||
      raise ArgumentError, "no MeshxRpc client #{inspect(pool)} is started"
  end

  @doc false
  # Nothing also when the pool has ended since its caller found it, and its table with it.
  def lookup(table, key) do
    :ets.lookup(table, key)
  rescue
    ArgumentError -> []
  end

  @doc false
  # The connection with the fewest calls, of those that are up, and the largest argument that its server takes.
  def connection(pool) do
    with {:ok, pid, max_message, _trace} <- route(pool), do: {:ok, pid, max_message}
  end

  @doc false
  # The same, with whether its requests of the server's functions carry a traceparent.
  def route(pool) do
    with {:ok, {_index, pid, max_message, trace}} <- row(pool), do: {:ok, pid, max_message, trace}
  end

  @doc false
  # What callers need who write to the connection's socket themselves, nil while it has calls. It is in a row of its
  # own, since it holds a reference whose copies are counted.
  def direct(%{table: table, load: load}, index, pid) do
    with 0 <- :counters.get(load, index),
         [{_key, ^pid, direct}] <- lookup(table, {:direct, index}) do
      direct
    else
      _busy_or_gone -> nil
    end
  end

  @doc false
  # The same as `{index, pid, max_message, trace}`.
  def row(%{size: size, growth: growth, overflow: overflow, table: table} = pool) do
    case :atomics.get(growth, 1) do
      0 when size == 1 and overflow == 0 -> only(table)
      0 -> least_loaded(pool, size)
      _extra -> least_loaded(pool, pool.most)
    end
  end

  defp only(table) do
    case lookup(table, 1) do
      [row] -> {:ok, row}
      [] -> :none
    end
  end

  defp least_loaded(%{table: table} = pool, last) do
    case for index <- 1..last,
             [row] <- [lookup(table, index)],
             do: {load(pool, index), row} do
      [] ->
        :none

      rows ->
        # A connection counts a call when it hears of it: of many callers at once, each prefers another.
        turn = :erlang.phash2(self(), last)

        {calls, row} =
          Enum.min_by(rows, fn {calls, row} -> {calls, rem(elem(row, 0) + turn, last)} end)

        if pool.overflow > 0 and calls >= Growth.busy(), do: Growth.ask(pool)
        {:ok, row}
    end
  end

  # One that has calls of its own has few beside those, if any.
  defp load(%{load: load} = pool, index) do
    case :counters.get(load, index) do
      0 -> in_flight(pool, index)
      calls -> calls
    end
  end

  @doc false
  # What telemetry tells of a connection.
  def metadata(%{table: table}, pid) do
    case lookup(table, {:metadata, pid}) do
      [{_key, metadata}] -> metadata
      [] -> %{}
    end
  end
end
