defmodule MeshxRpc.Reason do
  @moduledoc false
  # What a caller sees as the reason of `{:error_rpc, reason}` when its stream was reset with a cause
  # of docs/rpc-protocol.md.

  @spec of(MeshxRpc.Codec.cause()) :: atom()
  def of(:too_large), do: :error_too_long
  def of(:refused_term), do: :serialization_fail
  def of(:cancelled), do: :killed
  def of(:shutdown), do: :closed
  def of(cause) when cause in [:invalid_cks, :full, :timeout, :unread], do: cause
  def of(_protocol_or_unknown), do: :invalid_state
end
