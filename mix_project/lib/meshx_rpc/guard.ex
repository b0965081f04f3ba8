defmodule MeshxRpc.Guard do
  @moduledoc """
  What an external term of a peer may be, before it is decoded.

  | Key | Default | |
  |---|---|---|
  | `max_bytes` | 128 MiB | bytes of the encoded term |
  | `max_depth` | 256 | containers inside one another, at most 512 |
  | `max_terms` | 4,194,304 | terms in all, elements included |
  | `max_atoms` | 1,048,576 | atoms in all, each occurrence counted |
  | `max_atom_bytes` | 16 MiB | bytes of all their texts together |
  | `max_integer_bytes` | 4,096 | bytes of one integer |
  | `max_map_pairs` | 262,144 | pairs of all maps together |
  | `max_key_bytes` | 4 MiB | bytes of all map keys as encoded; keys within keys count again for each map around them |
  | `max_nodes` | 64 | nodes that pids, ports and references name, each creation of a node counted |
  | `max_heap_words` | 16,777,216 | words of 8 bytes that the decoded term may take on the heap |
  | `allow_funs`, `allow_exports` | `false` | functions with code, functions by name |
  | `allow_pids`, `allow_ports`, `allow_references` | `true` | |

  A VM builds the maps of a term in one go, without yielding, and hashes or compares all that is in their keys: about
  0.2 us for each pair and 1 us for each KiB of keys. So a term of 2,048 terms or more, or with more than 256 KiB of keys,
  is decoded on a dirty scheduler; without the NIF there is only the scheduler of the process, and these limits bound how
  long it is held. An identifier of a node with a creation that the VM has not met takes a place in its table of nodes,
  for a minute at least.

  Half or more of that time goes into atoms, which the VM looks up by their texts wherever they stand. A term that
  repeats its atoms, as a list of maps or structs does, is therefore given to the VM with its atoms in a table, as
  distribution sends it, and decoded on the scheduler of the process: 10,000 small maps in a quarter of the time. That is
  for terms of 256 atoms or more, at most 255 different ones, and 2 KiB to 1 MiB, that take the VM about 1 ms or less. They
  hold no identifiers, no functions, no binaries of more than 1 KiB and no maps of more than 32 pairs or with keys that
  are no atoms. The guard, and what it refuses, is the same for them.

  A compressed term is always refused: what it holds shows only after inflating it. Whether an atom exists is left to the
  VM, which makes none (`:erlang.binary_to_term(binary, [:safe])`).
  """

  @defaults %{
    max_bytes: 128 * 1024 * 1024,
    max_depth: 256,
    max_terms: 4 * 1024 * 1024,
    max_atoms: 1024 * 1024,
    max_atom_bytes: 16 * 1024 * 1024,
    max_integer_bytes: 4096,
    max_map_pairs: 256 * 1024,
    max_key_bytes: 4 * 1024 * 1024,
    max_nodes: 64,
    max_heap_words: 16 * 1024 * 1024,
    allow_funs: false,
    allow_exports: false,
    allow_pids: true,
    allow_ports: true,
    allow_references: true
  }

  @doc "A policy with the defaults where it says nothing. Raises `ArgumentError` on what it does not know."
  @spec policy(map()) :: map()
  def policy(policy) do
    for {key, value} <- policy do
      case @defaults do
        %{^key => default} when is_boolean(default) and is_boolean(value) ->
          :ok

        %{^key => default} when is_integer(default) and is_integer(value) and value >= 0 ->
          :ok

        %{^key => _} ->
          raise ArgumentError, "guard policy #{inspect(key)} cannot be #{inspect(value)}"

        _ ->
          raise ArgumentError,
                "unknown guard policy #{inspect(key)}, known are #{inspect(Map.keys(@defaults))}"
      end
    end

    Map.update!(Map.merge(@defaults, policy), :max_depth, &min(&1, 512))
  end
end
