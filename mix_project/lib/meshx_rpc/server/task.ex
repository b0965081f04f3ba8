defmodule MeshxRpc.Server.Task do
  @moduledoc false
  # The process of one request: decodes its argument, runs the function, hands the result to the connection
  # as `{:done, pid, stream, status, encoded}`. It is linked to the connection, which ends it by killing it.
  #
  # When somebody listens to telemetry, `measured` has what is known of the request: its event is told here, after the
  # result has gone, so that no handler delays anything. What is killed cannot: for that the connection does.

  alias MeshxRpc.{Message, Telemetry, Term, Traceparent}
  alias MeshxRpc.Server.Internal

  @spec start(pos_integer(), atom() | {:internal, atom()}, byte(), binary(), map(), nil | map()) ::
          pid()
  def start(stream, fun, flag, argument, config, measured \\ nil) do
    :erlang.spawn_opt(
      __MODULE__,
      :run,
      [self(), stream, fun, flag, argument, config, measured],
      [:link]
    )
  end

  @doc false
  def run(connection, stream, {:internal, name}, flag, argument, config, _measured),
    do: send(connection, {:done, self(), stream, internal(name, flag, argument, config)})

  def run(connection, stream, fun, flag, argument, config, measured) do
    began = clock(measured)
    argument = decode(config, flag, argument)
    decoded = clock(measured)

    {done, result, executed} =
      case argument do
        {:ok, argument} -> call(config, fun, argument, measured)
        {:error, :refused} -> {{:refused_term, nil}, :serialization_fail, decoded}
        {:error, :invalid_cks} -> {{:invalid_cks, nil}, :invalid_cks, decoded}
        {:error, reason} -> {{:error, Term.encode_error(reason)}, reason, decoded}
      end

    ended = clock(measured)
    send(connection, {:done, self(), stream, done})

    if measured do
      time = [dser: decoded - began, exec: executed - decoded, ser: ended - executed]
      result = if match?({:result, _encoded}, done), do: :ok, else: {:error_rpc, result}
      tell(config, Map.put(measured, :sent, size(done)), result, time)
    end
  end

  defp size({_status, {_flag, _iovec, size}}), do: size
  defp size(_refused), do: 0

  # Its argument is bytes, which no serializer of the user's made.
  defp internal(name, flag, argument, config) do
    Internal.run(name, flag, argument, config)
  catch
    kind, reason -> {:error, Term.encode_error(Term.failure(kind, reason, __STACKTRACE__))}
  end

  defp clock(nil), do: 0
  defp clock(_measured), do: Telemetry.now()

  defp decode(%{traced: true} = config, flag, bytes) do
    case Traceparent.split(bytes) do
      {:ok, bytes, text} ->
        Traceparent.put(text)
        decode(%{config | traced: false}, flag, bytes)

      :error ->
        {:error, :refused}
    end
  end

  defp decode(config, flag, bytes),
    do: Message.decode(config.message, config.codec, flag, bytes, config.guard)

  defp call(config, fun, argument, measured) do
    result = apply(config.module, fun, [argument])
    executed = clock(measured)

    case Message.encode(config.message, result) do
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
    |> Map.merge(%{result: result, traceparent: Traceparent.get()})
  end
end
