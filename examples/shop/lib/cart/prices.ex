defmodule Cart.Prices do
  @moduledoc "The price list: a small process that other nodes may call by its name, too."
  use GenServer

  @prices %{"lamp" => 1999, "chair" => 4500, "desk" => 12_900}

  def start_link(_opts), do: GenServer.start_link(__MODULE__, @prices, name: __MODULE__)

  @doc "Price in cents of one article; 0 when there is none."
  def of(article), do: GenServer.call(__MODULE__, {:price, article})

  @impl true
  def init(prices), do: {:ok, prices}

  @impl true
  def handle_call({:price, article}, _from, prices),
    do: {:reply, Map.get(prices, article, 0), prices}
end
