defmodule Meshx.MeshCase do
  @moduledoc "A scripted agent in a directory of its own, which this VM's client has found."
  use ExUnit.CaseTemplate
  alias Meshx.ScriptedAgent

  using do
    quote do
      import Meshx.MeshCase
    end
  end

  setup do
    directory = Path.join(System.tmp_dir!(), "mxm#{System.unique_integer([:positive])}")
    File.mkdir!(directory)
    System.put_env("MESHX_DIR", directory)
    agent = start_supervised!({ScriptedAgent, dir: directory}, id: :agent)
    {:ok, _client} = :meshx_agent.start()
    ready()
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, agent: agent, directory: directory}
  end

  @doc "Waits for the client, which may still be on its way from another test's agent."
  def ready(left \\ 500) do
    case :meshx_agent.await() do
      {:ok, _hello} -> :ok
      {:error, _reason} when left > 0 -> ready(left - 1)
    end
  end

  @doc "Ends the agent as a crash would, and starts another in its place."
  def restart_agent(directory, scripts \\ []) do
    ExUnit.Callbacks.stop_supervised!(:agent)

    agent =
      ExUnit.Callbacks.start_supervised!({ScriptedAgent, dir: directory, scripts: scripts},
        id: :agent
      )

    ready()
    agent
  end
end
