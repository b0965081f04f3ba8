defmodule MeshxRpc.Server.Casts do
  @moduledoc false
  # Runs casts: each in a process that outlives the connection it came on, since nobody waits for it and its client
  # may have heard that it started.
  #
  # Casts with a key have a lane: they run one after the other, in the order of their numbers, and a number that a lane
  # has seen is answered as started but does not run again. A lane is forgotten `@remember` after its last cast.
  #
  # Bounded by `max_concurrency` casts that run and `max_bytes` of their arguments (both beside those of calls),
  # `@max_lanes` lanes, and one waiting cast for each lane.

  use GenServer

  alias MeshxRpc.{Entry, Message, Telemetry, Term}
  alias MeshxRpc.Server.{Functions, Task}

  @max_lanes 65_536
  @remember 60_000
  @sweep 10_000

  @typedoc "Which lane, which number, and the server instance that the client believes it speaks to."
  @type key :: {lane :: {binary(), binary()}, number :: non_neg_integer(), instance :: binary()}

  def child_spec(config) do
    %{id: :casts, start: {__MODULE__, :start_link, [config]}, shutdown: config.drain + 1_000}
  end

  def start_link(config), do: GenServer.start_link(__MODULE__, config)

  @doc "Casts that run, and those that failed since start."
  @spec info(:ets.table()) :: %{running: non_neg_integer(), failures: non_neg_integer()}
  def info(table), do: GenServer.call(keeper(table), :info)

  @doc """
  Starts a cast for the request that brought it, when its turn comes. The answer is `:started`, or for one with a key
  `{:started, instance}` or `{:other, instance}`: it has not run, this is another instance than that it was meant for.
  """
  @spec run(map(), binary()) :: {:ok, term()} | {:error, term()}
  def run(config, <<timeout::32, flag, fun_len, keyed, rest::binary>>) when keyed in [0, 1] do
    with {:ok, key, rest} <- key(keyed, rest),
         true <- byte_size(rest) >= fun_len,
         {name, argument} = :erlang.split_binary(rest, fun_len) do
      case Functions.own(config, name) do
        {:ok, fun} ->
          cast = %{fun: fun, flag: flag, argument: argument, key: key, until: until(timeout)}
          GenServer.call(keeper(config.streams), {:run, cast}, :infinity)

        :error ->
          {:error, Term.undef(config.module, name)}
      end
    else
      _short -> {:error, :invalid_state}
    end
  end

  def run(_config, _other), do: {:error, :invalid_state}

  defp key(0, rest), do: {:ok, nil, rest}

  defp key(
         1,
         <<client::binary-size(16), lane::binary-size(16), number::64, instance::binary-size(16),
           rest::binary>>
       ),
       do: {:ok, {{client, lane}, number, instance}, rest}

  defp key(1, _short), do: :error

  defp until(0xFFFF_FFFF), do: :infinity
  defp until(timeout), do: now() + timeout

  defp keeper(table), do: :ets.lookup_element(table, :casts, 2)
  defp now, do: System.monotonic_time(:millisecond)

  @impl true
  def init(config) do
    Process.flag(:trap_exit, true)
    :ets.insert(config.streams, {:casts, self()})
    Process.send_after(self(), :sweep, @sweep)

    {:ok,
     %{
       config: config,
       instance: :crypto.strong_rand_bytes(16),
       runners: %{},
       bytes: 0,
       lanes: %{},
       waiting: %{},
       failures: 0
     }}
  end

  @impl true
  def handle_call(:info, _from, state),
    do: {:reply, %{running: map_size(state.runners), failures: state.failures}, state}

  def handle_call({:run, %{key: nil} = cast}, from, state), do: {:noreply, start(state, cast, from)}

  def handle_call({:run, %{key: {_lane, _number, other}}}, _from, %{instance: instance} = state)
      when other != instance,
      do: {:reply, {:ok, {:other, instance}}, state}

  def handle_call({:run, %{key: {id, number, _instance}} = cast}, from, state) do
    case state.lanes do
      %{^id => %{last: last}} when number <= last ->
        {:reply, {:ok, {:started, state.instance}}, state}

      %{^id => %{runner: nil}} ->
        {:noreply, start(state, cast, from)}

      # The same again: whoever asked before is gone, or has given up.
      %{^id => %{waiting: {%{key: {_, ^number, _}}, _, _}}} ->
        {:noreply, state |> unwait(id) |> wait(id, cast, from)}

      %{^id => %{waiting: nil}} ->
        {:noreply, wait(state, id, cast, from)}

      %{^id => _lane} ->
        {:reply, {:ok, :full}, state}

      lanes when map_size(lanes) >= @max_lanes ->
        {:reply, {:ok, :full}, state}

      _lanes ->
        {:noreply, start(state, cast, from)}
    end
  end

  @impl true
  def handle_info({:EXIT, pid, reason}, state) do
    case Map.pop(state.runners, pid) do
      {nil, _runners} ->
        {:noreply, state}

      {runner, runners} ->
        if runner.timer, do: :erlang.cancel_timer(runner.timer)
        failures = if reason == :normal, do: state.failures, else: state.failures + 1
        bytes = state.bytes - runner.size
        state = %{state | runners: runners, bytes: bytes, failures: failures}
        {:noreply, ended(state, runner.lane)}
    end
  end

  # The request that brought it is gone, and its argument with it.
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state) do
    case state.waiting do
      %{^monitor => id} -> {:noreply, unwait(state, id)}
      _ -> {:noreply, state}
    end
  end

  def handle_info({:timeout, timer, {:late, pid}}, state) do
    with %{^pid => %{timer: ^timer}} <- state.runners, do: Process.exit(pid, :kill)
    {:noreply, state}
  end

  def handle_info(:sweep, state) do
    Process.send_after(self(), :sweep, @sweep)
    oldest = now() - @remember

    lanes =
      Map.reject(state.lanes, fn {_id, lane} -> lane.runner == nil and lane.touched < oldest end)

    {:noreply, %{state | lanes: lanes}}
  end

  def handle_info(_other, state), do: {:noreply, state}

  # What was acknowledged may end, for a while.
  @impl true
  def terminate(_reason, state) do
    timer = :erlang.start_timer(state.config.drain, self(), :drained)
    drain(Map.keys(state.runners), timer)
  end

  defp drain([], _timer), do: :ok

  defp drain(pids, timer) do
    receive do
      {:EXIT, pid, _reason} -> drain(List.delete(pids, pid), timer)
      {:timeout, ^timer, :drained} -> Enum.each(pids, &Process.exit(&1, :kill))
    end
  end

  defp start(state, %{until: until} = cast, from) do
    %{config: config} = state
    size = byte_size(cast.argument)

    cond do
      until != :infinity and until <= now() ->
        GenServer.reply(from, {:error, :timeout})
        state

      map_size(state.runners) >= config.max_concurrency or
          (state.bytes > 0 and state.bytes + size > config.max_bytes) ->
        GenServer.reply(from, {:ok, :full})
        state

      true ->
        answer = if cast.key, do: {:started, state.instance}, else: :started
        server = {:server, config.id}
        pid = spawn_link(fn -> runner(cast, from, answer, Entry.get(server)) end)
        lane = if cast.key, do: elem(cast.key, 0)
        runner = %{lane: lane, size: size, timer: timer(pid, until, config.timeout_execute)}
        runners = Map.put(state.runners, pid, runner)
        lanes = if lane, do: Map.put(state.lanes, lane, lane(cast, pid)), else: state.lanes
        %{state | runners: runners, bytes: state.bytes + size, lanes: lanes}
    end
  end

  defp lane(%{key: {_id, number, _instance}}, pid),
    do: %{last: number, runner: pid, waiting: nil, touched: now()}

  defp timer(_pid, :infinity, :infinity), do: nil

  defp timer(pid, until, most) do
    left = if until == :infinity, do: :infinity, else: until - now()
    :erlang.start_timer(max(min(left, most), 0), self(), {:late, pid})
  end

  defp wait(state, id, cast, {pid, _tag} = from) do
    monitor = Process.monitor(pid)
    lanes = Map.update!(state.lanes, id, &%{&1 | waiting: {cast, from, monitor}})
    %{state | lanes: lanes, waiting: Map.put(state.waiting, monitor, id)}
  end

  defp unwait(state, id) do
    %{waiting: {_cast, _from, monitor}} = lane = state.lanes[id]
    Process.demonitor(monitor, [:flush])
    lanes = Map.put(state.lanes, id, %{lane | waiting: nil})
    %{state | lanes: lanes, waiting: Map.delete(state.waiting, monitor)}
  end

  defp ended(state, nil), do: state

  defp ended(state, id) do
    lane = %{state.lanes[id] | runner: nil, touched: now()}
    state = %{state | lanes: Map.put(state.lanes, id, lane)}

    case lane.waiting do
      nil -> state
      {cast, from, _monitor} -> state |> unwait(id) |> start(cast, from)
    end
  end

  # Whatever it ends with is for the count only.
  defp runner(cast, from, answer, config) do
    measured = measured(cast, config)
    began = Telemetry.now()

    case Message.decode(config.message, config.codec, cast.flag, cast.argument, config.guard) do
      {:ok, argument} ->
        GenServer.reply(from, {:ok, answer})

        try do
          apply(config.module, cast.fun, [argument])
          Task.tell(config, measured, :ok, exec: Telemetry.now() - began)
        catch
          kind, reason ->
            reason = Term.failure(kind, reason, __STACKTRACE__)
            Task.tell(config, measured, {:error_rpc, reason}, exec: Telemetry.now() - began)
            exit(:failed)
        end

      {:error, reason} ->
        reason = if reason == :refused, do: :serialization_fail, else: reason
        GenServer.reply(from, {:error, reason})
        Task.tell(config, measured, {:error_rpc, reason}, dser: Telemetry.now() - began)
    end
  end

  # What is told of it, when somebody listens. Which connection it came on is not: it may be gone.
  defp measured(cast, %{telemetry: telemetry} = config) do
    if Telemetry.on?(telemetry, :cast) do
      %{
        address: config.address,
        fun_name: cast.fun,
        fun_req: :cast,
        state: :reply,
        received: byte_size(cast.argument),
        block: config.blk_max_size,
        traceparent: nil
      }
    end
  end
end
