defmodule MeshxRpc.WriterTest do
  use ExUnit.Case, async: true
  alias MeshxRpc.Writer

  defp writer(options \\ []) do
    Writer.new(
      Keyword.merge([block: 1_000, stream_window: 1_000_000, connection_window: 1_000_000], options)
    )
  end

  # The frames of a batch: {type, stream, seq, last?, payload}.
  defp frames(iodata), do: iodata |> IO.iodata_to_binary() |> split()
  defp split(<<>>), do: []

  defp split(<<len::24, type, flags, seq::24, stream::32, payload::binary-size(len), rest::binary>>)
       when flags < 0x80,
       do: [{type, stream, seq, flags == 1, payload} | split(rest)]

  defp split(<<len::24, type, flags, seq::24, stream::32, rest::binary>>) do
    {payload, <<crc::32, rest::binary>>} = :erlang.split_binary(rest, len)
    assert crc == :erlang.crc32([<<len::24, type, flags, seq::24, stream::32>>, payload])
    [{type, stream, seq, Bitwise.band(flags, 1) == 1, payload} | split(rest)]
  end

  defp order(frames), do: Enum.map(frames, fn {_type, stream, _seq, _last?, _payload} -> stream end)

  test "control frames, then small messages whole, then larger ones in turn; ids in the order of sending" do
    writer =
      writer(stream_window: 2_000_000, connection_window: 10_000_000)
      |> Writer.request(:bulk1, "h", [:binary.copy("a", 70_000)], 70_000)
      |> Writer.request(:bulk2, "h", [:binary.copy("b", 1_100_000)], 1_100_000)
      |> Writer.request(:small, "h", ["cc", "dd"], 4)
      |> Writer.control(<<1::24, 0x80, 0, 0::24, 0::32, 9>>)

    {batch, _size, notes, writer} = Writer.take(writer, 5_000)
    frames = frames(batch)
    assert [{0x80, 0, 0, false, <<9>>}, {0x10, 1, 0, true, "hccdd"} | bulk] = frames
    assert order(bulk) |> Enum.take(4) == [2, 3, 2, 3]

    assert [{:opened, :small, 1}, {:sent, :small}, {:opened, :bulk1, 2}, {:opened, :bulk2, 3}] =
             notes

    assert Writer.count(writer) == 2
  end

  test "of larger messages no more is taken at a time than is asked for, of small ones all" do
    add = fn writer, n, size ->
      Writer.response(writer, n, "h", [:binary.copy(<<n>>, size)], size)
    end

    writer = writer(block: 10_000, stream_window: 20_000_000, connection_window: 100_000_000)
    refute Writer.bulk?(writer)
    writer = Enum.reduce(1..50, writer, &add.(&2, &1, 10_000))
    refute Writer.bulk?(writer)
    writer = writer |> add.(51, 100_000) |> add.(52, 400_000)
    assert Writer.bulk?(writer)

    {batch, _size, _notes, writer} = Writer.take(writer, 1_000_000, 30_000)
    {small, bulk} = batch |> frames() |> order() |> Enum.split_with(&(&1 <= 50))
    assert Enum.uniq(small) == Enum.to_list(1..50)
    assert length(bulk) == 3

    {batch, _size, _notes, _writer} = Writer.take(writer, 1_000_000, 30_000)
    assert batch |> frames() |> length() == 3
  end

  test "the first blocks of a message of 512 KiB and more are short" do
    for {kind, head} <- [request: "a request's", response: "h"] do
      data = :crypto.strong_rand_bytes(600_000)
      writer = writer(block: 65_024)

      writer =
        if kind == :request,
          do: Writer.request(writer, :key, head, [data], 600_000),
          else: Writer.response(writer, 1, head, [data], 600_000)

      {batch, _size, _notes, _writer} = Writer.take(writer, 1_000_000)
      frames = frames(batch)
      payloads = for {_type, _stream, _seq, _last?, payload} <- frames, do: payload
      assert IO.iodata_to_binary(payloads) == head <> data
      {short, blocks} = Enum.split_while(payloads, &(byte_size(&1) < 100))

      # What is before the first whole block: beyond where such a binary begins in its page, by 32 bytes or more.
      assert (length(short) * 12 + byte_size(head) + 12) in 136..200
      assert Enum.all?(Enum.drop(blocks, -1), &(byte_size(&1) == 65_024))
    end

    writer = Writer.response(writer(block: 65_024), 1, "h", [:binary.copy("x", 524_288)], 524_288)
    {batch, _size, _notes, _writer} = Writer.take(writer, 1_000_000)
    assert batch |> frames() |> length() == 9
    writer = Writer.response(writer(block: 20), 1, "h", [:binary.copy("x", 600_000)], 600_000)
    {batch, _size, _notes, _writer} = Writer.take(writer, 20_000_000)
    assert batch |> frames() |> length() == 30_000
  end

  test "larger messages of one class go one after the other, those of different classes in turn" do
    sizes = %{
      1 => 70_000,
      2 => 1_100_000,
      3 => 1_000_000,
      4 => 17_000_000,
      5 => 16_000_000,
      6 => 80_000
    }

    writer = writer(block: 10_000, stream_window: 20_000_000, connection_window: 100_000_000)

    writer =
      for {n, size} <- sizes, reduce: writer do
        writer -> Writer.response(writer, n, "h", [:binary.copy(<<n>>, size)], size)
      end

    {batch, _size, notes, _writer} = Writer.take(writer, 100_000_000)
    order = batch |> frames() |> order()
    assert Enum.take(order, 8) == [1, 2, 4, 1, 2, 4, 1, 2]

    # Of one class, in the order in which they came: 1, 3 and 6 up to 1 MiB, 2 and 5 up to 16 MiB, 4 above.
    for class <- [[1, 3, 6], [2, 5], [4]] do
      assert order |> Enum.filter(&(&1 in class)) |> Enum.dedup() == class
    end

    assert for({:sent, key} <- notes, do: key) == [1, 3, 2, 6, 4, 5]
  end

  test "the place of a dropped message is the next one's" do
    writer =
      for n <- 1..3, reduce: writer(stream_window: 2_000) do
        writer -> Writer.response(writer, n, "h", [:binary.copy(<<n>>, 70_000)], 70_000)
      end

    {batch, _size, _notes, writer} = Writer.take(writer, 1_000_000)
    assert batch |> frames() |> order() == [1, 1]
    {:partial, writer} = Writer.drop(writer, 1)
    {:unsent, writer} = Writer.drop(writer, 2)
    {batch, _size, _notes, writer} = Writer.take(writer, 1_000_000)
    assert batch |> frames() |> order() == [3, 3]
    {:ok, writer} = Writer.window(writer, 3, 1_000_000)
    {_batch, _size, [{:sent, 3}], writer} = Writer.take(writer, 1_000_000)
    assert {Writer.count(writer), Writer.bytes(writer)} == {0, 0}
  end

  test "a stream without window waits, and does not keep the others" do
    writer =
      writer(stream_window: 500)
      |> Writer.response(1, "h", [:binary.copy("a", 800)], 800)
      |> Writer.response(2, "h", ["b"], 1)

    {batch, _size, _notes, writer} = Writer.take(writer, 100_000)
    assert [{0x11, 1, 0, false, _}, {0x11, 2, 0, true, "hb"}] = frames(batch)
    assert {[], 0, [], writer} = Writer.take(writer, 100_000)
    {:ok, writer} = Writer.window(writer, 1, 300)
    assert {batch, _size, [{:sent, 1}], _writer} = Writer.take(writer, 100_000)
    assert [{0x12, 1, 1, true, payload}] = frames(batch)
    assert byte_size(payload) == 300
  end

  test "without connection window only control frames and empty messages go" do
    writer =
      writer(connection_window: 10)
      |> Writer.response(1, "h", [], 0)
      |> Writer.response(2, "h", [:binary.copy("a", 11)], 11)

    {batch, _size, _notes, writer} = Writer.take(writer, 100_000)
    assert [{0x11, 1, 0, true, "h"}, {0x11, 2, 0, false, _}] = frames(batch)
    writer = Writer.control(writer, <<0::24, 0x80, 0, 0::24, 0::32>>)
    assert {batch, 12, [], writer} = Writer.take(writer, 100_000)
    assert [{0x80, 0, 0, false, ""}] = frames(batch)
    {:ok, writer} = Writer.window(writer, 0, 1)
    assert {_batch, 13, [{:sent, 2}], _writer} = Writer.take(writer, 100_000)
  end

  test "windows that grow too far are an error, those of streams that are over are not" do
    writer = Writer.response(writer(), 1, "h", ["a"], 1)
    assert Writer.window(writer, 0, 0x7FFF_FFFF) == :error
    assert Writer.window(writer, 1, 0x7FFF_FFFF) == :error
    assert {:ok, ^writer} = Writer.window(writer, 2, 0x7FFF_FFFF)
  end

  test "dropped messages say how far they came, and are not sent on" do
    writer =
      writer()
      |> Writer.request(:a, "h", [:binary.copy("a", 70_000)], 70_000)
      |> Writer.request(:b, "h", [:binary.copy("b", 70_000)], 70_000)

    {_batch, _size, _notes, writer} = Writer.take(writer, 100)
    assert {:partial, writer} = Writer.drop(writer, :a)
    assert {:unsent, writer} = Writer.drop(writer, :b)
    assert {:sent, writer} = Writer.drop(writer, :c)
    assert {[], 0, [], writer} = Writer.take(writer, 100_000)
    assert Writer.bytes(writer) == 0
    assert Writer.count(writer) == 0
  end

  test "when the stream ids are used up, requests stay" do
    writer =
      writer(next_stream: 0xFFFF_FFFF)
      |> Writer.request(:a, "h", ["a"], 1)
      |> Writer.request(:b, "h", ["b"], 1)

    assert {_batch, _size, [{:opened, :a, 0xFFFF_FFFF}, {:sent, :a}], writer} =
             Writer.take(writer, 1_000)

    assert Writer.exhausted?(writer)
    assert {:unsent, _writer} = Writer.drop(writer, :b)
  end

  test "small messages that keep coming do not starve a bulk one" do
    bulk =
      Writer.response(
        writer(stream_window: 10_000_000, connection_window: 0x7FFF_FFFF),
        1,
        "h",
        [:binary.copy("a", 100_000)],
        100_000
      )

    Enum.reduce_while(2..1_000, bulk, fn n, writer ->
      writer = Writer.response(writer, n, "h", [:binary.copy("b", 60_000)], 60_000)
      {_batch, _size, notes, writer} = Writer.take(writer, 50_000)
      if {:sent, 1} in notes, do: {:halt, :sent}, else: {:cont, writer}
    end)
    |> then(&assert &1 == :sent)
  end

  # Messages of any size with any grants: every byte arrives in order, no window is ever exceeded,
  # ids of requests grow, and once windows are granted everything is sent.
  test "property: bytes in order, windows kept, nothing forgotten" do
    for round <- 1..150 do
      :rand.seed(:exsss, {round, 2, 3})
      stream_window = :rand.uniform(300_000)
      connection_window = :rand.uniform(900_000)
      crc = if rem(round, 2) == 0, do: &:erlang.crc32/1

      writer =
        writer(
          block: :rand.uniform(20_000),
          stream_window: stream_window,
          connection_window: connection_window,
          crc: crc
        )

      messages = for key <- 1..:rand.uniform(12), into: %{}, do: {key, pieces(round + key)}

      writer =
        Enum.reduce(messages, writer, fn {key, pieces}, writer ->
          Writer.request(writer, key, "head", pieces, :erlang.iolist_size(pieces))
        end)

      peer = %{
        connection: connection_window,
        windows: %{},
        start: stream_window,
        got: %{},
        keys: %{},
        last: 0
      }

      peer = pump(writer, peer, 0)

      for {key, pieces} <- messages do
        {stream, ^key} = Enum.find(peer.keys, fn {_stream, known} -> known == key end)
        assert {:done, bytes} = peer.got[stream]
        assert bytes == "head" <> IO.iodata_to_binary(pieces)
      end
    end
  end

  defp pieces(_seed) do
    for _ <- 0..:rand.uniform(4),
        do: :binary.copy(<<:rand.uniform(255)>>, Enum.random([0, 1, 7, 3_000, 40_000, 400_000]))
  end

  defp pump(writer, peer, rounds) when rounds < 20_000 do
    {batch, size, notes, writer} = Writer.take(writer, Enum.random([1, 5_000, 400_000]))
    assert size == IO.iodata_length(batch)
    peer = Enum.reduce(notes, peer, &note/2)
    peer = batch |> frames() |> Enum.reduce(peer, &take/2)

    if Writer.count(writer) == 0 do
      assert Writer.bytes(writer) == 0
      peer
    else
      {writer, peer} = grant(writer, peer)
      pump(writer, peer, rounds + 1)
    end
  end

  defp note({:opened, key, stream}, peer) do
    assert stream > peer.last

    %{
      peer
      | last: stream,
        keys: Map.put(peer.keys, stream, key),
        windows: Map.put(peer.windows, stream, peer.start)
    }
  end

  defp note({:sent, _key}, peer), do: peer

  defp take({type, stream, seq, last?, payload}, peer) do
    {so_far, next, head} = Map.get(peer.got, stream, {"", 0, 4})
    assert type == if(seq == 0, do: 0x10, else: 0x12)
    assert seq == next
    size = byte_size(payload) - if(seq == 0, do: head, else: 0)
    assert size > 0 or last?

    peer = %{
      peer
      | connection: peer.connection - size,
        windows: Map.update!(peer.windows, stream, &(&1 - size))
    }

    assert peer.connection >= 0
    assert peer.windows[stream] >= 0
    bytes = so_far <> payload

    %{
      peer
      | got: Map.put(peer.got, stream, if(last?, do: {:done, bytes}, else: {bytes, next + 1, head}))
    }
  end

  defp grant(writer, peer) do
    n = :rand.uniform(300_000)
    {:ok, writer} = Writer.window(writer, 0, n)
    peer = %{peer | connection: peer.connection + n}

    Enum.reduce(peer.windows, {writer, peer}, fn {stream, _left}, {writer, peer} ->
      n = :rand.uniform(100_000)
      {:ok, writer} = Writer.window(writer, stream, n)
      {writer, %{peer | windows: Map.update!(peer.windows, stream, &(&1 + n))}}
    end)
  end
end
