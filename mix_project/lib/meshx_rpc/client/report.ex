defmodule MeshxRpc.Client.Report do
  @moduledoc false
  # What a client's connection tells telemetry and the log.

  require Logger

  alias MeshxRpc.Telemetry
  alias MeshxRpc.Client.Calls

  @doc "Which event of 0.1 it is that a connection ends."
  @spec event_of(map()) :: :hsk | :idle | :send | :recv
  def event_of(%{phase: phase}) when phase not in [:up, :draining], do: :hsk

  def event_of(%{calls: calls, link: link}) do
    cond do
      Calls.empty?(calls) -> :idle
      link.blocked -> :send
      true -> :recv
    end
  end

  @doc "Tells telemetry. `reason` is `:ok`, or why. Without listeners it costs a look; handlers run elsewhere."
  @spec tell(map(), atom(), term()) :: map()
  def tell(state, name, reason) do
    if Telemetry.on?(state.config.telemetry, name) do
      key = if name == :hsk, do: :hsk, else: :idle
      time = [{key, Telemetry.now() - state.since}]

      metadata = Map.merge(metadata(state), %{result: Telemetry.cause(reason), state: state.phase})

      Telemetry.emit_aside(
        state.config.telemetry,
        name,
        Telemetry.measurements(time: time),
        Map.delete(metadata, :block)
      )
    end

    state
  end

  @doc "What telemetry tells of a connection."
  @spec metadata(map()) :: map()
  def metadata(state) do
    %{
      address: state.address || state.config.address,
      hsk_ref: state.hsk_ref,
      local: state.refs,
      remote: state.agreed && state.agreed.remote,
      socket: state.link && state.link.socket,
      block: state.agreed && state.agreed.block
    }
  end

  @doc "Warns that there is no connection: once for each reason, not once for each try."
  @spec log(map(), :idle | :proxy | :hello, term()) :: map()
  def log(%{logged: reason} = state, _kind, reason), do: state

  # That one was our own wish.
  def log(state, _kind, :idle), do: state

  # Also of a server that ends it without a word.
  def log(%{config: %{quiet_on_hsk_error?: true}} = state, kind, reason)
      when kind == :hello or (kind == :proxy and is_atom(reason)),
      do: %{state | logged: reason}

  def log(state, _kind, reason) do
    text =
      case reason do
        {cause, text} when is_binary(text) -> "#{cause}: #{text}"
        other -> inspect(other)
      end

    where = if state.address, do: inspect(state.address), else: inspect(state.config.mesh.service)

    Logger.warning(
      "MeshxRpc.Client #{inspect(state.config.id)}: no connection to #{where}: #{text}"
    )

    %{state | logged: reason}
  end
end
