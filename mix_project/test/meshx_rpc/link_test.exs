defmodule MeshxRpc.LinkTest do
  # What is said of a write decides which requests are made again.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Address, Link, Writer}

  defp link do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    {:ok, socket} = Address.connect({:tcp, {127, 0, 0, 1}, port}, 5_000, [])

    writer = Writer.new(block: 65_536, stream_window: 1_048_576, connection_window: 1_048_576)

    %Link{socket: socket, module: nil, codec: nil, writer: writer, shared: writer.shared}
  end

  test "a socket that closes right after a write has taken what was written" do
    {nil, link} = Link.request(link(), :key, "head", [:binary.copy("x", 200_000)], 200_000)
    assert {:ok, link, [{:opened, :key, 1}, {:sent, :key}]} = Link.write(link)
    :gen_tcp.close(link.socket)
    # As it is between the write and the question how long the port's queue is.
    link = %{link | dirty: true, written: Address.watermark()}
    assert {:ok, %{blocked: false}, []} = Link.write(link)
  end

  test "a closed socket takes nothing, and what was to be written counts as unsent" do
    {nil, link} = Link.request(link(), :key, "head", [:binary.copy("x", 200_000)], 200_000)
    :gen_tcp.close(link.socket)
    assert Link.write(link) == {:error, :closed}
    assert {:unsent, _writer} = Writer.drop(link.writer, :key)
  end

  test "at most 32 reads wait for a connection, and more come as it takes them" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    {:ok, socket} = Address.connect({:tcp, {127, 0, 0, 1}, port}, 5_000, [])
    {:ok, peer} = :gen_tcp.accept(listen, 5_000)
    size = 16 * 1_048_576
    task = Task.async(fn -> :gen_tcp.send(peer, :binary.copy("x", size)) end)
    link = %Link{socket: socket, module: nil, codec: nil}
    assert Link.activate(link) == :ok
    # The socket says itself when it has no read left.
    await(fn -> {:tcp_passive, socket} in waiting() end)
    assert Enum.count(waiting(), &match?({:tcp, ^socket, _bytes}, &1)) == 32
    assert all(link, size) == :ok
    assert Task.await(task) == :ok
  end

  defp waiting, do: self() |> Process.info(:messages) |> elem(1)

  defp all(_link, 0), do: :ok

  defp all(%{socket: socket} = link, left) do
    receive do
      {:tcp, ^socket, bytes} -> link |> Link.took() |> all(left - byte_size(bytes))
      {:tcp_passive, ^socket} -> all(link, left)
    after
      20_000 -> {:left, left}
    end
  end
end
