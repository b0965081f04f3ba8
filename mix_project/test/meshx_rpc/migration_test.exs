defmodule MeshxRpc.MigrationTest do
  # A program as a user of 0.1 has written it, unchanged: docs/migration.md says what it will notice.
  use ExUnit.Case, async: true
  import ExUnit.CaptureLog

  defmodule Example1.Server do
    use MeshxRpc.Server,
      telemetry_prefix: [:example1, __MODULE__],
      cks_mfa: {MeshxRpc.Protocol.Default, :checksum, []},
      timeout_execute: 15_000

    def echo(args), do: args
    def ping(_args), do: :pong
    def raise_test(args), do: raise(args)
  end

  defmodule Example1.Client do
    use MeshxRpc.Client,
      telemetry_prefix: [:example1, __MODULE__],
      cks_mfa: {MeshxRpc.Protocol.Default, :checksum, []},
      pool_opts: [size: 3, max_overflow: 5],
      idle_reconnect: 60 * 60 * 1000,
      exec_retry_on_error: [:closed, :tcp_closed]

    def echo(args), do: call(:echo, args)
  end

  defmodule Example1.Application do
    def start(address) do
      children = [
        Example1.Server.child_spec(address: address),
        {Example1.Client, address: address}
      ]

      Supervisor.start_link(children, strategy: :one_for_one)
    end
  end

  test "it runs" do
    path = Path.join(System.tmp_dir!(), "meshx-#{System.unique_integer([:positive])}.sock")
    on_exit(fn -> File.rm(path) end)
    assert MeshxRpc.attach_telemetry([:example1, Example1.Server]) == :ok
    assert MeshxRpc.attach_telemetry([:example1, Example1.Client]) == :ok

    log =
      capture_log(fn ->
        {:ok, supervisor} = Example1.Application.start({:uds, path})
        assert Example1.Client.call(:ping, [], 20_000, 1_000, 10) == :pong
        assert Example1.Client.echo("hello world") == "hello world"
        assert Example1.Client.call(:echo) == []
        assert Example1.Client.call!(:echo, %{a: 1}, 5_000) == %{a: 1}
        assert Example1.Client.cast(:echo, "hello world") == :ok
        assert MeshxRpc.Client.Pool.call(Example1.Client, :echo, "hello") == "hello"
        assert MeshxRpc.Client.Pool.cast(Example1.Client, :echo, "hello") == :ok

        assert {:error_rpc, %RuntimeError{message: "kaboom"}} =
                 Example1.Client.call(:raise_test, "kaboom")

        assert_raise RuntimeError, "kaboom", fn -> Example1.Client.call!(:raise_test, "kaboom") end
        assert {:error_rpc, {:undef, [_ | _]}} = Example1.Client.call(:rm, ["/etc/*"])
        assert {:error_rpc, {:undef, [_ | _]}} = Example1.Client.call(:child_spec)
        Supervisor.stop(supervisor)
        told()
      end)

    for line <- [
          ~s([:example1, #{inspect(Example1.Client)}, :hsk] -> :ok),
          ~s([:example1, #{inspect(Example1.Client)}, :call] ping -> :ok),
          ~s([:example1, #{inspect(Example1.Server)}, :call] ping -> :ok),
          ~s([:example1, #{inspect(Example1.Client)}, :call] rm -> {:error_rpc, :undef})
        ],
        do: assert(log =~ line)
  end

  # Events of connections are told by processes of their own, which may be late on a busy machine.
  defp told do
    teller = {:initial_call, {MeshxRpc.Telemetry, :emit, 4}}

    for pid <- Process.list(), Process.info(pid, :initial_call) == teller do
      monitor = Process.monitor(pid)
      assert_receive {:DOWN, ^monitor, :process, ^pid, _reason}, 30_000
    end
  end

  test "the functions that options named are there, with their meaning" do
    alias MeshxRpc.Protocol.Default
    assert Default.checksum("test", []) == <<216, 127, 126, 12>>
    assert Default.node_ref() == Atom.to_string(node())
    assert byte_size(Default.conn_ref()) == 4 and Default.conn_ref() != Default.conn_ref()
    assert Default.serialize("test", []) == {:ok, "test", 0}
    assert {:ok, binary, 1} = Default.serialize(%{test_k: "test_v"}, [])
    assert Default.deserialize(binary, [], 1) == {:ok, %{test_k: "test_v"}}
    assert Default.deserialize(binary, []) == {:ok, %{test_k: "test_v"}}
    assert Default.deserialize("test", [], 0) == {:ok, "test"}
    assert {:error, %ArgumentError{}} = Default.deserialize("test", [], 1)
    assert Default.deserialize("test", [], 7) == {:error, {:unknown_serializer, 7}}
    assert {:error, %ArgumentError{}} = Default.serialize(%{}, [:no_such_option])

    # In 0.1 it made atoms of whatever a peer sent.
    unknown = <<131, 119, 24, "an_atom_that_nobody_has_">>
    assert {:error, %ArgumentError{}} = Default.deserialize(unknown, [], 1)
  end

  test "arities" do
    for {module, functions} <- %{
          Example1.Client => [child_spec: 0, child_spec: 1] ++ calls(1..5),
          Example1.Server => [child_spec: 0, child_spec: 1],
          MeshxRpc.Client.Pool => [child_spec: 1, child_spec: 2] ++ calls(2..6),
          MeshxRpc.Server.Pool => [child_spec: 1, child_spec: 2],
          MeshxRpc => [attach_telemetry: 1, attach_telemetry: 2]
        } do
      Code.ensure_loaded!(module)
      assert functions -- module.__info__(:functions) == []
    end

    assert {:call, 5} in MeshxRpc.Client.behaviour_info(:optional_callbacks)
    assert {:child_spec, 1} in MeshxRpc.Server.behaviour_info(:optional_callbacks)
  end

  defp calls(arities), do: for(name <- [:call, :call!, :cast], arity <- arities, do: {name, arity})
end
