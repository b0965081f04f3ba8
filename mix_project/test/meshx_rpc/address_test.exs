defmodule MeshxRpc.AddressTest do
  use ExUnit.Case, async: true
  alias MeshxRpc.Address

  test "sockets ask a silent peer whether it is there, on both sides" do
    {:ok, listen, {:tcp, ip, port}} = Address.listen({:tcp, {127, 0, 0, 1}, 0}, 5)
    {:ok, client} = Address.connect({:tcp, ip, port}, 5_000)
    {:ok, server} = :gen_tcp.accept(listen)

    for socket <- [client, server] do
      assert {:ok, [keepalive: true, nodelay: true]} = :inet.getopts(socket, [:keepalive, :nodelay])

      if :os.type() == {:unix, :linux} do
        for {option, wanted} <- [{4, 20}, {5, 10}, {6, 4}, {18, 60_000}] do
          assert {:ok, [{:raw, 6, ^option, <<^wanted::32-native>>}]} =
                   :inet.getopts(socket, [{:raw, 6, option, 4}])
        end
      end

      # A write that would have to wait is known before it is made (MeshxRpc.Link).
      assert {:ok, [high_watermark: mark, low_watermark: mark]} =
               :inet.getopts(socket, [:high_watermark, :low_watermark])

      assert mark == Address.watermark()
    end
  end

  if :os.type() == {:unix, :linux} do
    # TCP_CONGESTION.
    defp congestion(socket) do
      {:ok, [{:raw, 6, 13, name}]} = :inet.getopts(socket, [{:raw, 6, 13, 16}])
      name |> :binary.split(<<0>>) |> hd()
    end

    test "within a host nothing paces what is sent, both ways, unless the user wants it" do
      default = String.trim(File.read!("/proc/sys/net/ipv4/tcp_congestion_control"))

      for ip <- [{127, 0, 0, 1}, {0, 0, 0, 0, 0, 0, 0, 1}] do
        {:ok, listen, {:tcp, ip, port}} = Address.listen({:tcp, ip, 0}, 5)
        {:ok, client} = Address.connect({:tcp, ip, port}, 5_000)
        {:ok, server} = :gen_tcp.accept(listen)
        assert {congestion(client), congestion(server)} == {"reno", "reno"}
        {:ok, client} = Address.connect({:tcp, ip, port}, 5_000, [{:raw, 6, 13, default}])
        assert congestion(client) == default
      end

      {:ok, listen, _address} = Address.listen({:tcp, {0, 0, 0, 0}, 0}, 5)
      assert congestion(listen) == default
    end
  end

  test "only this host's addresses are local" do
    assert Address.local?({:uds, "/x"})
    assert Address.local?({:tcp, {127, 9, 9, 9}, 1})
    refute Address.local?({:tcp, {192, 168, 0, 1}, 1})
    refute Address.local?({:tcp, {0, 0, 0, 0}, 1})
    refute Address.local?({:tcp, {0, 0, 0, 0, 0, 0xFFFF, 0x0A00, 1}, 1})
  end

  test "what is no address is refused" do
    for wrong <- [
          nil,
          {:tcp, {1, 2, 3}, 1},
          {:tcp, {127, 0, 0, 1}, 65_536},
          {:uds, ""},
          {:uds, "a\0b"},
          {:uds, ~c"x"}
        ] do
      assert Address.check(wrong) == :error
    end
  end
end
