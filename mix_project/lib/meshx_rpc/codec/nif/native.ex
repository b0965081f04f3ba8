defmodule MeshxRpc.Codec.Nif.Native do
  @moduledoc false
  # Stubs that `native/nif` replaces. Only `MeshxRpc.Codec.Nif` calls them.

  @on_load :load
  @status {__MODULE__, :status}

  @doc false
  # Always `:ok`: a VM without the library works, more slowly (`MeshxRpc.Codec.impl/0`).
  def load do
    :persistent_term.put(@status, load_nif())
    :ok
  end

  defp load_nif do
    case :code.priv_dir(:meshx) do
      {:error, :bad_name} ->
        {:error, "the directory of the application meshx is not known"}

      directory ->
        case :erlang.load_nif(:filename.join([directory, "native", "meshx_nif"]), 0) do
          :ok -> :ok
          {:error, {reason, text}} -> {:error, "#{reason}: #{text}"}
        end
    end
  end

  @doc "Whether the library was loaded."
  @spec status() :: :ok | {:error, String.t()}
  def status, do: :persistent_term.get(@status, {:error, "it was not tried"})

  def new(_options), do: not_loaded()
  def agree(_decoder, _checksum, _blk_max_size), do: not_loaded()
  def open(_decoder, _stream), do: not_loaded()
  def release(_decoder, _stream), do: not_loaded()
  def feed(_decoder, _bytes, _offset), do: not_loaded()
  def stats(_decoder), do: not_loaded()
  def crc32(_iovec), do: not_loaded()
  def crc32c(_iovec), do: not_loaded()
  def guard_new(_policy), do: not_loaded()
  def guard_step(_guard, _bytes), do: not_loaded()

  defp not_loaded, do: :erlang.nif_error(:nif_not_loaded)
end
