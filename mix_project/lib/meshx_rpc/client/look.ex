defmodule MeshxRpc.Client.Look do
  @moduledoc false
  # Whether a caller looks for its answer for a moment before it waits for it.
  #
  # Of a small call most of the time goes into waking: while its caller waits, its scheduler goes to sleep, and the
  # answer wakes first the thread that asks the kernel and then a scheduler. A scheduler that has something to do asks
  # the kernel itself. So a caller that has written its request itself, at a connection with nothing else to do, stays
  # runnable for so long, and lets all others have their turn between two looks. That is no more work for the processor:
  # a scheduler looks for work for about as long before it sleeps (`+sbwt`).
  #
  # Where no answer comes in time it is wasted: after each such call twice as many are made before the next that looks.
  # This is kept for a socket, and is a hint: callers that are about it at once may lose a count.

  @time_us 100
  # So many answers in time, in a row, make up for one that was not.
  @regained 4
  # At most 2 to the power of so many calls are made before it is tried again.
  @doubled_max 10

  @pass_over 1
  @misses 2
  @hits 3

  @opaque t :: :atomics.atomics_ref()
  @type look :: {t(), until :: integer()}

  @spec new() :: t()
  def new, do: :atomics.new(3, [])

  @doc "For a call that is made now: nil when it is just to wait."
  @spec start(t()) :: look() | nil
  def start(here) do
    if :atomics.get(here, @pass_over) > 0 do
      :atomics.sub(here, @pass_over, 1)
      nil
    else
      {here, now() + @time_us}
    end
  end

  @doc "Whether to look again. When not, it was for nothing."
  @spec again?(look()) :: boolean()
  def again?({here, until}), do: now() < until or missed(here)

  @doc "The answer is there."
  @spec found(look() | nil) :: :ok
  def found(nil), do: :ok

  def found({here, _until}) do
    with misses when misses > 0 <- :atomics.get(here, @misses),
         hits when hits >= @regained <- :atomics.add_get(here, @hits, 1) do
      :atomics.put(here, @hits, 0)
      :atomics.put(here, @misses, misses - 1)
    else
      _nothing_to_make_up_for -> :ok
    end
  end

  defp missed(here) do
    misses = min(:atomics.get(here, @misses) + 1, @doubled_max)
    :atomics.put(here, @hits, 0)
    :atomics.put(here, @misses, misses)
    :atomics.put(here, @pass_over, Bitwise.bsl(1, misses) - 1)
    false
  end

  defp now, do: :erlang.monotonic_time(:microsecond)
end
