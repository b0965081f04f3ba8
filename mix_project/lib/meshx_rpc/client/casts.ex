defmodule MeshxRpc.Client.Casts do
  @moduledoc false
  # The casts of a pool, until the server has started them. One whose connection is lost before it can have run goes to another.
  #
  # Casts with a key go one after the other, the next when the one before has started. Such a cast may also be sent again
  # when it may have run, but only to the same server instance, which knows what it has started.

  use GenServer

  alias MeshxRpc.Client.{Backoff, Measured, Pool, Request}
  alias MeshxRpc.{Message, Stream, Telemetry, Term}

  # What a cast costs here beside its argument.
  @overhead 1_024
  # A server forgets a key's casts after a minute without one.
  @again_within 30_000
  @no_instance <<0::128>>
  # How often in a row a connection may lead to another instance than the one before.
  @moves 3

  def child_spec(pool), do: %{id: :casts, start: {__MODULE__, :start_link, [pool]}}

  def start_link(pool), do: GenServer.start_link(__MODULE__, pool)

  @doc """
  Hands a cast over. Answers `:ok`; with `ack: true` when it has started, or with why it has not (or is not known to
  have).
  """
  @spec cast(atom(), atom() | binary(), term(), keyword()) :: :ok | {:error_rpc, term()}
  def cast(name, fun, argument, options) do
    if Stream.in?(argument), do: raise(ArgumentError, "a stream cannot be sent with cast")
    pool = Pool.fetch!(name)

    options =
      Keyword.validate!(options, [:key, timeout: :infinity, retry: 5, retry_sleep: 100, ack: false])

    :ok = Request.again!(options[:retry], options[:retry_sleep])

    until = Request.until(options[:timeout])

    case Message.encode(pool.message, argument, until) do
      {:ok, encoded} -> made(pool, fun, encoded, until, options)
      {:error, reason} -> refused(pool, fun, Term.localize(reason), options[:ack])
    end
  end

  defp made(pool, fun, {_flag, _iovec, size} = encoded, until, options) do
    size = size + @overhead

    cast = %{
      fun: Request.name!(fun),
      encoded: encoded,
      size: size,
      key: with({:ok, key} <- Keyword.fetch(options, :key), do: {:key, key}),
      until: until,
      retry: options[:retry],
      sleep: options[:retry_sleep],
      ack: nil,
      # Of one with a key: its number; the instance it was last sent to; which instance may have run it, and since when.
      number: nil,
      began: Telemetry.now(),
      meant: @no_instance,
      sent: nil,
      moved: 0
    }

    case Pool.lookup(pool.table, :casts) do
      [{:casts, keeper}] ->
        if reserve(pool, size),
          do: hand_over(keeper, cast, options[:ack]),
          else: refused(pool, fun, :full, options[:ack])

      # The pool is about to start, or has ended.
      [] ->
        refused(pool, fun, :closed, options[:ack])
    end
  end

  @doc "Casts that have not started."
  @spec waiting(map()) :: non_neg_integer()
  def waiting(pool), do: :atomics.get(pool.casts, 2)

  defp hand_over(keeper, cast, ack?) do
    if ack? do
      monitor = :erlang.monitor(:process, keeper, alias: :reply_demonitor)
      send(keeper, {:cast, %{cast | ack: monitor}})

      receive do
        {^monitor, result} -> result
        # It was gone before our message came.
        {:DOWN, ^monitor, :process, _pid, :noproc} -> {:error_rpc, :closed}
        {:DOWN, ^monitor, :process, _pid, _reason} -> {:error_rpc, :tcp_closed}
      after
        # Others of its key, or a pause, may be before it; when its turn comes it is not sent any more.
        Request.left(cast.until) -> too_late(monitor)
      end
    else
      send(keeper, {:cast, cast})
      :ok
    end
  end

  defp too_late(monitor) do
    :erlang.demonitor(monitor, [:flush])

    receive do
      {^monitor, result} -> result
    after
      0 -> {:error_rpc, :timeout}
    end
  end

  # A cast alone may be larger than the queue.
  defp reserve(%{casts: casts, max_queue: max}, size) do
    bytes = :atomics.add_get(casts, 1, size)

    if bytes > max and bytes > size do
      :atomics.sub(casts, 1, size)
      false
    else
      :atomics.add(casts, 2, 1)
      true
    end
  end

  defp refused(pool, fun, reason, ack?) do
    cast = %{fun: Request.name!(fun), size: 0, began: Telemetry.now()}
    Measured.cast(pool, cast, {:error_rpc, reason})
    :atomics.add(pool.casts, 3, 1)
    if ack?, do: {:error_rpc, reason}, else: :ok
  end

  @impl true
  def init(pool) do
    :ets.insert(pool.table, {:casts, self()})
    # What an earlier one had is lost with it.
    :atomics.add(pool.casts, 3, :atomics.exchange(pool.casts, 2, 0))
    :atomics.put(pool.casts, 1, 0)

    {:ok,
     %{
       pool: pool,
       client: :crypto.strong_rand_bytes(16),
       number: 1,
       open: %{},
       lanes: %{},
       instances: %{}
     }}
  end

  @impl true
  def handle_info({:cast, %{key: {:key, key}} = cast}, state) do
    cast = %{cast | number: state.number}
    state = %{state | number: state.number + 1}

    case state.lanes do
      %{^key => queue} ->
        {:noreply, %{state | lanes: %{state.lanes | key => :queue.in(cast, queue)}}}

      _ ->
        {:noreply, attempt(%{state | lanes: Map.put(state.lanes, key, :queue.new())}, cast)}
    end
  end

  def handle_info({:cast, cast}, state), do: {:noreply, attempt(state, cast)}
  def handle_info({:again, cast}, state), do: {:noreply, attempt(state, cast)}

  def handle_info({:timeout, _timer, {:late, request}}, %{open: open} = state)
      when is_map_key(open, request) do
    {{cast, connection, _timer}, open} = Map.pop!(open, request)
    Request.cancel(connection, request)
    {:noreply, over(%{state | open: open}, cast, {:error_rpc, :timeout})}
  end

  def handle_info(message, %{open: open} = state) do
    request = if match?({:DOWN, _, _, _, _}, message), do: elem(message, 1), else: first(message)

    case open do
      %{^request => {cast, connection, timer}} ->
        if timer, do: :erlang.cancel_timer(timer)
        {:ok, outcome} = Request.outcome(request, message)
        {:noreply, answered(%{state | open: Map.delete(open, request)}, cast, connection, outcome)}

      _ ->
        {:noreply, state}
    end
  end

  defp first(message) when is_tuple(message) and tuple_size(message) > 0, do: elem(message, 0)
  defp first(_message), do: nil

  defp attempt(state, %{until: until} = cast) do
    left = Request.left(until)

    case Request.connection(state.pool) do
      _any when left == 0 -> over(state, cast, {:error_rpc, :timeout})
      :none -> again(state, cast, :closed)
      {:ok, connection, max_message} -> ask(state, cast, connection, max_message, left)
    end
  end

  defp ask(state, cast, connection, max_message, left) do
    {flag, iovec, size} = cast.encoded

    # One that may have run is for the instance that may have run it, whatever this connection leads to.
    here = Map.get(state.instances, connection, @no_instance)
    cast = %{cast | meant: if(cast.sent, do: elem(cast.sent, 0), else: here)}
    head = head(state, cast, flag, left)

    if size + byte_size(head) > max_message do
      over(state, cast, {:error_rpc, :error_too_long})
    else
      encoded = {0, [head | iovec], size + byte_size(head)}
      request = Request.start(connection, "\0cast", left, encoded)
      timer = if left != :infinity, do: :erlang.start_timer(left, self(), {:late, request})
      %{state | open: Map.put(state.open, request, {cast, connection, timer})}
    end
  end

  defp head(state, cast, flag, left) do
    timeout = if left == :infinity, do: 0xFFFF_FFFF, else: min(left, 0xFFFF_FFFE)
    fun = cast.fun

    case cast.key do
      :error ->
        <<timeout::32, flag, byte_size(fun), 0, fun::binary>>

      {:key, key} ->
        lane = binary_part(:crypto.hash(:sha256, :erlang.term_to_binary(key)), 0, 16)

        <<timeout::32, flag, byte_size(fun), 1, state.client::binary, lane::binary, cast.number::64,
          cast.meant::binary, fun::binary>>
    end
  end

  defp answered(state, cast, connection, {:result, _flag, _bytes} = outcome) do
    case Request.value(outcome, %{state.pool | message: nil}) do
      :started ->
        over(state, cast, :ok)

      :full ->
        again(state, cast, :full)

      {:started, <<_::128>>} ->
        over(state, cast, :ok)

      {:other, <<instance::binary-size(16)>>} ->
        state = remember(state, connection, instance)

        cond do
          # It did not run here; somewhere else it may have.
          cast.sent -> over(state, cast, {:error_rpc, :tcp_closed})
          cast.moved < @moves -> attempt(state, %{cast | moved: cast.moved + 1})
          true -> over(state, cast, {:error_rpc, :closed})
        end

      _other ->
        over(state, cast, {:error_rpc, :invalid_state})
    end
  end

  defp answered(state, cast, _connection, {:error, _flag, _bytes} = outcome) do
    over(state, cast, Request.value(outcome, state.pool))
  end

  defp answered(state, cast, _connection, {:failed, :tcp_closed}) do
    cond do
      # Without a key nobody would notice that it runs twice.
      cast.key == :error -> again(state, cast, :tcp_closed)
      # Meant for no instance, it did not run at any.
      cast.meant == @no_instance -> again(state, cast, :closed)
      cast.sent == nil -> repeat(state, %{cast | sent: {cast.meant, now()}})
      now() - elem(cast.sent, 1) < @again_within -> repeat(state, cast)
      true -> over(state, cast, {:error_rpc, :tcp_closed})
    end
  end

  defp answered(state, cast, _connection, {:failed, reason}), do: again(state, cast, reason)

  # The server will tell whether it has run.
  defp repeat(%{pool: pool} = state, cast) do
    pool = %{pool | retry_on: [:tcp_closed | pool.retry_on]}
    %{again(%{state | pool: pool}, cast, :tcp_closed) | pool: state.pool}
  end

  defp again(state, %{retry: retry} = cast, reason) do
    if retry > 0 and reason in state.pool.retry_on do
      Process.send_after(self(), {:again, %{cast | retry: retry - 1}}, Backoff.jitter(cast.sleep))
      state
    else
      over(state, cast, {:error_rpc, if(cast.sent, do: :tcp_closed, else: reason)})
    end
  end

  # A connection that crashed had another pid: there are never many.
  defp remember(state, connection, instance) do
    instances = Map.filter(state.instances, fn {pid, _instance} -> Process.alive?(pid) end)
    %{state | instances: Map.put(instances, connection, instance)}
  end

  defp over(state, cast, result) do
    if cast.ack, do: send(cast.ack, {cast.ack, result})
    if result != :ok, do: :atomics.add(state.pool.casts, 3, 1)
    {_flag, _iovec, size} = cast.encoded
    Measured.cast(state.pool, %{cast | size: size}, result)
    :atomics.sub(state.pool.casts, 1, cast.size)
    :atomics.sub(state.pool.casts, 2, 1)
    following(state, cast.key)
  end

  defp following(state, :error), do: state

  defp following(state, {:key, key}) do
    case :queue.out(Map.fetch!(state.lanes, key)) do
      {:empty, _queue} -> %{state | lanes: Map.delete(state.lanes, key)}
      {{:value, cast}, queue} -> attempt(%{state | lanes: %{state.lanes | key => queue}}, cast)
    end
  end

  defp now, do: System.monotonic_time(:millisecond)
end
