# What distribution does between two nodes, as matches that fail. Both nodes load this file; one of them checks.
defmodule Distribution do
  @patience 60_000

  @doc "Runs a check in a process of its own: `:ok`, or why it failed."
  def check(what, args) do
    {pid, ref} = spawn_monitor(__MODULE__, what, args)

    receive do
      {:DOWN, ^ref, :process, ^pid, :normal} -> :ok
      {:DOWN, ^ref, :process, ^pid, reason} -> reason
    end
  end

  defp next do
    receive do
      message -> message
    after
      @patience -> :nothing
    end
  end

  # Asks until it is so: for what another node does by itself and tells nobody.
  defp until(condition, left \\ 6_000) do
    cond do
      condition.() -> true
      left == 0 -> false
      true -> Process.sleep(10) && until(condition, left - 1)
    end
  end

  @doc "Ends with the reason that it is sent."
  def hold do
    receive do
      {:exit, reason} -> exit(reason)
    end
  end

  @doc "Sends on what it gets, exits too."
  def tell(to) do
    Process.flag(:trap_exit, true)
    send(to, {:ready, self()})
    telling(to)
  end

  defp telling(to) do
    send(to, {:told, next()})
    telling(to)
  end

  def echo({from, ref, value}), do: send(from, {ref, value})

  ## Checks

  def links(node) do
    Process.flag(:trap_exit, true)
    # An exit comes here with its reason.
    far = Node.spawn_link(node, __MODULE__, :hold, [])
    send(far, {:exit, :done})
    {:EXIT, ^far, :done} = next()
    # And goes there.
    far = Node.spawn(node, __MODULE__, :tell, [self()])
    {:ready, ^far} = next()
    near = spawn(fn -> Process.link(far) && hold() end)
    send(near, {:exit, :from_here})
    {:told, {:EXIT, ^near, :from_here}} = next()
    # By a signal and without a link.
    Process.exit(far, :please)
    me = self()
    {:told, {:EXIT, ^me, :please}} = next()
    # Who is unlinked hears nothing: the monitor's message is the only one.
    other = Node.spawn_link(node, __MODULE__, :hold, [])
    Process.unlink(other)
    ref = Process.monitor(other)
    send(other, {:exit, :unheard})
    {:DOWN, ^ref, :process, ^other, :unheard} = next()
    # A link to nobody.
    Process.link(other)
    {:EXIT, ^other, :noproc} = next()
    Process.exit(far, :kill)
  end

  def monitors(node) do
    far = Node.spawn(node, __MODULE__, :hold, [])
    by_pid = Process.monitor(far)
    true = :erpc.call(node, Process, :register, [far, :held])
    by_name = Process.monitor({:held, node})
    undone = Process.monitor(far)
    true = Process.demonitor(undone)
    send({:held, node}, {:exit, {:because, self()}})
    me = self()
    downs = Enum.sort([next(), next()])

    ^downs =
      Enum.sort([
        {:DOWN, by_pid, :process, far, {:because, me}},
        {:DOWN, by_name, :process, {:held, node}, {:because, me}}
      ])

    nobody = Process.monitor(far)
    {:DOWN, ^nobody, :process, ^far, :noproc} = next()
    no_name = Process.monitor({:held, node})
    {:DOWN, ^no_name, :process, {:held, ^node}, :noproc} = next()
  end

  def spawns(node) do
    Process.flag(:trap_exit, true)
    me = self()
    Node.spawn(node, fn -> send(me, {:here, node()}) end)
    {:here, ^node} = next()
    {pid, ref} = Node.spawn_monitor(node, fn -> exit(:spawned) end)
    ^node = node(pid)
    {:DOWN, ^ref, :process, ^pid, :spawned} = next()
    linked = Node.spawn_link(node, fn -> exit(:linked) end)
    {:EXIT, ^linked, :linked} = next()
    # Asynchronous, with link and monitor; and one that cannot be.
    request = :erlang.spawn_request(node, __MODULE__, :hold, [], [:link, :monitor])
    {:spawn_reply, ^request, :ok, held} = next()
    send(held, {:exit, :requested})

    [{:EXIT, ^held, :requested}, {:DOWN, ^request, :process, ^held, :requested}] =
      Enum.sort([next(), next()])

    bad = :erlang.spawn_request(node, __MODULE__, :hold, [], [{:no_such_option, 1}])
    {:spawn_reply, ^bad, :error, :badopt} = next()
    # The group leader of a process is that of who asked for it.
    leader = Process.group_leader()
    ^leader = :erpc.call(node, Process, :group_leader, [])
  end

  def aliases(node) do
    # One that is used up by the first answer, with the monitor that it belongs to.
    far = Node.spawn(node, __MODULE__, :hold, [])
    once = :erlang.monitor(:process, far, alias: :reply_demonitor)
    Node.spawn(node, __MODULE__, :echo, [{once, once, 1}])
    {^once, 1} = next()
    false = Process.demonitor(once, [:info])

    # One that lasts until it is taken back: what comes later is dropped, so the next message is another.
    kept = :erlang.alias()
    for n <- 1..2, do: Node.spawn(node, __MODULE__, :echo, [{kept, kept, n}])
    [{^kept, 1}, {^kept, 2}] = Enum.sort([next(), next()])
    true = :erlang.unalias(kept)
    {pid, ref} = Node.spawn_monitor(node, __MODULE__, :echo, [{kept, kept, 3}])
    {:DOWN, ^ref, :process, ^pid, :normal} = next()
    ^node = :erpc.call(node, :erlang, :node, [])
    :nothing_else = empty()
    Process.exit(far, :kill)
  end

  defp empty do
    receive do
      message -> message
    after
      0 -> :nothing_else
    end
  end

  def erpc(node) do
    ^node = :erpc.call(node, :erlang, :node, [])

    {:error, {:exception, :badarith, _}} =
      caught(fn -> :erpc.call(node, fn -> 1 / Process.get(:x, 0) end) end)

    {:throw, :ball} = caught(fn -> :erpc.call(node, fn -> throw(:ball) end) end)
    {:exit, {:exception, :gone}} = caught(fn -> :erpc.call(node, fn -> exit(:gone) end) end)

    {:error, {:erpc, :timeout}} = caught(fn -> :erpc.call(node, __MODULE__, :hold, [], 50) end)

    here = node()
    [ok: ^here, ok: ^node] = :erpc.multicall([here, node], :erlang, :node, [])
    me = self()
    :ok = :erpc.cast(node, fn -> send(me, {:cast, node()}) end)
    {:cast, ^node} = next()
    requests = for n <- 1..100, do: {n, :erpc.send_request(node, Function, :identity, [n])}

    for {n, request} <- Enum.reverse(requests),
        do: ^n = :erpc.receive_response(request, @patience)

    {:error, {:erpc, :noconnection}} =
      caught(fn -> :erpc.call(:"nobody@nowhere.else", :erlang, :node, []) end)
  end

  defp caught(fun) do
    fun.()
  catch
    kind, reason -> {kind, reason}
  end

  def rpc(node) do
    ^node = :rpc.call(node, :erlang, :node, [])
    ^node = :rpc.block_call(node, :erlang, :node, [])
    {:badrpc, {:EXIT, {:undef, _}}} = :rpc.call(node, __MODULE__, :no_such_function, [])
    {:badrpc, :timeout} = :rpc.call(node, __MODULE__, :hold, [], 50)
    key = :rpc.async_call(node, Function, :identity, [:later])
    :later = :rpc.yield(key)
    here = node()

    {answers, [:"nobody@nowhere.else"]} =
      :rpc.multicall([here, node, :"nobody@nowhere.else"], :erlang, :node, [])

    true = Enum.sort(answers) == Enum.sort([here, node])
    true = :rpc.cast(node, __MODULE__, :echo, [{self(), :cast, node}])
    {:cast, ^node} = next()
    {[:done], []} = :rpc.multi_server_call([node], :distribution_server, :ask) |> served(node)
    :pong = :net_adm.ping(node)
  end

  # multi_server_call wants a server of that name: the first call has none.
  defp served({[], [node]}, node) do
    server =
      Node.spawn(node, fn ->
        Process.register(self(), :distribution_server)

        receive do
          {from, :ask} -> send(from, {:distribution_server, node(), :done})
        end
      end)

    true = until(fn -> :erpc.call(node, Process, :whereis, [:distribution_server]) == server end)
    :rpc.multi_server_call([node], :distribution_server, :ask)
  end

  def global(node) do
    :ok = :global.sync()
    far = Node.spawn(node, __MODULE__, :hold, [])
    :yes = :global.register_name(:one, far)
    ^far = :erpc.call(node, :global, :whereis_name, [:one])
    :no = :erpc.call(node, :global, :register_name, [:one, self()])
    ref = Process.monitor(far)
    ^far = :global.send(:one, {:exit, :by_name})
    {:DOWN, ^ref, :process, ^far, :by_name} = next()
    true = until(fn -> :global.whereis_name(:one) == :undefined end)
    # A lock that one holds is nobody else's.
    lock = {:lock, self()}
    true = :global.set_lock(lock)
    false = :erpc.call(node, :global, :set_lock, [{:lock, :other}, [node(), node], 0])
    true = :global.del_lock(lock)
    :inside = :erpc.call(node, :global, :trans, [{:lock, :other}, fn -> :inside end])
  end

  @doc "Gives a name to a process that stays."
  def register(name) do
    pid = spawn(__MODULE__, :hold, [])
    :yes = :global.register_name(name, pid)
    :persistent_term.put({:registered, name}, pid)
    pid
  end

  @doc "Two nodes that were apart have registered the same name, and meet: one process is left, for both."
  def conflict(node, name, near) do
    true = Node.connect(node)
    far = :erpc.call(node, :persistent_term, :get, [{:registered, name}])
    for pid <- [near, far], do: Process.monitor(pid)
    {:DOWN, _ref, :process, lost, _why} = next()
    [left] = [near, far] -- [lost]

    known = fn ->
      [:global.whereis_name(name), :erpc.call(node, :global, :whereis_name, [name])]
    end

    true = until(fn -> known.() == [left, left] end)
    Process.exit(left, :kill)
  end

  def pg(node) do
    scope = :distribution
    for at <- [node(), node], do: {:ok, _} = :erpc.call(at, :pg, :start, [scope])
    far = Node.spawn(node, __MODULE__, :hold, [])
    :ok = :erpc.call(node, :pg, :join, [scope, :group, far])
    :ok = :pg.join(scope, :group, self())
    both = Enum.sort([far, self()])
    for at <- [node(), node], do: true = until(fn -> members(at, scope) == both end)
    [me] = :pg.get_local_members(scope, :group)
    true = me == self()
    # Who ends is a member no more.
    send(far, {:exit, :normal})
    for at <- [node(), node], do: true = until(fn -> members(at, scope) == [me] end)
    for at <- [node(), node], do: stop(:erpc.call(at, Process, :whereis, [scope]))
  end

  defp members(node, scope),
    do: :erpc.call(node, :pg, :get_members, [scope, :group]) |> Enum.sort()

  defp stop(pid) do
    ref = Process.monitor(pid)
    Process.unlink(pid)
    Process.exit(pid, :kill)
    receive(do: ({:DOWN, ^ref, _, _, _} -> :ok))
  end

  def code(node) do
    {:module, module, binary, _} = defmodule Distributed, do: def(where, do: node())
    # As bytes, as the shell does it for one node and for all.
    false = loaded(node, module)
    {:module, ^module} = :erpc.call(node, :code, :load_binary, [module, ~c"distributed", binary])
    ^node = :erpc.call(node, module, :where, [])
    unload(node, module)

    dir =
      Path.join(System.tmp_dir!(), "mxcode#{System.unique_integer([:positive])}#{System.pid()}")

    File.mkdir!(dir)
    File.write!(Path.join(dir, "#{module}.beam"), binary)
    true = :code.add_path(to_charlist(dir))
    :abcast = :c.nl(module)
    true = until(fn -> loaded(node, module) end)
    ^node = :erpc.call(node, module, :where, [])
    unload(node, module)
    {:ok, [{^node, :loaded, ^module}]} = IEx.Helpers.nl([node], module)
    ^node = :erpc.call(node, module, :where, [])
    unload(node, module)
    unload(node(), module)
    :code.del_path(to_charlist(dir))
    File.rm_rf!(dir)
  end

  defp loaded(node, module), do: is_tuple(:erpc.call(node, :code, :is_loaded, [module]))

  defp unload(node, module) do
    _ = :erpc.call(node, :code, :purge, [module])
    true = :erpc.call(node, :code, :delete, [module])
    _ = :erpc.call(node, :code, :purge, [module])
    false = loaded(node, module)
  end

  @doc "What observer asks a remote node for."
  def observer(node) do
    info = :erpc.call(node, :observer_backend, :sys_info, [])
    true = Keyword.fetch!(info, :process_count) > 10
    true = info[:otp_release] == :erpc.call(node, :erlang, :system_info, [:otp_release])
    collector = Node.spawn(node, :observer_backend, :etop_collect, [self()])
    {^collector, top} = next()
    :etop_info = elem(top, 0)

    tables =
      :erpc.call(node, :observer_backend, :get_table_list, [
        :ets,
        [{:sys_hidden, true}, {:unread_hidden, true}]
      ])

    true = is_list(tables)
    # A trace of a process there.
    far = Node.spawn(node, __MODULE__, :hold, [])
    {:ok, _tracer} = :erpc.call(node, :dbg, :tracer, [:process, {&traced/2, self()}])
    {:ok, _} = :erpc.call(node, :dbg, :p, [far, [:receive]])
    send(far, {:exit, :traced})
    {:traced, {:trace, ^far, :receive, {:exit, :traced}}} = next()
    _ = :erpc.call(node, :dbg, :stop, [])
  end

  def traced(message, to) do
    send(to, {:traced, message})
    to
  end

  @doc "One message of so many MiB, there and back, while small ones go on."
  def giant(node, mib) do
    before = System.monotonic_time(:millisecond)
    blob = :binary.copy(:crypto.strong_rand_bytes(1_048_576), mib)
    small = Task.async(fn -> calls(node, 0, 0) end)
    hash = :crypto.hash(:sha256, blob)
    ^hash = :erpc.call(node, :crypto, :hash, [:sha256, blob], 600_000)

    true =
      :erpc.call(node, :binary, :copy, [binary_part(blob, 0, 1_048_576), mib], 600_000) == blob

    send(small.pid, :stop)
    {count, slowest} = Task.await(small, 600_000)
    took = System.monotonic_time(:millisecond) - before

    IO.puts(
      :stderr,
      "#{mib} MiB there and back in #{took} ms; #{count} small calls meanwhile, slowest #{slowest} us"
    )
  end

  defp calls(node, count, slowest) do
    {took, ^count} = :timer.tc(fn -> :erpc.call(node, Function, :identity, [count], 600_000) end)
    slowest = max(took, slowest)

    receive do
      :stop -> {count + 1, slowest}
    after
      0 -> calls(node, count + 1, slowest)
    end
  end

  @doc "Signals of one process to another keep their order, large and small ones mixed."
  def order(node) do
    far = Node.spawn(node, __MODULE__, :tell, [self()])
    {:ready, ^far} = next()
    large = :binary.copy("x", 300_000)
    for n <- 1..500, do: send(far, {n, if(rem(n, 7) == 0, do: large, else: n)})

    for n <- 1..500 do
      {:told, {^n, body}} = next()
      true = body == if(rem(n, 7) == 0, do: large, else: n)
    end

    Process.exit(far, :kill)
  end

  @doc "Floods the other node with blobs from several processes for so many milliseconds. How many MiB were sent."
  def flood(node, ms) do
    until = System.monotonic_time(:millisecond) + ms
    blob = :binary.copy(<<7>>, 1_048_576)
    sink = Node.spawn(node, __MODULE__, :sink, [])
    senders = for _ <- 1..4, do: Task.async(fn -> flood(sink, blob, until, 0) end)
    sent = senders |> Task.await_many(:infinity) |> Enum.sum()
    send(sink, {:count, self()})
    receive(do: ({:seen, ^sent} -> sent))
  end

  # Distribution's own back pressure holds the sender.
  defp flood(sink, blob, until, sent) do
    send(sink, blob)

    if System.monotonic_time(:millisecond) < until,
      do: flood(sink, blob, until, sent + 1),
      else: sent + 1
  end

  def sink(seen \\ 0) do
    receive do
      {:count, from} -> send(from, {:seen, seen})
      _blob -> sink(seen + 1)
    end
  end

  @doc "Meets the other node in every round, at the same moment as it. The slowest meeting in milliseconds."
  def meet(node, rounds) do
    :net_kernel.monitor_nodes(true)

    slowest =
      Enum.reduce(1..rounds, 0, fn round, slowest -> max(slowest, meeting(node, round)) end)

    :net_kernel.monitor_nodes(false)
    slowest
  end

  # Both know by the clock when: nothing else joins them while they are apart.
  defp meeting(node, round) do
    at = System.os_time(:millisecond)
    Process.sleep(50 - rem(at, 50))
    began = System.monotonic_time(:millisecond)
    true = Node.connect(node)
    took = System.monotonic_time(:millisecond) - began
    # The link is one that carries, in both directions.
    ^round = :erpc.call(node, Function, :identity, [round], @patience)
    # The lesser ends it, when both have been here.
    if node() < node do
      true = until(fn -> :erpc.call(node, :persistent_term, :get, [:met, 0]) == round end)
      Node.disconnect(node)
    else
      :persistent_term.put(:met, round)
    end

    receive(do: ({:nodedown, ^node} -> :ok))
    took
  end
end
