defmodule Shop.Application do
  @moduledoc """
  One code base, two roles: the node `cart@...` serves carts, every other node is a shop that asks it.
  """
  use Application

  @impl true
  def start(_type, _args) do
    children =
      case node() |> Atom.to_string() |> String.split("@") do
        ["cart", _host] -> [Cart.Server, {Cart.Prices, []}]
        ["shop", _host] -> [Shop.CartClient]
        _other -> []
      end

    Supervisor.start_link(children, strategy: :one_for_one, name: Shop.Supervisor)
  end
end
