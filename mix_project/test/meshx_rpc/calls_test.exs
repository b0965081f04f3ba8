defmodule MeshxRpc.CallsTest do
  use ExUnit.Case, async: true
  alias MeshxRpc.Client.Calls

  defp calls, do: Calls.new(:counters.new(1, []), 1)
  defp monitors, do: self() |> Process.info(:monitors) |> elem(1) |> length()

  defp caller do
    spawn_link(fn -> receive(do: (:end -> :ok)) end)
  end

  test "a caller is watched once, and until it goes" do
    {before, caller} = {monitors(), caller()}

    calls =
      for stream <- 1..100, reduce: calls() do
        calls ->
          call = {caller, make_ref()}
          calls = Calls.add(calls, call, stream)
          assert Calls.on_stream(calls, stream) == {:ok, call}
          Calls.forget(calls, call)
      end

    assert monitors() == before + 1
    assert Calls.empty?(calls)
    open = for n <- 1..3, do: {{caller, make_ref()}, n}
    calls = for {call, n} <- open, reduce: calls, do: (calls -> Calls.add(calls, call, n))
    send(caller, :end)
    assert_receive {:DOWN, _monitor, :process, ^caller, :normal}
    assert Enum.sort(Calls.of(calls, caller)) == open |> Enum.map(&elem(&1, 0)) |> Enum.sort()
    calls = for {call, _n} <- open, reduce: calls, do: (calls -> Calls.forget(calls, call))
    assert Calls.gone(calls, caller).callers == %{}
  end

  test "callers that have no call are not watched when they are many" do
    before = monitors()
    {busy, key} = {caller(), make_ref()}
    calls = Calls.add(calls(), {busy, key}, 1)
    callers = for _ <- 1..3_000, do: caller()

    calls =
      for caller <- callers, reduce: calls do
        calls ->
          call = {caller, make_ref()}
          calls = calls |> Calls.add(call, nil) |> Calls.forget(call)
          assert monitors() <= before + 1_024 + 2
          calls
      end

    # The one with a call is.
    send(busy, :end)
    assert_receive {:DOWN, _monitor, :process, ^busy, :normal}
    assert Calls.all(calls) == [{busy, key}]
  end

  test "a call without a stream gets one, and is above any last stream until then" do
    [one, two] = calls = for _ <- 1..2, do: {self(), :erlang.alias()}
    state = for call <- calls, reduce: calls(), do: (state -> Calls.add(state, call, nil))
    assert Enum.sort(Calls.above(state, 0xFFFF_FFFF)) == Enum.sort(calls)
    state = Calls.opened(state, one, 7)
    assert Calls.stream(state, one) == {:ok, 7}
    assert Calls.stream(state, two) == {:ok, nil}
    assert Calls.above(state, 7) == [two]
    state = Calls.finish(state, one, {:failed, :closed})
    assert Calls.stream(state, one) == :error
    assert Calls.on_stream(state, 7) == :error
    assert Calls.last?(state)
    {_caller, key} = one
    assert_received {^key, :failed, :closed}
  end
end
