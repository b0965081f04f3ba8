defmodule MeshxRpc.StreamMemoryTest do
  # Alone, so that the memory is its own.
  use MeshxRpc.Case, async: false
  alias MeshxRpc.Stream, as: Pieced

  @mib 1_048_576

  defmodule Pieces do
    @moduledoc false
    def blocks({count, size}), do: Stream.map(1..count, fn n -> :binary.copy(<<n>>, size) end)
    def size(pieces), do: Enum.reduce(pieces, 0, &(byte_size(&1) + &2))
  end

  test "memory of both sides stays within the window while gigabytes pass" do
    {_server, address} = server(module: Pieces)
    client = client_down(address)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    piece = :binary.copy("x", 65_536)
    # Warm: what the first call loads and grows stays.
    _ = Client.Pool.call(client, :size, Pieced.new(Stream.take(Stream.cycle([piece]), 1_000)))
    before = :erlang.memory(:total)
    me = self()

    sampler =
      spawn_link(fn ->
        Stream.repeatedly(fn ->
          receive do
            :stop -> :stop
          after
            5 -> :erlang.memory(:total)
          end
        end)
        |> Enum.reduce_while(0, fn
          :stop, most -> {:halt, send(me, {:most, most})}
          bytes, most -> {:cont, max(bytes, most)}
        end)
      end)

    # 512 MiB in each direction.
    count = 8_192
    there = Client.Pool.call(client, :size, Pieced.new(Stream.take(Stream.cycle([piece]), count)))
    assert there == count * 65_536

    back =
      Client.Pool.stream(client, :blocks, {count, 65_536}) |> Enum.reduce(0, &(byte_size(&1) + &2))

    assert back == count * 65_536
    send(sampler, :stop)
    assert_receive {:most, most}, 10_000
    assert most - before < 64 * @mib
  end
end
