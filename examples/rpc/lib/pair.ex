defmodule Pair do
  @moduledoc "A server and a client that meet at a Unix socket. Neither VM has a node name, and no agent runs."

  defmodule Server do
    use MeshxRpc.Server

    def greet(name), do: "hello, #{name}"
    def sum(numbers), do: Enum.sum(numbers)
    def fail(_argument), do: raise(ArgumentError, "this is raised in the server")
    def note(text), do: IO.puts("noted: #{text}")
  end

  defmodule Client do
    use MeshxRpc.Client
  end

  @doc "Serves until its input ends."
  def serve(path) do
    {:ok, _pid} = Supervisor.start_link([{Server, address: {:uds, path}}], strategy: :one_for_one)
    IO.puts("serving at #{path}")
    IO.read(:stdio, :line)
  end

  @doc "Asks, in every way there is."
  def ask(path) do
    {:ok, _pid} = Supervisor.start_link([{Client, address: {:uds, path}}], strategy: :one_for_one)

    # A call: made again while there is no connection yet.
    "hello, world" = Client.call(:greet, "world")
    # An exception is raised here, or comes as the reason of an error.
    {:error_rpc, %ArgumentError{}} = Client.call(:fail)
    # Two requests at once.
    ids = for numbers <- [1..10, 1..100], do: Client.send_request(:sum, Enum.to_list(numbers))
    [55, 5050] = Enum.map(ids, &MeshxRpc.Client.Async.receive_response(&1, 5_000))
    # Casts with one key start in order. The last one waits until its function has started.
    for n <- 1..3, do: :ok = Client.cast(:note, "number #{n}", key: :numbers)
    :ok = Client.cast(:note, "done", key: :numbers, ack: true)
    # A million numbers, and neither side ever holds them all.
    500_000_500_000 = Client.call(:sum, MeshxRpc.Stream.new(1..1_000_000))
    IO.puts("all answers are right")
  end
end
