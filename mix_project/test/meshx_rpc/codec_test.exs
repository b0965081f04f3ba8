defmodule MeshxRpc.CodecTest do
  # Not async: memory of the whole VM is measured.
  use ExUnit.Case, async: false

  import MeshxRpc.CodecPeer
  alias MeshxRpc.Codec

  @no_events {[], ""}

  # Events and bytes of a feed that must succeed.
  defp fed(codec, decoder, bytes) do
    assert {:ok, decoder, events, out} = codec.feed(decoder, bytes)
    {decoder, {events, IO.iodata_to_binary(out)}}
  end

  defp reset_frame(stream, cause, text), do: control(:reset, stream, <<cause::16, text::binary>>)

  # The stream ends with this cause, and both sides hear of it.
  defp assert_reset(codec, decoder, bytes, stream, cause, number, text) do
    {decoder, {events, out}} = fed(codec, decoder, bytes)
    assert {:stream_error, ^stream, ^cause, seen} = List.last(events)
    assert seen =~ text
    assert String.ends_with?(out, reset_frame(stream, number, seen))
    decoder
  end

  # The connection ends, says why as its last words, holds nothing and takes nothing any more.
  defp assert_end(codec, decoder, bytes, cause, text) do
    assert {:error, decoder, _events, out, ^cause, seen} = codec.feed(decoder, bytes)
    assert seen =~ text
    assert String.ends_with?(IO.iodata_to_binary(out), seen)
    assert %{open: 0, reserved: 0} = codec.stats(decoder)
    assert {:error, _, [], again, ^cause, ^seen} = codec.feed(decoder, "more")
    assert IO.iodata_length(again) == 0
  end

  test "the NIF is loaded, and it is what this VM uses" do
    assert Codec.Nif.load() == :ok
    assert Codec.impl() == Codec.Nif
  end

  test "the application's environment can name another codec" do
    Application.put_env(:meshx, :rpc_codec, Codec.Elixir)
    on_exit(fn -> Application.delete_env(:meshx, :rpc_codec) end)
    assert Codec.impl() == Codec.Elixir
  end

  for codec <- [Codec.Nif, Codec.Elixir] do
    describe inspect(codec) do
      @describetag codec: codec

      test "takes a request, byte for byte", %{codec: codec} do
        wire =
          <<0, 0, 22, 0x10, 0x81, 0, 0, 0, 0, 0, 0, 7, 1, 0, 0, 1, 0xF4, 0, 0, 0, 0, 0, 0, 0, 3, 1,
            4, "echo", "abc", 0x03, 0xA8, 0xB2, 0x8A>>

        assert request(7, "abc") == wire
        {_, fed} = fed(codec, up(codec), wire)
        assert fed == {[{:request, 7, :call, 500, "echo", 1, "abc"}], ""}
      end

      test "goes through both handshakes", %{codec: codec} do
        server = codec.new(options())
        proof = :binary.copy("p", 32)
        {server, {[{:hello, "fields"}], ""}} = fed(codec, server, control(:hello, 0, "fields"))
        {server, {[{:auth, ^proof}], ""}} = fed(codec, server, control(:auth, 0, proof))
        assert_end(codec, server, request(1, ""), :protocol, "at the wrong time")

        client = codec.new(options(role: :client))

        {client, {events, ""}} =
          fed(codec, client, control(:hello_ack, 0, "a") <> control(:ready, 0, ""))

        assert events == [{:hello_ack, "a"}, :ready]
        assert_end(codec, client, control(:ready, 0, ""), :protocol, "at the wrong time")
      end

      test "refuses everything else before the handshake is done", %{codec: codec} do
        for frame <- [
              request(1, ""),
              control(:ping, 0, "12345678"),
              control(:window, 0, <<1::32>>),
              control(:reset, 1, <<5::16>>),
              control(0x80, 0, ""),
              control(:goaway, 0, <<0::48>>),
              control(:auth, 0, :binary.copy("p", 32))
            ] do
          assert_end(codec, codec.new(options()), frame, :protocol, "at the wrong time")
        end

        client = codec.new(options(role: :client))
        assert_end(codec, client, control(:ready, 0, ""), :protocol, "at the wrong time")
      end

      test "reads nothing after REFUSED", %{codec: codec} do
        wire = control(:refused, 0, <<9::16, "no">>) <> :binary.copy(<<255>>, 50)
        {decoder, fed} = fed(codec, codec.new(options()), wire)
        assert fed == {[{:refused, :auth, "no"}], ""}
        assert {_, @no_events} = fed(codec, decoder, "anything")
      end

      test "any split of the stream gives the same", %{codec: codec} do
        wire =
          [
            request(1, ""),
            message(:request, 2, :crypto.strong_rand_bytes(5_000), 700),
            control(:ping, 0, "12345678"),
            control(0x99, 3, "an extension"),
            request(3, "x")
          ]
          |> IO.iodata_to_binary()

        {whole, wanted} = fed(codec, up(codec), wire)

        for size <- [1, 2, 7, 12, 100, 713, 4_096] do
          {decoder, events, out} =
            for piece <- chunks(wire, size), reduce: {up(codec), [], ""} do
              {decoder, events, out} ->
                {decoder, {new, more}} = fed(codec, decoder, piece)
                {decoder, events ++ new, out <> more}
            end

          assert {events, out} == wanted
          assert codec.stats(decoder) == codec.stats(whole)
        end
      end

      test "a corrupt byte of a block costs its stream alone", %{codec: codec} do
        good = request(1, "argument")

        for at <- 12..(byte_size(good) - 1) do
          {before, byte, rest} = at(good, at)
          bad = <<before::binary, Bitwise.bxor(byte, 0x10), rest::binary>>
          decoder = assert_reset(codec, up(codec), bad, 1, :invalid_cks, 2, "does not fit")
          assert {_, {[{:request, 2, _, _, _, _, "ok"}], _}} = fed(codec, decoder, request(2, "ok"))
        end
      end

      test "a checksum is there exactly when agreed", %{codec: codec} do
        assert_reset(
          codec,
          up(codec),
          request(1, "", crc: false),
          1,
          :invalid_cks,
          2,
          "no checksum"
        )

        other = up(codec, %{}, %{checksum: 2, blk_max_size: 16_384})
        assert_reset(codec, other, request(1, ""), 1, :invalid_cks, 2, "does not fit")

        assert {_, {[{:request, 3, _, _, _, _, "ok"}], _}} =
                 fed(codec, other, request(3, "ok", crc: :crc32c))

        without = up(codec, %{}, %{checksum: 0, blk_max_size: 16_384})
        assert_reset(codec, without, request(1, ""), 1, :invalid_cks, 2, "none was agreed")
      end

      test "refuses lengths from the header alone", %{codec: codec} do
        assert_end(codec, up(codec), header(65_537, 0x80), :too_large, "65537 bytes")
        assert_end(codec, up(codec), header(16_385, :data, 0, 1), :too_large, "at most 16384")

        assert_end(
          codec,
          codec.new(options()),
          header(4_097, :hello),
          :protocol,
          "0 to 4096 wanted"
        )

        assert_end(codec, up(codec), header(9, :ping), :protocol, "8 to 8 wanted")
        wide = block(:request, 1, request_payload(16_385, :binary.copy("x", 16_385)))
        assert_end(codec, up(codec), wide, :too_large, "at most 16384")
      end

      test "refuses headers that make no sense", %{codec: codec} do
        assert_end(codec, up(codec), header(0, 0x7F), :protocol, "127 is unknown")
        assert_end(codec, up(codec), header(8, :ping, 1), :protocol, "flags 1")
        assert_end(codec, up(codec), header(0, :data, 2, 1), :protocol, "flags 2")
        assert_end(codec, up(codec), header(8, :ping, 0, 1), :protocol, "on stream 1")
        assert_end(codec, up(codec), header(16, :request, 0, 0), :protocol, "on stream 0")
        assert_end(codec, up(codec), header(8, :ping, 0, 0, 1), :protocol, "sequence number 1")
        assert_end(codec, up(codec), header(10, :response, 0, 1), :protocol, "not for a client")
        client = up(codec, %{role: :client})
        assert_end(codec, client, header(16, :request, 0, 1), :protocol, "not for a server")
      end

      test "gaps and wrong lengths end the stream", %{codec: codec} do
        open = block(:request, 1, request_payload(10, "01234"), fin: false)

        for {tail, cause, number, text} <- [
              {block(:data, 1, "56789", seq: 2), :sequence, 6, "block 2, block 1 wanted"},
              {block(:data, 1, "56789", seq: 0), :sequence, 6, "block 0"},
              {block(:data, 1, "567890", seq: 1), :protocol, 1, "11 bytes of a message of 10"},
              {block(:data, 1, "5678", seq: 1), :protocol, 1, "ended after 9"},
              {block(:data, 1, "", seq: 1, fin: false), :protocol, 1, "empty block"}
            ] do
          {decoder, @no_events} = fed(codec, up(codec), open)
          assert %{reserved: 10, open: 1} = codec.stats(decoder)
          decoder = assert_reset(codec, decoder, tail, 1, cause, number, text)
          assert %{reserved: 0, open: 0} = codec.stats(decoder)
        end
      end

      test "data after the end ends the stream, and the budget waits for its user", %{codec: codec} do
        {decoder, _} = fed(codec, up(codec), request(1, "0123456789"))

        decoder =
          assert_reset(codec, decoder, block(:data, 1, "x", seq: 1), 1, :protocol, 1, "without")

        assert %{reserved: 10} = codec.stats(decoder)
        assert %{reserved: 0, open: 0} = codec.stats(codec.release(decoder, [1]))
      end

      test "what does not fit the limits is not kept", %{codec: codec} do
        huge = block(:request, 1, request_payload(0xFFFFFFFFFFFFFFFF, ""), fin: false)
        assert_reset(codec, up(codec), huge, 1, :too_large, 4, "at most 100000")
        half = &block(:request, &1, request_payload(80_000, ""), fin: false)
        {decoder, @no_events} = fed(codec, up(codec), half.(1))
        decoder = assert_reset(codec, decoder, half.(2), 2, :full, 3, "byte budget")
        {decoder, @no_events} = fed(codec, codec.release(decoder, [1]), half.(3))
        {decoder, _} = fed(codec, decoder, Enum.map_join(4..6, &request(&1, "")))
        assert_reset(codec, decoder, request(7, ""), 7, :full, 3, "too many streams")
      end

      test "windows bind the peer", %{codec: codec} do
        data = block(:request, 1, request_payload(1_000, :binary.copy("x", 101)), fin: false)

        assert_end(
          codec,
          up(codec, %{stream_window: 100}),
          data,
          :protocol,
          "stream's window held 100"
        )

        assert_end(
          codec,
          up(codec, %{connection_window: 100}),
          data,
          :protocol,
          "connection's window held 100"
        )

        for n <- [0, 0x80000000],
            do: assert_end(codec, up(codec), control(:window, 0, <<n::32>>), :protocol, "grows")

        assert_raise ArgumentError, fn -> codec.new(options(stream_window: 0)) end
        assert_raise ArgumentError, fn -> codec.new(options(connection_window: 0x80000000)) end
      end

      test "grants in halves of the window, and never late", %{codec: codec} do
        decoder = up(codec, %{stream_window: 100, connection_window: 400})
        first = block(:request, 1, request_payload(180, :binary.copy("x", 50)), fin: false)
        {decoder, {[], out}} = fed(codec, decoder, first)
        assert out == control(:window, 1, <<50::32>>)

        {decoder, {[], out}} =
          fed(codec, decoder, block(:data, 1, :binary.copy("x", 50), seq: 1, fin: false))

        assert out == control(:window, 1, <<50::32>>)

        {decoder, @no_events} =
          fed(codec, decoder, block(:data, 1, :binary.copy("x", 60), seq: 2, fin: false))

        {decoder, {[_], ""}} = fed(codec, decoder, block(:data, 1, :binary.copy("x", 20), seq: 3))
        {_, {[_], out}} = fed(codec, decoder, request(2, :binary.copy("x", 20)))
        assert out == control(:window, 0, <<200::32>>)
      end

      test "ignores what was on its way to a stream that is over, and nothing beyond", %{
        codec: codec
      } do
        client =
          codec.release(codec.open(up(codec, %{role: :client, stream_window: 100}), 1, 1), [1])

        first = block(:response, 1, response_payload(500, :binary.copy("x", 60)), fin: false)
        {client, @no_events} = fed(codec, client, first)

        {client, @no_events} =
          fed(codec, client, block(:data, 1, :binary.copy("x", 40), seq: 1, fin: false))

        assert_end(
          codec,
          client,
          block(:data, 1, "x", seq: 2),
          :protocol,
          "on a stream that is over"
        )
      end

      test "frames of streams that never were end the connection", %{codec: codec} do
        for frame <- [block(:data, 1, "x"), control(:window, 1, <<1::32>>)] do
          assert_end(codec, up(codec), frame, :unknown_stream, "stream 1 was never opened")
          # Nor is one that was left out.
          {decoder, _} = fed(codec, up(codec), request(2, ""))
          assert_end(codec, decoder, frame, :unknown_stream, "stream 1 was never opened")
        end

        assert_end(
          codec,
          up(codec, %{role: :client}),
          response(1, ""),
          :unknown_stream,
          "never opened"
        )
      end

      test "an id is used once; one that was left out may come later", %{codec: codec} do
        {decoder, _} = fed(codec, up(codec), request(5, ""))
        assert codec.skipped(decoder) == [1, 2, 3, 4]
        assert_end(codec, decoder, request(5, ""), :protocol, "after request 5")

        {decoder, _} = fed(codec, up(codec), request(5, ""))
        {decoder, {[{:request, 4, _, _, _, _, ""}], ""}} = fed(codec, decoder, request(4, ""))
        assert codec.skipped(decoder) == [1, 2, 3]
        assert_end(codec, decoder, request(4, ""), :protocol, "request 4 after request 5")
      end

      test "CANCEL and RESET of an id that was left out take it", %{codec: codec} do
        for frame <- [&control(:cancel, &1, ""), &control(:reset, &1, <<5::16>>)],
            stream <- [2, 9] do
          {decoder, _} = fed(codec, up(codec), request(5, ""))
          {decoder, @no_events} = fed(codec, decoder, frame.(stream))
          refute stream in codec.skipped(decoder)
          assert_end(codec, decoder, request(stream, ""), :protocol, "request #{stream} after")
        end
      end

      test "at most 1024 ids are left out", %{codec: codec} do
        {decoder, _} = fed(codec, up(codec), request(1_025, ""))
        assert length(codec.skipped(decoder)) == 1_024

        {decoder, _} =
          fed(codec, decoder, request(1_026, "") <> request(7, "") <> request(1_028, ""))

        assert_end(codec, decoder, request(1_030, ""), :protocol, "1025 request ids were left out")
        # However far the id is, at no cost.
        assert_end(codec, up(codec), request(0xFFFF_FFFF, ""), :protocol, "at most 1024 wanted")
        assert_end(codec, up(codec), control(:cancel, 2_000, ""), :protocol, "at most 1024 wanted")
      end

      test "last words reset what was left out", %{codec: codec} do
        {decoder, _} = fed(codec, up(codec), request(3, ""))
        {:error, _, [], out, :protocol, _} = codec.feed(decoder, request(3, ""))

        resets = for stream <- [1, 2], do: control(:reset, stream, <<12::16, "not run">>)
        assert String.starts_with?(IO.iodata_to_binary(out), IO.iodata_to_binary(resets))
      end

      test "connections share a budget, and give back what they had", %{codec: codec} do
        budget = codec.budget(100)
        counter = :counters.new(2, [])
        options = %{budget: {budget, counter}}
        half = block(:request, 1, request_payload(60, "x"), fin: false)
        {one, @no_events} = fed(codec, up(codec, options), half)
        assert codec.budget_used(budget) == 60
        other = assert_reset(codec, up(codec, options), half, 1, :full, 3, "byte budget")
        {other, _} = fed(codec, other, request(2, :binary.copy("y", 40)))
        assert codec.budget_used(budget) == 100
        _ = codec.release(other, [2])
        assert codec.budget_used(budget) == 60
        {:error, _, _, _, :protocol, _} = codec.feed(one, request(1, ""))
        assert codec.budget_used(budget) == 0
      end

      test "responses reach the client, each once", %{codec: codec} do
        client = codec.open(up(codec, %{role: :client}), 1, 3)

        wire =
          for {status, stream} <- [{0, 1}, {1, 2}, {2, 3}], into: "" do
            block(:response, stream, response_payload(2, "ok", status))
          end

        {client, {events, ""}} = fed(codec, client, wire)

        assert [
                 {:response, 1, :result, 1, "ok"},
                 {:response, 2, :error, 1, "ok"},
                 {:response, 3, :started, 1, "ok"}
               ] = events

        assert %{reserved: 0, open: 0} = codec.stats(client)
        # Whoever answers a second time does so in vain, as long as it is whole.
        {client, @no_events} = fed(codec, client, response(1, "once more"))
        assert_end(codec, client, block(:data, 1, "x"), :protocol, "on a stream that is over")
      end

      test "causes without a name stay numbers", %{codec: codec} do
        {decoder, _} = fed(codec, up(codec), request(1, ""))

        wire =
          control(:reset, 1, <<0x1234::16, "why">>) <> control(:goaway, 0, <<7::32, 12::16, "bye">>)

        {_, {events, ""}} = fed(codec, decoder, wire)
        assert events == [{:reset, 1, 0x1234, "why"}, {:goaway, 7, :shutdown, "bye"}]
      end

      test "floods of frames that bring nothing end the connection", %{codec: codec} do
        for frame <- [
              control(:ping, 0, "12345678"),
              control(:pong, 0, "12345678"),
              control(:cancel, 1, ""),
              control(:window, 1, <<1::32>>),
              block(:data, 1, "", seq: 1),
              control(0x99, 0, "what")
            ] do
          {decoder, _} = fed(codec, up(codec), request(1, ""))
          decoder = codec.release(decoder, [1])

          # One feed looks at the clock once in plain Elixir, often in the NIF: far more than could be refilled.
          assert_end(codec, decoder, :binary.copy(frame, 400_000), :protocol, "control frames")
        end
      end

      test "a stream that was reset is over though its budget is held", %{codec: codec} do
        {decoder, _} = fed(codec, up(codec), request(1, "x") <> control(:reset, 1, <<5::16>>))
        assert %{reserved: 1} = codec.stats(decoder)
        {decoder, @no_events} = fed(codec, decoder, block(:data, 1, "", seq: 1))
        assert_end(codec, decoder, block(:data, 1, "x", seq: 1), :protocol, "0 can be on their way")
      end

      test "streams in error are limited, overload is not", %{codec: codec} do
        bad = for stream <- 1..60_000, into: "", do: request(stream, "", seq: 1)
        assert_end(codec, up(codec), bad, :protocol, "control frames")
        many = for stream <- 1..20_000, into: "", do: request(stream, "")
        assert {_, {_, _}} = fed(codec, up(codec, %{max_streams: 1}), many)

        # The client's side of an overload: each of these answers a request.
        client = up(codec, %{role: :client, max_streams: 60_000})
        client = codec.open(client, 1, 20_000)
        resets = for stream <- 1..20_000, into: "", do: control(:reset, stream, <<3::16>>)
        assert {client, {events, _out}} = fed(codec, client, resets)
        assert length(events) == 20_000
        again = :binary.copy(control(:reset, 1, <<3::16>>), 400_000)
        assert_end(codec, client, again, :protocol, "control frames")
      end

      test "counts every frame and byte", %{codec: codec} do
        decoder = up(codec)
        %{frames: frames, bytes: bytes} = codec.stats(decoder)
        wire = IO.iodata_to_binary(message(:request, 1, :binary.copy("x", 10_000), 100))
        {decoder, _} = fed(codec, decoder, wire <> binary_part(wire, 0, 5))
        assert %{frames: now, bytes: all} = codec.stats(decoder)
        assert {now - frames, all - bytes} == {100, byte_size(wire) + 5}
      end

      test "one read of very many frames is taken whole", %{codec: codec} do
        decoder = up(codec, %{max_streams: 10_000})
        {_, {events, _}} = fed(codec, decoder, Enum.map_join(1..5_000, &request(&1, "x")))
        assert Enum.map(events, &elem(&1, 1)) == Enum.to_list(1..5_000)
      end

      test "takes 64 MiB within bounded memory, and an announcement costs nothing", %{codec: codec} do
        mib = 1_048_576

        limits = %{
          max_message: 1_024 * mib,
          max_bytes: 8_192 * mib,
          max_streams: 9,
          stream_window: 0x7FFFFFFF,
          connection_window: 0x7FFFFFFF
        }

        decoder = up(codec, limits, %{checksum: 1, blk_max_size: 65_536})
        before = resident()

        decoder =
          Enum.reduce(1..7, decoder, fn stream, decoder ->
            open = block(:request, stream, request_payload(1_024 * mib, "x"), fin: false)
            elem(fed(codec, decoder, open), 0)
          end)

        assert resident() - before < 64 * mib

        block = :crypto.strong_rand_bytes(65_024)
        count = div(64 * mib, 65_024)
        total = count * 65_024
        open = block(:request, 8, request_payload(total, ""), fin: false)
        {decoder, _} = fed(codec, decoder, open)

        {decoder, events} =
          Enum.reduce(1..count, {decoder, []}, fn seq, {decoder, []} ->
            {decoder, {events, _}} =
              fed(codec, decoder, block(:data, 8, block, seq: seq, fin: seq == count))

            {decoder, events}
          end)

        assert [{:request, 8, :call, 500, "echo", 1, argument}] = events
        assert :erlang.md5(argument) == :erlang.md5(:binary.copy(block, count))
        assert resident() - before < 5 * 64 * mib
        codec.release(decoder, [8])
      end

      test "checksums iodata without joining it", %{codec: codec} do
        for size <- [0, 10, 2_000, 70_000, 5_000_000] do
          bytes = :crypto.strong_rand_bytes(size)
          iodata = [<<1, 2>>, [bytes, [3, "four"]] | "five"]
          assert codec.crc32(iodata) == :erlang.crc32(iodata)
          assert codec.crc32c(iodata) == codec.crc32c(IO.iodata_to_binary(iodata))
        end

        # The catalogue's check value, and 32 zeroes of RFC 3720, B.4.
        assert codec.crc32c("123456789") == 0xE3069283
        assert codec.crc32c([<<0::256>>]) == 0x8A9136AA
      end
    end
  end

  # Bytes of memory this process of the operating system holds; the NIF's are not in :erlang.memory/0.
  defp resident do
    :erlang.garbage_collect()
    [_, pages | _] = "/proc/self/statm" |> File.read!() |> String.split()
    String.to_integer(pages) * 4096
  end
end
