defmodule MeshxRpc.Client.Measured do
  @moduledoc false
  # What a call tells telemetry, collected in its caller's process: only while somebody listens.

  alias MeshxRpc.{Client, Telemetry}

  @key :"$meshx_rpc_measured"

  @doc "Runs a call, and tells how it went. `fun` is the function of the server."
  @spec run(map(), binary(), (() -> term())) :: term()
  def run(pool, fun, call) do
    # A function that serialises may itself call.
    outer = Process.put(@key, %{})
    began = Telemetry.now()

    try do
      result = call.()
      emit(pool, fun, result, Telemetry.now() - began, Process.get(@key))
      result
    after
      if outer, do: Process.put(@key, outer), else: Process.delete(@key)
    end
  end

  @doc "Notes something about the call that this process makes, if it is measured."
  @spec note(atom(), term()) :: :ok
  def note(name, value) do
    with %{} = noted <- Process.get(@key), do: Process.put(@key, Map.put(noted, name, value))
    :ok
  end

  @doc "Notes how long a function takes, if this call is measured."
  @spec time(atom(), (() -> result)) :: result when result: term()
  def time(name, fun) do
    case Process.get(@key) do
      nil ->
        fun.()

      _measured ->
        began = Telemetry.now()
        result = fun.()
        note(name, Telemetry.now() - began)
        result
    end
  end

  @doc "Tells how a cast went; handlers run elsewhere."
  @spec cast(map(), %{fun: binary(), size: non_neg_integer(), began: integer()}, :ok | term()) ::
          :ok
  def cast(%{telemetry: telemetry}, cast, result) do
    if Telemetry.on?(telemetry, :cast) do
      measurements =
        Telemetry.measurements(sent: cast.size, time: [exec: Telemetry.now() - cast.began])

      metadata = %{
        fun_name: cast.fun,
        fun_req: :cast,
        result: Telemetry.result(result),
        state: :reply
      }

      Telemetry.emit_aside(telemetry, :cast, measurements, metadata)
    end

    :ok
  end

  defp emit(%{telemetry: telemetry} = pool, fun, result, total, noted) do
    connection = if noted[:pid], do: Client.Pool.metadata(pool, noted.pid), else: %{}
    block = Map.get(connection, :block, 65_536)
    {sent, received} = {Map.get(noted, :sent, 0), Map.get(noted, :received, 0)}
    {ser, dser} = {Map.get(noted, :ser, 0), Map.get(noted, :dser, 0)}

    measurements =
      Telemetry.measurements(
        sent: sent,
        received: received,
        blocks_sent: if(noted[:pid], do: Telemetry.blocks(sent, block)),
        blocks_received: if(noted[:received], do: Telemetry.blocks(received, block)),
        time: [ser: ser, dser: dser, exec: max(total - ser - dser, 0)]
      )

    metadata =
      connection
      |> Map.delete(:block)
      |> Map.merge(%{
        fun_name: fun,
        fun_req: :call,
        req_ref: noted[:ref],
        traceparent: noted[:traceparent],
        result: Telemetry.result(result),
        state: :reply
      })

    Telemetry.emit(telemetry, :call, measurements, metadata)
  end
end
