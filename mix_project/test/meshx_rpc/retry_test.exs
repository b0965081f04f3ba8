defmodule MeshxRpc.RetryTest do
  # What is made again, and what is not.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{Frame, TestPeer}

  @moduletag capture_log: true

  # A server that reads requests and then does as the test says; counts how often it was asked.
  defp peer(options, answer) do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    test = self()

    spawn_link(fn ->
      Stream.repeatedly(fn -> TestPeer.accept(listen) end)
      |> Enum.each(fn socket ->
        request = TestPeer.frame(socket)
        send(test, :asked)
        answer.(socket, request)
      end)
    end)

    client_down({:tcp, {127, 0, 0, 1}, port}, [retry_idle_error: 1] ++ options)
  end

  defp asked do
    receive do
      :asked -> 1 + asked()
    after
      0 -> 0
    end
  end

  test "a request that was written and got no answer is not made again by default" do
    client = peer([], fn socket, _request -> :gen_tcp.close(socket) end)
    assert Client.Pool.call(client, :echo, 1, 20_000, 1_000, 1) == {:error_rpc, :tcp_closed}
    assert asked() == 1
    assert Client.may_have_run?(:tcp_closed)
  end

  test "with retry_unsafe it is, as often as was said" do
    client = peer([retry_unsafe: true], fn socket, _request -> :gen_tcp.close(socket) end)
    await(fn -> Client.Pool.info(client).connected == 1 end)
    assert {:error_rpc, _reason} = Client.Pool.call(client, :echo, 1, 20_000, 3, 200)
    assert asked() in 2..4
  end

  test "what a server says it will not run is made again" do
    count = :counters.new(1, [])

    client =
      peer([], fn socket, {0x10, stream, _payload} ->
        :counters.add(count, 1, 1)

        if :counters.get(count, 1) < 3 do
          :gen_tcp.send(socket, Frame.goaway(stream - 1, :shutdown, ""))
          :gen_tcp.close(socket)
        else
          head = Frame.response_head(:result, 0, 4)
          :gen_tcp.send(socket, Frame.block(:response, true, 0, stream, [head, "done"], 14, nil))
        end
      end)

    assert Client.Pool.call(client, :echo, 1, 20_000, 1_000, 1) == "done"
    assert asked() == 3
  end

  test "a function that exits with the name of a lost connection is not made again" do
    {_server, address} = server()
    client = client(address)

    for reason <- [:closed, :tcp_closed, :full] do
      assert Client.Pool.call(client, :exit_it, reason) == {:error_rpc, {:exit, reason}}
      assert Client.may_have_run?({:exit, reason})
    end
  end

  test "only two reasons say that nothing has run" do
    for reason <- [:closed, :full], do: refute(Client.may_have_run?(reason))

    for reason <- [
          :unread,
          :timeout,
          :killed,
          :invalid_cks,
          :error_too_long,
          %RuntimeError{},
          {:undef, []}
        ] do
      assert Client.may_have_run?(reason)
    end
  end
end
