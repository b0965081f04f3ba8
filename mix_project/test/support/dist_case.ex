defmodule Meshx.DistCase do
  @moduledoc "A scripted agent in a directory of its own, and BEAMs that use it."
  use ExUnit.CaseTemplate

  alias Meshx.{ScriptedAgent, TestNode}

  using do
    quote do
      import Meshx.DistCase
      alias Meshx.{ScriptedAgent, TestNode}

      # Each test starts VMs.
      @moduletag timeout: 180_000
    end
  end

  setup do
    # Short, because a socket's path has at most 107 bytes.
    dir = Path.join("/tmp", "mx" <> Base.encode16(:crypto.strong_rand_bytes(5), case: :lower))
    File.mkdir!(dir)
    File.chmod!(dir, 0o700)
    on_exit(fn -> File.rm_rf!(dir) end)
    {:ok, dir: dir}
  end

  @doc "Starts the scripted agent in the test's directory."
  def start_agent(%{dir: dir}, scripts \\ []) do
    ExUnit.Callbacks.start_supervised!({ScriptedAgent, dir: dir, scripts: scripts},
      id: ScriptedAgent
    )
  end

  @doc "Ends the agent as a crash would: its connections close, its sockets stay behind."
  def stop_agent(), do: ExUnit.Callbacks.stop_supervised!(ScriptedAgent)

  @doc "Starts a node and waits until it is up."
  def start_node(context, name, args \\ []) do
    node = launch(context, ["-name", name | args])
    :ok = TestNode.await_boot(node)
    node
  end

  @doc """
  Connects as soon as that is possible after the agent came back. The agent has a node a moment before the node knows of
  it: until then it is refused at either end.
  """
  def connect_again(node, other, tries \\ 1_000) do
    with {:error, _refusal} when tries > 0 <- TestNode.call(node, MeshxNode, :connect, [other]) do
      Process.sleep(50)
      connect_again(node, other, tries - 1)
    end
  end

  @doc "Starts a BEAM without waiting; `args` follow `erl`'s own."
  def launch(%{dir: dir}, args, env \\ %{}) do
    env = Map.merge(%{"MESHX_DIR" => dir}, env)
    ExUnit.Callbacks.start_supervised!({TestNode, args: args, env: env}, id: make_ref())
  end
end
