defmodule MeshxRpc.LinkTest do
  # What is said of a write decides which requests are made again.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Address, Link, Writer}

  defp link do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    {:ok, socket} = Address.connect({:tcp, {127, 0, 0, 1}, port}, 5_000, [])
    spawn_link(fn -> listen |> :gen_tcp.accept() |> elem(1) |> swallow() end)

    writer = Writer.new(block: 65_536, stream_window: 1_048_576, connection_window: 1_048_576)

    %Link{socket: socket, module: nil, codec: nil, writer: writer, shared: writer.shared}
  end

  defp swallow(socket),
    do: with({:ok, _bytes} <- :gen_tcp.recv(socket, 0), do: swallow(socket))

  test "a socket that closes right after a write has taken what was written" do
    {nil, link} = Link.request(link(), :key, "head", [:binary.copy("x", 100_000)], 100_000)
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

  test "what is left of a large message waits for others: small ones, and who else has a turn" do
    {nil, link} = Link.request(link(), :large, "head", [:binary.copy("x", 500_000)], 500_000)
    before = new_turn()
    assert {:ok, link, [{:opened, :large, 1}]} = Link.write(link)
    assert reductions() - before >= 3_500
    assert Link.queued(link) > 300_000
    assert Link.dirty?(link)

    {nil, link} = Link.request(link, :small, "head", ["x"], 1)
    assert {:ok, link, [{:opened, :small, 2}, {:sent, :small}]} = Link.write(link)
    assert {:sent, _writer} = Writer.drop(link.writer, :small)
    assert {:partial, _writer} = Writer.drop(link.writer, :large)
  end

  test "small messages are written as they come" do
    {stream, link} = Link.request(link(), :small, "head", ["x"], 1)
    assert stream == 1
    before = new_turn()
    assert {:ok, %{dirty: false}, []} = Link.write(link)
    assert reductions() - before < 2_000
  end

  test "what the peer's window does not allow is not tried again and again" do
    {nil, link} = Link.request(link(), :large, "head", [:binary.copy("x", 2_000_000)], 2_000_000)
    link = written(link)
    refute link.blocked
    assert Link.queued(link) == 2_000_000 - 1_048_576
  end

  defp written(%{dirty: false} = link), do: link

  defp written(link) do
    {:ok, link, _notes} = Link.write(link)

    if link.blocked do
      assert_receive {:drained, _socket}, 5_000
      link |> Link.drained() |> written()
    else
      written(link)
    end
  end

  defp new_turn do
    :erlang.yield()
    reductions()
  end

  defp reductions, do: self() |> Process.info(:reductions) |> elem(1)

  test "the heap of a connection grows when it is busy" do
    Link.prepare()

    heap = fn ->
      self() |> Process.info(:garbage_collection) |> elem(1) |> Keyword.get(:min_heap_size)
    end

    few = heap.()
    link = Link.under_way(%Link{socket: nil, module: nil, codec: nil}, 7)
    assert heap.() == few
    link = Link.under_way(link, 8)
    assert heap.() >= 32_768
    # Once.
    Process.flag(:min_heap_size, few)
    Link.under_way(link, 1_000)
    assert heap.() == few
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
