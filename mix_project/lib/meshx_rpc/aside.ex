defmodule MeshxRpc.Aside do
  @moduledoc false
  # A function of the user's in a process of its own, which ends when its time is up or when nobody waits any more. The
  # one that waits may be killed and the function may hang: so a process between the two sees to both.

  @type beat :: (() -> term())

  @doc """
  What the function answers. It has `timeout` ms, from its start and from each call of the `beat` that it is handed, and
  ends at `until` (`:erlang.monotonic_time(:millisecond)`) whatever it calls. `:failed`: it raised or exited.

  Nothing of it comes to the calling process later.
  """
  @spec run((beat() -> result), timeout(), integer() | :infinity) ::
          {:ok, result} | {:error, :failed | :timeout | :late}
        when result: term()
  def run(fun, timeout, until \\ :infinity) do
    waiting = self()
    {_pid, monitor} = spawn_monitor(fn -> watch(waiting, fun, timeout, until) end)

    receive do
      {:DOWN, ^monitor, :process, _pid, {__MODULE__, result}} -> result
      {:DOWN, ^monitor, :process, _pid, _killed} -> {:error, :failed}
    end
  end

  defp watch(waiting, fun, timeout, until) do
    gone = Process.monitor(waiting)
    watching = self()

    {pid, monitor} =
      spawn_monitor(fn ->
        exit({__MODULE__, {:ok, fun.(fn -> send(watching, {self(), :beat}) end)}})
      end)

    exit({__MODULE__, await(pid, monitor, gone, timeout, until)})
  end

  defp await(pid, monitor, gone, timeout, until) do
    {left, why} = left(timeout, until)

    receive do
      {^pid, :beat} -> await(pid, monitor, gone, timeout, until)
      {:DOWN, ^monitor, :process, _pid, {__MODULE__, result}} -> result
      {:DOWN, ^monitor, :process, _pid, _reason} -> {:error, :failed}
      {:DOWN, ^gone, :process, _pid, _reason} -> stop(pid, :late)
    after
      left -> stop(pid, why)
    end
  end

  defp left(timeout, :infinity), do: {timeout, :timeout}

  defp left(timeout, until) do
    left = max(until - :erlang.monotonic_time(:millisecond), 0)
    if left < timeout, do: {left, :late}, else: {timeout, :timeout}
  end

  defp stop(pid, why) do
    Process.exit(pid, :kill)
    {:error, why}
  end
end
