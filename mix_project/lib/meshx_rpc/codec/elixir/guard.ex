defmodule MeshxRpc.Codec.Elixir.Guard do
  @moduledoc false
  # Walks an external term without building it. What is open is an explicit list of counts, at most `max_depth` long.

  @type reason :: {atom(), term()}

  @spec check(binary(), map()) :: :ok | {:error, reason()}
  def check(binary, policy) do
    policy = MeshxRpc.Guard.policy(policy)

    if byte_size(binary) > policy.max_bytes,
      do: {:error, {:too_long, byte_size(binary)}},
      else: start(binary, policy)
  catch
    {:refused, reason} -> {:error, reason}
  end

  defp start(<<131, 80, size::32, zlib::binary>>, policy) do
    unless policy.allow_compressed, do: refuse(:compressed_not_allowed, size)
    if size > policy.max_inflated, do: refuse(:inflated_too_long, size)
    walk(inflate(zlib, size), policy)
  end

  defp start(<<131, term::binary>>, policy), do: walk(term, policy)
  defp start(<<byte, _::binary>>, _policy), do: {:error, {:version, byte}}
  defp start("", _policy), do: {:error, {:version, nil}}

  defp walk(term, policy) do
    case terms(term, [1], 0, 1, policy) do
      "" -> :ok
      rest -> {:error, {:trailing, byte_size(rest)}}
    end
  end

  # `open` holds how many terms each open container still wants, `depth` its length less one.
  defp terms(rest, [], _depth, _terms, _policy), do: rest

  defp terms(rest, [0 | open], depth, terms, policy),
    do: terms(rest, open, depth - 1, terms, policy)

  defp terms(bytes, [wanted | open], depth, terms, policy) do
    open = [wanted - 1 | open]

    case term(bytes, policy) do
      {rest, 0} ->
        terms(rest, open, depth, terms, policy)

      {rest, {:flat, count}} ->
        terms(rest, open, depth, total(terms, count, policy), policy)

      {rest, children} ->
        if children > byte_size(rest), do: refuse(:count_past_end, children)
        if depth + 1 > policy.max_depth, do: refuse(:too_deep, policy.max_depth)
        terms(rest, [children | open], depth + 1, total(terms, children, policy), policy)
    end
  end

  defp total(terms, more, %{max_terms: max}) when terms + more > max,
    do: refuse(:too_many_terms, terms + more)

  defp total(terms, more, _policy), do: terms + more

  # One term without what it contains: the bytes after it, and how many terms follow as its parts.
  defp term(<<97, _, rest::binary>>, _), do: {rest, 0}
  defp term(<<98, _::32, rest::binary>>, _), do: {rest, 0}
  defp term(<<70, _::64, rest::binary>>, _), do: {rest, 0}
  defp term(<<99, _::binary-size(31), rest::binary>>, _), do: {rest, 0}
  defp term(<<100, len::16, _::binary-size(len), rest::binary>>, _), do: {rest, 0}
  defp term(<<115, len, _::binary-size(len), rest::binary>>, _), do: {rest, 0}
  defp term(<<118, len::16, _::binary-size(len), rest::binary>>, _), do: {rest, 0}
  defp term(<<119, len, _::binary-size(len), rest::binary>>, _), do: {rest, 0}
  defp term(<<104, arity, rest::binary>>, _), do: {rest, arity}
  defp term(<<105, arity::32, rest::binary>>, _), do: {rest, arity}
  defp term(<<106, rest::binary>>, _), do: {rest, 0}
  defp term(<<107, len::16, _::binary-size(len), rest::binary>>, _), do: {rest, {:flat, len}}
  defp term(<<108, len::32, rest::binary>>, _), do: {rest, len + 1}
  defp term(<<109, len::32, _::binary-size(len), rest::binary>>, _), do: {rest, 0}

  defp term(<<77, len::32, bits, _::binary-size(len), rest::binary>>, _) when bits in 1..8,
    do: {rest, 0}

  defp term(<<116, pairs::32, rest::binary>>, _), do: {rest, 2 * pairs}

  defp term(<<110, len, _sign, _::binary-size(len), rest::binary>>, policy),
    do: integer(len, rest, policy)

  defp term(<<111, len::32, _sign, _::binary-size(len), rest::binary>>, policy),
    do: integer(len, rest, policy)

  defp term(<<103, rest::binary>>, policy), do: node_then(rest, 9, policy)
  defp term(<<88, rest::binary>>, policy), do: node_then(rest, 12, policy)
  defp term(<<102, rest::binary>>, policy), do: node_then(rest, 5, policy)
  defp term(<<89, rest::binary>>, policy), do: node_then(rest, 8, policy)
  defp term(<<120, rest::binary>>, policy), do: node_then(rest, 12, policy)
  defp term(<<101, rest::binary>>, policy), do: node_then(rest, 5, policy)

  defp term(<<114, words::16, rest::binary>>, policy) when words in 1..5,
    do: node_then(rest, 1 + 4 * words, policy)

  defp term(<<90, words::16, rest::binary>>, policy) when words in 1..5,
    do: node_then(rest, 4 + 4 * words, policy)

  defp term(<<tag, _::binary>>, _) when tag in [112, 113, 117], do: refuse(:fun, tag)
  defp term(<<tag, _::binary>>, _), do: refuse(:malformed, tag)
  defp term("", _), do: refuse(:truncated, 0)

  defp integer(len, _rest, %{max_integer_bytes: max}) when len > max,
    do: refuse(:integer_too_long, len)

  defp integer(_len, rest, _policy), do: {rest, 0}

  # The node of a pid, port or reference is an atom.
  defp node_then(<<tag, _::binary>> = bytes, more, policy) when tag in [100, 115, 118, 119] do
    {rest, 0} = term(bytes, policy)
    if byte_size(rest) < more, do: refuse(:truncated, byte_size(rest))
    {binary_part(rest, more, byte_size(rest) - more), 0}
  end

  defp node_then(_bytes, _more, _policy), do: refuse(:malformed, :node)

  defp inflate(zlib, size) do
    z = :zlib.open()

    try do
      :zlib.inflateInit(z)
      inflate(z, :zlib.safeInflate(z, zlib), size, [])
    rescue
      ErlangError -> refuse(:zlib, size)
    after
      :zlib.close(z)
    end
  end

  defp inflate(z, {status, output}, size, done) do
    done = [done | output]
    length = IO.iodata_length(done)

    cond do
      length > size -> refuse(:inflated_length, length)
      status == :continue -> inflate(z, :zlib.safeInflate(z, []), size, done)
      length < size -> refuse(:inflated_length, length)
      true -> IO.iodata_to_binary(done)
    end
  end

  defp refuse(name, seen), do: throw({:refused, {name, seen}})
end
