defmodule Meet.Greeter do
  @moduledoc "What the one VM offers to the other."
  def hello(name), do: "hello #{name}, this is #{inspect(node())}"
end

defmodule Meet do
  @moduledoc """
  Two VMs that meet over `SocketDir`, by MeshxRpc and as nodes. `kind` is `:uds` or `:tcp`.
  """
  alias MeshxRpc.{Client, Server}

  @cookie :meet_example

  @doc "The one: serves `Meet.Greeter` and is the node `greeter@here`, until its input ends."
  def serve(dir, kind) do
    start(dir, kind, :greeter@here)

    {:ok, _pid} =
      Server.Pool.start_link(:greeter,
        module: Meet.Greeter,
        mesh: [adapter: SocketDir, service: "greeter", template: [kind: kind]]
      )

    IO.puts("serving")
    IO.read(:stdio, :line)
  end

  @doc "The other: asks by MeshxRpc, then as a node."
  def ask(dir, kind) do
    start(dir, kind, :asker@here)

    {:ok, _pid} = Client.Pool.start_link(:greeter, mesh: [adapter: SocketDir, service: "greeter"])

    "hello RPC, this is :greeter@here" =
      say(Client.Pool.call(:greeter, :hello, "RPC", 5_000, 50, 100))

    :ok = MeshxNode.connect(:greeter@here)

    "hello node, this is :greeter@here" =
      say(:erpc.call(:greeter@here, Meet.Greeter, :hello, ["node"]))

    # And back: messages of any size, monitors, all that distribution is.
    big = :binary.copy(<<7>>, 5_000_000)
    pid = Node.spawn(:greeter@here, fn -> receive(do: ({from, text} -> send(from, text))) end)
    monitor = Process.monitor(pid)
    send(pid, {self(), big})
    receive(do: (^big -> :ok))
    receive(do: ({:DOWN, ^monitor, :process, ^pid, :normal} -> :ok))

    {:error, {cause, _text}} = MeshxNode.connect(:nobody@here)
    say("nobody is #{cause}")
    IO.puts("all answers are right")
  end

  defp start(dir, kind, node) do
    Application.put_env(:meshx_node, :mesh_adapter, SocketDir)
    Application.put_env(:meshx_node, :service_reg, kind: kind)
    {:ok, _pid} = SocketDir.start_link(dir: dir)
    {:ok, _pid} = MeshxNode.start(node, @cookie)
  end

  defp say(text), do: tap(text, &IO.puts/1)
end
