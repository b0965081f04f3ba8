defmodule MeshxRpc.Codec.Nif.Native do
  @moduledoc false
  # Stubs that `native/nif` replaces. Only `MeshxRpc.Codec.Nif` calls them.

  @on_load :load
  @status {__MODULE__, :status}

  # Why a library is not loaded a second time into the same VM: the module has it already.
  @again [:reload, :upgrade, :old_code]

  @doc false
  # `:ok` also without the library: such a VM works, more slowly (`MeshxRpc.Codec.impl/0`).
  #
  # A VM that has the library keeps it: native code cannot be replaced under decoders that are in use. So a reload is
  # refused (`on_load_failure`), and the version before, which has the library, stays.
  def load do
    case load_nif() do
      {:error, {reason, text}} when reason in @again -> again(reason, text)
      {:error, {reason, text}} -> :persistent_term.put(@status, {:error, "#{reason}: #{text}"})
      result -> :persistent_term.put(@status, result)
    end
  end

  # `recompile` deletes a module before it compiles it anew: then there is none to stay, and what the old one still
  # holds goes. Connections that have its decoders end, and are made again.
  defp again(reason, text) do
    if :erlang.module_loaded(__MODULE__) do
      {:native_code_stays, "#{reason}: #{text} Restart the VM for another version of it."}
    else
      _ = :code.purge(__MODULE__)
      with {:error, {reason, text}} <- load_nif(), do: {:error, "#{reason}: #{text}"}
    end
  end

  defp load_nif do
    case :code.priv_dir(:meshx) do
      {:error, :bad_name} ->
        {:error, "the directory of the application meshx is not known"}

      directory ->
        case :erlang.load_nif(:filename.join([directory, "native", "meshx_nif"]), 0) do
          :ok -> :ok
          {:error, {_reason, _text}} = error -> error
        end
    end
  end

  @doc "Whether the library was loaded."
  @spec status() :: :ok | {:error, String.t()}
  def status, do: :persistent_term.get(@status, {:error, "it was not tried"})

  def new(_options), do: not_loaded()
  def agree(_decoder, _checksum, _blk_max_size), do: not_loaded()
  def open(_decoder, _first, _last), do: not_loaded()
  def release(_decoder, _streams), do: not_loaded()
  def feed(_decoder, _bytes, _offset), do: not_loaded()
  def stats(_decoder), do: not_loaded()
  def crc32(_iovec), do: not_loaded()
  def longest_slice, do: not_loaded()
  def crc32c(_iovec), do: not_loaded()
  def budget(_max), do: not_loaded()
  def budget_used(_budget), do: not_loaded()
  def skipped(_decoder), do: not_loaded()
  def guard_policy(_policy), do: not_loaded()
  def guard(_policy, _bytes), do: not_loaded()
  def decode(_policy, _bytes, _index), do: not_loaded()
  def guard_step(_guard, _bytes), do: not_loaded()
  def binary_to_term(_bytes), do: not_loaded()

  defp not_loaded, do: :erlang.nif_error(:nif_not_loaded)
end
