defmodule MeshxRpc.Client.Call do
  @moduledoc false
  # The caller's half of a call, in the caller's process: serialise, choose a connection, wait, decode.
  #
  # The answer comes to a process alias that is gone when the caller has given up: late answers vanish.

  alias MeshxRpc.{Client, Frame, Message, Shared, Telemetry, Term, Traceparent}
  alias MeshxRpc.Client.{Direct, Look, Measured, Request}

  # Each call that is a jump less is one in hundreds of thousands a second.
  @compile {:inline, until: 1, left: 1, decoded: 3, term: 3, direct?: 2}

  @max_timeout 0xFFFF_FFFF

  @spec call(atom(), atom() | binary(), term(), timeout(), non_neg_integer(), non_neg_integer()) ::
          term()
  def call(pool, fun, argument, timeout, retry, retry_sleep) do
    pool = Client.Pool.fetch!(pool)
    fun = Request.name!(fun)
    :ok = Request.again!(retry, retry_sleep)
    until = until(timeout)

    if Telemetry.on?(pool.telemetry, :call) do
      Measured.run(pool, fun, fn ->
        encoded = Measured.time(:ser, fn -> Message.encode(pool.message, argument, until) end)
        attempt(encoded, pool, fun, until, retry_sleep, true, retry)
      end)
    else
      pool.message
      |> Message.encode(argument, until)
      |> attempt(pool, fun, until, retry_sleep, false, retry)
    end
  end

  # What is made for each call is garbage of the caller's: so it is little.
  defp attempt({:ok, encoded}, pool, fun, until, sleep, measured, retry) do
    request = %{
      pool: pool,
      fun: fun,
      encoded: encoded,
      until: until,
      sleep: sleep,
      measured: measured
    }

    attempt(request, retry)
  end

  defp attempt({:error, reason}, _pool, _fun, _until, _sleep, _measured, _retry),
    do: {:error_rpc, Term.localize(reason)}

  # A result may itself look like an error, of a server that calls another: it has run, and is not made again.
  defp attempt(request, retry) do
    case once(request) do
      {:ok, result} ->
        result

      {:error_rpc, reason} = error when retry > 0 ->
        cond do
          reason not in request.pool.retry_on -> error
          pause(request) -> attempt(request, retry - 1)
          true -> {:error_rpc, :timeout}
        end

      error ->
        error
    end
  end

  defp once(%{encoded: {_flag, _iovec, size}} = request) do
    case Client.Pool.row(request.pool) do
      {:ok, {_index, _pid, max_message, _trace}} when size > max_message ->
        {:error_rpc, :error_too_long}

      {:ok, {index, pid, _max_message, false}} ->
        ask(request, pid, Client.Pool.direct(request.pool, index, pid))

      {:ok, {index, pid, _max_message, true}} ->
        request |> traced() |> ask(pid, Client.Pool.direct(request.pool, index, pid))

      :none ->
        {:error_rpc, :closed}
    end
  end

  defp traced(%{pool: pool} = request) do
    text = Traceparent.ask(pool.traceparent)
    if request.measured, do: Measured.note(:traceparent, text)
    %{request | encoded: Traceparent.append(request.encoded, text)}
  end

  defp ask(request, pid, direct) do
    case left(request.until) do
      0 -> {:error_rpc, :timeout}
      left -> ask(request, pid, direct, left)
    end
  end

  defp ask(%{encoded: {_flag, _iovec, size}} = request, pid, direct, left) do
    alias = :erlang.monitor(:process, pid, alias: :reply_demonitor)
    if request.measured, do: sending(alias, pid, size)

    if direct?(direct, request.encoded) do
      case write(request, alias, pid, left, direct) do
        :closed ->
          abandon(alias, pid)
          {:error_rpc, :closed}

        written ->
          # It may have gone before we asked for its end, and its socket after we wrote.
          answer = wait(request, alias, pid, left, :tcp_closed, Look.start(direct.look))
          if written == :soon, do: written(direct.socket)
          answer
      end
    else
      send(pid, {:call, alias, self(), request.fun, left, request.encoded})
      # When it was gone, it was before our message came.
      wait(request, alias, pid, left, :closed, nil)
    end
  end

  defp wait(request, alias, pid, left, gone, look) do
    receive do
      {^alias, :result, flag, bytes} -> Look.found(look) && decoded(request, flag, bytes)
      {^alias, :error, flag, bytes} -> {:error_rpc, reason(request, flag, bytes)}
      {^alias, :failed, reason} -> {:error_rpc, reason}
      {:DOWN, ^alias, :process, _pid, :noproc} -> {:error_rpc, gone}
      {:DOWN, ^alias, :process, _pid, _reason} -> {:error_rpc, :tcp_closed}
    after
      if(look, do: 0, else: left) ->
        cond do
          is_nil(look) ->
            abandon(alias, pid)
            {:error_rpc, :timeout}

          Look.again?(look) ->
            :erlang.yield()
            wait(request, alias, pid, left, gone, look)

          true ->
            wait(request, alias, pid, left, gone, nil)
        end
    end
  end

  defp abandon(alias, pid) do
    :erlang.demonitor(alias, [:flush])
    send(pid, {:cancel, self(), alias})

    # What came until the end of the alias.
    receive do
      {^alias, _failed, _reason} -> :ok
      {^alias, _status, _flag, _bytes} -> :ok
    after
      0 -> :ok
    end
  end

  defp sending(alias, pid, size) do
    Measured.note(:ref, alias)
    Measured.note(:pid, pid)
    Measured.note(:sent, size)
  end

  # While the connection is idle the caller writes the request itself. That saves a process on the way; waiting
  # in the port is the connection's business.
  defp direct?(nil, _encoded), do: false

  defp direct?(%{shared: shared, block: block}, {_flag, _iovec, size}) do
    size <= block and Shared.claim?(shared) and not Shared.retiring?(shared) and
      Shared.take_all?(shared, size)
  end

  defp write(request, alias, pid, left, %{socket: socket, shared: shared, crc: crc} = direct) do
    {flag, iovec, size} = request.encoded
    stream = Shared.take_id(shared)
    {frame, size} = Frame.request(stream, left, request.fun, flag, iovec, size, crc)

    # The connection knows of it before the server can: a caller that dies in between is cancelled, and its id
    # is not missed for ever.
    cond do
      not Direct.enter(direct, pid, stream, alias) -> :closed
      MeshxRpc.Port.command(socket, frame) -> written(socket)
      true -> send(pid, {:frame, socket, frame, size})
    end
  rescue
    # The socket is closed, and has taken nothing.
    ArgumentError -> :closed
  end

  # The port's answer. It is there at once, or when another process that is in the port leaves it.
  defp written(socket) do
    receive do
      {:inet_reply, ^socket, _status} -> :ok
    after
      0 -> :soon
    end
  end

  defp decoded(%{measured: true} = request, flag, bytes) do
    Measured.note(:received, byte_size(bytes))
    Measured.time(:dser, fn -> term(request, flag, bytes) end)
  end

  defp decoded(request, flag, bytes), do: term(request, flag, bytes)

  defp term(%{pool: %{message: message, codec: codec, guard: guard}, until: until}, flag, bytes) do
    case Message.decode(message, codec, flag, bytes, guard, until) do
      {:ok, term} -> {:ok, term}
      {:error, :refused} -> {:error_rpc, :serialization_fail}
      {:error, reason} -> {:error_rpc, Term.localize(reason)}
    end
  end

  # What went wrong is an external term, whatever the serializers.
  defp reason(request, flag, bytes) do
    case Term.decode(request.pool.codec, flag, bytes, request.pool.guard) do
      {:ok, reason} -> Term.localize(reason)
      {:error, _why} -> :serialization_fail
    end
  end

  defp pause(%{sleep: sleep, until: until}) do
    left = left(until)
    wait = min(Client.Backoff.jitter(sleep), left)
    Process.sleep(wait)
    left == :infinity or left > wait
  end

  defp until(:infinity), do: :infinity

  # The longest that `receive` waits: to learn it there would be too late.
  defp until(timeout) when is_integer(timeout) and timeout <= @max_timeout,
    do: :erlang.monotonic_time(:millisecond) + timeout

  defp until(timeout) do
    raise ArgumentError,
          "timeout is #{inspect(timeout)}, wanted milliseconds (at most #{@max_timeout}) or :infinity"
  end

  defp left(:infinity), do: :infinity
  defp left(until), do: max(until - :erlang.monotonic_time(:millisecond), 0)
end
