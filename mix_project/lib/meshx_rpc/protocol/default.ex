defmodule MeshxRpc.Protocol.Default do
  @moduledoc """
  The functions that the `*_mfa` options name by default, and what those of your own look like.

  | Option | Called as | Answers |
  |---|---|---|
  | `serialize_mfa: {mod, fun, arg}` | `mod.fun(term, arg)` | `{:ok, binary, flag}` with a flag of 0 to 255, or `{:error, reason}` |
  | `deserialize_mfa: {mod, fun, arg}` | `mod.fun(binary, arg, flag)` | `{:ok, term}` or `{:error, reason}` |
  | `cks_mfa: {mod, fun, arg}` | `mod.fun(block, arg)` | a binary of at most 255 bytes |
  | `conn_ref_mfa`, `node_ref_mfa`, `svc_ref_mfa: {mod, fun, args}` | `apply(mod, fun, args)` | a binary, of which 255 bytes are taken |
  """

  @raw 0
  @external 1

  @doc "CRC-32 of a block, as `:erlang.crc32/1`, in 4 bytes. As `:cks_mfa` it is `checksum: :crc32`."
  @spec checksum(binary(), term()) :: <<_::32>>
  def checksum(block, _options), do: <<:erlang.crc32(block)::32>>

  @doc "This node's name, at most 255 bytes."
  @spec node_ref() :: String.t()
  def node_ref, do: node() |> Atom.to_string() |> String.slice(0, 255)

  @doc "4 random bytes that name a connection in telemetry."
  @spec conn_ref() :: <<_::32>>
  def conn_ref, do: :crypto.strong_rand_bytes(4)

  @doc "A binary as it is, with flag 0; everything else in the external term format, with flag 1."
  @spec serialize(term(), list()) :: {:ok, binary(), byte()} | {:error, term()}
  def serialize(binary, _options) when is_binary(binary), do: {:ok, binary, @raw}

  def serialize(term, options) do
    {:ok, :erlang.term_to_binary(term, options), @external}
  rescue
    error -> {:error, error}
  end

  @doc """
  Undoes `serialize/2`. Makes no atoms, whatever the options.

  As `:deserialize_mfa` with `[]` it is done behind `MeshxRpc.Guard`; called from a function of your own it is not.
  """
  @spec deserialize(binary(), list(), byte()) :: {:ok, term()} | {:error, term()}
  def deserialize(binary, options, flag \\ @external)
  def deserialize(binary, _options, @raw), do: {:ok, binary}

  def deserialize(binary, options, @external) do
    {:ok, :erlang.binary_to_term(binary, [:safe | options])}
  rescue
    error -> {:error, error}
  end

  def deserialize(_binary, _options, flag), do: {:error, {:unknown_serializer, flag}}
end
