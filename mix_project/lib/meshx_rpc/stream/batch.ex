defmodule MeshxRpc.Stream.Batch do
  @moduledoc false
  # Encoded pieces that wait to be sent together.

  defstruct parts: [], size: 0

  @type t :: %__MODULE__{parts: [[binary()]], size: non_neg_integer()}

  @spec add(t(), {[binary()], pos_integer()}) :: t()
  def add(%__MODULE__{} = batch, {iovec, size}),
    do: %__MODULE__{batch | parts: [iovec | batch.parts], size: batch.size + size}

  @doc "Its bytes, and how many they are."
  @spec iovec(t()) :: {[binary()], non_neg_integer()}
  def iovec(%__MODULE__{parts: parts, size: size}), do: {Enum.concat(Enum.reverse(parts)), size}
end
