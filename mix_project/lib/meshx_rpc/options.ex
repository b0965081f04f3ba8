defmodule MeshxRpc.Options do
  @moduledoc false
  # The options of servers and clients: checked at start, documented in `MeshxRpc.Server` and `MeshxRpc.Client`.

  alias Meshx.Options
  alias MeshxRpc.{Address, Message, Secret}
  alias MeshxRpc.Options.Check
  alias MeshxRpc.Protocol.Default

  require Logger

  @max_window 0x7FFF_FFFF
  @mib 1_048_576
  @max_budget 0xFFFF_FFFF_FFFF

  @mesh_common [
    adapter: [
      type: :atom,
      default: Meshx.Agent,
      doc: "the module that implements `Meshx.ServiceMesh`"
    ],
    service: [
      type: :any,
      required: true,
      doc: "the service, in a form that the adapter's params allow"
    ],
    template: [type: :any, doc: "handed to the adapter"]
  ]

  @mesh_server @mesh_common ++
                 [
                   timeout: [
                     type: {:range, 1, 600_000},
                     default: 5_000,
                     doc: "ms that a registration may take"
                   ]
                 ]

  @mesh_client @mesh_common ++
                 [
                   as: [
                     type: :any,
                     doc: "the service on whose behalf the calls are made, `{name, id}` or nil"
                   ]
                 ]

  # Functions cannot be module attributes, so the schemas are functions.
  defp common(mesh) do
    [
      address: [
        type: {:custom, &Address.check/1, Address.wanted()},
        doc: "where the server listens; either this or `:mesh`"
      ],
      mesh: [
        type:
          {:custom, &mesh(&1, mesh),
           "a keyword list of #{Enum.map_join(mesh, ", ", &inspect(elem(&1, 0)))}"},
        doc:
          "reach the other side through a service mesh instead: `[adapter: Meshx.Agent, service: \"cart\"]`"
      ],
      shared_key: [
        type: {:custom, &Check.keys/1, "a binary or a list of binaries, each of at least 16 bytes"},
        default: [],
        secret: true,
        doc: "key or keys that both sides prove to each other; the first proves, all are accepted"
      ],
      insecure_no_auth: [
        type: :boolean,
        default: false,
        doc:
          "do without a shared key beyond loopback: everyone who can connect may call, and whoever answers is believed"
      ],
      checksum: [
        type:
          {:custom, &Check.checksums/1, ":none, :crc32, :crc32c or a list of them, preferred first"},
        default: [0, 1, 2],
        doc: "checksum of each block: the client's first that the server has too"
      ],
      cks_mfa: [
        type:
          {:custom, &Check.cks_mfa/1,
           "{module, function, argument} of a function/2 that exists, or nil"},
        doc:
          "a checksum of your own for each `blk_max_size` bytes of an argument or result (see `MeshxRpc.Protocol.Default`); " <>
            "its `checksum` is the same as `checksum: :crc32`"
      ],
      timeout_cks: [
        type: {:range, 1, 600_000},
        default: 500,
        doc: "ms that `:cks_mfa` may take for one block"
      ],
      serialize_mfa: [
        type:
          {:custom, &Check.serialize_mfa/1,
           "{module, function, argument} of a function/2 that exists"},
        doc: "a serializer of your own, default `{MeshxRpc.Protocol.Default, :serialize, []}`"
      ],
      deserialize_mfa: [
        type:
          {:custom, &Check.deserialize_mfa/1,
           "{module, function, argument} of a function/3 that exists"},
        doc:
          "the reverse, default `{MeshxRpc.Protocol.Default, :deserialize, []}`; with one of your own, `:guard` looks at nothing"
      ],
      blk_max_size: [
        type: {:range, 200, 268_435_456},
        default: 65_536,
        doc: "bytes per block; the smaller of both sides counts, and at most 64 KiB less a head"
      ],
      strict_settings: [
        type: :boolean,
        default: false,
        doc:
          "refuse a peer whose `blk_max_size` or checksums differ, as 0.1 did, instead of agreeing on what both can"
      ],
      svc_ref_mfa: [
        type: {:custom, &Check.ref/1, Check.wanted_ref()},
        doc: "what this side's service is called in the peer's telemetry; default: the id"
      ],
      node_ref_mfa: [
        type: {:custom, &Check.ref/1, Check.wanted_ref()},
        default: {Default, :node_ref, []},
        doc: "the same for its node"
      ],
      conn_ref_mfa: [
        type: {:custom, &Check.ref/1, Check.wanted_ref()},
        default: {Default, :conn_ref, []},
        doc: "the same for each connection"
      ],
      hsk_dgt_mfa: [
        type: {:custom, &Check.hsk_dgt_mfa/1, "{module, function, argument}"},
        doc: "as in 0.1; has no effect: a hello is proved by HMAC-SHA-256 of `:shared_key`"
      ],
      telemetry_prefix: [
        type: {:custom, &Check.prefix/1, "a list of atoms that is not empty"},
        doc:
          "the first names of events, default `[:meshx_rpc, id]`; `MeshxRpc.Telemetry` has the rest"
      ],
      telemetry_handler: [
        type:
          {:custom, &Check.callable(&1, 4),
           "{module, function, argument} of a function/4 that exists"},
        doc:
          "called as `function.(event, measurements, metadata, argument)` for each event, with or without `:telemetry`"
      ],
      socket_opts: [
        type: {:custom, &Check.socket_opts/1, Check.wanted_socket_opts()},
        default: [],
        doc: "options of the connections' sockets"
      ],
      gen_statem_opts: [
        type: {:custom, &Check.gen_statem_opts/1, Check.wanted_gen_statem_opts()},
        default: [],
        doc: "options of the connections' processes: see `GenServer.start_link/3`"
      ],
      max_message: [
        type: {:range, 1, @max_budget},
        default: 128 * @mib,
        doc: "largest argument or result that is taken from the peer, in bytes"
      ],
      stream_window: [
        type: {:range, 1_024, @max_window},
        default: 8 * @mib,
        doc: "bytes that the peer may send on one stream before it is granted more"
      ],
      connection_window: [
        type: {:range, 1_024, @max_window},
        default: 16 * @mib,
        doc: "the same for all streams of a connection"
      ],
      max_queue: [
        type: {:range, 1, @max_budget},
        default: 64 * @mib,
        doc:
          "bytes that wait to be sent on one connection; further messages are `:full`. A cast counts 1 KiB " <>
            "besides, until the server has started it"
      ],
      timeout_hsk: [
        type: {:range, 1, 600_000},
        default: 5_000,
        doc: "ms from connect to the end of the hello"
      ],
      timeout_send: [
        type: {:range, 1, 3_600_000},
        default: 30_000,
        doc: "ms that the peer may leave bytes unread before the connection is closed"
      ],
      guard: [
        type: {:custom, &Check.guard/1, "a map of `MeshxRpc.Guard` keys"},
        default: %{},
        doc: "limits of terms that are taken from the peer"
      ],
      quiet_on_hsk_error?: [
        type: :boolean,
        default: false,
        doc: "neither log a hello that fails nor tell the peer why"
      ],
      codec: [
        type: {:custom, &Check.codec/1, "a module that implements MeshxRpc.Codec"},
        doc: "default: the NIF when it can be loaded, otherwise plain Elixir"
      ]
    ]
  end

  @doc "The schema of a server's options."
  def server do
    common(@mesh_server) ++
      [
        module: [type: :atom, doc: "the module whose functions are called; default: the id"],
        functions: [
          type: {:custom, &Check.functions/1, ":all or a list of function names"},
          default: :all,
          doc: "which functions may be called, of those exported with one argument"
        ],
        max_connections: [type: {:range, 1, 1_000_000}, default: 1_024, doc: "connections at once"],
        max_hello: [
          type: {:range, 1, 1_000_000},
          default: 128,
          doc: "connections in their hello at once; one more ends the oldest"
        ],
        max_concurrency: [
          type: {:range, 1, 1_000_000},
          default: 1_024,
          doc:
            "requests that run at once, those for pieces of streams not counted; more are `:full`"
        ],
        max_bytes: [
          type: {:range, 1, @max_budget},
          default: 256 * @mib,
          doc: "bytes of arguments that all connections together may have in use; more are `:full`"
        ],
        timeout_execute: [
          type: :timeout,
          default: :infinity,
          doc: "ms that a function may run, whatever its caller allows"
        ],
        drain: [
          type: {:range, 0, 600_000},
          default: 5_000,
          doc: "ms that a server which stops gives to what it has begun"
        ],
        acceptors: [type: {:range, 1, 64}, default: 4, doc: "processes that accept connections"],
        pool_opts: [
          type:
            {:custom, &Check.server_pool/1,
             "a keyword list of :num_acceptors (1 to 64) and :max_connections"},
          default: [],
          doc: "as in 0.1: the same as `:acceptors` and `:max_connections`"
        ],
        backlog: [
          type: {:range, 1, 65_535},
          default: 512,
          doc: "connections that the kernel keeps waiting"
        ]
      ]
  end

  @doc "The schema of a client's options."
  def client do
    common(@mesh_client) ++
      [
        pool_opts: [
          type:
            {:custom, &Check.client_pool/1,
             "a keyword list of :size (1 to 64), :max_overflow (0 to 64) and :strategy (:lifo or :fifo)"},
          default: %{size: 2, max_overflow: 0},
          doc:
            "`size` connections, of which a call takes the one with the fewest; each carries any number of calls at " <>
              "once, so few are needed. While all have 64 calls or more there are up to `max_overflow` further ones. " <>
              "`strategy` is taken and has no meaning any more"
        ],
        traceparent: [
          type:
            {:custom, &Check.source/1, "{module, function, args} of a function that exists, or nil"},
          doc:
            "called by each caller: the W3C traceparent to send with the request, or nil. See `MeshxRpc.Server.traceparent/0`"
        ],
        max_bytes: [
          type: {:range, 1, @max_budget},
          default: 1_024 * @mib,
          doc: "bytes of results that one connection may be receiving at once; more are `:full`"
        ],
        timeout_connect: [
          type: {:range, 1, 600_000},
          default: 5_000,
          doc: "ms that connecting may take"
        ],
        idle_reconnect: [
          type: :timeout,
          default: 600_000,
          doc: "ms without a call after which a connection is made anew, +-10 %"
        ],
        retry_idle_error: [
          type: {:range, 1, 3_600_000},
          default: 1_000,
          doc: "longest wait in ms before a lost connection is made again"
        ],
        retry_proxy_fail: [
          type: {:range, 1, 3_600_000},
          default: 1_000,
          doc: "longest wait in ms after connecting failed"
        ],
        retry_hsk_fail: [
          type: {:range, 1, 3_600_000},
          default: 5_000,
          doc: "wait in ms after the hello failed"
        ],
        ping_interval: [
          type: {:range, 10, 3_600_000},
          default: 15_000,
          doc:
            "ms of silence after which the server is asked whether it is there (PING); after as many again without a " <>
              "byte of it the connection is lost"
        ],
        retry_unsafe: [
          type: :boolean,
          default: false,
          doc:
            "as in 0.1: make a call again also when it may have run already (`:tcp_closed`); for functions that " <>
              "may run twice"
        ],
        exec_retry_on_error: [
          type: {:custom, &Check.atoms/1, "a list of atoms"},
          default: [:closed],
          doc:
            "reasons after which a call is made again; after `:closed` it cannot have run, " <>
              "after `:tcp_closed` it may have"
        ]
      ]
  end

  @doc "Checks a server's options: a map, with what connections need beside it."
  def server!(id, options) do
    what = "MeshxRpc.Server #{inspect(id)}"
    config = server() |> Options.validate!(options, what) |> prepare!(id, what)
    config = %{config | module: config.module || id}
    config = Map.merge(config, pool_opts(config, options, what))
    # It takes the traceparents that clients send.
    config = Map.put(config, :trace, true)
    protected!(config, config.address, what)
    MeshxRpc.Server.Functions.check!(config, what)
    config
  end

  @doc "Checks a client's options."
  def client!(id, options) do
    what = "MeshxRpc.Client #{inspect(id)}"
    config = client() |> Options.validate!(options, what) |> prepare!(id, what)

    if match?({:tcp, _ip, 0}, config.address),
      do:
        raise(
          ArgumentError,
          "#{what}: option :address has port 0, wanted the port that the server listens on"
        )

    protected!(config, config.address, what)
    Map.put(config, :trace, config.traceparent != nil)
  end

  @doc "Where its events go: asked when it starts, since `:telemetry` may be loaded later than the options are checked."
  @spec telemetry(map()) :: map()
  def telemetry(config) do
    MeshxRpc.Port.prepare()
    sink = MeshxRpc.Telemetry.new(config.id, config.telemetry_prefix, config.telemetry_handler)
    Map.put(config, :telemetry, sink)
  end

  @doc "The configuration with its keys in the open, for `MeshxRpc.Hello`: not to be kept."
  @spec reveal(map()) :: MeshxRpc.Hello.config()
  def reveal(config), do: %{config | keys: Secret.reveal(config.keys)}

  @doc "As `reveal/1`, with what this side calls itself on one connection."
  @spec reveal(map(), MeshxRpc.Refs.t()) :: MeshxRpc.Hello.config()
  def reveal(config, refs), do: config |> reveal() |> Map.put(:refs, refs)

  @doc """
  Whether an address may be used: one beyond this host only with a shared key. Asked again for an address
  that a mesh adapter gave.
  """
  @spec protected(map(), nil | Address.t()) :: :ok | {:error, String.t()}
  def protected(_config, nil), do: :ok

  def protected(config, address) do
    if Address.local?(address) or config.protected do
      :ok
    else
      {:tcp, ip, _port} = address

      {:error,
       "address #{:inet.ntoa(ip)} is not this host's alone and there is no shared_key, " <>
         "wanted a shared_key, a loopback address, or insecure_no_auth: true"}
    end
  end

  defp protected!(config, address, what) do
    with {:error, text} <- protected(config, address),
         do: raise(ArgumentError, "#{what}: #{text}")
  end

  defp prepare!(config, id, what) do
    unless is_atom(id),
      do: raise(ArgumentError, "#{what}: the id is #{inspect(id)}, wanted an atom")

    if config.address == nil == (config.mesh == nil),
      do: raise(ArgumentError, "#{what}: wanted one of the options :address and :mesh")

    if config.stream_window > config.connection_window do
      raise ArgumentError,
            "#{what}: option :stream_window is #{config.stream_window}, " <>
              "wanted at most connection_window (#{config.connection_window})"
    end

    if config.max_message > config.max_bytes do
      raise ArgumentError,
            "#{what}: option :max_message is #{config.max_message}, wanted at most max_bytes (#{config.max_bytes})"
    end

    if config.hsk_dgt_mfa not in [nil, {Default, :checksum, []}] do
      Logger.warning(
        "#{what}: option :hsk_dgt_mfa has no effect: a hello is proved by HMAC-SHA-256 of :shared_key"
      )
    end

    config
    |> Map.merge(%{
      id: id,
      keys: Secret.hide(config.shared_key),
      protected: config.shared_key != [] or config.insecure_no_auth,
      checksums: checksums(config),
      message: message(config),
      svc_ref_mfa: config.svc_ref_mfa || MeshxRpc.Refs.cut(Atom.to_string(id)),
      telemetry_prefix: config.telemetry_prefix || [:meshx_rpc, id],
      guard: MeshxRpc.Guard.policy(Map.put_new(config.guard, :max_bytes, config.max_message)),
      codec: config.codec || MeshxRpc.Codec.impl()
    })
    |> Map.delete(:shared_key)
  end

  # The user's own comes with CRC-32 of each frame: heads and errors have checksums too.
  defp checksums(%{cks_mfa: nil} = config), do: config.checksum
  defp checksums(%{cks_mfa: :crc32}), do: [1]
  defp checksums(_config), do: [255]

  defp message(config) do
    cks = if is_tuple(config.cks_mfa), do: config.cks_mfa

    if cks || config.serialize_mfa || config.deserialize_mfa do
      %Message{
        serialize: config.serialize_mfa,
        deserialize: config.deserialize_mfa,
        cks: cks,
        timeout_cks: config.timeout_cks,
        block: config.blk_max_size
      }
    end
  end

  defp pool_opts(%{pool_opts: given}, options, what) do
    for {theirs, ours} <- [num_acceptors: :acceptors, max_connections: :max_connections],
        value = given[theirs],
        into: %{} do
      if Keyword.has_key?(options, ours) do
        raise ArgumentError,
              "#{what}: options :pool_opts (#{inspect(theirs)}) and #{inspect(ours)} say the same, wanted one of them"
      end

      {ours, value}
    end
  end

  defp mesh(options, schema) do
    {:ok, Options.validate!(schema, options, "mesh")}
  end
end
