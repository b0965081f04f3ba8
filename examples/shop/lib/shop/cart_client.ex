defmodule Shop.CartClient do
  @moduledoc "Asks the cart service, wherever in the mesh it runs."
  use MeshxRpc.Client,
    mesh: [adapter: Meshx.Agent, service: "cart-rpc"],
    cks_mfa: {MeshxRpc.Protocol.Default, :checksum, []}
end
