defmodule SocketDir do
  @moduledoc """
  A service mesh for one user on one machine: a directory. No agent, no certificates, no rules.

  Each instance of a service is a file in it, which tells the instance's address and the process that holds it (its
  OS pid). Upstreams are those addresses themselves: nothing stands between client and service. What it cannot
  give is said in the README.

      {SocketDir, dir: "/run/user/1000/mesh"}

  A template is `nil`, or `[kind: :uds | :tcp]` for a service: where it listens, a Unix socket by default.
  """
  @behaviour Meshx.ServiceMesh
  use GenServer

  def start_link(options), do: GenServer.start_link(__MODULE__, options, name: __MODULE__)

  @impl Meshx.ServiceMesh
  def start(params, template \\ nil, force_registration? \\ false, timeout \\ 5_000) do
    with {:ok, {name, id}} <- params(params),
         {:ok, kind} <- kind(template),
         do:
           ask(
             {:start, name, id || "#{name}-#{System.pid()}", kind, force_registration?},
             timeout
           )
  end

  @impl Meshx.ServiceMesh
  def stop(service_id),
    do: with({:ok, known} <- params(service_id), do: ask({:stop, elem(known, 0)}))

  @impl Meshx.ServiceMesh
  def connect(upstreams, _template \\ nil, _proxy \\ nil) when is_list(upstreams) do
    Meshx.ServiceMesh.each(upstreams, &params/1, &ask({:connect, &1}))
  end

  @impl Meshx.ServiceMesh
  def disconnect(upstreams, _proxy_id \\ nil, _restart_proxy? \\ false) when is_list(upstreams) do
    ask({:disconnect, for(upstream <- upstreams, {:ok, known} <- [params(upstream)], do: known)})
  end

  defp ask(request, timeout \\ 5_000)

  defp ask(request, timeout) when timeout == :infinity or (is_integer(timeout) and timeout > 0) do
    GenServer.call(__MODULE__, request, timeout)
  catch
    :exit, {reason, _call} -> {:error, reason}
  end

  defp ask(_request, timeout), do: {:error, {:invalid_request, "timeout is #{inspect(timeout)}"}}

  defp params({name, id}) do
    with {:ok, {name, nil}} <- params(name), {:ok, {id, nil}} <- params(id), do: {:ok, {name, id}}
  end

  defp params(name) when (is_atom(name) or is_binary(name)) and name not in [nil, ""],
    do: {:ok, {to_string(name), nil}}

  defp params(other),
    do: {:error, {:invalid_request, "#{inspect(other)} is neither a name nor {name, id}"}}

  defp kind(template) do
    case template || [] do
      [] -> {:ok, :uds}
      [kind: kind] when kind in [:uds, :tcp] -> {:ok, kind}
      other -> {:error, {:invalid_request, "template is #{inspect(other)}, wanted [kind: :uds]"}}
    end
  end

  ## The server holds what this VM has: services with their owners, and who asked for which upstreams.

  @impl GenServer
  def init(options) do
    Process.flag(:trap_exit, true)
    dir = Keyword.fetch!(options, :dir)
    File.mkdir_p!(dir)
    # Whoever can write here is the mesh.
    File.chmod!(dir, 0o700)
    {:ok, %{dir: dir, services: %{}, upstreams: MapSet.new()}}
  end

  @impl GenServer
  def handle_call({:start, name, id, kind, force?}, {owner, _tag}, state) do
    case state.services do
      %{^id => {^owner, _monitor}} when force? ->
        register(remove(state, id), owner, name, id, kind)

      %{^id => _service} when force? ->
        {:reply, {:error, {:name_taken, "#{id} belongs to another process"}}, state}

      %{^id => _service} ->
        {:reply, {:ok, :already_started}, state}

      _new ->
        register(state, owner, name, id, kind)
    end
  end

  def handle_call({:stop, id}, _from, state) do
    if Map.has_key?(state.services, id),
      do: {:reply, :ok, remove(state, id)},
      else: {:reply, {:error, {:no_such_service, id}}, state}
  end

  def handle_call({:connect, upstreams}, {owner, _tag}, state) do
    known = for file <- Path.wildcard(Path.join(state.dir, "*.i")), do: read(file)
    answers = Enum.map(upstreams, &find(known, &1))
    asked = for {upstream, {:ok, _}} <- Enum.zip(upstreams, answers), do: {owner, upstream}
    {:reply, answers, %{state | upstreams: Enum.into(asked, state.upstreams)}}
  end

  def handle_call({:disconnect, upstreams}, {owner, _tag}, state) do
    known = Enum.filter(upstreams, &MapSet.member?(state.upstreams, {owner, &1}))
    left = MapSet.difference(state.upstreams, MapSet.new(known, &{owner, &1}))
    {:reply, {:ok, for({name, _id} <- known, do: name)}, %{state | upstreams: left}}
  end

  @impl GenServer
  def handle_info({:DOWN, monitor, :process, _owner, _reason}, state) do
    ids = for {id, {_owner, ^monitor}} <- state.services, do: id
    {:noreply, Enum.reduce(ids, state, &remove(&2, &1))}
  end

  def handle_info(_other, state), do: {:noreply, state}

  @impl GenServer
  def terminate(_reason, state), do: Enum.each(Map.keys(state.services), &remove(state, &1))

  defp register(state, owner, name, id, kind) do
    address = address(kind, entry(state.dir, id) <> ".s")
    new = "#{entry(state.dir, id)}.#{System.pid()}"
    File.write!(new, :erlang.term_to_binary({name, id, address, System.pid()}))

    # Whole from the first moment on, and of two VMs one makes it.
    with :ok <- free(state.dir, id), :ok <- File.ln(new, entry(state.dir, id)) do
      File.rm!(new)
      services = Map.put(state.services, id, {owner, Process.monitor(owner)})
      {:reply, {:ok, id, address}, %{state | services: services}}
    else
      {:error, reason} ->
        File.rm!(new)
        {:reply, {:error, reason}, state}
    end
  end

  defp address(:uds, path), do: {:uds, path}

  defp address(:tcp, _path) do
    ip = {127, 0, 0, 1}
    {:ok, socket} = :gen_tcp.listen(0, ip: ip)
    {:ok, port} = :inet.port(socket)
    :gen_tcp.close(socket)
    {:tcp, ip, port}
  end

  # What a killed VM left makes room.
  defp free(dir, id) do
    case read(entry(dir, id)) do
      {_name, _id, _address, true} -> {:error, {:name_taken, "#{id} is another VM's"}}
      {_name, _id, _address, false} -> File.rm(entry(dir, id))
      nil -> :ok
    end
  end

  defp remove(state, id) do
    {{_owner, monitor}, services} = Map.pop!(state.services, id)
    Process.demonitor(monitor, [:flush])
    File.rm(entry(state.dir, id))
    %{state | services: services}
  end

  defp find(known, {name, id}) do
    found = for {^name, instance, address, true} <- known, id in [nil, instance], do: address

    if found == [],
      do: {:error, {:no_such_service, "#{name} is not in the directory"}},
      else: {:ok, Enum.random(found)}
  end

  # The last one: whether its VM lives.
  defp read(file) do
    with {:ok, content} <- File.read(file) do
      {name, id, address, pid} = :erlang.binary_to_term(content, [:safe])
      {name, id, address, File.exists?("/proc/#{pid}")}
    else
      {:error, _gone} -> nil
    end
  end

  # Short, since a socket's path has at most 107 bytes.
  defp entry(dir, id) do
    hash = :crypto.hash(:sha256, id) |> binary_part(0, 9) |> Base.url_encode64()
    Path.join(dir, hash <> ".i")
  end
end
