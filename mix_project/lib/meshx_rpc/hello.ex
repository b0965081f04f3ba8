defmodule MeshxRpc.Hello do
  @moduledoc """
  What both ends of a connection agree on before the first call: `docs/rpc-protocol.md`, "Hello".

  Pure functions over payloads; the connections do the I/O. With shared keys both sides prove that they
  hold one, over both payloads and thus over both nonces, so that no proof is of use on another connection.
  """

  alias MeshxRpc.Frame
  import Bitwise, only: [&&&: 2]

  @versions {1, 1}
  @max_window 0x7FFF_FFFF
  # That of the option: smaller ones are mostly heads.
  @least_block 200
  @nonce_bytes 32
  @proof_bytes 32
  @server_label "meshx-rpc-1 server"
  @client_label "meshx-rpc-1 client"

  @version 1
  @nonce 2
  @checksums 3
  @blk_max_size 4
  @stream_window 5
  @connection_window 6
  @max_message 7
  @auth 8
  @server_proof 9
  @svc_ref 10
  @node_ref 11
  @conn_ref 12
  @flags 13

  # Bits of field 13.
  @strict 1
  @trace 2

  # Numbers of checksums on the wire. `:user` is CRC-32 of each frame, and a checksum of the user's own within the
  # messages (`MeshxRpc.Message`).
  @checksum_names %{0 => :none, 1 => :crc32, 2 => :crc32c, 255 => :user}

  @typedoc "What one side wants: the options of the same names."
  @type config :: %{
          required(:keys) => [binary()],
          required(:checksums) => [0 | 1 | 2 | 255],
          required(:blk_max_size) => pos_integer(),
          required(:stream_window) => pos_integer(),
          required(:connection_window) => pos_integer(),
          required(:max_message) => pos_integer(),
          optional(:strict_settings) => boolean(),
          optional(:trace) => boolean(),
          optional(:refs) => MeshxRpc.Refs.t(),
          optional(atom()) => term()
        }

  @typedoc """
  What was agreed; `peer_*` is what the other side grants and takes, `remote` what it calls itself, `trace` whether
  requests carry a traceparent.
  """
  @type agreed :: %{
          version: pos_integer(),
          checksum: 0 | 1 | 2 | 255,
          trace: boolean(),
          remote: MeshxRpc.Refs.t(),
          blk_max_size: pos_integer(),
          block: pos_integer(),
          auth: 0 | 1,
          peer_stream_window: pos_integer(),
          peer_connection_window: pos_integer(),
          peer_max_message: pos_integer()
        }

  @type refusal :: {:refused, MeshxRpc.Codec.cause(), text :: String.t()}

  @doc "The nonce of one side of one connection."
  @spec nonce() :: <<_::256>>
  def nonce, do: :crypto.strong_rand_bytes(@nonce_bytes)

  @doc "The client's HELLO payload."
  @spec hello(config(), <<_::256>>) :: binary()
  def hello(config, nonce) do
    {min, max} = @versions

    encode([
      {@version, <<min, max>>},
      {@nonce, nonce},
      {@checksums, :binary.list_to_bin(config.checksums)},
      {@blk_max_size, <<config.blk_max_size::32>>},
      {@stream_window, <<config.stream_window::32>>},
      {@connection_window, <<config.connection_window::32>>},
      {@max_message, <<config.max_message::64>>},
      {@auth, <<if(config.keys == [], do: 0, else: 1)>>}
      | extras(config, flags(config))
    ])
  end

  @doc """
  The server's answer to a HELLO: what is agreed, the HELLO_ACK payload, and the proofs of which the
  client must send one (`[]`: none is needed).
  """
  @spec answer(config(), binary(), <<_::256>>) ::
          {:ok, agreed(), binary(), proofs :: [binary()]} | refusal()
  def answer(config, hello, nonce) do
    with {:ok, fields} <- decode(hello),
         {:ok, _nonce} <- fetch(fields, @nonce, @nonce_bytes),
         {:ok, version} <- common_version(fields),
         # Before the settings: whoever holds no key learns nothing of them.
         {:ok, auth} <- common_auth(config, fields),
         {:ok, checksum} <- common_checksum(config, fields),
         {:ok, agreed} <- peer_limits(config, fields),
         {:ok, flags} <- flags_of(fields),
         :ok <- strictly_equal(config, fields, flags),
         {:ok, remote} <- remote(fields) do
      # The client says whether it has something to send, we whether we take it.
      trace = (flags &&& @trace) != 0 and Map.get(config, :trace, false)

      agreed =
        Map.merge(agreed, %{
          version: version,
          checksum: checksum,
          auth: auth,
          trace: trace,
          remote: remote
        })

      ack =
        encode([
          {@version, <<version>>},
          {@nonce, nonce},
          {@checksums, <<checksum>>},
          {@blk_max_size, <<agreed.blk_max_size::32>>},
          {@stream_window, <<config.stream_window::32>>},
          {@connection_window, <<config.connection_window::32>>},
          {@max_message, <<config.max_message::64>>},
          {@auth, <<auth>>}
          | extras(config, if(trace, do: @trace, else: 0))
        ])

      case auth do
        0 ->
          {:ok, agreed, ack, []}

        1 ->
          proof = proof(hd(config.keys), @server_label, hello, ack)
          expected = Enum.map(config.keys, &proof(&1, @client_label, hello, ack))
          {:ok, agreed, ack <> encode([{@server_proof, proof}]), expected}
      end
    end
  end

  @doc "The client's look at a HELLO_ACK: what is agreed, and the proof to send (nil: none)."
  @spec accept(config(), hello :: binary(), ack :: binary()) ::
          {:ok, agreed(), nil | binary()} | refusal()
  def accept(config, hello, ack) do
    with {:ok, fields} <- decode(ack),
         {:ok, _nonce} <- fetch(fields, @nonce, @nonce_bytes),
         {:ok, version} <- chosen_version(fields),
         {:ok, checksum} <- chosen(fields, @checksums, config.checksums, :settings, "checksum"),
         {:ok, auth} <- chosen_auth(config, fields),
         {:ok, agreed} <- peer_limits(config, fields),
         {:ok, flags} <- flags_of(fields),
         {:ok, trace} <- chosen_trace(config, flags),
         {:ok, remote} <- remote(fields),
         {:ok, proof} <- server_proved(auth, config, fields, hello, ack) do
      agreed =
        Map.merge(agreed, %{
          version: version,
          checksum: checksum,
          auth: auth,
          trace: trace,
          remote: remote
        })

      {:ok, agreed, proof}
    end
  end

  @doc "Whether a client's proof is one of those that are expected; takes the same time for each."
  @spec proved?([binary()], binary()) :: boolean()
  def proved?(expected, proof), do: Enum.reduce(expected, false, &(equal?(&1, proof) or &2))

  @doc "A checksum's name, for people."
  @spec checksum_name(byte()) :: String.t()
  def checksum_name(id), do: to_string(Map.get(@checksum_names, id, "number #{id}"))

  # Fields

  # Neither is there when it says nothing.
  defp extras(config, flags) do
    refs =
      case config do
        %{refs: refs} ->
          [{@svc_ref, refs.svc_ref}, {@node_ref, refs.node_ref}, {@conn_ref, refs.conn_ref}]

        _none ->
          []
      end

    refs ++ if(flags == 0, do: [], else: [{@flags, <<flags>>}])
  end

  defp flags(config) do
    if(Map.get(config, :strict_settings, false), do: @strict, else: 0) +
      if(Map.get(config, :trace, false), do: @trace, else: 0)
  end

  defp flags_of(%{@flags => _value} = fields) do
    with {:ok, <<flags>>} <- fetch(fields, @flags, 1), do: {:ok, flags}
  end

  defp flags_of(_fields), do: {:ok, 0}

  defp remote(fields) do
    refs =
      for {tag, key} <- [svc_ref: @svc_ref, node_ref: @node_ref, conn_ref: @conn_ref],
          do: {tag, Map.get(fields, key, "")}

    case Enum.find(refs, fn {_name, text} -> byte_size(text) > 255 end) do
      nil ->
        {:ok, Map.new(refs)}

      {name, text} ->
        {:refused, :protocol, "#{name} has #{byte_size(text)} bytes, at most 255 wanted"}
    end
  end

  defp encode(fields),
    do: for({tag, value} <- fields, into: <<>>, do: <<tag, byte_size(value)::16, value::binary>>)

  defp decode(payload), do: decode(payload, %{})
  defp decode(<<>>, fields), do: {:ok, fields}

  defp decode(<<tag, size::16, value::binary-size(size), rest::binary>>, fields) do
    if Map.has_key?(fields, tag),
      do: {:refused, :protocol, "hello field #{tag} comes twice, wanted once"},
      else: decode(rest, Map.put(fields, tag, value))
  end

  defp decode(rest, _fields),
    do: {:refused, :protocol, "hello ends within a field, #{byte_size(rest)} bytes are left over"}

  defp fetch(fields, tag, size) do
    case fields do
      %{^tag => value} when byte_size(value) == size ->
        {:ok, value}

      %{^tag => value} ->
        {:refused, :protocol, "hello field #{tag} has #{byte_size(value)} bytes, wanted #{size}"}

      _ ->
        {:refused, :protocol, "hello field #{tag} is missing"}
    end
  end

  defp list(fields, tag) do
    case fields do
      %{^tag => <<_, _::binary>> = value} -> {:ok, :binary.bin_to_list(value)}
      _ -> {:refused, :protocol, "hello field #{tag} is missing or empty"}
    end
  end

  # What the server chooses

  defp common_version(fields) do
    {min, max} = @versions

    with {:ok, <<peer_min, peer_max>>} <- fetch(fields, @version, 2) do
      if peer_min <= max and peer_max >= min,
        do: {:ok, min(max, peer_max)},
        else:
          {:refused, :version,
           "versions #{peer_min} to #{peer_max} are offered, wanted #{min} to #{max}"}
    end
  end

  defp common_checksum(config, fields) do
    with {:ok, offered} <- list(fields, @checksums) do
      case Enum.find(offered, &(&1 in config.checksums)) do
        nil ->
          {:refused, :settings,
           "checksums #{checksum_names(offered)} are offered, wanted one of #{checksum_names(config.checksums)}"}

        checksum ->
          {:ok, checksum}
      end
    end
  end

  defp checksum_names(ids), do: Enum.map_join(ids, ", ", &checksum_name/1)

  # As 0.1 was: settings that differ are refused, when one side wants it.
  defp strictly_equal(config, fields, flags) do
    if Map.get(config, :strict_settings, false) or (flags &&& @strict) != 0 do
      %{@blk_max_size => <<block::32>>, @checksums => offered} = fields
      offered = :binary.bin_to_list(offered)

      cond do
        block != config.blk_max_size ->
          {:refused, :settings,
           "strict_settings: blk_max_size is #{block} at the client, #{config.blk_max_size} at the server"}

        Enum.sort(offered) != Enum.sort(config.checksums) ->
          {:refused, :settings,
           "strict_settings: checksums are #{checksum_names(offered)} at the client, " <>
             "#{checksum_names(config.checksums)} at the server"}

        true ->
          :ok
      end
    else
      :ok
    end
  end

  defp common_auth(config, fields) do
    with {:ok, offered} <- list(fields, @auth) do
      wanted = if config.keys == [], do: 0, else: 1

      cond do
        wanted in offered ->
          {:ok, wanted}

        wanted == 1 ->
          {:refused, :auth, "this server has a shared key, the client offers no proof of one"}

        true ->
          {:refused, :auth, "the client wants a shared key to be proved, this server has none"}
      end
    end
  end

  # What the client checks

  defp chosen_version(fields) do
    {min, max} = @versions

    with {:ok, <<version>>} <- fetch(fields, @version, 1) do
      if version in min..max,
        do: {:ok, version},
        else: {:refused, :version, "version #{version} was chosen, offered were #{min} to #{max}"}
    end
  end

  defp chosen(fields, tag, offered, cause, what) do
    with {:ok, <<chosen>>} <- fetch(fields, tag, 1) do
      if chosen in offered,
        do: {:ok, chosen},
        else:
          {:refused, cause,
           "#{what} #{chosen} was chosen, offered were #{inspect(offered, charlists: :as_lists)}"}
    end
  end

  defp chosen_trace(config, flags) do
    if (flags &&& @trace) == 0 or Map.get(config, :trace, false),
      do: {:ok, (flags &&& @trace) != 0},
      else: {:refused, :protocol, "traceparents were chosen, and not offered"}
  end

  defp chosen_auth(config, fields) do
    wanted = if config.keys == [], do: 0, else: 1
    chosen(fields, @auth, [wanted], :auth, "authentication method")
  end

  defp server_proved(0, _config, _fields, _hello, _ack), do: {:ok, nil}

  defp server_proved(1, config, fields, hello, ack) do
    # The proof is the last field: all before it is what it covers.
    signed = binary_part(ack, 0, max(byte_size(ack) - @proof_bytes - 3, 0))

    with {:ok, proof} <- fetch(fields, @server_proof, @proof_bytes),
         true <- ack == signed <> encode([{@server_proof, proof}]),
         expected = Enum.map(config.keys, &proof(&1, @server_label, hello, signed)),
         true <- proved?(expected, proof) do
      {:ok, proof(hd(config.keys), @client_label, hello, signed)}
    else
      _ -> {:refused, :auth, "the server does not prove that it holds one of the shared keys"}
    end
  end

  # Both

  defp peer_limits(config, fields) do
    with {:ok, <<blk_max_size::32>>} <- fetch(fields, @blk_max_size, 4),
         {:ok, <<stream_window::32>>} <- fetch(fields, @stream_window, 4),
         {:ok, <<connection_window::32>>} <- fetch(fields, @connection_window, 4),
         {:ok, <<max_message::64>>} <- fetch(fields, @max_message, 8),
         :ok <- within(@blk_max_size, blk_max_size, @least_block, 0xFFFF_FFFF),
         :ok <- within(@stream_window, stream_window, 1, @max_window),
         :ok <- within(@connection_window, connection_window, 1, @max_window),
         :ok <- within(@max_message, max_message, 1, 0xFFFF_FFFF_FFFF_FFFF) do
      blk_max_size = min(config.blk_max_size, blk_max_size)

      {:ok,
       %{
         blk_max_size: blk_max_size,
         block: min(blk_max_size, Frame.max_block()),
         peer_stream_window: stream_window,
         peer_connection_window: connection_window,
         peer_max_message: max_message
       }}
    end
  end

  defp within(_tag, value, min, max) when value >= min and value <= max, do: :ok

  defp within(tag, value, min, max),
    do: {:refused, :settings, "hello field #{tag} is #{value}, wanted #{min} to #{max}"}

  defp proof(key, label, hello, ack), do: :crypto.mac(:hmac, :sha256, key, [label, hello, ack])

  defp equal?(a, b), do: byte_size(a) == byte_size(b) and :crypto.hash_equals(a, b)
end
