defmodule Meshx.Agent.Server.Lanes do
  @moduledoc false
  # Requests of one lane run one after the other, what asks the agent as a job: a process of its own.

  alias Meshx.Agent.Server.Work

  # The agent takes 64 unanswered requests of a VM. Two adapters leave room for others.
  @max_jobs 24

  def max_jobs, do: @max_jobs

  def lane(state, %{id: id}) do
    case state.services do
      %{^id => %{lane: lane}} -> lane
      _unknown -> {:service, id}
    end
  end

  def lane(_state, _request), do: nil

  def enqueue(state, %{lane: lane} = request) do
    case state.lanes do
      %{^lane => waiting} -> put_in(state.lanes[lane], :queue.in(request, waiting))
      _free -> run_next(put_in(state.lanes[lane], :queue.from_list([request])), lane)
    end
  end

  defp run_next(state, lane) do
    case :queue.out(state.lanes[lane]) do
      {:empty, _waiting} ->
        %{state | lanes: Map.delete(state.lanes, lane)}

      {{:value, request}, waiting} ->
        case Work.begin(request, put_in(state.lanes[lane], waiting)) do
          {:reply, reply, state} -> state |> answer(request, reply) |> run_next(lane)
          {:job, fun, state} -> start_job(state, {request, fun})
        end
    end
  end

  defp start_job(state, job) when map_size(state.jobs) >= @max_jobs,
    do: %{state | waiting: :queue.in(job, state.waiting)}

  defp start_job(state, {request, fun}) do
    {_pid, monitor} = spawn_monitor(fn -> exit({:done, fun.()}) end)
    put_in(state.jobs[monitor], Map.put(request, :epoch, state.epoch))
  end

  def done(state, monitor, reason) do
    {request, jobs} = Map.pop(state.jobs, monitor)
    {reply, state} = Work.finish(request, result(reason), %{state | jobs: jobs})
    state = state |> answer(request, reply) |> run_next(request.lane)

    case :queue.out(state.waiting) do
      {{:value, job}, waiting} -> start_job(%{state | waiting: waiting}, job)
      {:empty, _waiting} -> state
    end
  end

  def result({:done, result}), do: result

  # Not the reason itself: it may have arguments, and one of them is a token.
  def result(_crash), do: {:error, {:not_ready, "asking the agent failed, see the log"}}

  defp answer(state, %{from: nil}, _reply), do: state

  defp answer(state, %{from: from}, reply) do
    case Map.pop(state.callers, from, :answered) do
      {:answered, _callers} ->
        state

      {timer, callers} ->
        if timer, do: Process.cancel_timer(timer)
        GenServer.reply(from, reply)
        %{state | callers: callers}
    end
  end

  # Nobody wants it any more: the caller gave up, or the owner ended.
  def unwanted?(%{from: from} = request, state) do
    (from != nil and not Map.has_key?(state.callers, from)) or not alive?(request[:owner])
  end

  def alive?(nil), do: true
  def alive?(owner), do: Process.alive?(owner)
end
