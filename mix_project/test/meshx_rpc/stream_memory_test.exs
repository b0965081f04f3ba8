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

  test "a batch of many small pieces is not decoded at once" do
    alias MeshxRpc.Stream.Pieces, as: Wire
    config = %{codec: MeshxRpc.Codec.impl(), guard: %{}}
    config = %{config | guard: config.codec.policy(%{})}
    batch = :binary.copy(<<0, 0::32>>, 4_000_000)

    count = fn count, batch, total ->
      assert {:ok, pieces, rest} = Wire.decode(nil, batch, config)
      assert length(pieces) in 1..16_384
      total = total + length(pieces)
      if rest == "", do: total, else: count.(count, rest, total)
    end

    assert count.(count, batch, 0) == 4_000_000

    # Large ones come alone, and only the one that is most of what came keeps it.
    large = :binary.copy("x", 100_000)
    batch = IO.iodata_to_binary(for _ <- 1..3, do: <<0, 100_000::32, large::binary>>)
    assert {:ok, [^large = piece], rest} = Wire.decode(nil, batch, config)
    assert :binary.referenced_byte_size(piece) == 100_000
    assert {:ok, [^large], <<_::binary-100_005>>} = Wire.decode(nil, rest, config)
    assert {:error, :invalid_state} = Wire.decode(nil, <<0, 5::32, "abc">>, config)
    assert {:ok, [], ""} = Wire.decode(nil, "", config)
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
