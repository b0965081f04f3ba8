defmodule MeshxRpc.DirectTest do
  # Callers and requests that write to the socket themselves, and the NIF's slices.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Codec, CodecPeer, Shared, TestPeer}

  @moduletag capture_log: true

  defmodule Slow do
    @moduledoc false
    def echo(argument), do: argument

    def sleep(milliseconds) do
      Process.sleep(milliseconds)
      milliseconds
    end

    # Tells the test which processes it and its connection are.
    def wait(test) do
      {:links, [connection]} = Process.info(self(), :links)
      send(:erlang.binary_to_term(test), {:runs, self(), connection})

      receive do
        :end -> :done
      end
    end
  end

  defp row(client), do: Client.Pool.row(Client.Pool.fetch!(client))

  for codec <- MeshxRpc.Case.codecs() do
    describe "#{inspect(codec)}:" do
      @describetag codec: codec

      test "callers that are killed at any moment leave nothing, and the connection lives", %{
        codec: codec
      } do
        {server, address} = server(codec: codec)
        client = client(address, codec: codec)
        before = row(client)

        for n <- 1..300 do
          {caller, monitor} =
            spawn_monitor(fn -> for _ <- 1..1_000, do: Client.Pool.call(client, :echo, n) end)

          for _ <- 1..rem(n * 7, 50)//1, do: :erlang.yield()
          Process.exit(caller, :kill)
          assert_receive {:DOWN, ^monitor, :process, ^caller, _killed}, 10_000
        end

        assert Client.Pool.call(client, :echo, :after) == :after
        await(fn -> Server.Pool.info(server).running == 0 end)
        await(fn -> Client.Pool.info(client).in_flight == 0 end)
        assert row(client) == before
      end

      test "who has his answer does not find the last place taken by it", %{codec: codec} do
        {_server, address} = server(codec: codec, module: Slow, max_concurrency: 1)
        [one, other] = for _ <- 1..2, do: client(address, codec: codec)

        test = :erlang.term_to_binary(self())
        caller = Task.async(fn -> Client.Pool.call(one, :wait, test, 30_000, 0) end)
        assert_receive {:runs, request, connection}, 10_000

        # The connection cannot hear of the end now. Either it has to, or the answer comes later.
        true = :erlang.suspend_process(connection)
        send(request, :end)
        answer = Task.yield(caller, 300)
        unless answer, do: :erlang.resume_process(connection)
        assert (answer && elem(answer, 1)) || Task.await(caller, 10_000) == :done

        assert Client.Pool.call(other, :echo, 1, 30_000, 0) == 1
      end

      test "answers that come as their deadline passes cost nobody else", %{codec: codec} do
        {server, address} = server(codec: codec, module: Slow)
        client = client(address, codec: codec)
        before = row(client)

        answers =
          1..400
          |> Task.async_stream(fn n -> Client.Pool.call(client, :sleep, 2, 1 + rem(n, 4), 0) end,
            max_concurrency: 2,
            timeout: 60_000
          )
          |> Enum.map(fn {:ok, answer} -> answer end)

        assert Enum.all?(answers, &(&1 in [2, {:error_rpc, :timeout}]))
        assert Client.Pool.call(client, :echo, :after) == :after
        await(fn -> Server.Pool.info(server).running == 0 end)
        assert row(client) == before
        assert Process.info(self(), :messages) == {:messages, []}
      end
    end
  end

  test "an idle connection is written to by one caller at a time, without asking it" do
    {_server, address} = server()
    client = client(address)
    {:ok, {index, pid, _max, _trace}} = row(client)
    %{shared: shared} = Client.Pool.direct(Client.Pool.fetch!(client), index, pid)
    {name, test} = {registered(), self()}

    call =
      Task.async(fn ->
        assert Client.Pool.call(client, :echo, 0) == 0
        send(test, :watched)
        receive do: (:go -> Client.Pool.call(client, :wait, {name, 1}))
      end)

    assert_receive :watched, 10_000
    await(fn -> not Shared.busy?(shared) end)
    taken = Shared.taken(shared)

    # It cannot be asked now; the request goes out, and runs. Of a caller that it knows it does not even hear.
    :ok = :sys.suspend(pid)
    send(call.pid, :go)
    assert_receive {:running, request, 1}, 10_000
    {:messages, waiting} = Process.info(pid, :messages)
    assert for({:watch, _} = message <- waiting, do: message) == []
    assert Shared.busy?(shared)
    assert Shared.taken(shared) == taken + 1
    send(request, {:answer, :ok})
    :ok = :sys.resume(pid)
    assert Task.await(call) == :ok
  end

  test "a server that stops says of ids that were left out that they have not run" do
    {server, address} = server()
    name = registered()
    socket = TestPeer.connect(address)
    wait = :erlang.term_to_binary({name, 1})
    :ok = :gen_tcp.send(socket, TestPeer.request(3, "wait", 1, wait))
    assert_receive {:running, _pid, 1}, 10_000
    :ok = stop_supervised(server)
    assert {0x14, 1, <<12::16, _text::binary>>} = TestPeer.frame(socket)
    assert {0x14, 2, <<12::16, _text::binary>>} = TestPeer.frame(socket)
    assert {0x23, 0, <<3::32, 12::16, _text::binary>>} = TestPeer.frame(socket)
  end

  test "the byte budget of a server is one for all its connections" do
    {_server, address} = server(max_bytes: 1_000_000, max_message: 1_000_000)
    name = registered()
    holder = client(address)
    argument = {name, :binary.copy("x", 700_000)}
    held = Task.async(fn -> Client.Pool.call(holder, :wait, argument) end)
    assert_receive {:running, pid, _argument}, 10_000
    other = client(address)
    assert Client.Pool.call(other, :size, :binary.copy("y", 400_000)) == {:error_rpc, :full}
    assert Client.Pool.call(other, :size, :binary.copy("y", 200_000)) == 200_000
    send(pid, {:answer, :ok})
    assert Task.await(held) == :ok
    await(fn -> Client.Pool.call(other, :size, :binary.copy("y", 400_000)) == 400_000 end)
  end

  if Codec.impl() == Codec.Nif do
    test "a call of the NIF takes at most 128 KiB or 512 frames" do
      options = [max_message: 8_000_000, max_bytes: 8_000_000, max_streams: 10_000]
      windows = [stream_window: 10_000_000, connection_window: 10_000_000]

      bulk =
        CodecPeer.message(:request, 1, :binary.copy("x", 4_000_000), 65_000)
        |> IO.iodata_to_binary()

      small = for(n <- 1..5_000, do: CodecPeer.request(n, "")) |> IO.iodata_to_binary()

      for {wire, least} <- [{bulk, 31}, {small, 10}] do
        agreed = %{checksum: 1, blk_max_size: 65_536}
        decoder = CodecPeer.up(Codec.Nif, options ++ windows, agreed)
        {slices, events} = slices(decoder, wire, 0, [], [])
        assert Enum.max(slices) <= 128 * 1024
        assert length(slices) >= least
        assert Enum.max(Enum.map(events, &length/1)) <= 512
        assert [{:request, 1, :call, _deadline, "echo", 1, _argument} | _] = Enum.concat(events)
      end
    end
  end

  defp slices(_decoder, wire, offset, slices, events) when offset == byte_size(wire),
    do: {slices, Enum.reverse(events)}

  defp slices(decoder, wire, offset, slices, events) do
    {:ok, next, new, _out} = Codec.Nif.Native.feed(decoder, wire, offset)
    slices(decoder, wire, next, [next - offset | slices], [new | events])
  end
end
