defmodule MeshxRpc.Client.Feeder do
  @moduledoc false
  # Sends an argument's stream: enumerates it in a process of its own and pushes batches, each in a request that is
  # answered when the server's function has taken it. At most `@ahead` are open, so that is how far it runs ahead.

  alias MeshxRpc.Client.Request
  alias MeshxRpc.Term
  alias MeshxRpc.Stream.{Batch, Pieces}

  @ahead 8
  # A server that has no room for the request: it is sent again.
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
      message: session.pool.message,
      token: token,
      index: index,
      batch_size: div(session.window, @ahead),
      batch: %Batch{},
      number: 0,
      open: %{}
    }

    {pid, monitor} =
      spawn_monitor(fn ->
        feeder = self()
        spawn(fn -> watch(owner, feeder) end)
        Process.put(:"$callers", callers)
        run(state, enumerable)
      end)

    {pid, monitor}
  end

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

  defp run(state, enumerable) do
    key = {__MODULE__, state.token}
    Process.put(key, state)

    {status, last} =
      try do
        Enum.each(enumerable, fn piece ->
          Process.put(key, piece |> add(Process.get(key)) |> offer())
        end)

        {@ended, nil}
      catch
        :exit, {:feeder, _reason} = gone -> exit(gone)
        kind, reason -> {@failed, Term.failure(kind, reason, __STACKTRACE__)}
      end

    state = Process.delete(key)

    state =
      if status == @failed,
        do: %{flush(state) | batch: Batch.add(%Batch{}, Pieces.encode_reason(last))},
        else: state

    state |> room() |> push(status) |> settle()
  end

  defp add(piece, state),
    do: %{state | batch: Batch.add(state.batch, Pieces.encode(state.message, piece))}

  # At once while the other side waits, in full batches while it is busy.
  defp offer(state) do
    state = acknowledged(state, 0)

    if state.open == %{} or state.batch.size >= state.batch_size,
      do: state |> room() |> push(@more),
      else: state
  end

  defp flush(%{batch: %{size: 0}} = state), do: state
  defp flush(state), do: state |> room() |> push(@more)

  defp room(state) do
    if map_size(state.open) < @ahead, do: state, else: state |> acknowledged(:infinity) |> room()
  end

  defp settle(%{open: open}) when open == %{}, do: :ok
  defp settle(state), do: state |> acknowledged(:infinity) |> settle()

  defp push(state, status) do
    {iovec, size} = Batch.iovec(state.batch)
    head = <<state.token::binary, state.index, state.number::32, status>>
    encoded = {0, [head | iovec], byte_size(head) + size}
    %{ask(state, encoded) | batch: %Batch{}, number: state.number + 1}
  end

  defp ask(state, encoded) do
    request = Request.start(state.connection, "\0push", :infinity, encoded)
    %{state | open: Map.put(state.open, request, encoded)}
  end

  defp acknowledged(%{open: open} = state, wait) do
    receive do
      {request, _, _} = message when is_map_key(open, request) ->
        answer(state, request, message)

      {request, _, _, _} = message when is_map_key(open, request) ->
        answer(state, request, message)

      {:DOWN, request, _, _, _} = message when is_map_key(open, request) ->
        answer(state, request, message)
    after
      wait -> state
    end
  end

  defp answer(state, request, message) do
    {:ok, outcome} = Request.outcome(request, message)
    {encoded, open} = Map.pop!(state.open, request)
    state = %{state | open: open}

    case outcome do
      {:result, _flag, _empty} ->
        state

      {:failed, :full} ->
        Process.sleep(@pause)
        ask(state, encoded)

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
