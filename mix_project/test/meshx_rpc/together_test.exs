defmodule MeshxRpc.TogetherTest do
  # Requests and results that are gone through together are the same as one by one.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Entry, Frame, TestPeer}
  alias MeshxRpc.Server.Room

  @moduletag capture_log: true

  @response 0x11
  @reset 0x14
  @call 1
  @cast 2
  @full 3
  @refused_term 14

  defp request(stream, kind, deadline, fun, flag, bytes) do
    head = <<kind, deadline::32, byte_size(bytes)::64, flag, byte_size(fun), fun::binary>>

    size = byte_size(head) + byte_size(bytes)
    [<<size::24, 0x10, 1, 0::24, stream::32>>, head | bytes]
  end

  defp number(most), do: :rand.uniform(most)

  # What is sent, and what may come of it.
  defp one(stream) do
    bytes = :crypto.strong_rand_bytes(Enum.random([0, 1, 64, 300, 20_000]))
    deadline = Enum.random([0xFFFF_FFFF, 60_000 + number(1_000)])
    term = :erlang.term_to_binary({:ok, number(1_000)})

    case number(12) do
      1 -> {request(stream, @call, deadline, "nobody", 0, bytes), {:error, :undef}}
      2 -> {request(stream, @call, deadline, "fail", 0, bytes), {:error, ArgumentError}}
      3 -> {request(stream, @call, deadline, "echo", 1, "garbage"), {:reset, @refused_term}}
      4 -> {request(stream, @call, deadline, "kill_it", 0, ""), {:error, :killed}}
      5 -> {request(stream, @cast, deadline, "echo", 0, bytes), :started}
      6 -> {request(stream, @cast, deadline, "\0push", 0, ""), :started}
      7 -> {request(stream, @call, deadline, "\0push", 0, ""), {:error, :invalid_state}}
      8 -> {request(stream, @call, deadline, "echo", 1, term), {:result, 1, term}}
      _ -> {request(stream, @call, deadline, "echo", 0, bytes), {:result, 0, bytes}}
    end
  end

  defp answer({@response, stream, <<0, flag, size::64, bytes::binary-size(size)>>}),
    do: {stream, {:result, flag, bytes}}

  defp answer({@response, stream, <<2, 0, 0::64>>}), do: {stream, :started}

  defp answer({@response, stream, <<1, 1, _size::64, bytes::binary>>}) do
    reason =
      case :erlang.binary_to_term(bytes) do
        %{__struct__: module} -> module
        {reason, stack} when is_list(stack) -> reason
        reason -> reason
      end

    {stream, {:error, reason}}
  end

  defp answer({@reset, stream, <<cause::16, _text::binary>>}), do: {stream, {:reset, cause}}

  defp answers(_socket, 0), do: []

  defp answers(socket, left),
    do: [socket |> TestPeer.frame() |> answer() | answers(socket, left - 1)]

  defp places(server) do
    running = Entry.get({:server, server}).running
    for place <- [1, 3], do: :atomics.get(running, place)
  end

  for codec <- MeshxRpc.Case.codecs() do
    test "#{inspect(codec)}: what comes in one read is answered, each as it is, and gives its place back" do
      {server, address} = server(codec: unquote(codec))
      socket = TestPeer.connect(address)

      for _round <- 1..40, reduce: 1 do
        first ->
          last = first + number(80) - 1
          all = for stream <- first..last, do: {stream, one(stream)}
          :ok = :gen_tcp.send(socket, for({_stream, {bytes, _wanted}} <- all, do: bytes))

          wanted = for {stream, {_bytes, wanted}} <- all, do: {stream, wanted}
          got = answers(socket, length(all))
          assert Enum.sort(got) == Enum.sort(wanted)
          last + 1
      end

      await(fn -> places(server) == [0, 0] end)
    end

    test "#{inspect(codec)}: of requests that come together no more run than may, and the others are told" do
      {server, address} = server(codec: unquote(codec), max_concurrency: 5)
      name = registered()
      socket = TestPeer.connect(address)
      argument = :erlang.term_to_binary({name, 1})

      requests = fn streams ->
        for stream <- streams, do: TestPeer.request(stream, "wait", 1, argument)
      end

      :ok = :gen_tcp.send(socket, requests.(1..3))
      for _ <- 1..3, do: assert_receive({:running, _pid, 1}, 5_000)
      :ok = :gen_tcp.send(socket, requests.(4..13))
      pids = for _ <- 1..2, do: assert_receive({:running, _pid, 1}, 5_000) |> elem(1)
      assert Enum.sort(answers(socket, 8)) == for(stream <- 6..13, do: {stream, {:reset, @full}})
      assert places(server) == [5, 0]

      for pid <- pids, do: send(pid, {:answer, "done"})

      assert Enum.sort(answers(socket, 2)) ==
               for(stream <- 4..5, do: {stream, {:result, 0, "done"}})

      await(fn -> places(server) == [3, 0] end)
      :ok = :gen_tcp.send(socket, requests.(14..15))
      for _ <- 1..2, do: assert_receive({:running, _pid, 1}, 5_000)
      :gen_tcp.close(socket)
      await(fn -> places(server) == [0, 0] end)
    end

    test "#{inspect(codec)}: results that end together are bounded as each is" do
      {server, address} = server(codec: unquote(codec), max_queue: 100_000)
      name = registered()

      # With windows that let nothing go, or all of it: the second finds the first in its way.
      for windows <- [[connection_window: 1_024, stream_window: 1_024], []] do
        socket = TestPeer.connect(address, windows)
        argument = :erlang.term_to_binary({name, 1})
        :ok = :gen_tcp.send(socket, for(n <- 1..4, do: TestPeer.request(n, "wait", 1, argument)))
        pids = for _ <- 1..4, do: assert_receive({:running, _pid, 1}, 5_000) |> elem(1)
        together(pids, :binary.copy("x", 60_000))
        for _ <- 1..3, do: assert({15, _text} = reset(socket))
        await(fn -> places(server) == [0, 0] end)
        :gen_tcp.close(socket)
      end
    end

    test "#{inspect(codec)}: what ends together and is not sent takes nothing of the window" do
      {_server, address} = server(codec: unquote(codec))
      socket = TestPeer.connect(address, connection_window: 100_000, stream_window: 100_000)
      argument = :erlang.term_to_binary({registered(), 1})
      bytes = :binary.copy("x", 1_000)

      # Each has a result that nobody waits for: 50,000 bytes a time.
      for first <- [1, 51, 101, 151] do
        streams = first..(first + 49)
        casts = for stream <- streams, do: request(stream, @cast, 60_000, "wait", 1, argument)
        :ok = :gen_tcp.send(socket, casts)
        assert socket |> answers(50) |> Enum.sort() == for(n <- streams, do: {n, :started})
        pids = for _ <- 1..50, do: assert_receive({:running, _pid, 1}, 5_000) |> elem(1)
        together(pids, bytes)
      end

      :ok = :gen_tcp.send(socket, request(201, @call, 60_000, "echo", 0, bytes))
      assert answers(socket, 1) == [{201, {:result, 0, bytes}}]
    end

    test "#{inspect(codec)}: calls that a client begins together, of all sizes, some of callers that are gone" do
      {server, address} = server(codec: unquote(codec), checksum: [:crc32])
      client = client(address, codec: unquote(codec), checksum: [:crc32])
      pool = Client.Pool.fetch!(client)

      for _round <- 1..10 do
        {:ok, connection, _max} = Client.Pool.connection(pool)
        true = :erlang.suspend_process(connection)

        tasks =
          for _ <- 1..120 do
            bytes =
              :crypto.strong_rand_bytes(Enum.random([0, 10, 64, 64, 64, 3_000, 64_900, 200_000]))

            {bytes, Task.async(fn -> Client.Pool.call(client, :echo, bytes, 30_000, 0) end)}
          end

        gone =
          for _ <- 1..20, do: spawn(fn -> Client.Pool.call(client, :wait, :nobody, 30_000, 0) end)

        await(fn -> match?({_, n} when n >= 130, Process.info(connection, :message_queue_len)) end)
        for pid <- gone, do: Process.exit(pid, :kill)
        true = :erlang.resume_process(connection)
        for {bytes, task} <- tasks, do: assert(Task.await(task, 30_000) == bytes)
        await(fn -> Client.Pool.info(client).in_flight == 0 end)
        await(fn -> places(server) == [0, 0] end)
      end
    end

    test "#{inspect(codec)}: calls that time out while many others wait" do
      {server, address} = server(codec: unquote(codec))
      client = client(address, codec: unquote(codec))
      name = registered()

      parked =
        for n <- 1..200,
            do: Task.async(fn -> Client.Pool.call(client, :wait, {name, n}, 60_000, 0) end)

      pids = for n <- 1..200, do: {n, assert_receive({:running, _pid, ^n}, 5_000) |> elem(1)}

      for _ <- 1..30 do
        answers =
          1..20
          |> Enum.map(fn _ ->
            Task.async(fn -> Client.Pool.call(client, :wait, {name, :late}, 5, 0) end)
          end)
          |> Task.await_many(30_000)

        assert Enum.uniq(answers) == [{:error_rpc, :timeout}]
      end

      await(fn -> Client.Pool.info(client).in_flight == 200 end)
      await(fn -> places(server) == [200, 0] end)
      for {n, pid} <- pids, do: send(pid, {:answer, n})
      assert Task.await_many(parked, 30_000) == Enum.to_list(1..200)
      await(fn -> Client.Pool.info(client).in_flight == 0 end)
    end
  end

  def told(event, _measurements, metadata, test), do: send(test, {event, metadata.result})

  test "who listens hears of each request that came with others" do
    {_server, address} =
      server(telemetry_handler: {__MODULE__, :told, self()}, telemetry_prefix: [:t])

    socket = TestPeer.connect(address)
    calls = for n <- 1..30, do: request(n, @call, 60_000, "echo", 0, "x")
    :ok = :gen_tcp.send(socket, calls)
    assert socket |> answers(30) |> Enum.sort() == for(n <- 1..30, do: {n, {:result, 0, "x"}})
    for _ <- 1..30, do: assert_receive({[:t, :call], :ok}, 5_000)
  end

  # Their connection hears of all of them at once.
  defp together(pids, answer) do
    {:links, links} = Process.info(hd(pids), :links)
    [connection] = Enum.filter(links, &is_pid/1)
    true = :erlang.suspend_process(connection)
    for pid <- pids, do: send(pid, {:answer, answer})
    await(fn -> not Enum.any?(pids, &Process.alive?/1) end)
    true = :erlang.resume_process(connection)
  end

  defp reset(socket) do
    case TestPeer.frame(socket) do
      {@reset, _stream, <<cause::16, text::binary>>} -> {cause, text}
      _a_part_of_the_first -> reset(socket)
    end
  end

  test "places are never more than there are, whoever takes how many at once" do
    rules = %{running: Room.running(), max_concurrency: 100}

    counts =
      1..8
      |> Enum.map(fn n ->
        Task.async(fn ->
          held = Room.held()

          for _ <- 1..20_000 do
            count = rem(n * 7, 40) + 1

            if Room.take?(rules, held, 1, count) do
              seen = Room.calls(rules.running)
              Room.leave(rules, held, 1, count)
              seen
            else
              # Nobody has more than 41 of them, but together they may have all.
              Room.calls(rules.running)
            end
          end
          |> Enum.max()
        end)
      end)
      |> Task.await_many(60_000)

    assert Enum.max(counts) <= 100
    assert Room.count(rules.running) == 0
  end

  test "a frame that is made at once is the one that is made of its parts" do
    for crc <- [nil, &:erlang.crc32/1],
        size <- [0, 1, 64, 60_000],
        deadline <- [:infinity, 0, 17] do
      bytes = :crypto.strong_rand_bytes(size)
      fun = String.duplicate("f", number(255))

      for {kind, {frame, length}, head} <- [
            {:request, Frame.request(7, deadline, fun, 1, [bytes], size, crc),
             Frame.request_head(deadline, size, 1, fun)},
            {:response, Frame.response(7, :error, 1, [bytes], size, crc),
             Frame.response_head(:error, 1, size)}
          ] do
        parts = Frame.block(kind, true, 0, 7, [head, bytes], byte_size(head) + size, crc)
        assert IO.iodata_to_binary(frame) == IO.iodata_to_binary(parts)
        assert IO.iodata_length(frame) == length
      end
    end
  end
end
