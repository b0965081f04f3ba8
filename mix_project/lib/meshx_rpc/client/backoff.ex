defmodule MeshxRpc.Client.Backoff do
  @moduledoc false
  # How long to wait before the next try: doubled each time up to a limit, and +-10 % so that many clients
  # of a server that came back do not come at once.

  @first 20

  @doc "The wait before try number `attempt` (from 0), at most about `longest`, in milliseconds."
  @spec wait(non_neg_integer(), pos_integer()) :: non_neg_integer()
  def wait(attempt, longest),
    do: (@first * Integer.pow(2, min(attempt, 20))) |> min(longest) |> jitter()

  @doc "The same time +-10 %."
  @spec jitter(non_neg_integer()) :: non_neg_integer()
  def jitter(milliseconds) when milliseconds < 10, do: milliseconds

  def jitter(milliseconds) do
    spread = div(milliseconds, 10)
    milliseconds - spread + :rand.uniform(2 * spread + 1) - 1
  end
end
