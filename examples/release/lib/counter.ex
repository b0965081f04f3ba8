defmodule Counter do
  @moduledoc """
  Counts, so that there is something to ask the node of a release for.
  """
  use Application

  @impl true
  def start(_type, _args) do
    children = [%{id: __MODULE__, start: {Agent, :start_link, [fn -> 0 end, [name: __MODULE__]]}}]
    Supervisor.start_link(children, strategy: :one_for_one)
  end

  @doc "Counts one on; the new count."
  def next, do: Agent.get_and_update(__MODULE__, &{&1 + 1, &1 + 1})
end
