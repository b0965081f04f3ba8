defmodule MeshxRpc.Guard do
  @moduledoc """
  What an external term of a peer may be, before it is decoded.

  | Key | Default | |
  |---|---|---|
  | `max_bytes` | 128 MiB | bytes of the encoded term |
  | `max_depth` | 256 | containers inside one another, at most 512 |
  | `max_terms` | 4,194,304 | terms in all, elements included |
  | `max_integer_bytes` | 65,536 | bytes of one integer |
  | `allow_compressed` | `false` | whether a compressed term is taken |
  | `max_inflated` | 64 MiB | bytes that a compressed term may inflate to |

  Functions are never taken. Atoms are left to `:erlang.binary_to_term(binary, [:safe])`.
  """

  @defaults %{
    max_bytes: 128 * 1024 * 1024,
    max_depth: 256,
    max_terms: 4 * 1024 * 1024,
    max_integer_bytes: 65_536,
    allow_compressed: false,
    max_inflated: 64 * 1024 * 1024
  }

  @doc "A policy with the defaults where it says nothing. Raises on a key that does not exist."
  @spec policy(map()) :: map()
  def policy(policy) do
    for key <- Map.keys(policy), not is_map_key(@defaults, key) do
      raise ArgumentError,
            "unknown guard policy #{inspect(key)}, known are #{inspect(Map.keys(@defaults))}"
    end

    Map.update!(Map.merge(@defaults, policy), :max_depth, &min(&1, 512))
  end
end
