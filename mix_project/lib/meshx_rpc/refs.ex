defmodule MeshxRpc.Refs do
  @moduledoc false
  # What a side calls itself in the hello, for telemetry: its service, its node, this connection.
  #
  # Nothing is decided by them: a peer may say what it likes, in 255 bytes each.

  require Logger

  @max 255

  @type t :: %{svc_ref: binary(), node_ref: binary(), conn_ref: binary()}

  @doc "Ours, for one connection; a function of the user's that fails gives an empty text and a line in the log."
  @spec local(map()) :: t()
  def local(config) do
    %{
      svc_ref: value(config, :svc_ref_mfa),
      node_ref: value(config, :node_ref_mfa),
      conn_ref: value(config, :conn_ref_mfa)
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

  defp value(config, option) do
    case Map.fetch!(config, option) do
      {module, fun, args} -> cut(apply(module, fun, args))
      text_or_name -> text_or_name |> to_string() |> cut()
    end
  catch
    kind, reason ->
      Logger.warning(
        "MeshxRpc #{inspect(config.id)}: option #{inspect(option)}: " <>
          Exception.format_banner(kind, reason, __STACKTRACE__)
      )

      ""
  end
end
