defmodule Meshx.Application do
  @moduledoc false
  use Application

  @impl true
  def start(_type, _args) do
    MeshxConsul.Config.check!()
    # Before anything asks for it.
    agent = Meshx.Agent.Start.children(Application.get_env(:meshx, :agent, :require))
    Supervisor.start_link(agent, strategy: :one_for_one, name: Meshx.Supervisor)
  end
end
