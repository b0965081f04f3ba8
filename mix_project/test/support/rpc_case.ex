defmodule MeshxRpc.TestServer do
  @moduledoc false
  use MeshxRpc.Server, address: {:tcp, {127, 0, 0, 1}, 0}

  def echo(argument), do: argument
  def size(binary), do: byte_size(binary)
  def make(size), do: :binary.copy(<<7>>, size)
  def fail(_argument), do: raise(ArgumentError, "no")
  def badarith(number), do: 1 / number
  def throw_it(value), do: throw(value)
  def exit_it(reason), do: exit(reason)
  def kill_it(_argument), do: Process.exit(self(), :kill)
  def a_function(_argument), do: fn -> :ok end
  def two(_first, _second), do: :no

  @doc "Dies with a linked process, whose stack has the argument of the function that failed."
  def fail_aside(argument) do
    spawn_link(fn -> byte_size(Process.put(:argument, argument) || refuse(argument)) end)
    Process.sleep(:infinity)
  end

  defp refuse(:wanted), do: ""

  @doc "Tells the test process that it runs, and does what it says; killed, the test sees it go down."
  def wait({name, argument}) do
    test = name |> :erlang.binary_to_existing_atom() |> Process.whereis()
    send(test, {:running, self(), argument})

    receive do
      {:answer, answer} -> answer
    end
  end
end

defmodule MeshxRpc.Case do
  @moduledoc false
  use ExUnit.CaseTemplate

  alias MeshxRpc.{Client, Server}

  using do
    quote do
      import MeshxRpc.Case
      alias MeshxRpc.{Client, Server, TestServer}
    end
  end

  @doc "The codecs that this VM has."
  def codecs do
    if MeshxRpc.Codec.impl() == MeshxRpc.Codec.Elixir,
      do: [MeshxRpc.Codec.Elixir],
      else: [MeshxRpc.Codec.Elixir, MeshxRpc.Codec.impl()]
  end

  @doc "A name that no other test has."
  def unique(prefix), do: :"#{prefix}_#{System.unique_integer([:positive])}"

  @doc "Starts a server; answers with its id and its address."
  def server(options \\ []) do
    id = unique("server")

    options =
      Keyword.merge(
        [address: {:tcp, {127, 0, 0, 1}, 0}, module: MeshxRpc.TestServer, drain: 0],
        options
      )

    start_supervised!(Server.Pool.child_spec(id, options))
    {:ok, address} = Server.Pool.address(id)
    {id, address}
  end

  @doc "Starts a client of one connection and waits until it is up."
  def client(address, options \\ []) do
    id = client_down(address, options)
    await(fn -> Client.Pool.info(id).connected > 0 end)
    id
  end

  @doc "The table of a client, by whose rows its callers find a connection."
  def table(client), do: Client.Pool.fetch!(client).table

  @doc "Starts a client and does not wait."
  def client_down(address, options \\ []) do
    id = unique("client")
    address = if address, do: [address: address], else: []
    options = Keyword.merge([pool_opts: [size: 1]] ++ address, options)
    start_supervised!(Client.Pool.child_spec(id, options))
    id
  end

  @doc "Waits until it is so: as long as the test may take."
  def await(condition) do
    unless condition.() do
      Process.sleep(2)
      await(condition)
    end
  end

  @doc "Registers the test process so that the test server's `wait` finds it; answers with the name as a binary."
  def registered do
    name = unique("test")
    Process.register(self(), name)
    Atom.to_string(name)
  end

  @doc "Connects a plain socket, for peers that do not speak the protocol."
  def raw({:tcp, ip, port}) do
    {:ok, socket} = :gen_tcp.connect(ip, port, [:binary, active: false])
    socket
  end

  @doc "Everything that a socket says until it is closed."
  def read_all(socket, so_far \\ <<>>) do
    case :gen_tcp.recv(socket, 0, 10_000) do
      {:ok, bytes} -> read_all(socket, so_far <> bytes)
      {:error, :closed} -> so_far
      {:error, :econnreset} -> so_far
    end
  end
end
