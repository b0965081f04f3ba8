defmodule MeshxRpc.StreamTest do
  use MeshxRpc.Case, async: true

  alias MeshxRpc.Stream, as: Pieced

  @moduletag capture_log: true
  @mib 1_048_576

  defmodule Pieces do
    @moduledoc false

    # Runs when the test has seen as many others of it.
    def together({name, n, numbers}) do
      test = name |> :erlang.binary_to_existing_atom() |> Process.whereis()
      send(test, {:together, self()})
      receive do: (:go -> if(n == 0, do: Enum.sum(numbers), else: 1..n))
    end

    def range(n), do: 1..n//1
    def blocks({count, size}), do: Stream.map(1..count, fn n -> :binary.copy(<<n>>, size) end)
    def sum(numbers), do: Enum.sum(numbers)
    def both({numbers, factor}), do: Stream.map(numbers, &(&1 * factor))
    def zip({left, :and, right}), do: Enum.zip(left, right)
    def first({numbers, n}), do: Enum.take(numbers, n)
    def twice(numbers), do: {Enum.to_list(numbers), Enum.to_list(numbers)}
    def ignore(_numbers), do: :ignored
    def size(pieces), do: Enum.reduce(pieces, 0, &(byte_size(&1) + &2))
    def no_stream(_argument), do: 7

    # A millisecond or so for each MiB.
    def digest(pieces),
      do:
        pieces
        |> Enum.reduce(:crypto.hash_init(:sha256), &:crypto.hash_update(&2, &1))
        |> :crypto.hash_final()

    def zipped({left, right}),
      do: left |> Stream.zip(right) |> Stream.flat_map(&Tuple.to_list/1) |> digest()

    def fails_after(n),
      do: Stream.map(1..(n + 1), &if(&1 > n, do: raise(ArgumentError, "no more"), else: &1))

    def throws(_argument), do: Stream.map(1..3, &if(&1 == 3, do: throw(:it), else: &1))

    def dies(_argument),
      do: Stream.map(1..3, &if(&1 == 3, do: Process.exit(self(), :kill), else: &1))

    def odd(_argument), do: [1, fn -> 2 end]

    def rescues(numbers) do
      Enum.to_list(numbers)
    rescue
      error in RuntimeError -> {:rescued, error.message}
    end

    # Tells the test each number that it makes.
    def told({name, n}) do
      test = name |> :erlang.binary_to_existing_atom() |> Process.whereis()
      send(test, {:producer, self()})

      Stream.map(1..n, fn i ->
        send(test, {:made, i})
        :binary.copy(<<i>>, 1_024)
      end)
    end

    # Takes as many as the test allows.
    def slowly({name, pieces}) do
      test = name |> :erlang.binary_to_existing_atom() |> Process.whereis()
      send(test, {:consumer, self()})

      Enum.reduce(pieces, 0, fn piece, sum ->
        receive do: (:take -> sum + byte_size(piece))
      end)
    end

    def trickle({name, n}) do
      test = name |> :erlang.binary_to_existing_atom() |> Process.whereis()

      Stream.map(1..n, fn i ->
        send(test, {:next, self()})
        receive do: (:go -> i)
      end)
    end
  end

  defp idle(server, client) do
    await(fn ->
      Server.Pool.info(server).running == 0 and Client.Pool.info(client).in_flight == 0
    end)
  end

  defp open(token, mode, places, plain) do
    places = :erlang.list_to_binary(places)

    <<token::binary, mode, 9::32, 1, byte_size(places), places::binary, 3, "sum",
      :erlang.term_to_binary(plain)::binary>>
  end

  # Tells the test, and gives the value.
  defp told(test, message, value) do
    send(test, message)
    value
  end

  # What has been counted when nothing new comes for a while: to see that something does not come one has to wait. At
  # least so much comes, however late.
  defp quiet(least, so_far \\ 0) do
    receive do
      {:made, n} -> quiet(least, max(n, so_far))
    after
      if(so_far < least, do: 20_000, else: 300) -> so_far
    end
  end

  for codec <- MeshxRpc.Case.codecs() do
    describe "#{inspect(codec)}" do
      setup do
        {server, address} = server(codec: unquote(codec), module: Pieces)
        client = client_down(address, codec: unquote(codec))
        await(fn -> Client.Pool.info(client).connected == 1 end)
        {:ok, server: server, client: client}
      end

      test "streams of arguments go on when they fill the server's budget together" do
        limits = [max_bytes: 4 * @mib, max_message: 4 * @mib]
        {server, address} = server([codec: unquote(codec), module: Pieces] ++ limits)
        client = client_down(address, codec: unquote(codec), pool_opts: [size: 2])
        await(fn -> Client.Pool.info(client).connected == 2 end)

        for streams <- [1, 2, 6] do
          calls =
            for _ <- 1..streams do
              pieces = Stream.map(1..40, fn n -> :binary.copy(<<n>>, @mib) end)
              Task.async(fn -> Client.Pool.call(client, :digest, Pieced.new(pieces)) end)
            end

          digest = Pieces.digest(for n <- 1..40, do: :binary.copy(<<n>>, @mib))
          assert Task.await_many(calls, 60_000) == List.duplicate(digest, streams)
          idle(server, client)
        end
      end

      test "nor do those of one call that its function takes in turn", %{} do
        limits = [max_bytes: 4 * @mib, max_message: 4 * @mib]
        {server, address} = server([codec: unquote(codec), module: Pieces] ++ limits)
        client = client_down(address, codec: unquote(codec))
        await(fn -> Client.Pool.info(client).connected == 1 end)
        pieces = Stream.map(1..12, fn n -> :binary.copy(<<n>>, @mib) end)
        digest = Pieces.digest(for n <- 1..12, _ <- 1..2, do: :binary.copy(<<n>>, @mib))

        calls =
          for _ <- 1..6 do
            Task.async(fn ->
              Client.Pool.call(client, :zipped, {Pieced.new(pieces), Pieced.new(pieces)})
            end)
          end

        assert Task.await_many(calls, 60_000) == List.duplicate(digest, 6)
        idle(server, client)
      end

      test "results move piece by piece, small ones and large ones", %{
        server: server,
        client: client
      } do
        for n <- [0, 1, 7, 20_000],
            do:
              assert(
                Enum.to_list(Client.Pool.stream(client, :range, n)) == Enum.to_list(1..n//1) ||
                  n == 0
              )

        assert Client.Pool.stream(client, :range, 5) |> Enum.map(&(&1 * 2)) == [2, 4, 6, 8, 10]

        for {count, size} <- [{100, 1_000}, {40, 300_000}, {3, 5 * @mib}] do
          pieces = Client.Pool.stream(client, :blocks, {count, size}) |> Enum.to_list()
          assert pieces == for(n <- 1..count, do: :binary.copy(<<n>>, size))
        end

        idle(server, client)
      end

      test "arguments move piece by piece, alone or in a tuple, several at once", %{
        server: server,
        client: client
      } do
        for n <- [1, 7, 20_000],
            do: assert(Client.Pool.call(client, :sum, Pieced.new(1..n)) == div(n * (n + 1), 2))

        blocks = Stream.map(1..20, fn n -> :binary.copy(<<n>>, 500_000) end)
        assert Client.Pool.call(client, :size, Pieced.new(blocks)) == 10_000_000

        assert Client.Pool.call(client, :zip, {Pieced.new(1..3), :and, Pieced.new(4..6)}) == [
                 {1, 4},
                 {2, 5},
                 {3, 6}
               ]

        assert Client.Pool.call(client, :sum, Pieced.new([])) == 0
        idle(server, client)
      end

      test "both ways at once", %{server: server, client: client} do
        numbers = Client.Pool.stream(client, :both, {Pieced.new(1..10_000), 3})
        assert Enum.sum(numbers) == 3 * div(10_000 * 10_001, 2)
        # A lazy one can be enumerated again.
        assert Enum.take(numbers, 2) == [3, 6]
        idle(server, client)
      end

      test "pieces that come slowly are not held back", %{client: client} do
        name = registered()

        task =
          Task.async(fn ->
            Client.Pool.stream(client, :trickle, {name, 3})
            |> Enum.each(&send(:erlang.binary_to_existing_atom(name), {:got, &1}))
          end)

        for i <- 1..3 do
          assert_receive {:next, producer}, 10_000
          send(producer, :go)
          # The next one is not made before this one was let go.
          assert_receive {:got, ^i}, 10_000
        end

        Task.await(task)
      end

      test "a producer waits for its consumer, and the window bounds what is on its way", %{
        server: server,
        client: client
      } do
        name = registered()
        window = 65_536
        stream = Client.Pool.stream(client, :told, {name, 10_000}, window: window)

        {:suspended, _, continue} =
          Enumerable.reduce(stream, {:cont, 0}, fn _piece, _ -> {:suspend, 0} end)

        made = quiet(8)
        # Eight batches on their way, one being filled, and one that is being consumed.
        assert made * 1_024 <= (div(window, 8) + 1_029) * 10
        assert made >= 8
        assert_received {:producer, producer}
        monitor = Process.monitor(producer)
        continue.({:halt, 0})
        assert_receive {:DOWN, ^monitor, :process, _pid, :killed}, 10_000
        idle(server, client)
      end

      test "a client runs no further ahead than the function takes", %{
        server: server,
        client: client
      } do
        name = registered()
        me = self()

        pieces = Stream.map(1..3_000, fn n -> told(me, {:made, n}, :binary.copy(<<n>>, 1_024)) end)

        call = Task.async(fn -> Client.Pool.call(client, :slowly, {name, Pieced.new(pieces)}) end)
        assert_receive {:consumer, consumer}, 10_000
        made = quiet(8)
        assert made in 8..(div(@mib * 10, 8 * 1_024) + 2)
        for _ <- 1..3_000, do: send(consumer, :take)
        assert Task.await(call, 60_000) == 3_000 * 1_024
        idle(server, client)
      end

      test "a consumer that stops early or dies ends its producer", %{
        server: server,
        client: client
      } do
        name = registered()
        assert [_, _] = Client.Pool.stream(client, :told, {name, 1_000_000}) |> Enum.take(2)
        assert_receive {:producer, producer}, 10_000
        monitor = Process.monitor(producer)
        assert_receive {:DOWN, ^monitor, :process, _pid, _killed}, 10_000

        {consumer, _} =
          spawn_monitor(fn ->
            Client.Pool.stream(client, :told, {name, 1_000_000})
            |> Enum.each(fn _ -> Process.sleep(:infinity) end)
          end)

        assert_receive {:producer, producer}, 10_000
        monitor = Process.monitor(producer)
        Process.exit(consumer, :kill)
        assert_receive {:DOWN, ^monitor, :process, _pid, _killed}, 10_000
        idle(server, client)
      end

      test "a function that stops early, or ignores it, ends the client's enumeration", %{
        server: server,
        client: client
      } do
        me = self()

        endless =
          Stream.resource(fn -> told(me, {:feeder, self()}, 1) end, &{[&1], &1 + 1}, fn _ ->
            :ok
          end)

        assert Client.Pool.call(client, :first, {Pieced.new(endless), 3}) == [1, 2, 3]
        assert Client.Pool.call(client, :ignore, Pieced.new(endless)) == :ignored

        for _ <- 1..2 do
          receive do
            {:feeder, pid} ->
              monitor = Process.monitor(pid)
              assert_receive {:DOWN, ^monitor, :process, _pid, _killed}, 10_000
          after
            # The call was over before it began to enumerate.
            500 -> :ok
          end
        end

        idle(server, client)
      end

      test "a caller that dies ends its feeder and the function", %{server: server, client: client} do
        me = self()
        name = registered()

        endless =
          Stream.resource(
            fn -> told(me, {:feeder, self()}, 1) end,
            &{["piece #{&1}"], &1 + 1},
            fn _ -> :ok end
          )

        {caller, _} =
          spawn_monitor(fn -> Client.Pool.call(client, :slowly, {name, Pieced.new(endless)}) end)

        assert_receive {:consumer, consumer}, 10_000
        assert_receive {:feeder, feeder}, 10_000
        monitors = for pid <- [consumer, feeder], do: Process.monitor(pid)
        Process.exit(caller, :kill)
        for monitor <- monitors, do: assert_receive({:DOWN, ^monitor, :process, _pid, _}, 10_000)
        idle(server, client)
      end

      test "failures of a producer come after its pieces", %{server: server, client: client} do
        me = self()

        collect = fn fun, argument ->
          Client.Pool.stream(client, fun, argument) |> Enum.each(&send(me, {:piece, &1}))
        end

        assert_raise ArgumentError, "no more", fn -> collect.(:fails_after, 3) end
        for i <- 1..3, do: assert_received({:piece, ^i})

        error = assert_raise MeshxRpc.Error, fn -> collect.(:throws, 1) end
        assert {{:nocatch, :it}, [_ | _]} = error.reason
        for i <- 1..2, do: assert_received({:piece, ^i})

        error = assert_raise MeshxRpc.Error, fn -> collect.(:dies, 1) end
        assert error.reason == :killed
        error = assert_raise MeshxRpc.Error, fn -> collect.(:odd, 1) end
        assert error.reason == :serialization_fail
        assert_raise Protocol.UndefinedError, fn -> collect.(:no_stream, 1) end
        error = assert_raise MeshxRpc.Error, fn -> collect.(:missing, 1) end
        assert {:undef, [{Pieces, _missing, 1, []}]} = error.reason
        error = assert_raise MeshxRpc.Error, fn -> collect.("module_info", 1) end
        assert {:undef, _} = error.reason
        idle(server, client)
      end

      test "failures of an argument are raised where the function takes it", %{
        server: server,
        client: client
      } do
        failing = Stream.map(1..5, &if(&1 == 5, do: raise("broken"), else: &1))
        assert Client.Pool.call(client, :rescues, Pieced.new(failing)) == {:rescued, "broken"}

        assert {:error_rpc, %RuntimeError{message: "broken"}} =
                 Client.Pool.call(client, :sum, Pieced.new(failing))

        assert_raise RuntimeError, "broken", fn ->
          Client.Pool.call!(client, :sum, Pieced.new(failing))
        end

        thrown = Stream.map(1..5, &if(&1 == 5, do: throw(:it), else: &1))

        assert {:error_rpc, %MeshxRpc.Error{reason: {{:nocatch, :it}, _}}} =
                 Client.Pool.call(client, :sum, Pieced.new(thrown))

        assert {:error_rpc, %ArgumentError{}} = Client.Pool.call(client, :twice, Pieced.new(1..3))
        unknown = Pieced.new([fn -> 1 end])

        assert {:error_rpc, %MeshxRpc.Error{reason: :serialization_fail}} =
                 Client.Pool.call(client, :sum, unknown)

        idle(server, client)
      end

      test "a timeout is for all of it, on both sides", %{server: server, client: client} do
        name = registered()

        error =
          assert_raise MeshxRpc.Error, fn ->
            Client.Pool.stream(client, :trickle, {name, 3}, timeout: 200) |> Enum.to_list()
          end

        assert error.reason == :timeout

        assert Client.Pool.call(client, :slowly, {name, Pieced.new(["x"])}, 200) ==
                 {:error_rpc, :timeout}

        idle(server, client)
      end

      test "the loss of the connection ends it", %{server: server, client: client} do
        name = registered()
        me = self()

        task =
          Task.async(fn ->
            try do
              Client.Pool.stream(client, :trickle, {name, 3}) |> Enum.each(&send(me, {:got, &1}))
            rescue
              error -> error
            end
          end)

        assert_receive {:next, producer}, 10_000
        send(producer, :go)
        assert_receive {:got, 1}, 10_000
        :ok = stop_supervised(server)
        assert %MeshxRpc.Error{reason: :tcp_closed} = Task.await(task)
        await(fn -> Client.Pool.info(client).in_flight == 0 end)
      end
    end
  end

  test "a call without a connection is made when there is one, and enumerates once" do
    {:ok, listen} = :gen_tcp.listen(0, ip: {127, 0, 0, 1})
    {:ok, port} = :inet.port(listen)
    :ok = :gen_tcp.close(listen)
    client = client_down({:tcp, {127, 0, 0, 1}, port})
    me = self()
    once = Stream.map(1..3, fn n -> told(me, {:made, n}, n) end)
    call = Task.async(fn -> Client.Pool.call(client, :sum, Pieced.new(once), 60_000, 10_000, 5) end)
    server(module: Pieces, address: {:tcp, {127, 0, 0, 1}, port})
    assert Task.await(call, 60_000) == 6
    for n <- 1..3, do: assert_received({:made, ^n})
    refute_received {:made, _again}

    assert Client.Pool.call(
             client_down({:tcp, {127, 0, 0, 1}, 1}),
             :sum,
             Pieced.new(once),
             60_000,
             0
           ) == {:error_rpc, :closed}
  end

  test "streams that fill the server's max_concurrency end, and calls are refused meanwhile" do
    {server, address} = server(module: Pieces, max_concurrency: 2)
    client = client_down(address)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    name = registered()

    streams = [
      fn -> Client.Pool.call(client, :together, {name, 0, Pieced.new(1..20_000)}, 60_000) end,
      fn ->
        client
        |> Client.Pool.stream(:together, {name, 20_000, []}, window: 1_024, timeout: 60_000)
        |> Enum.sum()
      end
    ]

    streams = Enum.map(streams, &Task.async/1)
    assert_receive {:together, one}, 10_000
    assert_receive {:together, two}, 10_000
    assert Client.Pool.call(client, :sum, [1], 60_000, 0) == {:error_rpc, :full}
    for pid <- [one, two], do: send(pid, :go)
    assert Task.await_many(streams, 60_000) == List.duplicate(200_010_000, 2)
    await(fn -> Server.Pool.info(server).running == 0 end)
    assert Client.Pool.call(client, :sum, [1, 2], 60_000) == 3
  end

  test "requests for pieces of streams that are not there, or are malformed, harm nobody" do
    {server, address} = server(module: Pieces, max_concurrency: 16)
    client = client_down(address)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    socket = MeshxRpc.TestPeer.connect(address)
    token = :crypto.strong_rand_bytes(16)

    for {{fun, flag, argument}, n} <-
          Enum.with_index(
            [
              {"\0pull", 0, <<1, 2, 3>>},
              {"\0push", 0, <<token::binary, 0, 0::32, 9>>},
              {"\0open", 0, "raw"},
              {"\0open", 0, open(token, 1, [1, 7], {1, 2})},
              {"\0open", 0, open(token, 1, [1], 7)},
              {"\0open", 0, open(token, 3, [], 7)},
              {"\0open", 0, binary_part(open(token, 1, [], 7), 0, 20)},
              {"\0open", 1, open(token, 1, [], 7)},
              {"\0cast", 0, <<1, 2>>},
              {"\0cast", 0, <<0::32, 1, 200, 0, "sum">>},
              {"\0cast", 1, :erlang.term_to_binary({:a, 1})}
            ],
            1
          ) do
      :ok = :gen_tcp.send(socket, MeshxRpc.TestPeer.request(n, fun, flag, argument))
      assert {0x11, ^n, <<1, 1, _total::64, reason::binary>>} = MeshxRpc.TestPeer.frame(socket)
      assert :erlang.binary_to_term(reason) == :invalid_state
    end

    # A name that begins like ours and is not.
    :ok = :gen_tcp.send(socket, MeshxRpc.TestPeer.request(20, "\0other", 0, ""))
    assert {0x11, 20, <<1, 1, _::binary>>} = MeshxRpc.TestPeer.frame(socket)

    # These wait for a call that nobody makes, as long as their connection lasts.
    for n <- 21..23 do
      argument = <<token::binary, n::32>>
      :ok = :gen_tcp.send(socket, MeshxRpc.TestPeer.request(n, "\0pull", 0, argument))
    end

    await(fn -> Server.Pool.info(server).running == 3 end)
    assert Client.Pool.call(client, :sum, Pieced.new(1..3)) == 6
    :gen_tcp.close(socket)
    idle(server, client)
  end

  test "a token that runs already is refused" do
    {server, address} = server(module: Pieces)
    socket = MeshxRpc.TestPeer.connect(address)
    token = :crypto.strong_rand_bytes(16)
    open = open(token, 1, [0], [])
    :ok = :gen_tcp.send(socket, MeshxRpc.TestPeer.request(1, "\0open", 0, open))
    await(fn -> Server.Pool.info(server).running == 1 end)
    # The first may still be about to take its token: only one of them gets it.
    :ok = :gen_tcp.send(socket, MeshxRpc.TestPeer.request(2, "\0open", 0, open))
    assert {0x11, _one, <<1, 1, _total::64, reason::binary>>} = MeshxRpc.TestPeer.frame(socket)
    assert :erlang.binary_to_term(reason) == :invalid_state
    assert Server.Pool.info(server).running == 1
  end
end
