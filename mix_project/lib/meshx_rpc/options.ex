defmodule MeshxRpc.Options do
  @moduledoc false
  # The options of servers and clients: checked at start, documented in `MeshxRpc.Server` and `MeshxRpc.Client`.

  alias Meshx.Options
  alias MeshxRpc.Address

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
        type: {:custom, &keys/1, "a binary or a list of binaries, each of at least 16 bytes"},
        default: [],
        secret: true,
        doc: "key or keys that both sides prove to each other; the first proves, all are accepted"
      ],
      checksum: [
        type: {:custom, &checksums/1, ":none, :crc32 or a list of them, preferred first"},
        default: [0, 1],
        doc: "checksum of each block: the client's first that the server has too"
      ],
      cks_mfa: [
        type: {:one_of, [nil, {MeshxRpc.Protocol.Default, :checksum, []}]},
        doc: "as in 0.1; the tuple is the same as `checksum: :crc32`"
      ],
      blk_max_size: [
        type: {:range, 200, 268_435_456},
        default: 65_536,
        doc: "bytes per block; the smaller of both sides counts, and at most 64 KiB less a head"
      ],
      max_message: [
        type: {:range, 1, @max_budget},
        default: 128 * @mib,
        doc: "largest argument or result that is taken from the peer, in bytes"
      ],
      stream_window: [
        type: {:range, 1_024, @max_window},
        default: 4 * @mib,
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
        type: {:custom, &guard/1, "a map of `MeshxRpc.Guard` keys"},
        default: %{},
        doc: "limits of terms that are taken from the peer"
      ],
      quiet_on_hsk_error?: [type: :boolean, default: false, doc: "do not log hellos that fail"],
      codec: [
        type: {:custom, &codec/1, "a module that implements MeshxRpc.Codec"},
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
          type: {:custom, &functions/1, ":all or a list of function names"},
          default: :all,
          doc: "which functions may be called, of those exported with one argument"
        ],
        insecure_no_auth: [
          type: :boolean,
          default: false,
          doc: "listen beyond loopback without a shared key: everyone who can connect may call"
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
          doc: "requests that run at once; more are `:full`"
        ],
        max_bytes: [
          type: {:range, 1, @max_budget},
          default: 256 * @mib,
          doc: "bytes of arguments that one connection may have in use; more are `:full`"
        ],
        timeout_execute: [
          type: :timeout,
          default: :infinity,
          doc: "ms that a function may run, whatever its caller allows"
        ],
        acceptors: [type: {:range, 1, 64}, default: 4, doc: "processes that accept connections"],
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
          type: {:custom, &pool_opts/1, "a keyword list of :size (1 to 64) and :max_overflow"},
          default: %{size: 2},
          doc:
            "`size` connections; each carries any number of calls at once, so few are needed. " <>
              "`max_overflow` is taken and has no meaning any more"
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
        exec_retry_on_error: [
          type: {:custom, &reasons/1, "a list of atoms"},
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

    with {:tcp, ip, _port} = address <- config.address,
         false <- Address.local?(address) or config.keys.() != [] or config.insecure_no_auth do
      raise ArgumentError,
            "#{what}: address #{:inet.ntoa(ip)} can be reached from other hosts and there is no shared_key, " <>
              "wanted a shared_key, a loopback address, or insecure_no_auth: true"
    end

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

    config
  end

  @doc "The configuration with its keys in the open, for `MeshxRpc.Hello`: not to be kept."
  @spec reveal(map()) :: MeshxRpc.Hello.config()
  def reveal(config), do: %{config | keys: config.keys.()}

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

    keys = config.shared_key

    config
    |> Map.merge(%{
      id: id,
      # Inside a function, so that no crash report of a process or supervisor shows them.
      keys: fn -> keys end,
      checksums: if(config.cks_mfa, do: [1], else: config.checksum),
      guard: MeshxRpc.Guard.policy(Map.put_new(config.guard, :max_bytes, config.max_message)),
      codec: config.codec || MeshxRpc.Codec.impl()
    })
    |> Map.delete(:shared_key)
  end

  defp mesh(options, schema) do
    {:ok, Options.validate!(schema, options, "mesh")}
  end

  defp keys(""), do: {:ok, []}
  defp keys(key) when is_binary(key), do: keys([key])

  defp keys(keys) when is_list(keys),
    do: if(Enum.all?(keys, &(is_binary(&1) and byte_size(&1) >= 16)), do: {:ok, keys}, else: :error)

  defp keys(_other), do: :error

  defp checksums(name) when is_atom(name), do: checksums([name])

  defp checksums([_ | _] = names) do
    if Enum.all?(names, &(&1 in [:none, :crc32])),
      do: {:ok, Enum.map(names, &if(&1 == :crc32, do: 1, else: 0))},
      else: :error
  end

  defp checksums(_other), do: :error

  defp guard(policy) when is_map(policy) do
    _ = MeshxRpc.Guard.policy(policy)
    {:ok, policy}
  rescue
    ArgumentError -> :error
  end

  defp guard(_other), do: :error

  defp codec(module) when is_atom(module) and module != nil do
    if Code.ensure_loaded?(module) and function_exported?(module, :feed, 2),
      do: {:ok, module},
      else: :error
  end

  defp codec(_other), do: :error

  defp functions(:all), do: {:ok, :all}
  defp functions(names), do: reasons(names)

  defp reasons(names) when is_list(names),
    do: if(Enum.all?(names, &is_atom/1), do: {:ok, names}, else: :error)

  defp reasons(_other), do: :error

  defp pool_opts(options) do
    with true <- Keyword.keyword?(options),
         [] <- Keyword.keys(options) -- [:size, :max_overflow],
         size when size in 1..64 <- Keyword.get(options, :size, 2),
         overflow when is_integer(overflow) and overflow >= 0 <-
           Keyword.get(options, :max_overflow, 0) do
      {:ok, %{size: size}}
    else
      _ -> :error
    end
  end
end
