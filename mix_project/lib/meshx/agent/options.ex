defmodule Meshx.Agent.Options do
  @moduledoc false
  # The templates of `Meshx.Agent`, and what they are on the control socket.

  alias Meshx.Agent.Ask
  alias Meshx.Options
  alias MeshxRpc.Address

  @doc "The schema of a template for `start/4`."
  # Functions cannot be module attributes, so the schemas are functions.
  def service do
    [
      address: [
        type: {:custom, &address/1, Address.wanted()},
        doc:
          "where the service listens, on this host; by default a Unix socket that the agent names"
      ],
      wait: [
        type: :boolean,
        default: false,
        doc: "whether `start/4` waits until the mesh's checks of the service pass"
      ],
      tags: [type: {:custom, &texts/1, "a list of binaries"}, doc: "tags in the catalogue"],
      meta: [
        type: {:custom, &meta/1, "a map of binaries"},
        doc: "metadata in the catalogue"
      ],
      weights: [
        type: {:custom, &weights/1, "{passing, warning}: 1 to 65,535 and 0 to 65,535"},
        doc: "its share of the calls while its checks pass, and while they warn"
      ],
      ttl: [
        type: {:range, 1_000, 86_400_000},
        doc: "ms that the check lives which the agent refreshes; the agent's default is 10,000"
      ],
      deregister_after: [
        type: {:range, 1_000, 86_400_000},
        doc: "ms that it may be critical before the mesh forgets it"
      ],
      token: token("the mesh's token for this service"),
      adopt: [type: :boolean, doc: "serve what somebody else registered under this id"],
      force: [
        type: :boolean,
        doc:
          "take over this id from whoever registered it with the same Consul agent, but not through this meshx agent"
      ],
      sidecar: [
        type:
          {:custom, &sidecar/1,
           ":native, :connect_proxy, :envoy or {:command, [program | arguments]}"},
        doc: "what carries its traffic; by default what the agent was told"
      ],
      max_proxy_restarts: [
        type: {:range, 0, 1_000},
        doc: "restarts of the sidecar within a minute before it is given up"
      ]
    ]
  end

  @doc "The schema of a template for `connect/3`."
  def upstream do
    [
      address: [
        type: {:custom, &upstream_address/1, ":uds, :tcp or {:tcp, ip, port} with an ip tuple"},
        doc: "a Unix socket (the default) or a port of loopback, chosen by the agent or by you"
      ],
      purpose: [type: {:one_of, [:rpc, :tcp]}, doc: "`:tcp` for other protocols than MeshxRpc's"],
      via: [
        type: {:custom, &text/1, "a binary"},
        doc: "id of a service of this VM whose sidecar carries the upstream"
      ],
      token: token("the mesh's token for the service that calls")
    ]
  end

  defp token(doc),
    do: [
      type: {:custom, &secret/1, "a binary of at least one byte"},
      secret: true,
      doc: doc
    ]

  @doc "The options of `template` as arguments of a command; those that are not given are left to the agent."
  @spec arguments(Options.schema(), keyword() | nil) ::
          {:ok, map()} | {:error, {:invalid_request, String.t()}}
  def arguments(schema, template) do
    options = Options.validate!(schema, template || [], "template")
    {:ok, for({name, value} <- options, value != nil, into: %{}, do: {name, value})}
  rescue
    error in ArgumentError -> {:error, {:invalid_request, error.message}}
  end

  defp address(address) do
    with {:ok, address} <- Address.check(address), do: {:ok, Ask.wire(address)}
  end

  defp upstream_address(kind) when kind in [:uds, :tcp], do: {:ok, kind}
  defp upstream_address({:tcp, _ip, _port} = tcp), do: address(tcp)
  defp upstream_address(_other), do: :error

  defp text(text) when is_binary(text) and text != "", do: {:ok, text}
  defp text(_other), do: :error

  # A function, so that it shows nowhere: see `Meshx.Agent.Ask.ask/3`.
  defp secret(text), do: with({:ok, text} <- text(text), do: {:ok, fn -> text end})

  defp texts(texts) when is_list(texts),
    do: if(Enum.all?(texts, &is_binary/1), do: {:ok, texts}, else: :error)

  defp texts(_other), do: :error

  defp meta(meta) when is_map(meta) do
    if Enum.all?(meta, fn {key, value} -> is_binary(key) and is_binary(value) end),
      do: {:ok, meta},
      else: :error
  end

  defp meta(_other), do: :error

  defp weights({passing, warning} = weights)
       when passing in 1..65_535 and warning in 0..65_535,
       do: {:ok, weights}

  defp weights(_other), do: :error

  defp sidecar(kind) when kind in [:native, :connect_proxy, :envoy], do: {:ok, kind}

  defp sidecar({:command, [_program | _] = words}),
    do: with({:ok, words} <- texts(words), do: {:ok, {:command, words}})

  defp sidecar(_other), do: :error
end
