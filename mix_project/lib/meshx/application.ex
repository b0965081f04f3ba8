defmodule Meshx.Application do
  @moduledoc false
  use Application

  @impl true
  def start(_type, _args) do
    MeshxConsul.Config.check!()
    Supervisor.start_link([], strategy: :one_for_one, name: Meshx.Supervisor)
  end
end
