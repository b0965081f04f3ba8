defmodule MeshxRpc.FaultServer do
  @moduledoc "Functions for tests with VMs of their own."

  def echo(argument), do: argument

  # Calls that last a little are what a server that stops has to wait for.
  def slow_echo(argument) do
    Process.sleep(5)
    argument
  end

  def make(size), do: :binary.copy(<<7>>, size)
  def blocks({count, size}), do: Stream.map(1..count, fn _ -> :binary.copy("b", size) end)
  def node(_argument), do: {Node.self(), Node.alive?(), System.get_env("MESHX_DIR")}
  def memory(_argument), do: :erlang.memory(:total)
  def size(pieces), do: Enum.reduce(pieces, 0, &(byte_size(&1) + &2))
end
