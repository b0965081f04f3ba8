defmodule MeshxRpc.Codec.Elixir.Crc32c do
  @moduledoc false
  # CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), a byte at a time: for VMs that cannot load the NIF.

  import Bitwise

  @polynomial 0x82F63B78
  @table (for byte <- 0..255 do
            Enum.reduce(1..8, byte, fn _bit, crc ->
              if band(crc, 1) == 1, do: bxor(crc >>> 1, @polynomial), else: crc >>> 1
            end)
          end)
         |> List.to_tuple()

  @spec of(iodata()) :: non_neg_integer()
  def of(iodata) do
    iodata
    |> :erlang.iolist_to_iovec()
    |> Enum.reduce(0xFFFF_FFFF, &update/2)
    |> bxor(0xFFFF_FFFF)
  end

  defp update(<<byte, rest::binary>>, crc),
    do: update(rest, bxor(crc >>> 8, elem(@table, bxor(crc, byte) &&& 0xFF)))

  defp update(<<>>, crc), do: crc
end
