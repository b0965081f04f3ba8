defmodule MeshxRpc.CallTest do
  use MeshxRpc.Case, async: true
  import ExUnit.CaptureLog

  defmodule Api do
    @moduledoc false
    @callback offered(term()) :: term()
  end

  defmodule Worker do
    @moduledoc false
    use GenServer
    use Application
    use MeshxRpc.Server, address: {:tcp, {127, 0, 0, 1}, 0}

    @behaviour MeshxRpc.CallTest.Api

    @impl Application
    def start(_type, _argument), do: {:ok, self()}
    @impl GenServer
    def init(argument), do: {:ok, argument}
    @impl MeshxRpc.CallTest.Api
    def offered(argument), do: argument
  end

  test "callbacks of OTP cannot be called, those of the user's own behaviours can" do
    {_server, address} = server(module: Worker)
    client = client_down(address)
    assert Client.Pool.call(client, :offered, 1, 10_000, 1_000, 5) == 1

    for name <- ~w(init start_link stop child_spec prep_stop) do
      assert {:error_rpc, {:undef, _stack}} = Client.Pool.call(client, name)
    end
  end

  defmodule Bridge do
    @moduledoc false
    @behaviour :supervisor_bridge
    @impl true
    def init(argument), do: {:error, argument}
    @impl true
    def terminate(_reason, _state), do: :ok
    def offered(argument), do: argument
  end

  test "nor those of a behaviour that the VM has not loaded yet" do
    :code.purge(:supervisor_bridge)
    :code.delete(:supervisor_bridge)
    {_server, address} = server(module: Bridge)
    client = client_down(address)
    assert Client.Pool.call(client, :offered, 1, 10_000, 1_000, 5) == 1
    assert {:error_rpc, {:undef, _stack}} = Client.Pool.call(client, :init)
  end

  defmodule Stray do
    @moduledoc false
    # It is linked to what serves its caller's connection.
    def disturb(_argument) do
      {:links, links} = Process.info(self(), :links)
      for pid <- links, is_pid(pid), do: send(pid, {:nothing, "of yours"})
    end

    def echo(argument), do: argument
  end

  test "a function that sends messages to its links disturbs no other call" do
    {server, address} = server(module: Stray)
    client = client(address)
    call = Task.async(fn -> Client.Pool.call(client, :disturb) end)
    assert [{:nothing, _}] = Task.await(call)
    assert Client.Pool.call(client, :echo, 1, 10_000, 0) == 1
    assert Server.Pool.info(server).connections == 1
  end

  test "a timeout that cannot be waited for is refused before anything is sent" do
    {_server, address} = server()
    client = client(address)

    for timeout <- [0x1_0000_0000, 1.5, nil] do
      assert_raise ArgumentError, ~r/wanted milliseconds/, fn ->
        Client.Pool.call(client, :echo, 1, timeout)
      end
    end

    assert Client.Pool.call(client, :echo, 1, -1) == {:error_rpc, :timeout}
    assert Client.Pool.info(client).in_flight == 0 or Client.Pool.call(client, :echo, 1) == 1
  end

  for codec <- MeshxRpc.Case.codecs() do
    describe "#{inspect(codec)}" do
      @describetag codec: codec

      setup %{codec: codec} do
        {server, address} = server(codec: codec)
        {:ok, server: server, address: address, client: client(address, codec: codec)}
      end

      test "results come back as they are", %{client: client} do
        for term <- [
              1,
              "binary",
              :ok,
              %{a: [1.5, nil]},
              {:error, :no},
              [],
              "",
              self(),
              String.duplicate("é", 100_000)
            ] do
          assert Client.Pool.call(client, :echo, term) == term
          assert Client.Pool.call!(client, :echo, term) == term
        end

        assert Client.Pool.call(client, :echo) == []
        assert Client.Pool.call(client, "echo", 1) == 1
      end

      test "failures have the reasons of 0.1", %{client: client} do
        assert {:error_rpc, %ArgumentError{message: "no"}} = Client.Pool.call(client, :fail)
        assert {:error_rpc, {:badarith, [_ | _] = stack}} = Client.Pool.call(client, :badarith, 0)
        assert Enum.any?(stack, &match?({MeshxRpc.TestServer, :badarith, 1, _}, &1))
        assert {:error_rpc, {{:nocatch, 7}, [_ | _]}} = Client.Pool.call(client, :throw_it, 7)
        assert {:error_rpc, :gone} = Client.Pool.call(client, :exit_it, :gone)
        assert {:error_rpc, :killed} = Client.Pool.call(client, :kill_it)
        assert {:error_rpc, :serialization_fail} = Client.Pool.call(client, :a_function)
        assert {:error_rpc, :serialization_fail} = Client.Pool.call(client, :echo, fn -> 1 end)
        assert Client.Pool.call(client, :echo, :still_there) == :still_there

        # Arguments stay at the server, also those of another process.
        assert {:error_rpc, {:function_clause, [_ | _] = stack}} =
                 Client.Pool.call(client, :fail_aside, :not_wanted)

        assert {MeshxRpc.TestServer, :refuse, 1, _} = hd(stack)
        # No stack, though its form is much like one.
        odd = {:reason, [{:m, :f, [1 | 2], []} | :improper]}
        assert Client.Pool.call(client, :exit_it, odd) == {:error_rpc, odd}
      end

      test "call! raises the exception of the function, or ours", %{client: client} do
        assert_raise ArgumentError, "no", fn -> Client.Pool.call!(client, :fail) end
        error = assert_raise MeshxRpc.Error, fn -> Client.Pool.call!(client, :exit_it, :gone) end
        assert error.reason == :gone
        assert Exception.message(error) =~ "failed: :gone"
      end

      test "only the module's own functions of one argument can be called, and no atom is made", %{
        client: client
      } do
        # Those of the server's own begin with a zero byte, and are not for callers to name.
        for name <- ["\0cast", <<0>>, "", String.duplicate("x", 256)] do
          assert_raise ArgumentError, ~r/the first not zero/, fn ->
            Client.Pool.call(client, name)
          end
        end

        for name <- ~w(module_info __info__ child_spec two nothing behaviour_info) do
          assert {:error_rpc, {:undef, [{MeshxRpc.TestServer, _name, 1, []}]}} =
                   Client.Pool.call(client, name)
        end

        for n <- 1..2_000 do
          name = "unknown_function_#{n}"
          assert {:error_rpc, {:undef, _stack}} = Client.Pool.call(client, name)
          assert_raise ArgumentError, fn -> :erlang.binary_to_existing_atom(name, :utf8) end
        end
      end

      test "casts run, answer :ok, and count their failures", %{client: client} do
        name = registered()
        assert Client.Pool.cast(client, :wait, {name, 1}) == :ok
        assert_receive {:running, pid, 1}, 5_000
        monitor = Process.monitor(pid)
        send(pid, {:answer, :ok})
        assert_receive {:DOWN, ^monitor, :process, ^pid, :normal}, 5_000
        assert Client.Pool.info(client).cast_failures == 0
        assert Client.Pool.cast(client, :nothing) == :ok
        await(fn -> Client.Pool.info(client).cast_failures == 1 end)
      end

      test "a timeout ends the call and kills its work, on both sides", %{
        client: client,
        server: server
      } do
        name = registered()
        assert Client.Pool.call(client, :wait, {name, 1}, 3_000) == {:error_rpc, :timeout}
        assert_receive {:running, pid, 1}, 5_000
        monitor = Process.monitor(pid)
        assert_receive {:DOWN, ^monitor, :process, ^pid, _reason}, 5_000
        refute_received {_alias, :error, _flag, _bytes}
        assert Client.Pool.call(client, :echo, 1) == 1
        await(fn -> Server.Pool.info(server).running == 0 end)
        await(fn -> Client.Pool.info(client).in_flight == 0 end)
      end

      test "a caller that dies has its work killed", %{client: client} do
        name = registered()
        {caller, _} = spawn_monitor(fn -> Client.Pool.call(client, :wait, {name, 1}) end)
        assert_receive {:running, pid, 1}, 5_000
        monitor = Process.monitor(pid)
        Process.exit(caller, :kill)
        assert_receive {:DOWN, ^monitor, :process, ^pid, _killed}, 5_000
        assert Client.Pool.call(client, :echo, 1) == 1
        await(fn -> Client.Pool.info(client).in_flight == 0 end)
      end

      test "many callers share a connection", %{client: client} do
        results =
          1..200
          |> Task.async_stream(
            &Client.Pool.call(client, :echo, {&1, :binary.copy(<<&1>>, &1 * 300)}),
            max_concurrency: 100,
            timeout: 60_000
          )
          |> Enum.map(fn {:ok, {n, binary}} -> {n, byte_size(binary)} end)

        assert results == Enum.map(1..200, &{&1, &1 * 300})
      end
    end
  end

  test "64 MiB with checksums go and come" do
    for codec <- codecs() do
      {_server, address} = server(codec: codec, checksum: :crc32)
      client = client(address, codec: codec, checksum: :crc32)
      data = :crypto.strong_rand_bytes(64 * 1_048_576)
      assert Client.Pool.call(client, :echo, data) == data
    end
  end

  test "what the server's limits do not hold is refused with their reason" do
    {_server, address} = server(max_message: 10_000, max_concurrency: 1)
    client = client(address, max_message: 10_000)

    assert Client.Pool.call(client, :echo, :binary.copy("x", 10_001)) ==
             {:error_rpc, :error_too_long}

    assert Client.Pool.call(client, :make, 10_001) == {:error_rpc, :error_too_long}
    assert byte_size(Client.Pool.call(client, :make, 10_000)) == 10_000

    name = registered()
    first = Task.async(fn -> Client.Pool.call(client, :wait, {name, 1}) end)
    assert_receive {:running, pid, 1}, 5_000
    assert Client.Pool.call(client, :echo, 1) == {:error_rpc, :full}
    send(pid, {:answer, :done})
    assert Task.await(first) == :done
    assert Client.Pool.call(client, :echo, 1) == 1
  end

  test "the server's own time limit kills" do
    {_server, address} = server(timeout_execute: 3_000)
    client = client(address)
    name = registered()
    assert Client.Pool.call(client, :wait, {name, 1}) == {:error_rpc, :killed}
    assert_received {:running, pid, 1}
    refute Process.alive?(pid)
  end

  test "only allowed functions are offered when there is a list" do
    {_server, address} = server(functions: [:echo])
    client = client(address)
    assert Client.Pool.call(client, :echo, 1) == 1
    assert {:error_rpc, {:undef, _}} = Client.Pool.call(client, :make, 1)
  end

  test "a term that is too deep is refused by the server, and only that call fails" do
    {_server, address} = server()
    client = client(address)
    deep = Enum.reduce(1..600, [], fn _, term -> [term] end)
    assert Client.Pool.call(client, :size, deep) == {:error_rpc, :serialization_fail}
    assert Client.Pool.call(client, :echo, [[1]]) == [[1]]
  end

  test "calls find a server that was restarted on the same address" do
    log =
      capture_log(fn ->
        {server, {:tcp, ip, port} = address} = server()
        client = client(address)
        name = registered()
        lost = Task.async(fn -> Client.Pool.call(client, :wait, {name, 1}) end)
        assert_receive {:running, _pid, 1}, 5_000
        stop_supervised!(server)
        assert Task.await(lost) == {:error_rpc, :tcp_closed}
        assert Client.Pool.call(client, :echo, 1, 1_000, 0) == {:error_rpc, :closed}
        server(address: {:tcp, ip, port})
        assert Client.Pool.call(client, :echo, 2, 20_000, 1_000, 10) == 2
      end)

    assert log =~ "no connection to"
  end

  test "both sides of a pool that is used by macros" do
    defmodule ApiClient do
      use MeshxRpc.Client, pool_opts: [size: 2, max_overflow: 0]
    end

    start_supervised!(MeshxRpc.TestServer)
    {:ok, address} = Server.Pool.address(MeshxRpc.TestServer)
    start_supervised!({ApiClient, address: address})
    assert ApiClient.call(:echo, 1, 20_000, 1_000, 10) == 1
    assert ApiClient.call!(:echo, 2) == 2
    assert ApiClient.cast(:echo, 3) == :ok
    assert %{size: 2} = Client.Pool.info(ApiClient)
  end

  test "Unix sockets are for their owner only, replaced when stale, refused when too long" do
    directory = Path.join(System.tmp_dir!(), "mx#{System.unique_integer([:positive])}")
    File.mkdir!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    path = Path.join(directory, "s")
    {server, {:uds, ^path} = address} = server(address: {:uds, path})
    assert Bitwise.band(File.lstat!(path).mode, 0o777) == 0o600
    client = client(address)
    assert Client.Pool.call(client, :echo, :hi) == :hi

    assert {:error, _} =
             start_supervised(
               Server.Pool.child_spec(unique("server"), address: address, module: TestServer)
             )

    stop_supervised!(server)
    refute File.exists?(path)
    assert File.ls!(directory) == []

    {:ok, stale} = :gen_tcp.listen(0, ifaddr: {:local, path})
    :gen_tcp.close(stale)
    assert File.exists?(path)
    server(address: {:uds, path})
    assert Client.Pool.call(client, :echo, :again, 20_000, 1_000, 10) == :again

    assert_raise ArgumentError, ~r/1 to 107 bytes/, fn ->
      Server.Pool.child_spec(:x, address: {:uds, String.duplicate("x", 108)})
    end
  end
end
