defmodule Meshx.ScriptedMesh do
  @moduledoc """
  The services and upstreams of `Meshx.ScriptedAgent`: a mesh of one host, which carries bytes and lets live
  connections be until they are cut. A part of that agent's state, without a process of its own.
  """

  defstruct [:dir, count: 0, services: %{}, upstreams: %{}, foreign: MapSet.new()]

  @doc "What is answered to a command, or `:unknown`."
  def handle(mesh, :register_service, args, owner) do
    host = "h1"
    count = mesh.count + 1
    id = Map.get(args, :id, "#{args.name}-#{host}-#{count}")
    foreign? = MapSet.member?(mesh.foreign, id) and not Map.get(args, :force, false)

    if Map.has_key?(mesh.services, id) or foreign? do
      {{:error, :name_taken, "#{id} is registered"}, mesh}
    else
      address = Map.get(args, :address, {:uds, Path.join([mesh.dir, "up", "s#{count}"])})
      service = %{name: args.name, args: args, address: address, owner: owner}
      reply = %{id: id, service: args.name, spiffe: "spiffe://test/#{args.name}", address: address}
      {{:ok, reply}, %{mesh | count: count, services: Map.put(mesh.services, id, service)}}
    end
  end

  def handle(mesh, :deregister, %{id: id}, owner) do
    case mesh.services do
      %{^id => %{owner: ^owner}} ->
        {{:ok, %{}}, %{mesh | services: Map.delete(mesh.services, id)}}

      _other ->
        {{:error, :invalid_request, "#{id} is not registered through this connection"}, mesh}
    end
  end

  def handle(mesh, :connect, args, owner) do
    count = mesh.count + 1
    id = "u#{count}"

    address =
      case Map.get(args, :address, :uds) do
        :uds -> {:uds, Path.join([mesh.dir, "up", id])}
        :tcp -> {:tcp, "127.0.0.1", 0}
        tcp -> tcp
      end

    case listen(address) do
      {:ok, listen, address} ->
        agent = self()
        target = {args.service, args[:instance]}
        pid = spawn_link(fn -> accept(receive(do: (socket -> socket)), agent, id, target) end)
        :ok = :gen_tcp.controlling_process(listen, pid)
        send(pid, listen)
        upstream = %{args: args, owner: owner, pid: pid, listen: listen, live: []}
        mesh = %{mesh | count: count, upstreams: Map.put(mesh.upstreams, id, upstream)}
        {{:ok, %{upstream: id, address: address}}, mesh}

      {:error, reason} ->
        {{:error, :not_ready, "cannot listen: #{reason}"}, mesh}
    end
  end

  def handle(mesh, :disconnect, %{upstream: id} = args, _owner) do
    case Map.pop(mesh.upstreams, id) do
      {nil, _upstreams} ->
        {{:ok, %{existed: false}}, mesh}

      {upstream, upstreams} ->
        close(upstream)
        if Map.get(args, :cut, true), do: Enum.each(upstream.live, &Process.exit(&1, :kill))
        {{:ok, %{existed: true}}, %{mesh | upstreams: upstreams}}
    end
  end

  def handle(mesh, :services, _args, _owner) do
    services =
      for {id, service} <- mesh.services do
        %{
          name: service.name,
          id: id,
          address: "127.0.0.2:1",
          agent: "a",
          protocol: :meshx,
          status: "passing",
          tags: Map.get(service.args, :tags, []),
          local: true
        }
      end

    {{:ok, %{services: services}}, mesh}
  end

  def handle(mesh, _command, _args, _owner), do: {:unknown, mesh}

  @doc "Notes a live connection of an upstream."
  def live(mesh, id, pid) do
    case mesh.upstreams do
      %{^id => upstream} ->
        %{mesh | upstreams: %{mesh.upstreams | id => %{upstream | live: [pid | upstream.live]}}}

      _gone ->
        mesh
    end
  end

  @doc "The address of an instance, or nil."
  def pick(mesh, {name, instance}) do
    found =
      for {id, %{name: ^name} = service} <- mesh.services,
          instance in [nil, id],
          do: service.address

    if found != [], do: Enum.random(found)
  end

  @doc "What a connection had ends with it."
  def closed(mesh, owner) do
    for {_id, %{owner: ^owner} = upstream} <- mesh.upstreams do
      close(upstream)
      Enum.each(upstream.live, &Process.exit(&1, :kill))
    end

    %{
      mesh
      | services: Map.reject(mesh.services, fn {_id, service} -> service.owner == owner end),
        upstreams: Map.reject(mesh.upstreams, fn {_id, upstream} -> upstream.owner == owner end)
    }
  end

  defp close(upstream) do
    Process.unlink(upstream.pid)
    Process.exit(upstream.pid, :kill)
  end

  defp listen({:uds, path} = address) do
    with {:ok, listen} <- :gen_tcp.listen(0, [:binary, ifaddr: {:local, path}, active: false]),
         do: {:ok, listen, address}
  end

  defp listen({:tcp, text, port}) do
    {:ok, ip} = :inet.parse_address(to_charlist(text))

    with {:ok, listen} <-
           :gen_tcp.listen(port, [:binary, ip: ip, active: false, reuseaddr: true]),
         {:ok, port} <- :inet.port(listen),
         do: {:ok, listen, {:tcp, text, port}}
  end

  defp accept(listen, agent, id, target) do
    with {:ok, socket} <- :gen_tcp.accept(listen) do
      pid = spawn(fn -> carry(receive(do: (socket -> socket)), agent, id, target) end)
      :ok = :gen_tcp.controlling_process(socket, pid)
      send(pid, socket)
      accept(listen, agent, id, target)
    end
  end

  defp carry(socket, agent, id, target) do
    # A connection ends with the agent, however it does.
    Process.link(agent)

    with address when address != nil <- GenServer.call(agent, {:carry, id, self(), target}),
         {:ok, other} <- dial(address) do
      pid = spawn_link(fn -> copy(receive(do: (socket -> socket)), socket) end)
      :ok = :gen_tcp.controlling_process(other, pid)
      send(pid, other)
      copy(socket, other)
    end
  end

  defp dial({:uds, path}),
    do: :gen_tcp.connect({:local, path}, 0, [:binary, :local, active: false])

  defp dial({:tcp, text, port}),
    do: :gen_tcp.connect(to_charlist(text), port, [:binary, active: false])

  # The end of either direction is the end of both.
  defp copy(from, to) do
    with {:ok, bytes} <- :gen_tcp.recv(from, 0),
         :ok <- :gen_tcp.send(to, bytes) do
      copy(from, to)
    else
      _ -> exit(:shutdown)
    end
  end
end
