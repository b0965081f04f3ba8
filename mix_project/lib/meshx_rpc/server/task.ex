defmodule MeshxRpc.Server.Task do
  @moduledoc false
  # The process of one request: decodes its argument, runs the function, hands the result to the connection.
  #
  # It is linked to the connection, which ends it by killing it, and tells it `{:done, pid, stream, done}`. A small
  # result of a connection with nothing else to do it writes itself, and then `done` is `:answered`.
  #
  # When somebody listens to telemetry, `measured` has what is known of the request: its event is told here, after the
  # result has gone, so that no handler delays anything. What is killed cannot: for that the connection does.

  alias MeshxRpc.{Frame, Message, Shared, Telemetry, Term, Traceparent}
  alias MeshxRpc.Server.{Internal, Room}

  @enforce_keys [:connection, :rules, :traced]
  defstruct @enforce_keys ++ [:direct]

  @typedoc """
  What all requests of a connection have in common; copied to each, so it is small. `:rules` are the server's as
  `MeshxRpc.Entry` has them, which are not copied. `:direct` is for those that may write their result themselves, nil for
  the others.
  """
  @type t :: %__MODULE__{}

  @typedoc "Stream, kind, flag and bytes of the argument."
  @type request :: {pos_integer(), :call | :cast, byte(), binary()}

  # Nobody else answers meanwhile: the connection is idle, or nearly.
  @alone 1

  @spec start(t(), atom(), request(), nil | map()) :: pid()
  def start(task, fun, request, measured),
    do: :erlang.spawn_opt(__MODULE__, :run, [task, fun, request, measured], [:link])

  @doc "The same for one of the functions that streams and casts are made of."
  @spec internal(t(), pos_integer(), atom(), byte(), binary()) :: pid()
  def internal(task, stream, name, flag, argument) do
    arguments = [task, stream, name, flag, argument]
    :erlang.spawn_opt(__MODULE__, :run_internal, arguments, [:link])
  end

  @doc false
  def run_internal(%{connection: connection, rules: config}, stream, name, flag, argument) do
    send(connection, {:done, self(), stream, internal_result(name, flag, argument, config)})
    leave(connection)
  end

  @doc false
  def run(task, fun, {stream, kind, flag, argument}, measured) do
    %{connection: connection, rules: config, traced: traced, direct: direct} = task
    began = clock(measured)
    argument = decode(config, traced, flag, argument)
    decoded = clock(measured)

    {done, result, executed} =
      case argument do
        {:ok, argument} -> call(config, fun, argument, measured)
        {:error, :refused} -> {{:refused_term, nil}, :serialization_fail, decoded}
        {:error, :invalid_cks} -> {{:invalid_cks, nil}, :invalid_cks, decoded}
        {:error, reason} -> {{:error, Term.encode_error(reason)}, reason, decoded}
      end

    ended = clock(measured)
    direct? = kind == :call and direct != nil and direct?(config, direct, done)
    sent = if direct?, do: answer(direct, stream, done), else: done
    send(connection, {:done, self(), stream, sent})

    if measured do
      time = [dser: decoded - began, exec: executed - decoded, ser: ended - executed]
      result = if match?({:result, _encoded}, done), do: :ok, else: {:error_rpc, result}
      tell(config, Map.put(measured, :sent, size(done)), result, time)
    end

    leave(connection)
  end

  # It knows all: the message of our end would tell it nothing, and costs it as much as the result did.
  defp leave(connection), do: Process.unlink(connection)

  defp size({_status, {_flag, _iovec, size}}), do: size
  defp size(_refused), do: 0

  # Its argument is bytes, which no serializer of the user's made.
  defp internal_result(name, flag, argument, config) do
    Internal.run(name, flag, argument, config)
  catch
    kind, reason -> {:error, Term.encode_error(Term.failure(kind, reason, __STACKTRACE__))}
  end

  defp clock(nil), do: 0
  defp clock(_measured), do: Telemetry.now()

  defp decode(config, true, flag, bytes) do
    case Traceparent.split(bytes) do
      {:ok, bytes, text} ->
        Traceparent.put(text)
        decode(config, false, flag, bytes)

      :error ->
        {:error, :refused}
    end
  end

  defp decode(%{message: message, codec: codec, guard: guard}, false, flag, bytes),
    do: Message.decode(message, codec, flag, bytes, guard)

  defp call(%{module: module, message: message}, fun, argument, measured) do
    result = apply(module, fun, [argument])
    executed = clock(measured)

    case Message.encode(message, result) do
      {:ok, encoded} -> {{:result, encoded}, nil, executed}
      {:error, reason} -> {{:error, Term.encode_error(reason)}, reason, executed}
    end
  catch
    kind, reason ->
      reason = Term.failure(kind, reason, __STACKTRACE__)
      {{:error, Term.encode_error(reason)}, reason, clock(measured)}
  end

  @doc "Tells of a request that ended in this process; `measured` is nil when nobody listens."
  @spec tell(map(), nil | map(), :ok | {:error_rpc, term()}, keyword()) :: :ok
  def tell(_config, nil, _result, _time), do: :ok

  def tell(%{telemetry: telemetry}, measured, result, time) do
    measurements = measurements(measured, Map.get(measured, :sent, 0), time)
    metadata = metadata(measured, Telemetry.result(result))
    Telemetry.emit(telemetry, measured.fun_req, measurements, metadata)
  end

  @doc "The measurements of a request that sent so many bytes."
  @spec measurements(map(), non_neg_integer(), keyword()) :: map()
  def measurements(measured, sent, time) do
    Telemetry.measurements(
      sent: sent,
      received: measured.received,
      blocks_sent: if(sent > 0, do: Telemetry.blocks(sent, measured.block)),
      blocks_received: Telemetry.blocks(measured.received, measured.block),
      time: time
    )
  end

  @doc "The metadata of a request."
  @spec metadata(map(), :ok | {:error_rpc, term()}) :: map()
  def metadata(measured, result) do
    measured
    |> Map.drop([:received, :sent, :block, :began])
    |> Map.put(:result, result)
  end

  defp direct?(config, direct, {status, {_flag, _iovec, size}}) when status in [:result, :error] do
    size <= direct.block and size <= direct.max_message and not Shared.busy?(direct.shared) and
      :counters.get(direct.held, 1) <= @alone and room?(config) and
      Shared.take_all?(direct.shared, size)
  end

  defp direct?(_config, _direct, _refused), do: false

  # The place of a request is free when its connection has heard of its end. Who has the answer before that, and asks
  # again, must not find the last place taken by his own request.
  defp room?(config), do: Room.calls(config.running) < config.max_concurrency

  # Should we be killed right after this, the connection may answer too: clients ignore a second answer.
  defp answer(direct, stream, {status, {flag, iovec, size}} = done) do
    {frame, _length} = Frame.response(stream, status, flag, iovec, size, direct.crc)

    if MeshxRpc.Port.command(direct.socket, frame) do
      :answered
    else
      _ = Shared.grant(direct.shared, size)
      done
    end
  rescue
    # The connection is gone.
    ArgumentError -> :answered
  end
end
