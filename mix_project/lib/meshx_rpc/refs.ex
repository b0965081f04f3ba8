defmodule MeshxRpc.Refs do
  @moduledoc false
  # What a side calls itself in the hello, for telemetry: its service, its node, this connection.
  #
  # Nothing is decided by them: a peer may say what it likes, in 255 bytes each.

  require Logger

  alias MeshxRpc.Aside
  alias MeshxRpc.Protocol.Default

  @max 255

  @type t :: %{svc_ref: binary(), node_ref: binary(), conn_ref: binary()}

  @doc """
  Ours, for one connection, within `timeout_hsk`; a function of the user's that fails, or takes longer, gives an empty
  text and a line in the log.
  """
  @spec local(map()) :: t()
  def local(config) do
    until = :erlang.monotonic_time(:millisecond) + config.timeout_hsk

    %{
      svc_ref: value(config, :svc_ref_mfa, until),
      node_ref: value(config, :node_ref_mfa, until),
      conn_ref: value(config, :conn_ref_mfa, until)
    }
  end

  @doc "At most 255 bytes of it."
  @spec cut(binary()) :: binary()
  def cut(text) when byte_size(text) <= @max, do: text
  def cut(text), do: text |> binary_part(0, @max) |> whole_characters()

  # A text keeps its last character whole; what is none is cut where it must be.
  defp whole_characters(bytes) do
    case String.chunk(bytes, :valid) do
      [text | [_half]] when byte_size(text) > @max - 4 -> text
      _other -> bytes
    end
  end

  defp value(config, option, until) do
    case Map.fetch!(config, option) do
      {Default, fun, args} ->
        cut(apply(Default, fun, args))

      # The connection must go on when it hangs.
      {_module, _fun, _args} = mfa ->
        case Aside.run(fn _beat -> ask(mfa) end, :infinity, until) do
          {:ok, {:ok, text}} -> text
          {:ok, {:failed, banner}} -> failed(config, option, banner)
          {:error, :late} -> failed(config, option, "took longer than timeout_hsk")
          {:error, :failed} -> failed(config, option, "ended without an answer")
        end

      text_or_name ->
        text_or_name |> to_string() |> cut()
    end
  end

  defp ask({module, fun, args}) do
    {:ok, cut(apply(module, fun, args))}
  catch
    kind, reason -> {:failed, Exception.format_banner(kind, reason, __STACKTRACE__)}
  end

  defp failed(config, option, text) do
    Logger.warning("MeshxRpc #{inspect(config.id)}: option #{inspect(option)}: #{text}")
    ""
  end
end
