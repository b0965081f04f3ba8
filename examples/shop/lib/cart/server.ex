defmodule Cart.Server do
  @moduledoc """
  What other services may call. Only the functions of this module can be reached, each with one argument.
  """
  use MeshxRpc.Server,
    mesh: [adapter: Meshx.Agent, service: "cart-rpc"],
    cks_mfa: {MeshxRpc.Protocol.Default, :checksum, []}

  @doc "Price of a cart: a list of `{article, pieces}`."
  def total(items) do
    Enum.reduce(items, 0, fn {article, pieces}, sum -> sum + Cart.Prices.of(article) * pieces end)
  end

  @doc "Gives back what it got."
  def echo(term), do: term

  @doc "Size of a binary."
  def size(binary) when is_binary(binary), do: byte_size(binary)

  @doc "SHA-256 of a binary, and its size: shows that each byte arrived."
  def digest(binary) when is_binary(binary) do
    {byte_size(binary), :crypto.hash(:sha256, binary)}
  end
end
