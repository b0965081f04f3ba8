defmodule MeshxRpc.TelemetryTest do
  use MeshxRpc.Case, async: true
  import ExUnit.CaptureLog

  alias MeshxRpc.{Telemetry, TestProxy}

  @moduletag capture_log: true

  @traceparent "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
  @key "a shared key of some length"

  def handle(event, measurements, metadata, {pid, side}),
    do: send(pid, {:event, side, event, measurements, metadata})

  def handle(_event, _measurements, _metadata, :crash), do: raise("this handler is broken")

  def trace(text), do: text
  def traceparent(_argument), do: MeshxRpc.Server.traceparent()

  def hang(_argument), do: receive(do: (:never -> :ok))

  defp told(side), do: [telemetry_handler: {__MODULE__, :handle, {self(), side}}]

  # The next event of one side, by its last name.
  defp event(side, name, timeout \\ 10_000) do
    receive do
      {:event, ^side, event, measurements, metadata} ->
        if List.last(event) == name,
          do: {event, measurements, metadata},
          else: event(side, name, timeout)
    after
      timeout -> flunk("no event #{inspect(name)} of #{inspect(side)}")
    end
  end

  defp pair(server_options \\ [], client_options \\ []) do
    {server, address} = server(told(:server) ++ server_options)
    client = client_down(address, told(:client) ++ client_options)
    {server, client}
  end

  test "each event, of both sides, with measurements and metadata of 0.1 and no payload" do
    {server, client} =
      pair([telemetry_prefix: [:shop], shared_key: @key, svc_ref_mfa: "the server"],
        shared_key: @key,
        node_ref_mfa: :a_node
      )

    secret = "a payload that nobody must see"
    assert Client.Pool.call(client, :echo, {secret, 1}, 10_000, 1_000, 5) == {secret, 1}

    assert {[:shop, :init], _, %{id: ^server, result: :ok, address: {:tcp, _, _}}} =
             event(:server, :init)

    {[:shop, :hsk], measurements, metadata} = event(:server, :hsk)
    assert %{result: :ok, id: ^server, remote: %{node_ref: "a_node"}} = metadata
    assert measurements.time[:hsk] > 0

    {[:meshx_rpc, ^client, :hsk], measurements, metadata} = event(:client, :hsk)
    assert %{result: :ok, remote: %{svc_ref: "the server", conn_ref: <<_::32>>}} = metadata
    assert measurements.time[:hsk] > 0 and is_port(metadata.socket)

    size = byte_size(:erlang.term_to_binary({secret, 1}))
    {[:meshx_rpc, ^client, :call], measurements, metadata} = event(:client, :call)
    assert measurements.size == %{send: size, recv: size}
    assert measurements.blocks == %{send: 1, recv: 1}
    assert [:ser, :dser, :exec, :hsk, :idle, :recv, :send] -- Keyword.keys(measurements.time) == []
    assert measurements.time[:exec] > 0

    assert %{fun_name: "echo", fun_req: :call, result: :ok, id: ^client, state: :reply} = metadata
    assert %{address: {:tcp, _, _}, remote: %{svc_ref: "the server"}, hsk_ref: hsk_ref} = metadata
    assert is_integer(hsk_ref) and is_reference(metadata.req_ref)
    client_event = {measurements, metadata}

    {[:shop, :call], measurements, metadata} = event(:server, :call)
    assert %{send: ^size, recv: ^size} = measurements.size
    assert %{fun_name: :echo, fun_req: :call, result: :ok, id: ^server, req_ref: 1} = metadata
    assert %{remote: %{node_ref: "a_node"}, local: %{svc_ref: "the server"}} = metadata

    for shown <- [client_event, {measurements, metadata}] do
      text = inspect(shown, limit: :infinity, printable_limit: :infinity)
      refute text =~ secret or text =~ @key
    end

    assert Client.Pool.cast(client, :echo, secret) == :ok
    assert {_, _, %{fun_req: :cast, result: :ok}} = event(:client, :cast)
    assert {_, _, %{fun_req: :cast, result: :ok, fun_name: :echo}} = event(:server, :cast)
  end

  test "failures are told by kind: what a function failed with may be its argument" do
    {_server, client} = pair(timeout_execute: 4_000)
    assert Client.Pool.call(client, :echo, 1, 10_000, 1_000, 5) == 1
    name = registered()
    Process.put(:secret, "what nobody must see")

    for {fun, argument, timeout, told} <- [
          {:fail, 1, :infinity, {:exception, ArgumentError}},
          {:exit_it, {:closed, "what nobody must see"}, :infinity, :other},
          {:exit_it, {:shutdown, "what nobody must see"}, :infinity, :other},
          {:throw_it, "what nobody must see", :infinity, :nocatch},
          {:badarith, 0, :infinity, :badarith},
          {:nothing, 1, :infinity, :undef},
          {:wait, {name, 1}, 2_000, :timeout},
          {:wait, {name, 1}, :infinity, :killed}
        ] do
      assert {:error_rpc, _reason} = Client.Pool.call(client, fun, argument, timeout)

      for side <- [:server, :client] do
        {_, measurements, metadata} = failed(side)
        # The caller's CANCEL may come before the deadline passes here.
        told = if told == :timeout and side == :server, do: [:timeout, :cancelled], else: [told]

        assert elem(metadata.result, 1) in told, "#{fun} at #{side}: #{inspect(metadata)}"
        refute inspect({measurements, metadata}, limit: :infinity) =~ "what nobody must see"
      end
    end
  end

  defp failed(side) do
    case event(side, :call) do
      {_, _, %{result: :ok}} -> failed(side)
      event -> event
    end
  end

  test "a hello that fails, at both sides" do
    {_server, _client} = pair([shared_key: @key], shared_key: "not the key of this server")
    assert {_, _, %{result: {:error_rpc, {:auth, text}}}} = event(:client, :hsk)
    assert text =~ "does not prove"
    assert {_, _, %{result: {:error_rpc, {:auth, _}}}} = event(:server, :hsk)
  end

  test "a connection that ends: idle without calls, recv with some; and one that is refused" do
    {server, client} = pair()
    assert Client.Pool.call(client, :echo, 1, 10_000, 1_000, 5) == 1
    :ok = stop_supervised(server)
    assert {_, measurements, %{result: {:error_rpc, _}}} = event(:client, :idle)
    assert measurements.time[:idle] > 0
    assert {_, _, %{result: {:error_rpc, {:connect, :econnrefused}}}} = event(:client, :hsk)

    {_server, client} = pair()
    assert Client.Pool.call(client, :echo, 1, 10_000, 1_000, 5) == 1
    name = registered()
    call = Task.async(fn -> Client.Pool.call(client, :wait, {name, 1}, 10_000, 0) end)
    assert_receive {:running, pid, 1}, 10_000
    {:links, links} = Process.info(pid, :links)
    for link <- links, do: Process.exit(link, :kill)
    assert Task.await(call) == {:error_rpc, :tcp_closed}
    assert {_, _, %{result: {:error_rpc, _}}} = event(:client, :recv)
  end

  test "a connection without calls is made anew after idle_reconnect, one with calls is not" do
    {server, client} = pair([], idle_reconnect: 200)
    assert Client.Pool.call(client, :echo, 1, 10_000, 1_000, 5) == 1
    assert {_, _, %{result: :ok, socket: first}} = event(:client, :hsk)
    assert {_, measurements, %{result: :ok_reconnect, socket: ^first}} = event(:client, :idle)
    assert measurements.time[:idle] >= 150_000
    assert {_, _, %{result: :ok, socket: second}} = event(:client, :hsk)
    assert second != first

    name = registered()
    # It may come while the connection is made anew.
    call = Task.async(fn -> Client.Pool.call(client, :wait, {name, 1}, :infinity, 1_000, 5) end)
    assert_receive {:running, pid, 1}, 10_000
    Process.sleep(700)
    await(fn -> Server.Pool.info(server).connections == 1 end)
    send(pid, {:answer, :undisturbed})
    assert Task.await(call) == :undisturbed
  end

  test "a handler that fails costs nothing but a line in the log" do
    broken = [telemetry_handler: {__MODULE__, :handle, :crash}]

    log =
      capture_log(fn ->
        {_server, address} = server(broken)
        client = client(address, broken)
        assert Client.Pool.call(client, :echo, 1) == 1
        assert Client.Pool.cast(client, :echo, 1) == :ok
      end)

    assert log =~ "telemetry handler MeshxRpc.TelemetryTest.handle/4 failed"
    assert log =~ "this handler is broken"
  end

  test "attach_telemetry prints, for a prefix of any length, and only that" do
    for prefix <- [[:a], [:a, :b], [:a, :b, unique("c")]] do
      {_server, address} = server(telemetry_prefix: prefix ++ [:server])
      client = client(address, telemetry_prefix: prefix)
      id = {:printing, prefix}
      assert MeshxRpc.attach_telemetry(prefix, id) == :ok

      assert_raise ArgumentError, ~r/attached already/, fn ->
        MeshxRpc.attach_telemetry(prefix, id)
      end

      log =
        capture_log(fn ->
          assert Client.Pool.call(client, :echo, "x") == "x"
          assert {:error_rpc, _} = Client.Pool.call(client, :fail)
        end)

      assert log =~ "[debug] #{inspect(prefix ++ [:call])} echo -> :ok"

      assert log =~
               "[error] #{inspect(prefix ++ [:call])} fail -> {:error_rpc, {:exception, ArgumentError}}"

      refute log =~ inspect(prefix ++ [:server, :call])
      assert MeshxRpc.detach_telemetry(id) == :ok
      assert MeshxRpc.detach_telemetry(id) == {:error, :not_found}

      refute capture_log(fn -> Client.Pool.call(client, :echo, "x") end) =~
               inspect(prefix ++ [:call])
    end

    assert MeshxRpc.attach_telemetry([:d, :e]) == :ok
    assert MeshxRpc.detach_telemetry(:e) == :ok
    assert_raise ArgumentError, fn -> MeshxRpc.attach_telemetry([]) end
  end

  def broken(:raise), do: raise("no")
  def broken(:throw), do: throw(:no)
  def broken(:exit), do: exit(:no)

  test "functions for names and traces that fail, in whatever way, cost only what they are for" do
    for how <- [:raise, :throw, :exit] do
      mfa = {__MODULE__, :broken, [how]}
      refs = [svc_ref_mfa: mfa, node_ref_mfa: mfa, conn_ref_mfa: mfa]
      {_server, client} = pair([module: __MODULE__] ++ refs, [traceparent: mfa] ++ refs)
      assert Client.Pool.call(client, :traceparent, 1, 10_000, 1_000, 5) == nil
      nameless = %{svc_ref: "", node_ref: "", conn_ref: ""}
      assert {_, _, %{local: ^nameless, remote: ^nameless}} = event(:client, :call)
    end
  end

  test "functions for names that hang hold up neither side for longer than a hello may take" do
    mfa = {__MODULE__, :hang, [1]}
    options = [conn_ref_mfa: mfa, timeout_hsk: 200]

    for {ours, theirs} <- [{options, []}, {[], options}] do
      log =
        capture_log(fn ->
          {_server, client} = pair(ours, theirs)
          assert Client.Pool.call(client, :echo, 1, 10_000, 1_000, 5) == 1
          assert {_, _, %{local: local, remote: remote}} = event(:client, :call)
          assert "" in [local.conn_ref, remote.conn_ref]
        end)

      assert log =~ "option :conn_ref_mfa: took longer than timeout_hsk"
    end
  end

  test "the name that a peer calls is printed so that it is one line of ours" do
    prefix = [unique("shop")]
    {_server, address} = server()
    # The same text at the server; a client's is there when the call has ended.
    client = client(address, telemetry_prefix: prefix)
    assert MeshxRpc.attach_telemetry(prefix) == :ok

    log =
      capture_log(fn ->
        for name <- ["x\n[info] y", "\e[31m", <<255, 254>>],
            do: assert({:error_rpc, {:undef, _}} = Client.Pool.call(client, name, 1))
      end)

    assert MeshxRpc.detach_telemetry(hd(prefix)) == :ok
    assert log =~ ~S(x\n[info] y -> {:error_rpc, :undef})
    assert log =~ ~S(\e[31m -> {:error_rpc, :undef})
    assert log =~ ~S(\xFF\xFE -> {:error_rpc, :undef})
    refute log =~ "failed"
  end

  describe "with :telemetry, in a VM of its own:" do
    # Does what the application of that name does, and counts.
    @fake """
    defmodule :telemetry_handler_table do
      def list_for_event(event), do: Enum.filter(:persistent_term.get(:fake, []), &(event in elem(&1, 1)))
    end

    defmodule :telemetry do
      def execute(event, measurements, metadata) do
        for {_id, _events, fun, config} <- :telemetry_handler_table.list_for_event(event),
            do: fun.(event, measurements, metadata, config)
        :counters.add(:persistent_term.get(:executed), 1, 1)
        :ok
      end

      def attach_many(id, events, fun, config) do
        :persistent_term.put(:fake, [{id, events, fun, config} | :persistent_term.get(:fake, [])])
      end

      def detach(id) do
        :persistent_term.put(:fake, List.keydelete(:persistent_term.get(:fake, []), id, 0))
        :ok
      end
    end
    """

    @program """
    :persistent_term.put(:executed, :counters.new(1, []))
    :ok = :application.load({:application, :telemetry, [applications: [:kernel, :stdlib], vsn: ~c"1.0.0"]})
    {:ok, _} = Application.ensure_all_started(:meshx)

    defmodule Api do
      use MeshxRpc.Server, address: {:tcp, {127, 0, 0, 1}, 0}
      def echo(x), do: x
    end

    {:ok, _} = Supervisor.start_link([Api], strategy: :one_for_one)
    {:ok, address} = MeshxRpc.Server.Pool.address(Api)
    {:ok, _} = MeshxRpc.Client.Pool.start_link(:c, address: address, pool_opts: [size: 1])
    1 = MeshxRpc.Client.Pool.call(:c, :echo, 1, 10_000, 1_000, 5)
    quiet = :counters.get(:persistent_term.get(:executed), 1)
    me = self()
    handler = fn event, _measurements, metadata, nil -> send(me, {event, metadata.result}) end
    :telemetry.attach_many(:h, [[:meshx_rpc, :c, :call], [:meshx_rpc, Api, :call]], handler, nil)
    2 = MeshxRpc.Client.Pool.call(:c, :echo, 2)
    seen = for _ <- 1..2, do: (receive do message -> message after 10_000 -> :none end)
    :telemetry.detach(:h)
    before = :counters.get(:persistent_term.get(:executed), 1)
    3 = MeshxRpc.Client.Pool.call(:c, :echo, 3)
    :ok = MeshxRpc.attach_telemetry([:meshx_rpc, :c])
    [{:c, events, _, _}] = :persistent_term.get(:fake)
    {quiet, Enum.sort(seen), :counters.get(:persistent_term.get(:executed), 1) - before, length(events)}
    """

    test "its handlers get the events, and without one it is not even called" do
      {:ok, peer, _node} =
        :peer.start_link(%{
          connection: :standard_io,
          wait_boot: 60_000,
          args: Enum.flat_map(:code.get_path(), &[~c"-pa", &1])
        })

      {:ok, _} = :peer.call(peer, Application, :ensure_all_started, [:elixir])
      _modules = :peer.call(peer, Code, :eval_string, [@fake], 60_000)
      {answer, _binding} = :peer.call(peer, Code, :eval_string, [@program], 60_000)

      assert answer ==
               {0, [{[:meshx_rpc, Api, :call], :ok}, {[:meshx_rpc, :c, :call], :ok}], 0, 7}

      :peer.stop(peer)
    end
  end

  describe "traceparent" do
    test "travels from a caller to the function, and to the events" do
      {_server, client} =
        pair([module: __MODULE__], traceparent: {__MODULE__, :trace, [@traceparent]})

      assert Client.Pool.call(client, :traceparent, "x", 10_000, 1_000, 5) == @traceparent
      assert Client.Pool.call(client, :traceparent, "") == @traceparent
      assert Client.Pool.call(client, :traceparent, %{a: 1}) == @traceparent
      assert {_, _, %{traceparent: @traceparent}} = event(:client, :call)
      assert {_, _, %{traceparent: @traceparent}} = event(:server, :call)
    end

    test "is in the events of requests that nobody answers, too" do
      {_server, client} =
        pair(
          [module: __MODULE__, timeout_execute: 200, functions: [:hang]],
          traceparent: {__MODULE__, :trace, [@traceparent]}
        )

      assert Client.Pool.call(client, :hang, "x", 10_000, 1_000, 5) == {:error_rpc, :killed}

      assert {_, _, %{traceparent: @traceparent, result: {:error_rpc, :killed}}} =
               event(:server, :call)

      assert Client.Pool.call(client, :hang, "x", 100) == {:error_rpc, :timeout}

      assert {_, _, %{traceparent: @traceparent, result: {:error_rpc, reason}}} =
               event(:server, :call)

      assert reason in [:timeout, :cancelled]
      assert {:error_rpc, {:undef, _stack}} = Client.Pool.call(client, :nothing, "x", 10_000)

      assert {_, _, %{traceparent: @traceparent, result: {:error_rpc, :undef}}} =
               event(:server, :call)
    end

    test "costs a byte without one, and nothing at all without the option" do
      {_server, address} = server(module: __MODULE__)

      for {options, tail} <- [{[], 0}, {[traceparent: {__MODULE__, :trace, [nil]}], 1}] do
        proxy =
          start_supervised!({TestProxy, target: address, fun: fn _, _, _ -> :pass end}, id: tail)

        client = client_down(TestProxy.address(proxy), options)
        assert Client.Pool.call(client, :traceparent, "x", 10_000, 1_000, 5) == nil

        assert [<<len::24, 0x10, _::binary>>] =
                 for(
                   <<_::24, 0x10, _::binary>> = frame <- TestProxy.seen(proxy, :request),
                   do: frame
                 )

        assert len == 15 + byte_size("traceparent") + 1 + tail
      end
    end

    test "what is malformed is none, here and at the server" do
      for bad <- [
            "",
            nil,
            1,
            String.upcase(@traceparent),
            @traceparent <> "-more",
            String.replace_prefix(@traceparent, "00", "ff"),
            "00-" <> String.duplicate("0", 32) <> "-b7ad6b7169203331-01",
            String.duplicate("x", 300)
          ] do
        assert MeshxRpc.Traceparent.ask({__MODULE__, :trace, [bad]}) == nil
        text = if is_binary(bad), do: binary_part(bad, 0, min(byte_size(bad), 255)), else: "x"

        assert {:ok, "data", nil} =
                 MeshxRpc.Traceparent.split(<<"data", text::binary, byte_size(text)>>)
      end

      later = String.replace_prefix(@traceparent, "00", "01") <> "-more"
      assert MeshxRpc.Traceparent.ask({__MODULE__, :trace, [later]}) == later
      assert MeshxRpc.Traceparent.ask({__MODULE__, :no_such_function, []}) == nil
      assert MeshxRpc.Traceparent.split("") == :error
      assert MeshxRpc.Traceparent.split(<<"abc", 4>>) == :error
      assert {:ok, "", nil} = MeshxRpc.Traceparent.split(<<"abc", 3>>)
    end
  end

  test "measurements always have all keys" do
    assert %{blocks: %{send: 0, recv: 0}, size: %{send: 0, recv: 0}, time: time} =
             Telemetry.measurements([])

    assert Enum.all?(time, &match?({_name, 0}, &1))
    assert Telemetry.names() == [:init, :hsk, :idle, :recv, :send, :call, :cast]
    assert Enum.map([0, 1, 100, 101], &Telemetry.blocks(&1, 100)) == [1, 1, 1, 2]
  end
end
