defmodule MeshxRpc.Secret do
  @moduledoc false
  # Keys of configurations, so that no crash report, `:sys.get_state` or child specification shows them: encrypted
  # with a key that only this VM's memory has.
  #
  # Not a closure over them: a fun belongs to the version of the module that made it, and the supervisor that holds
  # it would be killed when that version is purged by the second reload.

  @vault {__MODULE__, :vault}

  @opaque t :: {__MODULE__, iv :: binary(), sealed :: binary(), tag :: binary()}

  @spec hide([binary()]) :: t()
  def hide(keys) do
    iv = :crypto.strong_rand_bytes(12)
    plain = :erlang.term_to_binary(keys)
    {sealed, tag} = :crypto.crypto_one_time_aead(:aes_256_gcm, vault(), iv, plain, "", true)
    {__MODULE__, iv, sealed, tag}
  end

  @spec reveal(t()) :: [binary()]
  def reveal({__MODULE__, iv, sealed, tag}) do
    :aes_256_gcm
    |> :crypto.crypto_one_time_aead(vault(), iv, sealed, "", tag, false)
    |> :erlang.binary_to_term()
  end

  defp vault, do: :persistent_term.get(@vault, nil) || make()

  # Under a lock of this node: two that start at once must not make two.
  defp make do
    :global.trans(
      {@vault, self()},
      fn ->
        :persistent_term.get(@vault, nil) ||
          tap(:crypto.strong_rand_bytes(32), &:persistent_term.put(@vault, &1))
      end,
      [node()]
    )
  end
end
