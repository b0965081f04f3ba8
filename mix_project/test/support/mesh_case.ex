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
    ready(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, agent: agent, directory: directory}
  end

  @doc "Waits until this agent answers: the client may not have noticed yet that another one ended."
  def ready(directory, left \\ 2_000) do
    with {:ok, %{vm_dir: dir}} <- :meshx_agent.await(),
         ^directory <- Path.dirname(dir),
         {:ok, _answer} <- :meshx_agent.call(:names, %{}) do
      :ok
    else
      _not_yet when left > 0 ->
        Process.sleep(2)
        ready(directory, left - 1)
    end
  end

  @doc "Ends the agent as a crash would, and starts another in its place."
  def restart_agent(directory, scripts \\ []) do
    ExUnit.Callbacks.stop_supervised!(:agent)

    agent =
      ExUnit.Callbacks.start_supervised!({ScriptedAgent, dir: directory, scripts: scripts},
        id: :agent
      )

    ready(directory)
    agent
  end
end
