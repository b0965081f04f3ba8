defmodule MeshxRpc.Client.Streams do
  @moduledoc false
  # The caller's half of calls with streams: one request for the call itself, which is open as long as the streams are,
  # and requests for batches beside it, on the same connection. A random token ties them together.

  alias MeshxRpc.Client.{Backoff, Feeder, Pool, Request}
  alias MeshxRpc.{Message, Stream, Term}
  alias MeshxRpc.Stream.Pieces

  @window 1_048_576
  @max_window 268_435_456

  @doc "A call whose argument has streams."
  @spec call(atom(), atom() | binary(), term(), timeout(), non_neg_integer(), non_neg_integer()) ::
          term()
  def call(pool, fun, argument, timeout, retry, retry_sleep) do
    options = [timeout: timeout, retry: retry, retry_sleep: retry_sleep]
    session = open(pool, fun, argument, :call, settings(options))

    try do
      await(session)
    after
      close(session)
    end
  end

  @doc "A call whose result is a stream: a lazy Enumerable."
  @spec stream(atom(), atom() | binary(), term(), keyword()) :: Enumerable.t()
  def stream(pool, fun, argument, options) do
    settings = settings(options)
    _ = Request.name!(fun)

    Elixir.Stream.resource(
      fn -> pool |> open(fun, argument, :stream, settings) |> pull(Feeder.ahead()) end,
      &next/1,
      &close/1
    )
  end

  defp settings(options) do
    options =
      Keyword.validate!(options, timeout: :infinity, window: @window, retry: 5, retry_sleep: 100)

    unless options[:window] in 1_024..@max_window,
      do:
        raise(
          ArgumentError,
          "window is #{inspect(options[:window])}, wanted 1024 to #{@max_window} bytes"
        )

    :ok = Request.again!(options[:retry], options[:retry_sleep])
    Map.new(options) |> Map.put(:until, Request.until(options[:timeout]))
  end

  # `until` is set anew: an Enumerable may be enumerated again.
  defp open(name, fun, argument, mode, settings) do
    pool = Pool.fetch!(name)
    {plain, places, sources} = Stream.take_out(argument)
    token = :crypto.strong_rand_bytes(16)
    settings = %{settings | until: Request.until(settings.timeout)}

    {connection, main} =
      begin(pool, encode(pool, token, mode, places, fun, plain, settings), settings)

    session = %{
      name: name,
      fun: fun,
      pool: pool,
      connection: connection,
      main: main,
      token: token,
      until: settings.until,
      window: settings.window,
      feeders: %{},
      # Of a result: batches that were asked for, those that have come, the next one, and how it ended.
      pulls: %{},
      come: %{},
      # What is left of a batch that is being taken.
      batch: "",
      asked: 0,
      next: 0,
      ended: nil
    }

    feed(session, sources)
  end

  defp encode(pool, token, mode, places, fun, plain, settings) do
    with {:ok, {flag, iovec, size}} <- Message.encode(pool.message, plain, settings.until) do
      fun = Request.name!(fun)
      mode = if mode == :call, do: 1, else: 2
      want = div(settings.window, Feeder.ahead())
      places = :erlang.list_to_binary(places)

      head =
        <<token::binary, mode, want::32, flag, byte_size(places), places::binary, byte_size(fun),
          fun::binary>>

      {:ok, {0, [head | iovec], byte_size(head) + size}}
    end
  end

  defp begin(_pool, {:error, reason}, _settings),
    do: {nil, Request.failed(Term.localize(reason))}

  defp begin(pool, {:ok, encoded}, settings), do: begin(pool, encoded, settings, settings.retry)

  # Without a connection it certainly has not run, and nothing was enumerated.
  defp begin(pool, {_flag, _iovec, size} = encoded, settings, retry) do
    case Request.connection(pool) do
      {:ok, _pid, max_message} when size > max_message ->
        {nil, Request.failed(:error_too_long)}

      {:ok, pid, _max_message} ->
        {pid, Request.start(pid, "\0open", Request.left(settings.until), encoded)}

      :none ->
        wait = min(Backoff.jitter(settings.retry_sleep), Request.left(settings.until))

        if retry > 0 and wait > 0 do
          Process.sleep(wait)
          begin(pool, encoded, settings, retry - 1)
        else
          {nil, Request.failed(:closed)}
        end
    end
  end

  defp feed(%{connection: nil} = session, _sources), do: session

  defp feed(session, sources) do
    feeders =
      for {source, index} <- Enum.with_index(sources), into: %{} do
        {pid, monitor} = Feeder.start(session, session.connection, session.token, index, source)
        {monitor, pid}
      end

    Feeder.together(Map.values(feeders))
    %{session | feeders: feeders}
  end

  ## A call's answer

  defp await(%{main: main, feeders: feeders} = session) do
    receive do
      {^main, _, _} = message ->
        answer(session, message)

      {^main, _, _, _} = message ->
        answer(session, message)

      {:DOWN, ^main, _, _, _} = message ->
        answer(session, message)

      {:DOWN, monitor, _, _, reason} when is_map_key(feeders, monitor) ->
        await(fed(session, monitor, reason))
    after
      Request.left(session.until) -> {:error_rpc, :timeout}
    end
  end

  defp answer(session, message) do
    {:ok, outcome} = Request.outcome(session.main, message)
    Request.value(outcome, session.pool)
  end

  # A feeder has ended: well, or the call cannot go on.
  defp fed(session, monitor, :normal),
    do: %{session | feeders: Map.delete(session.feeders, monitor)}

  defp fed(session, monitor, {:feeder, reason}),
    do: %{session | feeders: Map.delete(session.feeders, monitor), main: stopped(session, reason)}

  defp fed(session, monitor, _killed),
    do: %{session | feeders: Map.delete(session.feeders, monitor), main: stopped(session, :killed)}

  defp stopped(session, reason) do
    Request.cancel(session.connection, session.main)
    Request.failed(reason)
  end

  ## A result's pieces

  defp pull(%{connection: nil} = session, _count), do: session
  defp pull(session, 0), do: session
  defp pull(%{ended: ended} = session, _count) when ended != nil, do: session

  defp pull(session, count),
    do: %{ask(session, session.asked) | asked: session.asked + 1} |> pull(count - 1)

  defp ask(session, number) do
    argument = <<session.token::binary, number::32>>
    encoded = {0, [argument], byte_size(argument)}
    request = Request.start(session.connection, "\0pull", Request.left(session.until), encoded)
    %{session | pulls: Map.put(session.pulls, request, number)}
  end

  defp next(%{batch: batch} = session) when batch != "", do: pieces(session, batch)

  defp next(%{next: next, come: come} = session) when is_map_key(come, next) do
    {batch, come} = Map.pop!(come, next)
    %{session | come: come, next: next + 1} |> pull(1) |> pieces(batch)
  end

  defp next(%{ended: {:done, batches}, next: batches} = session), do: {:halt, session}

  defp next(%{ended: {:failed, batches, reason}, next: batches} = session),
    do: fail(session, Term.localize(reason))

  defp next(%{main: main, pulls: pulls, feeders: feeders} = session) do
    receive do
      {^main, _, _} = message ->
        ended(session, message)

      {^main, _, _, _} = message ->
        ended(session, message)

      {:DOWN, ^main, _, _, _} = message ->
        ended(session, message)

      {request, _, _} = message when is_map_key(pulls, request) ->
        came(session, request, message)

      {request, _, _, _} = message when is_map_key(pulls, request) ->
        came(session, request, message)

      {:DOWN, request, :process, _, _} = message when is_map_key(pulls, request) ->
        came(session, request, message)

      {:DOWN, monitor, _, _, reason} when is_map_key(feeders, monitor) ->
        fed(session, monitor, reason)
    after
      Request.left(session.until) -> fail(session, :timeout)
    end
    |> next()
  end

  defp pieces(session, batch) do
    case Pieces.decode(session.pool.message, batch, session.pool) do
      {:ok, pieces, rest} -> {pieces, %{session | batch: rest}}
      {:error, reason} -> fail(session, Term.localize(reason))
    end
  end

  defp ended(session, message) do
    session = %{session | main: nil}
    {:ok, outcome} = Request.outcome(elem_of(message), message)

    # How it ended is said by us, not by serializers of the user's own.
    case Request.value(outcome, %{session.pool | message: nil}) do
      {:done, batches} when is_integer(batches) and batches >= session.next ->
        settle(session, {:done, batches}, batches)

      {:failed, batches, _reason} = failed when is_integer(batches) and batches >= session.next ->
        settle(session, failed, batches)

      {:error_rpc, reason} ->
        fail(session, reason)

      _other ->
        fail(session, :invalid_state)
    end
  end

  defp elem_of({:DOWN, request, _, _, _}), do: request
  defp elem_of(message), do: elem(message, 0)

  # Batches that were not made will not come.
  defp settle(session, ended, batches) do
    {due, idle} = Enum.split_with(session.pulls, fn {_request, number} -> number < batches end)
    for {request, _number} <- idle, do: Request.cancel(session.connection, request)
    session = %{session | ended: ended, pulls: Map.new(due)}

    if Enum.all?(session.next..(batches - 1)//1, &due?(session, due, &1)),
      do: session,
      else: fail(session, :invalid_state)
  end

  defp due?(session, due, number),
    do: is_map_key(session.come, number) or List.keymember?(due, number, 1)

  defp came(session, request, message) do
    {number, pulls} = Map.pop!(session.pulls, request)
    session = %{session | pulls: pulls}

    case Request.outcome(request, message) do
      # The call has ended: its answer tells how.
      {:ok, {:result, 0, <<>>}} when session.ended == nil ->
        session

      {:ok, {:result, 0, batch}} when batch != <<>> ->
        %{session | come: Map.put(session.come, number, batch)}

      # It waits there for its turn, and has not run.
      {:ok, {:failed, :full}} ->
        again(session, number)

      # Of this request it is true, not of the stream.
      {:ok, {:failed, :closed}} ->
        fail(session, :tcp_closed)

      {:ok, {:failed, reason}} ->
        fail(session, reason)

      # Its time may be over a moment before the call's, and before ours.
      {:ok, {:error, _flag, _bytes} = error} ->
        {:error_rpc, reason} = Request.value(error, session.pool)
        fail(session, reason)

      {:ok, _not_asked_for} ->
        fail(session, :invalid_state)
    end
  end

  defp again(session, number) do
    Process.sleep(min(20, Request.left(session.until)))
    ask(session, number)
  end

  # What this session has asked for since the Enumerable was last told of it is known only here.
  defp fail(session, reason) do
    close(session)
    MeshxRpc.Error.raise_reason(reason, session.name, session.fun)
  end

  defp close(session) do
    for {monitor, pid} <- session.feeders, do: Feeder.stop({pid, monitor})
    for {request, _number} <- session.pulls, do: Request.cancel(session.connection, request)
    if session.main, do: Request.cancel(session.connection, session.main)
    :ok
  end
end
