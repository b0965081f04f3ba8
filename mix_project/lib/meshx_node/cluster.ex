defmodule MeshxNode.Cluster do
  alias Meshx.Options

  # Atoms that one cluster makes in its life: names of nodes come from other hosts, and an atom stays. A VM has room for
  # a million, and where hosts are new with each release so are the names.
  @atoms_max 65_536
  # Attempts at one time: each may take the whole of net_setuptime.
  @attempts_max 8
  # Between attempts to reach one node, in milliseconds; the first is due at once.
  @backoff_min 200
  @backoff_max 5_000
  # Between attempts to have the agent watch.
  @watch_again 1_000

  @schema [
    services: [
      type: {:custom, &__MODULE__.services/1, "a list of 1 to 64 names of services, or :all"},
      required: true,
      doc: "whose nodes this node connects to; `:all` for those of all services"
    ],
    meta: [
      type: {:custom, &__MODULE__.meta/1, "a map of strings"},
      doc: "of them only those whose registration has all of this metadata"
    ],
    name: [type: :atom, default: __MODULE__, doc: "of the process; one for each child"],
    select: [
      type: {:custom, &__MODULE__.select/1, "a function of one argument"},
      doc:
        "of the passing nodes, those for which it is true of `%{node: String.t(), service: String.t(), meta: %{String.t() => String.t()}}`; all by default"
    ],
    max_degree: [
      type: {:range, 1, 4_096},
      doc: "so many of them at most, others for each node; all by default"
    ],
    connect: [
      type: {:custom, &__MODULE__.connect/1, "a function of one argument"},
      doc: "called with a node, `:ok` when it is connected; `MeshxNode.connect/1` by default"
    ]
  ]

  @moduledoc """
  Keeps this node connected to the passing nodes of given services.

      children = [{MeshxNode.Cluster, services: ["shop", "cart"]}]
      children = [{MeshxNode.Cluster, services: :all, meta: %{"tier" => "backend"}}]

  A node's metadata is what its VM was started with (`-meshx_meta tier=backend`, or `meshx run --meta tier=backend`).

  The agent tells of a node that comes, goes or does not pass any more within a second, and a new one is connected to
  at once. What cannot be reached is tried again, after 0.2 s and up to 5 s later each time; so is a node whose link
  was lost, which heals partitions. Links are only made, never ended: a node that is draining (out of the catalogue, or
  not passing its checks) keeps those that it has and gets no new ones.

  With `:max_degree` a node dials only so many of them, chosen by a hash of both names, so that each chooses others;
  with 3 or more a cluster is connected as good as always. Links that others make come on top.

  A node that is not distributed yet begins when it is.

  ## Options

  #{Options.docs(@schema)}
  """
  use GenServer
  require Logger

  @doc false
  def child_spec(options) do
    %{id: Keyword.get(options, :name, __MODULE__), start: {__MODULE__, :start_link, [options]}}
  end

  @doc "Starts it. Options that are wrong raise `ArgumentError`."
  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(options) do
    options = Options.validate!(@schema, options, "MeshxNode.Cluster")
    GenServer.start_link(__MODULE__, options, name: options.name)
  end

  @doc "The nodes that it keeps this one connected to at the moment, whether they are or not."
  @spec wanted(GenServer.server()) :: [node]
  def wanted(cluster \\ __MODULE__), do: GenServer.call(cluster, :wanted)

  @impl true
  def init(options) do
    # With reasons only on connections of all kinds: links to other clusters are hidden.
    :ok = :net_kernel.monitor_nodes(true, node_type: :all)

    state = %{
      options: options,
      agent: nil,
      # How many were made.
      atoms: 0,
      # What the watch told last.
      seen: [],
      wanted: [],
      # Attempts that run: monitor => node.
      attempts: %{},
      # Nodes that are to be tried again later: node => {failures, timer}.
      later: %{}
    }

    {:ok, state, {:continue, :watch}}
  end

  @impl true
  def handle_continue(:watch, state), do: {:noreply, watch(state)}

  @impl true
  def handle_call(:wanted, _from, state), do: {:reply, state.wanted, state}

  @impl true
  def handle_info({:meshx_agent, :up}, state), do: {:noreply, ask(state)}

  def handle_info({:meshx_agent, {:nodes, %{watch: watch, nodes: nodes}}}, state) do
    if watch == watch_name(state),
      do: {:noreply, choose(%{state | seen: nodes})},
      else: {:noreply, state}
  end

  # A link that was lost is made again. The other end of it may do so at the same moment.
  def handle_info({:nodedown, node, _info}, state) do
    if node in state.wanted,
      do: {:noreply, again(state, node)},
      else: {:noreply, state}
  end

  # This node has got its name: what was chosen and tried without it is chosen anew.
  def handle_info({:nodeup, me, _info}, state) when me == node(),
    do: {:noreply, state |> forget_all(Map.keys(state.later)) |> choose()}

  def handle_info({:nodeup, node, _info}, state), do: {:noreply, forget(state, node)}

  def handle_info({:again, node}, state) do
    {:noreply, state |> put_in([:later, node], {failures(state, node), nil}) |> dial()}
  end

  def handle_info({:DOWN, agent, :process, _pid, _reason}, %{agent: agent} = state) do
    Process.send_after(self(), :watch, @watch_again)
    {:noreply, %{state | agent: nil}}
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state) do
    {node, attempts} = Map.pop(state.attempts, monitor)
    state = %{state | attempts: attempts}

    cond do
      node == nil -> {:noreply, state}
      node in Node.list(:connected) -> {:noreply, state |> forget(node) |> dial()}
      true -> {:noreply, state |> again(node) |> dial()}
    end
  end

  def handle_info(:watch, state), do: {:noreply, watch(state)}
  def handle_info(_other, state), do: {:noreply, state}

  # === The agent's watch

  defp watch(state) do
    with {:ok, client} <- :meshx_agent.start(),
         {:ok, _up_or_down} <- :meshx_agent.subscribe() do
      ask(%{state | agent: Process.monitor(client)})
    else
      _not_yet ->
        Process.send_after(self(), :watch, @watch_again)
        state
    end
  end

  # Lost with the connection to the agent, and asked for again when there is a new one.
  defp ask(state) do
    args = Map.put(watched(state.options.services), :watch, watch_name(state))

    case :meshx_agent.call(:watch, args) do
      {:ok, _} ->
        state

      {:error, {cause, text}} ->
        if cause not in [:unreachable, :not_ready],
          do: Logger.warning("MeshxNode.Cluster: the agent does not watch: #{cause}: #{text}")

        Process.send_after(self(), {:meshx_agent, :up}, @watch_again)
        state
    end
  end

  defp watched(:all), do: %{all: true}
  defp watched(services), do: %{services: services}

  defp watch_name(state), do: Atom.to_string(state.options.name)

  # === Which nodes

  defp choose(state) do
    me = Atom.to_string(node())
    select = state.options.select || fn _node -> true end

    names =
      for %{node: name, service: service} = seen <- state.seen,
          is_binary(name) and is_binary(service) and name != me,
          # An agent of an earlier release tells no metadata.
          meta = Map.get(seen, :meta, %{}),
          has?(meta, state.options.meta),
          select.(%{node: name, service: service, meta: meta}),
          do: name

    {nodes, state} =
      names |> Enum.uniq() |> nearest(me, state.options.max_degree) |> to_nodes(state)

    # What was left out a while may come back at once.
    gone = Map.keys(state.later) -- nodes
    %{state | wanted: nodes} |> forget_all(gone) |> dial()
  end

  defp has?(_meta, nil), do: true
  defp has?(meta, wanted), do: Enum.all?(wanted, fn {key, value} -> meta[key] == value end)

  defp nearest(names, _me, nil), do: names

  # A node that is gone takes the place of none that stays.
  defp nearest(names, me, max),
    do: names |> Enum.sort_by(&{:erlang.phash2({me, &1}), &1}) |> Enum.take(max)

  defp to_nodes(names, state) do
    Enum.flat_map_reduce(names, state, fn name, state ->
      cond do
        byte_size(name) > 255 -> {[], state}
        node = known(name) -> {[node], state}
        state.atoms < @atoms_max -> {[String.to_atom(name)], %{state | atoms: state.atoms + 1}}
        true -> {[], full(state)}
      end
    end)
  end

  defp known(name) do
    String.to_existing_atom(name)
  rescue
    ArgumentError -> nil
  end

  # Said once, and not of each name at each change.
  defp full(%{atoms: @atoms_max} = state) do
    Logger.warning(
      "MeshxNode.Cluster: #{@atoms_max} names of nodes were seen, further ones are left out until they connect by " <>
        "themselves; start this VM anew"
    )

    %{state | atoms: @atoms_max + 1}
  end

  defp full(state), do: state

  # === Connecting

  # Each in a process of its own: an attempt may take the whole of net_setuptime.
  defp dial(state) do
    trying = Map.values(state.attempts)
    connected = Node.list(:connected)

    due =
      for node <- state.wanted,
          node not in connected,
          node not in trying,
          not match?(%{^node => {_failures, timer}} when timer != nil, state.later),
          do: node

    # Those that hang do not hold up the ones that may answer.
    due
    |> Enum.sort_by(&failures(state, &1))
    |> Enum.take(@attempts_max - length(trying))
    |> Enum.reduce(state, fn node, state ->
      connect = state.options.connect || (&MeshxNode.connect/1)

      {_pid, monitor} =
        spawn_monitor(fn ->
          if :meshx_links.patiently(node, fn -> connect.(node) end) != :ok,
            do: exit({:shutdown, :refused})
        end)

      put_in(state.attempts[monitor], node)
    end)
  end

  defp again(state, node) do
    failures = failures(state, node)
    pause = min(@backoff_min * Integer.pow(2, min(failures, 10)), @backoff_max)
    cancel(state, node)
    timer = Process.send_after(self(), {:again, node}, div(pause, 2) + :rand.uniform(div(pause, 2)))
    put_in(state.later[node], {failures + 1, timer})
  end

  defp failures(state, node) do
    case state.later do
      %{^node => {failures, _timer}} -> failures
      _ -> 0
    end
  end

  defp forget(state, node), do: forget_all(state, [node])

  defp forget_all(state, nodes) do
    Enum.each(nodes, &cancel(state, &1))
    %{state | later: Map.drop(state.later, nodes)}
  end

  defp cancel(state, node) do
    with %{^node => {_failures, timer}} when timer != nil <- state.later,
         do: Process.cancel_timer(timer)
  end

  # === Options

  @doc false
  def services(:all), do: {:ok, :all}

  def services([_ | _] = services) when length(services) <= 64 do
    if Enum.all?(services, &((is_atom(&1) or is_binary(&1)) and &1 not in [nil, ""])),
      do: {:ok, Enum.map(services, &to_string/1)},
      else: :error
  end

  def services(_other), do: :error

  @doc false
  def meta(%{} = meta) do
    if Enum.all?(meta, fn {key, value} -> is_binary(key) and is_binary(value) end),
      do: {:ok, meta},
      else: :error
  end

  def meta(_other), do: :error

  @doc false
  def select(fun), do: function(fun)
  @doc false
  def connect(fun), do: function(fun)
  defp function(fun), do: if(is_function(fun, 1), do: {:ok, fun}, else: :error)
end
