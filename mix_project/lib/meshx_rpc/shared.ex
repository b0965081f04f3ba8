defmodule MeshxRpc.Shared do
  @moduledoc false
  # What a connection shares with the processes that may write to its socket beside it: the last stream id that
  # was taken, the send window of the connection, and whether it is idle. All of it is atomic, so nobody asks the
  # connection; the idle mark is a hint, and writing beside a busy connection does no harm.

  @id 1
  @window 2
  @busy 3
  @last 4
  @retire 5
  @over 6

  @max_window 0x7FFF_FFFF
  @max_stream 0xFFFF_FFFF
  # So many ids are left to the connection, for requests that wait in it when it is about to be replaced.
  @reserve 1_000_000

  @type t :: :atomics.atomics_ref()

  @doc """
  `window` is what the peer grants the connection. Options, for tests: `:next_stream`, the first stream id (1), and
  `:last_stream`, the last one.
  """
  @spec new(non_neg_integer(), keyword()) :: t()
  def new(window, options \\ []) do
    shared = :atomics.new(6, [])
    last = Keyword.get(options, :last_stream, @max_stream)
    :atomics.put(shared, @id, Keyword.get(options, :next_stream, 1) - 1)
    :atomics.put(shared, @window, window)
    :atomics.put(shared, @last, last)
    :atomics.put(shared, @retire, last - min(@reserve, div(last, 2)))
    shared
  end

  @doc "The next stream id. Whoever takes one must use it, or see that a CANCEL does."
  @spec take_id(t()) :: pos_integer()
  def take_id(shared), do: :atomics.add_get(shared, @id, 1)

  @doc "The same of so many in a row: the last of them."
  @spec take_ids(t(), pos_integer()) :: pos_integer()
  def take_ids(shared, count), do: :atomics.add_get(shared, @id, count)

  @doc "The last id that was taken, or asked for."
  @spec taken(t()) :: non_neg_integer()
  def taken(shared), do: :atomics.get(shared, @id)

  @doc "Whether there is no id any more."
  @spec exhausted?(t()) :: boolean()
  def exhausted?(shared), do: :atomics.get(shared, @id) >= :atomics.get(shared, @last)

  @doc "Whether the connection must be replaced soon, and only itself may take ids."
  @spec retiring?(t()) :: boolean()
  def retiring?(shared), do: :atomics.get(shared, @id) >= :atomics.get(shared, @retire)

  @spec window(t()) :: non_neg_integer()
  def window(shared), do: :atomics.get(shared, @window)

  @doc "Takes up to `bytes` of the window: how many it got. Never below zero, also not for a moment."
  @spec take(t(), non_neg_integer()) :: non_neg_integer()
  def take(shared, bytes) do
    held = :atomics.get(shared, @window)
    taken = min(held, bytes)

    case :atomics.compare_exchange(shared, @window, held, held - taken) do
      :ok -> taken
      _other -> take(shared, bytes)
    end
  end

  @doc "Takes all of `bytes` or nothing."
  @spec take_all?(t(), non_neg_integer()) :: boolean()
  def take_all?(shared, bytes) do
    held = :atomics.get(shared, @window)

    held >= bytes and
      (:atomics.compare_exchange(shared, @window, held, held - bytes) == :ok or
         take_all?(shared, bytes))
  end

  @doc "Adds to the window; `:error` when it grows beyond what the protocol allows."
  @spec grant(t(), pos_integer()) :: :ok | :error
  def grant(shared, bytes),
    do: if(:atomics.add_get(shared, @window, bytes) > @max_window, do: :error, else: :ok)

  @doc "True for one process, until `idle/1`: it may write itself."
  @spec claim?(t()) :: boolean()
  def claim?(shared), do: :atomics.compare_exchange(shared, @busy, 0, 1) == :ok

  @doc "The connection has nothing to do."
  @spec idle(t()) :: :ok
  def idle(shared), do: :atomics.put(shared, @busy, 0)

  @doc "The connection has messages of its own to send: nobody is to write beside it."
  @spec busy(t()) :: :ok
  def busy(shared), do: :atomics.put(shared, @busy, 1)

  @doc "Nobody is to write beside the connection any more."
  @spec over(t()) :: :ok
  def over(shared), do: :atomics.put(shared, @over, 1)

  @spec over?(t()) :: boolean()
  def over?(shared), do: :atomics.get(shared, @over) == 1

  @spec busy?(t()) :: boolean()
  def busy?(shared), do: :atomics.get(shared, @busy) == 1
end
