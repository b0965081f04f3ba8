defmodule MeshxRpc.Codec.Nif do
  @moduledoc """
  The codec in Rust (`native/frame` through `native/nif`).
  """
  @behaviour MeshxRpc.Codec

  alias MeshxRpc.Codec.Elixir.Crc32c
  alias MeshxRpc.Codec.Nif.{Indexed, Native}

  # Below this the VM's own crc32 is as fast as a NIF call with its list of binaries; above the other, one call
  # could hold a scheduler for too long, and the VM's own yields.
  @crc_from 1024
  @crc_to 128 * 1024

  @doc "Whether the library is there, or why not."
  @spec load() :: :ok | {:error, String.t()}
  def load, do: Native.status()

  # In a table of the calling process's, since what a library made is nothing to one that is loaded after it.
  @impl true
  def budget(max) do
    table = :ets.new(:meshx_rpc_budget, [:public, read_concurrency: true])
    :ets.insert(table, {:budget, Native.budget(max), max})
    table
  end

  @impl true
  def budget_used(table), do: table |> current() |> Native.budget_used()

  defp current(table) do
    [{:budget, budget, max}] = :ets.lookup(table, :budget)

    try do
      _ = Native.budget_used(budget)
      budget
    rescue
      ArgumentError ->
        budget = Native.budget(max)
        :ets.insert(table, {:budget, budget, max})
        budget
    end
  end

  # A decoder gives back what it has when it goes.
  @impl true
  def give_back(_budget, _bytes), do: :ok

  @impl true
  def skipped(decoder), do: Native.skipped(decoder)

  @doc "The longest that a call of the NIF held its scheduler since this was asked before, in nanoseconds."
  @spec longest_slice() :: non_neg_integer()
  def longest_slice, do: Native.longest_slice()

  @impl true
  def new(options) do
    budget =
      case options do
        %{budget: {table, _counter}} -> current(table)
        _none -> nil
      end

    case Native.new(Map.put(options, :budget, budget)) do
      decoder when is_reference(decoder) -> decoder
      {:error, text} -> raise ArgumentError, text
    end
  end

  @impl true
  def agree(decoder, %{checksum: checksum, blk_max_size: block}) when checksum in 0..2 do
    :ok = Native.agree(decoder, checksum, block)
    decoder
  end

  @impl true
  def feed(decoder, bytes), do: feed(decoder, bytes, 0, [], [])

  # A call takes 128 KiB or 512 frames, whichever comes first. `events` and `out` hold earlier calls', last first.
  defp feed(decoder, bytes, offset, events, out) do
    case Native.feed(decoder, bytes, offset) do
      {:ok, next, new, more} when next < byte_size(bytes) ->
        feed(decoder, bytes, next, [new | events], [more | out])

      {:ok, _all, new, more} ->
        {:ok, decoder, in_order(new, events), all_out(more, out)}

      {:error, new, more, cause, text} ->
        {:error, decoder, in_order(new, events), all_out(more, out), cause, text}
    end
  end

  defp in_order(last, []), do: last
  defp in_order(last, earlier), do: [last | earlier] |> Enum.reverse() |> Enum.concat()

  defp all_out(last, []), do: last
  defp all_out(last, earlier), do: Enum.reverse(earlier, [last])

  @impl true
  def open(decoder, first, last) do
    :ok = Native.open(decoder, first, last)
    decoder
  end

  @impl true
  def release(decoder, streams) do
    :ok = Native.release(decoder, streams)
    decoder
  end

  @impl true
  def stats(decoder), do: Native.stats(decoder)

  @impl true
  def crc32(iodata) do
    case :erlang.iolist_size(iodata) do
      size when size in @crc_from..@crc_to -> Native.crc32(:erlang.iolist_to_iovec(iodata))
      _ -> :erlang.crc32(iodata)
    end
  end

  @impl true
  def crc32c(iodata) do
    iovec = :erlang.iolist_to_iovec(iodata)
    if :erlang.iolist_size(iovec) <= @crc_to, do: Native.crc32c(iovec), else: Crc32c.of(iovec)
  end

  @impl true
  def policy(policy) do
    policy = MeshxRpc.Guard.policy(policy)

    # The other half is for a library that is loaded later; as a binary it costs nothing to send along.
    {Native.guard_policy(policy), :erlang.term_to_binary(policy)}
  end

  @impl true
  def guard(binary, policy) do
    with {:more, guard} <- first(:guard, binary, policy), do: step(guard, binary)
  end

  # What takes long to decode goes to a dirty scheduler, but for what does not with its atoms in a table.
  @impl true
  def decode(binary, policy) do
    case first(:decode, binary, policy) do
      {:ok, _term} = decoded -> decoded
      :unknown -> raise ArgumentError, "an atom of the term is unknown to this VM"
      :aside -> {:ok, Native.binary_to_term(binary)}
      {:more, guard} -> guard |> step(binary) |> decode_large(binary)
      done -> decode_large(done, binary)
    end
  end

  defp decode_large(:ok, binary), do: {:ok, Native.binary_to_term(binary)}

  defp decode_large({:indexed, names, bytes}, binary) do
    with :error <- Indexed.decode(names, bytes), do: {:ok, Native.binary_to_term(binary)}
  end

  defp decode_large({:error, _why} = refused, _binary), do: refused

  defp first(what, binary, policy) when is_map(policy),
    do: first(what, binary, policy(policy))

  defp first(what, binary, {prepared, policy}) do
    ask(what, prepared, binary)
  rescue
    # Of a library that was loaded before this one.
    ArgumentError -> ask(what, policy |> :erlang.binary_to_term() |> Native.guard_policy(), binary)
  end

  defp ask(:guard, policy, binary), do: Native.guard(policy, binary)
  defp ask(:decode, policy, binary), do: Native.decode(policy, binary, Indexed.works?())

  defp step(guard, binary) do
    case Native.guard_step(guard, binary) do
      :more -> step(guard, binary)
      done -> done
    end
  end
end
