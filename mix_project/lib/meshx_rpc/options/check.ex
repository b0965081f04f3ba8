defmodule MeshxRpc.Options.Check do
  @moduledoc false
  # Checks of single options: `{:ok, value}` as connections want it, or `:error`.

  alias MeshxRpc.Protocol.Default

  # Of a connected socket's options those that do not change what arrives: how bytes are framed and delivered,
  # and when the port is busy, is ours.
  @socket_opts [
    :bind_to_device,
    :buffer,
    :keepalive,
    :linger,
    :netns,
    :nodelay,
    :priority,
    :recbuf,
    :sndbuf,
    :tclass,
    :tos,
    :ttl
  ]
  @gen_statem_opts [:debug, :hibernate_after, :spawn_opt, :timeout]
  @max_ref 255

  @checksums [none: 0, crc32: 1, crc32c: 2]

  def keys(""), do: {:ok, []}
  def keys(key) when is_binary(key), do: keys([key])

  def keys(keys) when is_list(keys) do
    if proper?(keys) and Enum.all?(keys, &(is_binary(&1) and byte_size(&1) >= 16)),
      do: {:ok, keys},
      else: :error
  end

  def keys(_other), do: :error

  def checksums(name) when is_atom(name), do: checksums([name])

  def checksums([_ | _] = names) do
    if proper?(names) and Enum.all?(names, &(is_atom(&1) and Keyword.has_key?(@checksums, &1))),
      do: {:ok, names |> Enum.uniq() |> Enum.map(&Keyword.fetch!(@checksums, &1))},
      else: :error
  end

  def checksums(_other), do: :error

  @doc "0.1's own is the CRC-32 of frames."
  def cks_mfa(nil), do: {:ok, nil}
  def cks_mfa({Default, :checksum, _argument}), do: {:ok, :crc32}
  def cks_mfa(mfa), do: callable(mfa, 2)

  @doc "The defaults need no call."
  def serialize_mfa({Default, :serialize, []}), do: {:ok, nil}
  def serialize_mfa(mfa), do: callable(mfa, 2)

  # `:safe` is always on, and `:used` would change the answer.
  def deserialize_mfa({Default, :deserialize, options}) when options in [[], [:safe]],
    do: {:ok, nil}

  def deserialize_mfa(mfa), do: callable(mfa, 3)

  def ref({_module, _fun, args} = mfa) when is_list(args),
    do: if(proper?(args), do: callable(mfa, length(args)), else: :error)

  def ref(text) when is_binary(text) and byte_size(text) <= @max_ref, do: {:ok, text}
  def ref(name) when is_atom(name) and name != nil, do: name |> Atom.to_string() |> ref()
  def ref(_other), do: :error

  def wanted_ref,
    do:
      "{module, function, args} of a function that exists, or a text or atom of at most #{@max_ref} bytes"

  @doc "Called for each request."
  def source(nil), do: {:ok, nil}
  def source({_module, _fun, args} = mfa) when is_list(args), do: ref(mfa)
  def source(_other), do: :error

  def callable({module, fun, _argument} = mfa, arity) when is_atom(module) and is_atom(fun) do
    if Code.ensure_loaded?(module) and function_exported?(module, fun, arity),
      do: {:ok, mfa},
      else: :error
  end

  def callable(_other, _arity), do: :error

  def hsk_dgt_mfa({module, fun, _argument} = mfa) when is_atom(module) and is_atom(fun),
    do: {:ok, mfa}

  def hsk_dgt_mfa(_other), do: :error

  def socket_opts(options) when is_list(options) do
    if proper?(options) and Enum.all?(options, &socket_opt?/1), do: {:ok, options}, else: :error
  end

  def socket_opts(_other), do: :error

  def wanted_socket_opts,
    do:
      "a list of #{names(@socket_opts)}, with values as for :inet, and {:raw, protocol, option, binary}; " <>
        "how bytes are framed and delivered cannot be changed"

  # A value that the socket does not take is known only when there is one: at a client, in each connection.
  defp socket_opt?({name, value}) when name in [:keepalive, :nodelay], do: is_boolean(value)
  defp socket_opt?({:linger, {on?, seconds}}), do: is_boolean(on?) and seconds in 0..65_535
  defp socket_opt?({:bind_to_device, value}), do: is_binary(value)
  defp socket_opt?({:netns, value}), do: is_binary(value) or is_list(value)
  defp socket_opt?({:linger, _value}), do: false
  defp socket_opt?({name, value}), do: name in @socket_opts and value in 0..0x7FFF_FFFF

  defp socket_opt?({:raw, protocol, option, value}),
    do: is_integer(protocol) and is_integer(option) and is_binary(value)

  defp socket_opt?(_other), do: false

  def gen_statem_opts(options) do
    if Keyword.keyword?(options) and Enum.all?(options, &gen_statem_opt?/1),
      do: {:ok, options},
      else: :error
  end

  def wanted_gen_statem_opts,
    do: "a keyword list of #{names(@gen_statem_opts)}, with values as for GenServer"

  # A server would learn only from its first client that they are of no use.
  defp gen_statem_opt?({name, value}) when name in [:hibernate_after, :timeout],
    do: value == :infinity or value in 0..0xFFFF_FFFE

  defp gen_statem_opt?({:debug, value}), do: proper?(value)
  defp gen_statem_opt?({:spawn_opt, value}), do: proper?(value) and spawn_opts?(value)
  defp gen_statem_opt?(_unknown), do: false

  defp spawn_opts?(options) do
    Enum.all?(options, &(&1 == :link or (is_tuple(&1) and elem(&1, 0) != :monitor))) and
      is_pid(:erlang.spawn_opt(fn -> :ok end, options))
  rescue
    ArgumentError -> false
  end

  def prefix([_ | _] = prefix) do
    if proper?(prefix) and Enum.all?(prefix, &is_atom/1), do: {:ok, prefix}, else: :error
  end

  def prefix(_other), do: :error

  def guard(policy) when is_map(policy) do
    _ = MeshxRpc.Guard.policy(policy)
    {:ok, policy}
  rescue
    ArgumentError -> :error
  end

  def guard(_other), do: :error

  def codec(module) when is_atom(module) and module != nil do
    if Code.ensure_loaded?(module) and function_exported?(module, :feed, 2),
      do: {:ok, module},
      else: :error
  end

  def codec(_other), do: :error

  def functions(:all), do: {:ok, :all}
  def functions(names), do: atoms(names)

  def atoms(names) when is_list(names),
    do: if(proper?(names) and Enum.all?(names, &is_atom/1), do: {:ok, names}, else: :error)

  def atoms(_other), do: :error

  def client_pool(options) do
    with true <- Keyword.keyword?(options),
         [] <- Keyword.keys(options) -- [:size, :max_overflow, :strategy],
         size when size in 1..64 <- Keyword.get(options, :size, 2),
         overflow when overflow in 0..64 <- Keyword.get(options, :max_overflow, 0),
         strategy when strategy in [:lifo, :fifo] <- Keyword.get(options, :strategy, :lifo) do
      {:ok, %{size: size, max_overflow: overflow}}
    else
      _ -> :error
    end
  end

  @doc "What 0.1 handed to its acceptor pool."
  def server_pool(options) do
    with true <- Keyword.keyword?(options),
         [] <- Keyword.keys(options) -- [:num_acceptors, :max_connections],
         acceptors when acceptors in 1..64 <- Keyword.get(options, :num_acceptors, 1),
         connections when connections in 1..1_000_000 <-
           Keyword.get(options, :max_connections, 1) do
      {:ok, options}
    else
      _ -> :error
    end
  end

  defp proper?(list), do: is_list(list) and not List.improper?(list)
  defp names(names), do: Enum.map_join(names, ", ", &inspect/1)
end
