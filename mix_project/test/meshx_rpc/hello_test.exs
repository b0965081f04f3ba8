defmodule MeshxRpc.HelloTest do
  use ExUnit.Case, async: true
  alias MeshxRpc.Hello

  @key "a shared key of some length"
  @other "another key, not the same one"

  defp config(options \\ %{}) do
    Map.merge(
      %{
        keys: [],
        checksums: [0, 1],
        blk_max_size: 65_536,
        stream_window: 4_096,
        connection_window: 8_192,
        max_message: 1_000
      },
      Map.new(options)
    )
  end

  defp greet(client, server) do
    hello = Hello.hello(client, Hello.nonce())

    with {:ok, at_server, ack, proofs} <- Hello.answer(server, hello, Hello.nonce()),
         {:ok, at_client, proof} <- Hello.accept(client, hello, ack),
         do: {:ok, at_server, at_client, proofs, proof}
  end

  defp field(tag, value), do: <<tag, byte_size(value)::16, value::binary>>

  test "the smaller block, the client's first common checksum, the other side's windows" do
    client =
      config(
        checksums: [1, 0],
        blk_max_size: 500,
        stream_window: 1_111,
        connection_window: 2_222,
        max_message: 33
      )

    server = config(checksums: [0, 1])
    assert {:ok, at_server, at_client, [], nil} = greet(client, server)
    assert %{checksum: 1, blk_max_size: 500, block: 500, auth: 0, version: 1} = at_server

    assert %{peer_stream_window: 1_111, peer_connection_window: 2_222, peer_max_message: 33} =
             at_server

    assert %{checksum: 1, blk_max_size: 500, peer_stream_window: 4_096, peer_max_message: 1_000} =
             at_client
  end

  test "a block never fills more than a frame" do
    big = config(blk_max_size: 268_435_456)
    assert {:ok, %{block: block}, _, _, _} = greet(big, big)
    assert block <= 65_536 - 270
  end

  test "no common checksum is refused, naming both sides" do
    assert {:refused, :settings, text} = greet(config(checksums: [1]), config(checksums: [0]))
    assert text =~ "crc32 are offered" and text =~ "one of none"
  end

  test "strict_settings of either side: what differs is refused, naming both" do
    for {client, server} <- [{[strict_settings: true], []}, {[], [strict_settings: true]}] do
      assert {:ok, _, _, _, _} = greet(config(client), config(server))

      assert {:refused, :settings, text} =
               greet(config([blk_max_size: 500] ++ client), config(server))

      assert text =~ "blk_max_size is 500 at the client, 65536 at the server"

      assert {:refused, :settings, text} = greet(config(client), config([checksums: [1]] ++ server))

      assert text =~ "checksums are none, crc32 at the client, crc32 at the server"
    end
  end

  test "who holds no key learns nothing of the settings" do
    server = config(checksums: [0], keys: [@key], strict_settings: true)
    assert {:refused, :auth, text} = greet(config(checksums: [1], blk_max_size: 500), server)
    refute text =~ "checksum" or text =~ "blk_max_size"
  end

  test "what a side calls itself reaches the other, at most 255 bytes each" do
    refs = fn prefix -> %{svc_ref: prefix <> "s", node_ref: prefix <> "n", conn_ref: <<0, 255>>} end
    client = config(refs: refs.("c"), keys: [@key])
    server = config(refs: refs.("s"), keys: [@key])
    assert {:ok, %{remote: at_server}, %{remote: at_client}, _, _} = greet(client, server)
    assert at_server == refs.("c") and at_client == refs.("s")

    assert {:ok, %{remote: %{svc_ref: "", node_ref: "", conn_ref: ""}}, _, _, _} =
             greet(config(), server |> Map.put(:keys, []))

    hello = Hello.hello(config(), Hello.nonce()) <> field(11, String.duplicate("x", 256))
    assert {:refused, :protocol, text} = Hello.answer(config(), hello, Hello.nonce())
    assert text =~ "node_ref has 256 bytes"
  end

  test "traceparents travel when both sides want them" do
    for client <- [true, false], server <- [true, false] do
      assert {:ok, at_server, at_client, [], nil} =
               greet(config(trace: client), config(trace: server))

      assert at_server.trace == (client and server)
      assert at_client.trace == at_server.trace
    end

    hello = Hello.hello(config(), Hello.nonce())
    {:ok, _, ack, _} = Hello.answer(config(), hello, Hello.nonce())
    assert {:refused, :protocol, _} = Hello.accept(config(), hello, ack <> field(13, <<2>>))
  end

  test "no common version is refused, naming both ranges" do
    <<1, 2::16, 1, 1, rest::binary>> = Hello.hello(config(), Hello.nonce())

    assert {:refused, :version, text} =
             Hello.answer(config(), <<1, 2::16, 2, 9, rest::binary>>, Hello.nonce())

    assert text =~ "2 to 9" and text =~ "1 to 1"
    # A client that can do more is answered with what we can.
    assert {:ok, %{version: 1}, _, _} =
             Hello.answer(config(), <<1, 2::16, 1, 9, rest::binary>>, Hello.nonce())
  end

  test "both sides prove a key; any of several will do" do
    assert {:ok, %{auth: 1}, %{auth: 1}, proofs, proof} =
             greet(config(keys: [@key]), config(keys: [@key]))

    assert Hello.proved?(proofs, proof)
    # While keys are exchanged, each side's first may be the other's second.
    assert {:ok, _, _, proofs, proof} =
             greet(config(keys: [@key, @other]), config(keys: [@other, @key]))

    assert Hello.proved?(proofs, proof)
  end

  test "a wrong key is noticed by both sides" do
    client = config(keys: [@key])
    server = config(keys: [@other])
    assert {:refused, :auth, text} = greet(client, server)
    assert text =~ "the server does not prove"

    hello = Hello.hello(client, Hello.nonce())
    {:ok, _agreed, ack, proofs} = Hello.answer(server, hello, Hello.nonce())
    signed = binary_part(ack, 0, byte_size(ack) - 35)
    forged = :crypto.mac(:hmac, :sha256, @key, ["meshx-rpc-1 client", hello, signed])
    refute Hello.proved?(proofs, forged)
    refute Hello.proved?(proofs, "short")
    refute Hello.proved?([], forged)
  end

  test "a side with a key refuses one without" do
    assert {:refused, :auth, text} = greet(config(), config(keys: [@key]))
    assert text =~ "offers no proof"
    assert {:refused, :auth, text} = greet(config(keys: [@key]), config())
    assert text =~ "this server has none"

    # A false server that says that no proof is needed.
    hello = Hello.hello(config(keys: [@key]), Hello.nonce())
    {:ok, _, ack, []} = Hello.answer(config(), Hello.hello(config(), Hello.nonce()), Hello.nonce())
    assert {:refused, :auth, _} = Hello.accept(config(keys: [@key]), hello, ack)
  end

  test "proofs hold for one connection only" do
    config = config(keys: [@key])
    hello = Hello.hello(config, Hello.nonce())
    {:ok, _, ack, _} = Hello.answer(config, hello, Hello.nonce())
    {:ok, _, proof} = Hello.accept(config, hello, ack)

    # The same hello and proof again: the server's nonce is another.
    {:ok, _, _, proofs} = Hello.answer(config, hello, Hello.nonce())
    refute Hello.proved?(proofs, proof)

    # The same ack again: the client's nonce is another.
    assert {:refused, :auth, _} = Hello.accept(config, Hello.hello(config, Hello.nonce()), ack)
  end

  test "an ack that was changed on its way is refused, wherever" do
    config = config(keys: [@key])
    hello = Hello.hello(config, Hello.nonce())
    {:ok, _, ack, _} = Hello.answer(config, hello, Hello.nonce())

    for at <- 0..(byte_size(ack) - 1) do
      {before, <<byte, rest::binary>>} = :erlang.split_binary(ack, at)
      changed = before <> <<Bitwise.bxor(byte, 1)>> <> rest
      assert {:refused, _, _} = Hello.accept(config, hello, changed)
    end

    assert {:refused, :auth, _} = Hello.accept(config, hello, ack <> field(200, "more"))
  end

  test "what is malformed is refused with what is wrong" do
    hello = Hello.hello(config(), Hello.nonce())
    refused = fn payload -> Hello.answer(config(), payload, Hello.nonce()) end

    assert {:refused, :protocol, text} = refused.(<<>>)
    assert text =~ "missing"
    assert {:refused, :protocol, text} = refused.(hello <> field(1, <<1, 1>>))
    assert text =~ "twice"

    for size <- 0..(byte_size(hello) - 1) do
      assert {:refused, :protocol, _} = refused.(binary_part(hello, 0, size))
    end

    <<head::binary-size(48), _rest::binary>> = hello
    assert {:refused, _, _} = refused.(head <> field(5, <<0::32>>))
    # Fields of later versions are skipped.
    assert {:ok, _, _, _} = refused.(hello <> field(99, "later"))

    for {tag, value} <- [
          {5, <<0::32>>},
          {5, <<0x8000_0000::32>>},
          {6, <<0::32>>},
          {7, <<0::64>>},
          {4, <<0::32>>}
        ] do
      assert {:refused, :settings, text} = refused.(replace(hello, tag, value))
      assert text =~ "field #{tag}"
    end
  end

  test "any bytes are refused or agreed on, without a crash" do
    :rand.seed(:exsss, {1, 2, 3})
    hello = Hello.hello(config(), Hello.nonce())

    for _ <- 1..2_000 do
      at = :rand.uniform(byte_size(hello)) - 1
      {before, <<_byte, rest::binary>>} = :erlang.split_binary(hello, at)

      payload =
        Enum.random([before <> <<:rand.uniform(256) - 1>> <> rest, :crypto.strong_rand_bytes(at)])

      assert elem(Hello.answer(config(), payload, Hello.nonce()), 0) in [:ok, :refused]
      assert elem(Hello.accept(config(), hello, payload), 0) == :refused
    end
  end

  defp replace(<<tag, size::16, _old::binary-size(size), rest::binary>>, tag, value),
    do: field(tag, value) <> rest

  defp replace(<<other, size::16, value::binary-size(size), rest::binary>>, tag, new),
    do: field(other, value) <> replace(rest, tag, new)
end
