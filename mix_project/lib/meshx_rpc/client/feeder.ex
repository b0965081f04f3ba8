defmodule MeshxRpc.Client.Feeder do
  @moduledoc false
  # Sends an argument's stream: has it enumerated by another process and pushes batches, each in a request that is
  # answered when the server's function has taken it. At most `@ahead` are open, so that is how far it runs ahead.
  #
  # A batch lies in the server's byte budget until it is taken, and the function takes them in order. So when there is no
  # room for one, those behind it are taken back, and it goes on alone: else batches that wait for another could fill the
  # budget, and that one, of this stream or of others in the same place, would never find room. Nor may those of the
  # call's other streams lie there then: the function may take from each in turn, and want this one first.

  alias MeshxRpc.Client.Request
  alias MeshxRpc.Term
  alias MeshxRpc.Stream.{Batch, Pieces, Source}

  @ahead 8
  # After so many ms to twice as many a batch is sent again that found no room, or when one before it is taken.
  @pause 20

  @more 0
  @ended 1
  @failed 2

  @doc "How many batches a window is."
  @spec ahead() :: pos_integer()
  def ahead, do: @ahead

  @doc """
  Starts to send. The process ends with `:normal`, or with `{:feeder, reason}` when a batch could not be sent; it is ended
  when its owner, the calling process, ends.
  """
  @spec start(map(), pid(), binary(), byte(), Enumerable.t()) :: {pid(), reference()}
  def start(session, connection, token, index, enumerable) do
    owner = self()
    callers = [owner | Process.get(:"$callers") || []]

    state = %{
      connection: connection,
      token: token,
      index: index,
      source: nil,
      batch: %Batch{},
      number: 0,
      # By request, {number, argument}; then those that are to be sent again, in order, and how many may be open.
      open: %{},
      again: [],
      allowed: @ahead,
      ended: nil,
      # Those of the call's other streams.
      others: []
    }

    spawn_monitor(fn ->
      feeder = self()
      spawn(fn -> watch(owner, feeder) end)

      source =
        spawn_link(fn ->
          Process.put(:"$callers", callers)
          want = div(session.window, @ahead)
          send(feeder, {__MODULE__, enumerate(enumerable, feeder, session.pool.message, want)})
        end)

      loop(%{state | source: source})
    end)
  end

  @doc "These are the streams of one call."
  @spec together([pid()]) :: :ok
  def together(feeders),
    do: Enum.each(feeders, &send(&1, {__MODULE__, :others, feeders -- [&1]}))

  @doc "Ends it."
  @spec stop({pid(), reference()}) :: :ok
  def stop({pid, monitor}) do
    Process.demonitor(monitor, [:flush])
    Process.exit(pid, :kill)
    :ok
  end

  defp watch(owner, feeder) do
    down = Process.monitor(feeder)
    gone = Process.monitor(owner)

    receive do
      {:DOWN, ^down, :process, _pid, _reason} -> :ok
      {:DOWN, ^gone, :process, _pid, _reason} -> Process.exit(feeder, :kill)
    end
  end

  defp enumerate(enumerable, feeder, message, want) do
    :ok = Source.run(enumerable, feeder, message, want)
    {@ended, nil}
  catch
    kind, reason -> {@failed, Term.failure(kind, reason, __STACKTRACE__)}
  end

  # At once while there is room, in batches that grow while there is none.
  defp loop(%{batch: batch, ended: ended} = state) do
    room? = room?(state)

    cond do
      room? and state.again != [] ->
        state |> ask_again() |> loop()

      room? and batch.size > 0 and (ended == nil or elem(ended, 0) == @failed) ->
        state |> push(@more) |> loop()

      room? and match?({@ended, _}, ended) ->
        state |> push(@ended) |> settle()

      room? and ended != nil ->
        {@failed, reason} = ended
        failed = Batch.add(%Batch{}, Pieces.encode_reason(reason))
        %{state | batch: failed} |> push(@failed) |> settle()

      true ->
        state |> next() |> loop()
    end
  end

  defp room?(%{open: open, allowed: allowed}), do: map_size(open) < allowed

  defp settle(%{open: open, again: []}) when open == %{}, do: :ok

  defp settle(state) do
    if state.again != [] and room?(state),
      do: state |> ask_again() |> settle(),
      else: state |> next() |> settle()
  end

  defp next(%{open: open} = state) do
    receive do
      {Source, :piece, encoded} ->
        %{state | batch: Batch.add(state.batch, encoded)}

      {__MODULE__, :let_go} ->
        take_back(state, state.open)

      {__MODULE__, ended} ->
        %{state | ended: ended}

      {__MODULE__, :others, others} ->
        %{state | others: others}

      {:timeout, _timer, :again} ->
        %{state | allowed: max(state.allowed, 1)}

      {request, _, _} = message when is_map_key(open, request) ->
        answer(state, request, message)

      {request, _, _, _} = message when is_map_key(open, request) ->
        answer(state, request, message)

      {:DOWN, request, _, _, _} = message when is_map_key(open, request) ->
        answer(state, request, message)
    end
  end

  defp push(state, status) do
    {iovec, size} = Batch.iovec(state.batch)
    head = <<state.token::binary, state.index, state.number::32, status>>
    encoded = {0, [head | iovec], byte_size(head) + size}
    if size > 0, do: Source.taken(state.source, size)
    %{ask(state, {state.number, encoded}) | batch: %Batch{}, number: state.number + 1}
  end

  defp ask(state, {_number, encoded} = push) do
    request = Request.start(state.connection, "\0push", :infinity, encoded)
    %{state | open: Map.put(state.open, request, push)}
  end

  defp ask_again(%{again: [push | again]} = state), do: ask(%{state | again: again}, push)

  # None of those behind it has been taken.
  defp full(state, {number, _encoded} = push) do
    for other <- state.others, do: send(other, {__MODULE__, :let_go})
    behind = Map.filter(state.open, fn {_request, {other, _}} -> other > number end)
    take_back(%{state | again: [push | state.again]}, behind)
  end

  # One that is taken at this moment is pushed again, and answered at once. Who waits for the same room does so in
  # another rhythm.
  defp take_back(state, requests) do
    for {request, _push} <- requests, do: Request.cancel(state.connection, request)
    again = List.keysort(Map.values(requests) ++ state.again, 0)
    _ = :erlang.start_timer(@pause + :rand.uniform(@pause), self(), :again)
    %{state | open: Map.drop(state.open, Map.keys(requests)), again: again, allowed: 0}
  end

  defp answer(state, request, message) do
    {:ok, outcome} = Request.outcome(request, message)
    {push, open} = Map.pop!(state.open, request)
    state = %{state | open: open}

    case outcome do
      {:result, _flag, _empty} ->
        %{state | allowed: min(state.allowed + 1, @ahead)}

      {:failed, :full} ->
        full(state, push)

      # Of this request it is true, not of the call.
      {:failed, :closed} ->
        exit({:feeder, :tcp_closed})

      {:failed, reason} ->
        exit({:feeder, reason})

      {:error, _flag, _bytes} ->
        exit({:feeder, :invalid_state})
    end
  end
end
