defmodule MeshxRpc.Server.Report do
  @moduledoc false
  # What a server's connection tells telemetry and the log. Handlers of the user's run elsewhere, and without one it
  # costs a look.

  require Logger

  alias MeshxRpc.{Telemetry, Traceparent}
  alias MeshxRpc.Server.Task

  @doc "What became of the connection: an event of 0.1. `reason` is `:ok`, or why."
  @spec tell(map(), atom(), term()) :: :ok
  def tell(state, name, reason) do
    if Telemetry.on?(state.config.telemetry, name) do
      time = if name == :hsk, do: [hsk: Telemetry.now() - state.since], else: []

      Telemetry.emit_aside(
        state.config.telemetry,
        name,
        Telemetry.measurements(time: time),
        Map.merge(metadata(state), %{result: Telemetry.cause(reason), state: state.phase})
      )
    end

    :ok
  end

  @doc "A request that is not run."
  @spec tell_refused(map(), :call | :cast, binary(), pos_integer(), binary(), atom()) :: map()
  def tell_refused(state, kind, fun, stream, argument, reason) do
    with %{} = measured <- measured(state, kind, fun, stream, argument),
         do: tell_request(state, measured, reason)

    state
  end

  @doc "A request that ended before its process could tell."
  @spec tell_ended(map(), pos_integer(), term()) :: map()
  def tell_ended(state, stream, reason) do
    with %{measured: %{} = measured} <- state.streams[stream],
         do: tell_request(state, measured, reason)

    state
  end

  defp tell_request(state, measured, reason) do
    time = [exec: Telemetry.now() - measured.began]

    Telemetry.emit_aside(
      state.config.telemetry,
      measured.fun_req,
      Task.measurements(measured, 0, time),
      Task.metadata(measured, Telemetry.result({:error_rpc, reason}))
    )
  end

  @doc "What is told of a request, when somebody listens. What casts and streams are made of is not told."
  @spec measured(
          map(),
          :call | :cast,
          atom() | binary() | {:internal, atom()},
          pos_integer(),
          binary()
        ) :: nil | map()
  def measured(_state, _kind, {:internal, _name}, _stream, _argument), do: nil
  def measured(_state, _kind, <<0, _::binary>>, _stream, _argument), do: nil

  def measured(state, kind, fun, stream, argument) do
    if Telemetry.on?(state.config.telemetry, kind) do
      Map.merge(metadata(state), %{
        fun_name: fun,
        fun_req: kind,
        req_ref: stream,
        state: :reply,
        received: byte_size(argument),
        block: state.agreed.block,
        began: Telemetry.now(),
        traceparent: traceparent(state.agreed, argument)
      })
    end
  end

  # Its own process knows it too, but is not always there to tell.
  defp traceparent(%{trace: true}, argument) do
    case Traceparent.split(argument) do
      {:ok, _bytes, text} -> text
      :error -> nil
    end
  end

  defp traceparent(_agreed, _argument), do: nil

  defp metadata(state) do
    %{
      address: state.config.address,
      peer: state.peer,
      hsk_ref: state.hsk_ref,
      local: state.refs,
      remote: state.agreed && state.agreed.remote,
      socket: state.link && state.link.socket
    }
  end

  @doc "Warns of a peer, and tells."
  @spec log(map(), atom(), String.t()) :: :ok
  def log(%{config: config} = state, cause, text) do
    tell(state, if(state.phase == :up, do: :recv, else: :hsk), {cause, text})

    unless config.quiet_on_hsk_error? and state.phase != :up,
      do:
        Logger.warning(
          "MeshxRpc.Server #{inspect(config.id)} refuses #{state.peer}: #{cause}: #{text}"
        )

    :ok
  end
end
