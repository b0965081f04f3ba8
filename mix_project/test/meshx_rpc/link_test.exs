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
end
