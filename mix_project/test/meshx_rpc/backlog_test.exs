defmodule MeshxRpc.BacklogTest do
  # What lies in the mailbox of a client's connection that was busy for a while.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Frame, TestPeer}

  @moduletag capture_log: true

  defp connection(client) do
    [{1, pid, _max, _trace}] = :ets.lookup(table(client), 1)
    pid
  end

  defp length_of(pid), do: pid |> Process.info(:message_queue_len) |> elem(1)

  defp reductions(pid), do: pid |> Process.info(:reductions) |> elem(1)

  # Reductions of the connection for each of `n` requests that are given up together.
  defp each(n, name, give_up) do
    {server, address} = server(max_concurrency: 10_000)
    client = client(address)
    pid = connection(client)

    callers =
      for _ <- 1..n do
        spawn_link(fn ->
          request = Client.Async.send_request(client, :wait, {name, :asked})
          receive do: (:give_up -> Client.Async.abandon(request))
        end)
      end

    for _ <- callers, do: assert_receive({:running, _pid, :asked}, 20_000)
    :erlang.suspend_process(pid)
    Enum.each(callers, give_up)
    await(fn -> length_of(pid) >= n end)
    before = reductions(pid)
    :erlang.resume_process(pid)
    await(fn -> Client.Pool.info(client).in_flight == 0 and length_of(pid) == 0 end)
    took = reductions(pid) - before
    await(fn -> Server.Pool.info(server).running == 0 end)
    stop_supervised!(client)
    stop_supervised!(server)
    div(took, n)
  end

  test "calls that are given up together cost as much each, however many they are" do
    Process.flag(:trap_exit, true)
    name = registered()

    for give_up <- [&send(&1, :give_up), &Process.exit(&1, :kill)] do
      {few, many} = {each(500, name, give_up), each(4_000, name, give_up)}
      assert many < 3 * few, "#{few} reductions for each of 500, #{many} for each of 4,000"
    end
  end

  # More calls than are written together lie before the server's last words, and its socket is closed.
  test "answers and last words that lie behind calls are heard before the connection is lost" do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)

    for count <- [20, 200] do
      client = client_down({:tcp, {127, 0, 0, 1}, port}, retry_idle_error: 60_000)
      socket = TestPeer.accept(listen)
      await(fn -> Client.Pool.info(client).connected == 1 end)
      call = fn argument -> Client.Pool.call(client, :echo, argument, 20_000, 0) end
      first = Task.async(fn -> call.("a") end)
      assert {0x10, 1, _request} = TestPeer.frame(socket)
      pid = connection(client)
      :erlang.suspend_process(pid)
      later = for _ <- 1..count, do: Task.async(fn -> call.("b") end)
      await(fn -> length_of(pid) >= count end)

      :ok = :gen_tcp.send(socket, [answer(1), Frame.goaway(1, :shutdown, "the server stops")])
      :gen_tcp.close(socket)

      await(fn -> has?(pid, &match?({:tcp_closed, _socket}, &1)) end)

      :erlang.resume_process(pid)
      assert Task.await(first, 20_000) == "answer"

      for task <- later, do: assert(Task.await(task, 20_000) == {:error_rpc, :closed})

      stop_supervised!(client)
    end
  end

  @many 16

  defp answer(stream) do
    payload = [Frame.response_head(:result, 0, 6), "answer"]
    Frame.block(:response, true, 0, stream, payload, 16, nil)
  end

  # A connection that is suspended while answers to all of its calls come, in one read. Each caller runs `fun`, which is
  # given a function for calls.
  defp all_answered(fun) do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    client = client_down({:tcp, {127, 0, 0, 1}, port}, retry_idle_error: 60_000)
    socket = TestPeer.accept(listen)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    call = fn argument -> Client.Pool.call(client, :echo, argument, 20_000, 0) end
    tasks = for _ <- 1..@many, do: Task.async(fn -> fun.(call) end)
    streams = for _ <- tasks, do: socket |> TestPeer.frame() |> elem(1)
    assert Enum.sort(streams) == Enum.to_list(1..@many)
    pid = connection(client)
    :erlang.suspend_process(pid)
    :ok = :gen_tcp.send(socket, for(stream <- streams, do: answer(stream)))
    await(fn -> has?(pid, &match?({:tcp, _socket, _bytes}, &1)) end)
    {client, socket, pid, tasks}
  end

  defp has?(pid, condition),
    do: pid |> Process.info(:messages) |> elem(1) |> Enum.any?(condition)

  # The second half have them after a write, for those of the first half that ask again.
  test "all answers of a read are answers, also when what their callers ask for next cannot be written" do
    {client, socket, pid, tasks} = all_answered(fn call -> {call.("a"), call.("b")} end)
    :ok = :inet.setopts(socket, linger: {true, 0})
    :gen_tcp.close(socket)
    await(fn -> has?(pid, &match?({:tcp_closed, _socket}, &1)) end)
    :erlang.resume_process(pid)

    for task <- tasks do
      assert {"answer", {:error_rpc, reason}} = Task.await(task, 20_000)
      assert reason in [:closed, :tcp_closed]
    end

    stop_supervised!(client)
  end

  test "callers that end between the answers of a read cost nobody else an answer" do
    Process.flag(:trap_exit, true)
    {client, socket, pid, tasks} = all_answered(fn call -> {call.("a"), call.("b")} end)
    {live, dying} = Enum.split(tasks, 8)
    for task <- dying, do: Task.shutdown(task, :brutal_kill)
    :erlang.resume_process(pid)
    answer_all(socket, length(live))
    for task <- live, do: assert(Task.await(task, 20_000) == {"answer", "answer"})
    await(fn -> Client.Pool.info(client).in_flight == 0 end)
    assert connection(client) == pid
    stop_supervised!(client)
  end

  defp answer_all(_socket, 0), do: :ok

  # Beside CANCELs.
  defp answer_all(socket, left) do
    case TestPeer.frame(socket) do
      {0x10, stream, _request} when stream > @many ->
        :ok = :gen_tcp.send(socket, answer(stream))
        answer_all(socket, left - 1)

      {kind, stream, _} when kind != 0x10 and stream <= @many ->
        answer_all(socket, left)
    end
  end
end
