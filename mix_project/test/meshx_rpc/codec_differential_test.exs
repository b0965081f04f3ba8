defmodule MeshxRpc.CodecDifferentialTest do
  # Both codecs get the same bytes, valid, odd and damaged, in the same pieces, with the same calls in between; every
  # event, every byte to send and every counter must be the same.
  use ExUnit.Case, async: true

  import MeshxRpc.CodecPeer
  alias MeshxRpc.Codec

  @runs 1_500

  test "both codecs say the same to valid and to damaged streams" do
    seed = ExUnit.configuration()[:seed]

    ends =
      for run <- 1..@runs do
        :rand.seed(:exsss, {seed, run, 1})
        run(role(), "run #{run} of seed #{seed}")
      end

    # The generator must reach both: connections that live and connections that end.
    assert Enum.count(ends, &(&1 == :ok)) > @runs / 20
    assert Enum.count(ends, &(&1 == :error)) > @runs / 20
  end

  defp role, do: pick([:client, :server])

  defp run(role, name) do
    options =
      options(
        role: role,
        max_message: 3_000,
        max_bytes: pick([3_500, 6_000]),
        max_streams: pick([2, 30]),
        stream_window: pick([40, 700, 5_000]),
        connection_window: pick([300, 3_000, 50_000])
      )

    agreed = %{checksum: pick([0, 1, 1, 2]), blk_max_size: pick([10, 300, 65_536])}
    pair = for codec <- [Codec.Nif, Codec.Elixir], do: {codec, up(codec, options, agreed)}
    wire = stream(role, agreed) |> damage()
    steps(pair, pieces(wire), role, name)
  end

  defp steps(_pair, [], _role, _name), do: :ok

  defp steps(pair, [piece | pieces], role, name) do
    [a, b] = for {codec, decoder} <- pair, do: outcome(codec, codec.feed(decoder, piece))
    assert elem(a, 1) == elem(b, 1), name

    if elem(elem(a, 1), 0) == :error do
      :error
    else
      call = call(role)
      steps([apply_call(a, call), apply_call(b, call)], pieces, role, name)
    end
  end

  defp outcome(codec, {:ok, decoder, events, out}),
    do: {{codec, decoder}, {:ok, events, IO.iodata_to_binary(out), codec.stats(decoder)}}

  defp outcome(codec, {:error, decoder, events, out, cause, text}),
    do:
      {{codec, decoder},
       {:error, events, IO.iodata_to_binary(out), cause, text, codec.stats(decoder)}}

  defp call(:client) do
    first = number(12)
    pick([nil, {:open, [first, min(first + pick([0, 2]), 12)]}, {:open, [12, 12]}, release()])
  end

  defp call(:server), do: pick([nil, release()])
  defp release, do: {:release, [for(_ <- 1..pick([1, 1, 3]), do: number(12))]}

  defp apply_call({pair, _}, nil), do: pair

  defp apply_call({{codec, decoder}, _}, {name, arguments}),
    do: {codec, apply(codec, name, [decoder | arguments])}

  ## Streams

  # Messages of a few streams, their frames interleaved, with control frames and odd ones between.
  defp stream(role, agreed) do
    type = if role == :server, do: :request, else: :response
    size = min(agreed.blk_max_size, 500)

    queues =
      for stream <- 1..number(6) do
        bytes = :crypto.strong_rand_bytes(pick([0, number(30), number(900), number(4_000)]))
        message(type, stream, bytes, size, crc: Enum.at([false, true, :crc32c], agreed.checksum))
      end

    interleave(queues, [])
  end

  defp interleave([], frames), do: Enum.reverse(frames)

  defp interleave(queues, frames) do
    # Mostly the first, so that ids mostly grow.
    index = if number(3) == 1, do: number(length(queues)) - 1, else: 0
    {[frame | rest], queues} = List.pop_at(queues, index)
    queues = if rest == [], do: queues, else: List.insert_at(queues, index, rest)
    frames = if number(6) == 1, do: [odd() | frames], else: frames
    interleave(queues, [frame | frames])
  end

  defp odd do
    stream = number(8)

    pick([
      control(:window, pick([0, stream]), <<pick([1, 500, 0x7FFFFFFF])::32>>),
      control(:ping, 0, "12345678"),
      control(:pong, 0, "12345678"),
      control(:reset, stream, <<number(16)::16, "why">>),
      control(:cancel, stream, ""),
      control(:goaway, 0, <<stream::32, number(16)::16, "bye">>),
      control(0x7F + number(100), stream, "extension"),
      request(stream, "again"),
      response(stream, "again"),
      block(:data, stream, "stray", seq: number(3), fin: pick([true, false]))
    ])
  end

  defp damage(frames) do
    case number(8) do
      1 -> frames |> drop() |> IO.iodata_to_binary()
      2 -> frames |> double() |> IO.iodata_to_binary()
      3 -> IO.iodata_to_binary(frames) |> flip(number(3))
      4 -> IO.iodata_to_binary(frames) |> cut()
      _ -> IO.iodata_to_binary(frames)
    end
  end

  defp drop(frames), do: List.delete_at(frames, number(length(frames)) - 1)

  defp double(frames) do
    frame = pick(frames)
    List.insert_at(frames, number(length(frames)), frame)
  end

  defp flip(wire, 0), do: wire

  defp flip(wire, times) do
    at = number(byte_size(wire)) - 1
    {before, byte, rest} = at(wire, at)
    flip(<<before::binary, Bitwise.bxor(byte, number(255)), rest::binary>>, times - 1)
  end

  defp cut(wire) do
    at = number(byte_size(wire)) - 1
    {before, _, rest} = at(wire, at)
    before <> rest
  end

  defp pieces(""), do: []

  defp pieces(wire) do
    size = min(pick([1, number(20), number(400), number(5_000)]), byte_size(wire))
    [binary_part(wire, 0, size) | pieces(binary_part(wire, size, byte_size(wire) - size))]
  end

  defp number(max), do: :rand.uniform(max)
  defp pick(list), do: Enum.random(list)
end
