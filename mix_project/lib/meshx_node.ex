defmodule MeshxNode do
  require Logger

  @moduledoc """
  Erlang distribution over the mesh: connecting nodes, and knowing who is at the other end.

  A node takes part when its VM was started with the carrier, for example

      erl -proto_dist meshx -no_epmd -name shop@h1

  or by `meshx run shop@h1 -- iex -S mix`, which sets all that is needed. From there `Node.connect/1`,
  `Node.ping/1`, `:erpc`, monitors, links and `:global` work as ever. Host parts are names in the mesh: they need
  neither DNS nor a dot, and `-name` and `-sname` nodes meet.

  `Node.connect/1` answers only `true` or `false`; `connect/1` here says why. `peer/1` tells which identity was
  verified for a link.

  ## Causes

  A refusal is `{cause, text}`: the cause is one of the atoms in docs/mesh-protocol.md (`:no_such_node`,
  `:unreachable`, `:intention_denied`, `:identity_mismatch`, `:not_ready`, `:timeout` ...), or `:handshake_failed`
  when the agents let the link through and the nodes themselves did not agree, most often because of different
  cookies. The text is for people and names the rule, limit or address.

  ## Over a mesh adapter

  A VM with `-proto_dist Elixir.MeshxNode -no_epmd` and without a name is made a node by `start/4` or `Node.start/3`
  when it runs, as in Meshx 0.1. `config :meshx_node` says how:

  #{Meshx.Options.docs(MeshxNode.Adapter.schema())}

  With `Meshx.Agent` or `MeshxConsul` it is the carrier above, with all that it proves; the other options have no
  effect then. With any other adapter it is ordinary distribution between the addresses that the adapter gives, where
  nothing but the cookie tells friend from foe: `peer/1` and `peers/0` know no such links. docs/adapters.md has more.
  """

  # How long `start/4` waits for the application of the adapter, in steps.
  @adapter_steps 100
  @adapter_step 100

  @typedoc "Why a link was refused."
  @type refusal :: {cause :: atom, text :: String.t()}

  @typedoc """
  The other end of a link.

    * `:node` - the node's name
    * `:direction` - who dialled: `:outbound` for this node, `:inbound` for the other
    * `:link` - the link's id in hexadecimal, the same at both ends and in the agents' logs
    * `:spiffe` - the SPIFFE URI of the certificate that was verified; empty, and `:service` nil, when none was: the peer
      came through a sidecar, or one was dialled through
    * `:agent` - the address of the other node's agent, `"local"` when both nodes have the same
    * `:service` - the service that the SPIFFE URI names, or `nil` when it names none
    * `:certificate_expires_at` - when the verified certificate expires; `nil` for a node of the same
      agent, which shows none, and while the agent can't be asked
    * `:since` - when the link was made, or `nil` while the agent can't be asked
    * `:bytes_in`, `:bytes_out` - what the link carried so far, or `nil` while the agent can't be asked
  """
  @type peer :: %{
          node: node,
          direction: :outbound | :inbound,
          link: String.t(),
          spiffe: String.t(),
          agent: String.t(),
          service: String.t() | nil,
          certificate_expires_at: DateTime.t() | nil,
          since: DateTime.t() | nil,
          bytes_in: non_neg_integer | nil,
          bytes_out: non_neg_integer | nil
        }

  # What only the agent can tell.
  @unknown %{certificate_expires_at: nil, since: nil, bytes_in: nil, bytes_out: nil}

  @doc """
  Makes this VM a node, and sets its cookie.

  Waits up to 10 s for the application of `mesh_adapter`, when it belongs to one. The VM must have been started with
  `-proto_dist Elixir.MeshxNode` or `-proto_dist meshx`: with any other carrier the node would be open to the
  network.
  """
  @spec start(node, cookie :: atom, :longnames | :shortnames, tick_time :: pos_integer) ::
          {:ok, pid} | {:error, term}
  def start(node, cookie, type \\ :longnames, tick_time \\ 15_000)
      when is_atom(node) and is_atom(cookie) do
    with :ok <- carried(),
         :ok <- adapter_started(Application.get_env(:meshx_node, :mesh_adapter), @adapter_steps),
         {:ok, pid} <- Node.start(node, type, tick_time) do
      Node.set_cookie(cookie)
      {:ok, pid}
    end
  end

  @doc "The same in a process of its own, whose result is only to be seen in the log."
  @spec spawn_start(node, cookie :: atom, :longnames | :shortnames, pos_integer) :: pid
  def spawn_start(node, cookie, type \\ :longnames, tick_time \\ 15_000) do
    spawn(fn ->
      with {:error, reason} <- start(node, cookie, type, tick_time),
           do: Logger.error("MeshxNode: cannot start #{node}: #{inspect(reason)}")
    end)
  end

  defp carried do
    case :init.get_argument(:proto_dist) do
      {:ok, [[carrier]]} when carrier in [~c"Elixir.MeshxNode", ~c"meshx"] ->
        :ok

      _other ->
        {:error,
         {:unsupported,
          "the VM has another carrier: start it with -proto_dist Elixir.MeshxNode, or -proto_dist meshx"}}
    end
  end

  defp adapter_started(adapter, left) do
    app = adapter && Application.get_application(adapter)

    cond do
      app == nil or List.keymember?(Application.started_applications(), app, 0) ->
        :ok

      left == 0 ->
        {:error, {:not_ready, "the application #{app} of #{inspect(adapter)} is not started"}}

      true ->
        Process.sleep(@adapter_step)
        adapter_started(adapter, left - 1)
    end
  end

  @doc """
  Connects to a node, and says why when that fails.

  `:ok` also when the nodes are connected already. Without distribution the cause is `:not_ready`.

      iex> MeshxNode.connect(:"cart@h2")
      {:error, {:not_ready, "this VM is not distributed: start it with -proto_dist meshx and a name"}}
  """
  @spec connect(node) :: :ok | {:error, refusal}
  def connect(node) when is_atom(node), do: connect(node, :first)

  defp connect(node, attempt) do
    started = :erlang.monotonic_time()
    just_before = started - :erlang.convert_time_unit(1, :second, :native)

    case Node.connect(node) do
      true ->
        :ok

      :ignored ->
        {:error, not_distributed()}

      false ->
        case :meshx_links.refusal(node) do
          {:ok, %{monotonic: at} = refusal} when at >= started ->
            {:error, {refusal.cause, refusal.text}}

          # Another process had begun this attempt, and it was refused when we joined in: the next one is ours.
          {:ok, %{monotonic: at}} when at >= just_before and attempt == :first ->
            connect(node, :last)

          _ ->
            {:error, unexplained(node)}
        end
    end
  end

  # The setup timer and net_kernel itself end an attempt without a word.
  defp unexplained(node) do
    cond do
      not :meshx_dist.is_node_name(node) ->
        {:invalid_name, "#{node} is no node name, wanted NAME@HOST"}

      excluded?(node) ->
        {:not_permitted,
         "#{node} is not among the nodes that this one takes (:net_kernel.allow/1): add it there"}

      true ->
        {:timeout,
         "the handshake with #{node} was not done within the setup time (kernel parameter net_setuptime)"}
    end
  end

  # Without a list all are taken.
  defp excluded?(node) do
    case :net_kernel.allowed() do
      {:ok, [_ | _] = allowed} -> node not in allowed
      _all -> false
    end
  end

  @doc """
  Why the last attempt to reach a node was refused, with the time of it.

  This VM remembers its own attempts; for others the agent is asked. `:error` when nothing is known.
  """
  @spec refusal(node) :: {:ok, %{cause: atom, text: String.t(), at: DateTime.t()}} | :error
  def refusal(node) when is_atom(node) do
    with :error <- :meshx_links.refusal(node),
         {:error, _} <- :meshx_agent.call(:refusal, %{node: Atom.to_string(node)}) do
      :error
    else
      {:ok, %{cause: cause, text: text, at: at}}
      when is_atom(cause) and is_binary(text) and is_integer(at) ->
        {:ok, %{cause: cause, text: text, at: DateTime.from_unix!(at)}}

      {:ok, _} ->
        :error
    end
  end

  # Rules, two connections and two handshakes, each with up to 5 s of its own.
  @why_timeout 30_000

  @doc """
  Says step by step why this node may reach another, or may not and what to do.

  The agent makes the decision as for a link, other agent and certificates included, and stops at the first no;
  no link is made. `to_string/1` of the answer is what `meshx why` prints.

      {:ok, why} = MeshxNode.why(:"cart@h2")
      IO.puts(why)
      # ok  source  shop@h1 is registered with this agent
      # ok  target  cart@h2 is registered with the agent at 10.0.0.3:7070
      # no  rule    cart -> shop is denied by rule cart -> shop deny; to allow it: meshx allow cart shop
      # shop@h1 -> cart@h2: refused with intention_denied

  The error is about the question: the agent can't be asked, or this VM is not distributed.
  """
  @spec why(node) :: {:ok, MeshxNode.Why.t()} | {:error, refusal}
  def why(node) when is_atom(node) do
    question = %{from: Atom.to_string(node()), to: Atom.to_string(node)}

    with :ok <- distributed(),
         {:ok, answer} <- :meshx_agent.call(:why, question, @why_timeout) do
      case MeshxNode.Why.read(node(), node, answer) do
        nil -> {:error, {:invalid_request, "the agent's answer to why has no decision and steps"}}
        why -> {:ok, why}
      end
    end
  end

  defp distributed() do
    if Node.alive?(), do: :ok, else: {:error, not_distributed()}
  end

  defp not_distributed(),
    do: {:not_ready, "this VM is not distributed: start it with -proto_dist meshx and a name"}

  @doc "The verified other end of the link to a connected node."
  @spec peer(node) :: {:ok, peer} | {:error, refusal}
  def peer(node) when is_atom(node) do
    case Enum.find(peers(), &(&1.node == node)) do
      nil -> {:error, {:no_such_node, "there is no link to #{node}"}}
      peer -> {:ok, peer}
    end
  end

  @doc "The verified other ends of all links of this node."
  @spec peers() :: [peer]
  def peers() do
    case Enum.filter(:meshx_links.list(), fn {_, link} -> link.up end) do
      [] -> []
      links -> with_details(links, details())
    end
  end

  defp with_details(links, details) do
    for {id, link} <- links do
      hex = Base.encode16(id, case: :lower)

      Map.merge(
        %{
          # Made by the emulator when the link came up: no atom is made here.
          node: String.to_existing_atom(link.node),
          direction: link.direction,
          link: hex,
          spiffe: link.spiffe,
          agent: link.agent,
          service: service(link.spiffe)
        },
        details |> Map.get(hex, @unknown) |> seen_from(link.direction)
      )
    end
  end

  defp details() do
    case :meshx_agent.call(:links, %{}) do
      {:ok, %{links: links}} when is_list(links) ->
        for %{id: id} = link <- links, into: %{} do
          {id,
           %{
             direction: Map.get(link, :direction),
             certificate_expires_at: time(Map.get(link, :remote_not_after)),
             since: time(Map.get(link, :since)),
             bytes_in: Map.get(link, :bytes_in),
             bytes_out: Map.get(link, :bytes_out)
           }}
        end

      _ ->
        %{}
    end
  end

  # An agent counts a link between two of its own nodes once, as the dialler sees it.
  defp seen_from(%{direction: :local} = details, :inbound) do
    Map.delete(
      %{details | bytes_in: details.bytes_out, bytes_out: details.bytes_in},
      :direction
    )
  end

  defp seen_from(details, _direction), do: Map.delete(details, :direction)

  defp time(seconds) when is_integer(seconds) do
    case DateTime.from_unix(seconds) do
      {:ok, time} -> time
      {:error, _} -> nil
    end
  end

  defp time(_), do: nil

  # spiffe://TRUST-DOMAIN/ns/NS/dc/DC/svc/SERVICE (Consul's form of SPIFFE ids).
  defp service(spiffe) do
    case String.split(spiffe, "/svc/") do
      [_, service] -> service
      _ -> nil
    end
  end

  @doc """
  The nodes that the agent knows in the mesh.

  Each is `%{node: String.t(), service: String.t(), host: String.t(), agent: String.t(), local: boolean}`; `local`
  says that it is registered with this host's agent. Names stay strings: they come from other hosts.
  """
  @spec names() :: {:ok, [map]} | {:error, refusal}
  def names() do
    case :meshx_agent.call(:names, %{}) do
      {:ok, %{nodes: nodes}} when is_list(nodes) -> {:ok, nodes}
      {:ok, _} -> {:error, {:invalid_request, "the agent's answer to names has no list of nodes"}}
      {:error, _} = error -> error
    end
  end
end
