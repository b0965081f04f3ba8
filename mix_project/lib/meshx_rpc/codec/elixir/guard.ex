defmodule MeshxRpc.Codec.Elixir.Guard do
  @moduledoc false
  # Walks an external term without building it, by the rules of native/etf/src/guard.rs. What is open is an explicit
  # list of counts, at most `max_depth` long; `owed` is how many terms all of them still want together. Each takes at
  # least a byte, so that an announced count costs nothing.

  alias MeshxRpc.Codec.Elixir.Token

  @spec check(binary(), map()) :: :ok | {:error, {atom(), String.t()}}
  def check(binary, policy) do
    policy = MeshxRpc.Guard.policy(policy)

    if byte_size(binary) > policy.max_bytes do
      refuse(
        :too_long,
        "#{byte_size(binary)} bytes of input, the limit is #{policy.max_bytes} (max_bytes)"
      )
    end

    case binary do
      <<131, rest::binary>> ->
        seen = %{seen: 0, atoms: 0, atom_bytes: 0, words: 0, pairs: 0, key_bytes: 0, in_keys: 0}
        walk(rest, [], 0, 1, policy |> Map.merge(seen) |> Map.put(:nodes, %{}))

      _ ->
        refuse(:version, "a term begins with byte 131")
    end
  catch
    {:refused, name, text} -> {:error, {name, text}}
  end

  defp walk("", _open, _depth, 0, _s), do: :ok

  defp walk(rest, _open, _depth, 0, _s),
    do: refuse(:trailing, "#{byte_size(rest)} bytes follow the term")

  defp walk(bytes, open, depth, owed, s) do
    {rest, token} = Token.read(bytes, s.max_integer_bytes)
    s = keys(%{s | seen: s.seen + 1}, open, byte_size(bytes) - byte_size(rest))

    case token do
      {:open, kind, children, words} ->
        owed = owed - 1 + children

        if owed > byte_size(rest),
          do: refuse(:malformed, "#{children} elements announced past the end")

        s = terms(s, owed)
        {open, depth} = nest(open, depth, kind, children, s)
        s = if kind == :map, do: %{s | pairs: s.pairs + div(children, 2)}, else: s
        walk(rest, open, depth, owed, admit(s, kind, nil, words))

      {:string, len} ->
        s = terms(%{s | seen: s.seen + len}, owed - 1)
        {open, depth} = leaf(open, depth)
        walk(rest, open, depth, owed - 1, admit(s, :string, nil, 2 * len))

      {kind, atoms, words} ->
        {open, depth} = leaf(open, depth)
        walk(rest, open, depth, owed - 1, admit(s, kind, atoms, words))

      {kind, atoms, words, node} ->
        {open, depth} = leaf(open, depth)
        walk(rest, open, depth, owed - 1, s |> admit(kind, atoms, words) |> admit_node(node))
    end
  end

  # `in_keys` is of how many maps this token is in a key. An even number of parts to come means that a key is next.
  defp keys(s, open, len) do
    in_keys =
      case open do
        [{wanted, :map} | _] when rem(wanted, 2) == 0 -> s.in_keys + 1
        [{_wanted, :map} | _] -> s.in_keys - 1
        _ -> s.in_keys
      end

    %{s | in_keys: in_keys, key_bytes: s.key_bytes + in_keys * len}
  end

  defp terms(%{seen: seen, max_terms: max} = s, owed) do
    if seen + owed > max,
      do:
        refuse(:too_many_terms, "#{seen + owed} terms announced, the limit is #{max} (max_terms)"),
      else: s
  end

  ## Nesting: `{terms still wanted, kind}` of each open container, innermost first

  defp nest(open, depth, _kind, 0, _s), do: leaf(open, depth)

  defp nest(open, depth, kind, children, s) do
    {open, depth} =
      case open do
        # A list whose tail is a list is one longer list.
        [{1, :list} | open] when kind == :list -> {open, depth - 1}
        [{wanted, outer} | open] -> {[{wanted - 1, outer} | open], depth}
        [] -> {[], depth}
      end

    if depth >= s.max_depth,
      do: refuse(:too_deep, "terms are nested deeper than #{s.max_depth} (max_depth)")

    {[{children, kind} | open], depth + 1}
  end

  defp leaf([{wanted, kind} | open], depth), do: close([{wanted - 1, kind} | open], depth)
  defp leaf([], depth), do: {[], depth}

  defp close([{0, _kind} | open], depth), do: close(open, depth - 1)
  defp close(open, depth), do: {open, depth}

  ## Policy

  defp admit(%{allow_funs: false}, :fun, _atoms, _words), do: not_allowed("fun")
  defp admit(%{allow_exports: false}, :export, _atoms, _words), do: not_allowed("fun by name")
  defp admit(%{allow_pids: false}, :pid, _atoms, _words), do: not_allowed("pid")
  defp admit(%{allow_ports: false}, :port, _atoms, _words), do: not_allowed("port")
  defp admit(%{allow_references: false}, :reference, _atoms, _words), do: not_allowed("reference")

  defp admit(s, kind, atom_bytes, words) do
    count = if atom_bytes, do: 1 + ((kind == :export && 1) || 0), else: 0

    s = %{
      s
      | atoms: s.atoms + count,
        atom_bytes: s.atom_bytes + (atom_bytes || 0),
        words: s.words + words
    }

    cond do
      s.atoms > s.max_atoms ->
        refuse(:too_many_atoms, "more than #{s.max_atoms} atoms (max_atoms)")

      s.atom_bytes > s.max_atom_bytes ->
        refuse(:too_many_atom_bytes, over("bytes of atom text", s.max_atom_bytes, "max_atom_bytes"))

      s.pairs > s.max_map_pairs ->
        refuse(:too_many_map_pairs, over("pairs in maps", s.max_map_pairs, "max_map_pairs"))

      s.key_bytes > s.max_key_bytes ->
        refuse(:too_many_key_bytes, over("bytes in keys of maps", s.max_key_bytes, "max_key_bytes"))

      s.words > s.max_heap_words ->
        refuse(:too_many_heap_words, over("heap words", s.max_heap_words, "max_heap_words"))

      true ->
        s
    end
  end

  defp admit_node(%{nodes: nodes} = s, node) do
    nodes = Map.put(nodes, node, true)

    if map_size(nodes) > s.max_nodes do
      what = "nodes or creations that identifiers name"
      refuse(:too_many_nodes, over(what, s.max_nodes, "max_nodes"))
    end

    %{s | nodes: nodes}
  end

  defp over(what, limit, key), do: "more than #{limit} #{what} (#{key})"

  defp not_allowed(kind), do: refuse(:not_allowed, "a #{kind} is not allowed")

  @doc false
  @spec refuse(atom(), String.t()) :: no_return()
  def refuse(name, text), do: throw({:refused, name, text})
end
