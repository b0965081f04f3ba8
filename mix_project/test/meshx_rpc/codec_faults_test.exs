defmodule MeshxRpc.CodecFaultsTest do
  # What a codec makes of a conversation that arrives otherwise than it was sent: it may end a stream or the connection,
  # but it never hands over a message that was not sent, nor one twice.
  use ExUnit.Case, async: true
  alias MeshxRpc.{Case, CodecPeer}

  # A server's conversation: two long messages with their frames in turn, a short one between them, an empty one.
  @sent %{
    1 => :binary.copy("abcdefgh", 20),
    2 => :binary.copy("12345678", 17),
    3 => "short",
    4 => ""
  }

  defp frames(crc) do
    one = CodecPeer.message(:request, 1, @sent[1], 40, crc: crc)
    two = CodecPeer.message(:request, 2, @sent[2], 40, crc: crc)
    {first, rest} = Enum.split(one, 1)
    three = CodecPeer.request(3, @sent[3], crc: crc)
    four = CodecPeer.request(4, @sent[4], crc: crc)
    {begun, later} = Enum.split(two, 1)
    first ++ begun ++ [three, four] ++ Enum.concat(zip(rest, later))
  end

  defp zip([], rest), do: [rest]
  defp zip(rest, []), do: [rest]
  defp zip([a | one], [b | two]), do: [[a, b] | zip(one, two)]

  defp agreed(crc), do: %{checksum: if(crc, do: 1, else: 0), blk_max_size: 16_384}

  defp cut(""), do: []

  defp cut(bytes) do
    n = min(:rand.uniform(60), byte_size(bytes))
    {chunk, rest} = :erlang.split_binary(bytes, n)
    [chunk | cut(rest)]
  end

  # What it hands over, however the bytes are cut.
  defp received(codec, crc, chunks) do
    Enum.reduce_while(chunks, {CodecPeer.up(codec, [], agreed(crc)), []}, fn chunk,
                                                                             {decoder, seen} ->
      case codec.feed(decoder, chunk) do
        {:ok, decoder, events, _out} -> {:cont, {decoder, seen ++ events}}
        {:error, decoder, events, _out, _cause, _text} -> {:halt, {decoder, seen ++ events}}
      end
    end)
    |> elem(1)
  end

  defp messages(events),
    do: for({:request, stream, :call, 500, "echo", 1, bytes} <- events, do: {stream, bytes})

  # Any wrong message, also one with another name, kind or flag, is not among these.
  defp sound!(events, what) do
    requests = for event <- events, elem(event, 0) == :request, do: event
    messages = messages(events)
    assert length(messages) == length(requests), "#{what}: #{inspect(requests -- messages)}"
    assert messages == Enum.uniq_by(messages, &elem(&1, 0)), "#{what}: a message came twice"
    for {stream, bytes} <- messages, do: assert(bytes == @sent[stream], "#{what}: stream #{stream}")
    messages
  end

  for codec <- Case.codecs() do
    describe "#{inspect(codec)}" do
      @describetag codec: codec

      test "undisturbed, all of it arrives", %{codec: codec} do
        for crc <- [true, false] do
          events = received(codec, crc, [frames(crc)] |> Enum.map(&IO.iodata_to_binary/1))
          assert events |> sound!("whole") |> Map.new() == @sent
        end
      end

      test "any split of the stream gives the same", %{codec: codec} do
        whole = IO.iodata_to_binary(frames(true))
        expected = received(codec, true, [whole])

        for at <- 1..(byte_size(whole) - 1) do
          {left, right} = :erlang.split_binary(whole, at)
          assert received(codec, true, [left, right]) == expected, "split at #{at}"
        end

        bytes = for <<byte <- whole>>, do: <<byte>>
        assert received(codec, true, bytes) == expected

        for _ <- 1..200 do
          assert received(codec, true, cut(whole)) == expected
        end
      end

      test "every bit that is flipped is noticed where there are checksums", %{codec: codec} do
        whole = IO.iodata_to_binary(frames(true))

        for at <- 0..(byte_size(whole) - 1), bit <- [0, 3, 7] do
          {before, byte, rest} = CodecPeer.at(whole, at)
          flipped = <<before::binary, Bitwise.bxor(byte, Bitwise.bsl(1, bit)), rest::binary>>
          messages = sound!(received(codec, true, [flipped]), "bit #{bit} of byte #{at}")
          # What the bit was part of is missing, and nothing says that it arrived.
          assert length(messages) < 4, "bit #{bit} of byte #{at} was not noticed"
        end
      end

      test "truncated anywhere, what is whole arrives and no more", %{codec: codec} do
        whole = IO.iodata_to_binary(frames(true))

        for at <- 0..(byte_size(whole) - 1) do
          messages = sound!(received(codec, true, [binary_part(whole, 0, at)]), "cut at #{at}")
          assert length(messages) < 4
        end
      end

      test "frames that are left out, doubled, swapped or too long harm no message but their own",
           %{
             codec: codec
           } do
        for crc <- [true, false] do
          frames = frames(crc)
          last = length(frames) - 1

          for n <- 0..last do
            frame = Enum.at(frames, n)
            <<_len::24, tail::binary>> = frame

            faults = [
              {"left out", List.delete_at(frames, n)},
              {"doubled", List.insert_at(frames, n, frame)},
              {"at the end again", frames ++ [frame]},
              {"at the front", [frame | List.delete_at(frames, n)]},
              {"too long", List.replace_at(frames, n, <<0xFFFFFF::24, tail::binary>>)}
            ]

            # Bytes inside a frame are only guarded by its checksum.
            torn = [
              {"one byte more", List.replace_at(frames, n, frame <> "x")},
              {"cut short", List.replace_at(frames, n, binary_part(frame, 0, byte_size(frame) - 1))}
            ]

            for {what, faulty} <- if(crc, do: faults ++ torn, else: faults) do
              events = received(codec, crc, [IO.iodata_to_binary(faulty)])
              sound!(events, "frame #{n} #{what}, crc #{crc}")
            end
          end

          for n <- 0..(last - 1) do
            {left, [a, b | right]} = Enum.split(frames, n)
            events = received(codec, crc, [IO.iodata_to_binary(left ++ [b, a] ++ right)])
            sound!(events, "frames #{n} and #{n + 1} swapped, crc #{crc}")
          end
        end
      end
    end
  end
end
