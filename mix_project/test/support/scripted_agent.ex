defmodule Meshx.ScriptedAgent do
  @moduledoc """
  An agent for tests, in few words: the control and dist sockets of docs/mesh-protocol.md, with `Meshx.ScriptedMesh`
  behind them, and able to misbehave on demand.

  Links between its nodes are plain copies. `set/3` scripts what it does wrong:

    * `:control`: `fn id, command, args -> :default | {:reply, term} | {:raw, binary} | :silent | :close end`; with a
      fourth argument it gets the connection's process, for `answer/3`
    * `:dist`: `fn source, target -> :ok | {:refuse, cause, text} | {:raw, binary} | :silent | :close |
      {:accept, keyword} end`; the keywords replace fields of ACCEPT (`:secret`, `:node`) or all of it (`:raw`)
  """
  use GenServer
  alias Meshx.ScriptedMesh

  def start_link(opts), do: GenServer.start_link(__MODULE__, opts)

  def child_spec(opts),
    do: %{id: make_ref(), start: {__MODULE__, :start_link, [opts]}, restart: :temporary}

  @doc "Answers a request that a script left `:silent`."
  def answer(connection, id, reply),
    do: send(connection, {:push, :erlang.term_to_binary({:reply, id, reply})})

  @doc "Replaces a script, see the module."
  def set(agent, key, fun), do: GenServer.call(agent, {:set, key, fun})

  @doc "What is registered: name => %{socket, secret, creation, proof, hidden, count}."
  def nodes(agent), do: GenServer.call(agent, :nodes)

  @doc "The links that were made: [{link id, source, target}], newest first."
  def links(agent), do: GenServer.call(agent, :links)

  @doc "Services and upstreams: `Meshx.ScriptedMesh`."
  def mesh(agent), do: GenServer.call(agent, :mesh)

  @doc "An id that somebody else registered with the same mesh."
  def foreign(agent, id), do: GenServer.call(agent, {:foreign, id})

  @doc "Sends an event to every control connection that has a service."
  def push_service(agent, event),
    do: GenServer.call(agent, {:push_service, :erlang.term_to_binary(event)})

  @doc "Sends an event to the connection that owns a node."
  def push(agent, node, event),
    do: GenServer.call(agent, {:push, node, :erlang.term_to_binary(event)})

  @doc "Sends any bytes as a frame to the connection that owns a node."
  def push_raw(agent, node, bytes), do: GenServer.call(agent, {:push, node, bytes})

  @doc "Waits until a node is registered, and was at least `count` times."
  def await_node(agent, node, count \\ 1),
    do: GenServer.call(agent, {:await_node, node, count}, 60_000)

  @doc "Waits until a node is not registered."
  def await_gone(agent, node), do: GenServer.call(agent, {:await_gone, node}, 60_000)

  @impl true
  def init(opts) do
    Process.flag(:trap_exit, true)
    dir = Keyword.fetch!(opts, :dir)
    File.mkdir_p!(Path.join(dir, "vm"))
    File.mkdir_p!(Path.join(dir, "up"))
    # What a killed one left.
    for stale <- Path.wildcard(Path.join([dir, "up", "u*"])), do: File.rm(stale)
    File.chmod!(dir, 0o700)
    server = self()

    for {name, packet, serve} <- [{"control.sock", 4, &control/2}, {"dist.sock", 2, &dist/2}] do
      path = Path.join(dir, name)
      File.rm(path)

      {:ok, listen} =
        :gen_tcp.listen(0, [
          :binary,
          ifaddr: {:local, path},
          packet: packet,
          active: false,
          backlog: 64
        ])

      spawn_link(fun_accept(listen, server, serve))
    end

    {:ok,
     %{
       dir: dir,
       scripts: Map.new(Keyword.get(opts, :scripts, [])),
       nodes: %{},
       links: [],
       waiting: [],
       counts: %{},
       sessions: %{},
       mesh: %ScriptedMesh{dir: dir}
     }}
  end

  defp fun_accept(listen, server, serve) do
    fn -> accept(listen, server, serve) end
  end

  defp accept(listen, server, serve) do
    {:ok, socket} = :gen_tcp.accept(listen)

    pid =
      spawn(fn ->
        # A connection ends with the agent.
        Process.link(server)
        receive do: (:go -> serve.(socket, server))
      end)

    :ok = :gen_tcp.controlling_process(socket, pid)
    send(pid, :go)
    accept(listen, server, serve)
  end

  # Control

  defp control(socket, server) do
    :ok = :inet.setopts(socket, active: true)
    control_loop(socket, server)
  end

  defp control_loop(socket, server) do
    receive do
      {:tcp, ^socket, frame} ->
        {id, command, args} = :erlang.binary_to_term(frame)

        case GenServer.call(server, {:control, self(), id, command, args}) do
          {:reply, term} -> :gen_tcp.send(socket, :erlang.term_to_binary(term))
          {:raw, bytes} -> :gen_tcp.send(socket, bytes)
          :silent -> :ok
          :close -> exit(:normal)
        end

        control_loop(socket, server)

      {:tcp_closed, ^socket} ->
        GenServer.call(server, {:closed, self()})

      {:push, bytes} ->
        :gen_tcp.send(socket, bytes)
        control_loop(socket, server)
    end
  end

  # Links

  defp dist(socket, server) do
    with {:ok,
          <<1, 1, link::binary-size(16), secret::binary-size(32), n::16, target::binary-size(n)>>} <-
           :gen_tcp.recv(socket, 0, 5_000) do
      case GenServer.call(server, {:dist, link, secret, target}) do
        :ok -> :ok
        {:refuse, cause, text} -> :gen_tcp.send(socket, refused(cause, text))
        {:raw, bytes} -> :gen_tcp.send(socket, bytes)
        :silent -> :gen_tcp.recv(socket, 0)
        :close -> :ok
        {:connect, path, accept} -> join(socket, path, accept)
      end
    end
  end

  defp join(socket, path, accept) do
    ok = <<1, 2, str16("spiffe://test/callee")::binary, str16("127.0.0.3:1")::binary>>

    # A node may be gone at any step.
    with {:ok, other} <- :gen_tcp.connect({:local, path}, 0, [:binary, packet: 2, active: false]),
         :ok <- :gen_tcp.send(other, accept),
         :ok <- :gen_tcp.send(socket, ok),
         :ok <- :inet.setopts(socket, packet: 0),
         :ok <- :inet.setopts(other, packet: 0),
         pid = spawn_link(fn -> copy(other, socket) end),
         :ok <- :gen_tcp.controlling_process(other, pid) do
      copy(socket, other)
    end
  end

  # Either side's end is the end of both: the processes are linked.
  defp copy(from, to) do
    with {:ok, bytes} <- :gen_tcp.recv(from, 0),
         :ok <- :gen_tcp.send(to, bytes) do
      copy(from, to)
    else
      _ ->
        :gen_tcp.close(from)
        :gen_tcp.close(to)
    end
  end

  def refused(cause, text), do: <<1, 3, byte_size(cause), cause::binary, str16(text)::binary>>

  @doc "An ACCEPT frame without its length."
  def accept_frame(link, secret, node),
    do:
      <<1, 4, link::binary, secret::binary, str16(node)::binary,
        str16("spiffe://test/caller")::binary, str16("127.0.0.2:1")::binary>>

  defp str16(text), do: <<byte_size(text)::16, text::binary>>

  # State

  @impl true
  def handle_call({:set, key, fun}, _from, state),
    do: {:reply, :ok, put_in(state.scripts[key], fun)}

  def handle_call(:nodes, _from, state), do: {:reply, state.nodes, state}
  def handle_call(:links, _from, state), do: {:reply, state.links, state}

  def handle_call(:mesh, _from, state), do: {:reply, state.mesh, state}

  def handle_call({:foreign, id}, _from, state),
    do: {:reply, :ok, update_in(state.mesh.foreign, &MapSet.put(&1, id))}

  def handle_call({:carry, id, pid, target}, _from, state) do
    {:reply, ScriptedMesh.pick(state.mesh, target),
     %{state | mesh: ScriptedMesh.live(state.mesh, id, pid)}}
  end

  def handle_call({:push_service, bytes}, _from, state) do
    owners = for {_id, service} <- state.mesh.services, uniq: true, do: service.owner
    Enum.each(owners, &send(&1, {:push, bytes}))
    {:reply, :ok, state}
  end

  def handle_call({:push, node, bytes}, _from, state) do
    send(state.nodes[node].owner, {:push, bytes})
    {:reply, :ok, state}
  end

  def handle_call({:await_node, node, count}, from, state),
    do: {:noreply, tell(%{state | waiting: [{{:node, node, count}, from} | state.waiting]})}

  def handle_call({:await_gone, node}, from, state),
    do: {:noreply, tell(%{state | waiting: [{{:gone, node}, from} | state.waiting]})}

  def handle_call({:control, owner, id, command, args}, _from, state) do
    script = state.scripts[:control] || fn _, _, _ -> :default end

    case if(is_function(script, 4),
           do: script.(id, command, args, owner),
           else: script.(id, command, args)
         ) do
      :default ->
        {reply, state} = default(command, args, owner, state)
        {:reply, {:reply, {:reply, id, reply}}, tell(state)}

      other ->
        {:reply, other, state}
    end
  end

  def handle_call({:closed, owner}, _from, state) do
    nodes = for {name, %{owner: o} = node} <- state.nodes, o != owner, into: %{}, do: {name, node}
    {:reply, :ok, tell(%{state | nodes: nodes, mesh: ScriptedMesh.closed(state.mesh, owner)})}
  end

  def handle_call({:dist, link, secret, target}, _from, state) do
    script = state.scripts[:dist] || fn _, _ -> :ok end
    node = Enum.find_value(state.nodes, fn {name, node} -> node.secret == secret && name end)
    source = node || state.sessions[secret]
    callee = state.nodes[target]

    result =
      cond do
        source == nil -> {:refuse, "bad_secret", "no registration has this secret"}
        (answer = script.(source, target)) not in [:ok] and elem_or(answer) != :accept -> answer
        callee == nil -> {:refuse, "no_such_node", "#{target} is not in the catalogue"}
        true -> {:connect, callee.socket, accept_of(script.(source, target), link, callee, source)}
      end

    {:reply, result, %{state | links: [{link, source, target} | state.links]}}
  end

  @impl true
  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  defp elem_or(answer) when is_tuple(answer), do: elem(answer, 0)
  defp elem_or(answer), do: answer

  defp accept_of(:ok, link, callee, source), do: accept_frame(link, callee.secret, source)

  defp accept_of({:accept, fields}, link, callee, source) do
    fields[:raw] || accept_frame(link, fields[:secret] || callee.secret, fields[:node] || source)
  end

  defp default(:hello, _args, _owner, state) do
    {{:ok,
      %{
        version: 1,
        features: [],
        agent: "scripted",
        hosts: ["h1", "h2"],
        mesh: "none",
        trust_domain: "test",
        vm_dir: Path.join(state.dir, "vm"),
        dist_socket: Path.join(state.dir, "dist.sock")
      }}, state}
  end

  defp default(:register_node, args, owner, state) do
    if Map.has_key?(state.nodes, args.node) do
      {{:error, :name_taken, "#{args.node} is registered"}, state}
    else
      count = Map.get(state.counts, args.node, 0) + 1

      node = %{
        socket: args.socket,
        secret: :crypto.strong_rand_bytes(32),
        creation: Map.get(args, :creation, 1000 + System.unique_integer([:positive])),
        resumed: Map.has_key?(args, :creation),
        proof: args[:secret],
        hidden: args.hidden,
        owner: owner,
        count: count
      }

      reply =
        Map.take(node, [:creation, :secret])
        |> Map.merge(%{service: "svc", instance: args.node, spiffe: "spiffe://test/svc"})

      {{:ok, reply},
       %{
         state
         | nodes: Map.put(state.nodes, args.node, node),
           counts: Map.put(state.counts, args.node, count)
       }}
    end
  end

  defp default(:register_session, args, _owner, state) do
    secret = :crypto.strong_rand_bytes(32)
    name = args[:node] || args.host
    {{:ok, %{secret: secret}}, put_in(state.sessions[secret], name)}
  end

  defp default(:deregister, %{id: id}, _owner, state) when is_map_key(state.nodes, id),
    do: {{:ok, %{}}, %{state | nodes: Map.delete(state.nodes, id)}}

  defp default(:names, _args, _owner, state) do
    nodes =
      for {name, _} <- state.nodes do
        [_, host] = String.split(name, "@")
        %{node: name, service: "svc", host: host, agent: "127.0.0.2:1", local: true}
      end

    {{:ok, %{nodes: nodes}}, state}
  end

  defp default(:links, _args, _owner, state) do
    links =
      for {link, source, target} <- state.links do
        %{
          id: Base.encode16(link, case: :lower),
          direction: :outbound,
          local: source,
          remote: target,
          local_spiffe: "spiffe://test/caller",
          remote_spiffe: "spiffe://test/callee",
          remote_agent: "127.0.0.3:1",
          purpose: :dist,
          since: 1_700_000_000,
          bytes_in: 10,
          bytes_out: 20,
          local_not_after: 2_000_000_000,
          remote_not_after: 2_000_000_001
        }
      end

    {{:ok, %{links: links}}, state}
  end

  defp default(command, args, owner, state) do
    case ScriptedMesh.handle(state.mesh, command, args, owner) do
      {:unknown, _mesh} -> {{:error, :invalid_request, "no such command: #{command}"}, state}
      {reply, mesh} -> {reply, %{state | mesh: mesh}}
    end
  end

  defp tell(state) do
    {met, waiting} =
      Enum.split_with(state.waiting, fn
        {{:node, node, count}, _} -> match?(%{count: c} when c >= count, state.nodes[node])
        {{:gone, node}, _} -> state.nodes[node] == nil
      end)

    for {what, from} <- met do
      GenServer.reply(
        from,
        if(match?({:node, _, _}, what), do: state.nodes[elem(what, 1)], else: :ok)
      )
    end

    %{state | waiting: waiting}
  end
end
