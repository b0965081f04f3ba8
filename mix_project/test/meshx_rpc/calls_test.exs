defmodule MeshxRpc.CallsTest do
  use ExUnit.Case, async: true
  alias MeshxRpc.Client.{Calls, Direct}
  alias MeshxRpc.Shared

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
    assert_receive {:DOWN, _monitor, :process, ^caller, :normal}, 10_000
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
    assert_receive {:DOWN, _monitor, :process, ^busy, :normal}, 10_000
    assert Calls.all(calls) == [{busy, key}]
  end

  test "one that has written its call itself is watched however many others there are" do
    before = monitors()
    direct = Direct.new(Shared.new(0))
    calls = Calls.renew(calls(), 0, direct)
    {writer, key} = {caller(), make_ref()}
    calls = Calls.watch(calls, writer)
    :ets.insert(direct.calls, {7, key, writer})

    calls =
      for _ <- 1..3_000, reduce: calls do
        calls ->
          call = {caller(), make_ref()}
          calls = calls |> Calls.add(call, nil) |> Calls.forget(call)
          assert monitors() <= before + 1_024 + 2
          calls
      end

    assert :ets.member(direct.watched, writer)
    assert :ets.info(direct.watched, :size) == map_size(calls.callers)
    send(writer, :end)
    assert_receive {:DOWN, _monitor, :process, ^writer, :normal}, 10_000
    calls = Calls.adopt(calls)
    assert Calls.of(calls, writer) == [{writer, key}]
    assert Calls.on_stream(calls, 7) == {:ok, {writer, key}}
    assert :ets.info(direct.calls, :size) == 0
    refute calls |> Calls.gone(writer) |> Map.fetch!(:callers) |> Map.has_key?(writer)
    refute :ets.member(direct.watched, writer)
  end

  test "a caller enters its call, and none once there are no more to be" do
    direct = Direct.new(Shared.new(0))
    calls = Calls.renew(calls(), 0, direct)
    {me, key} = {self(), make_ref()}
    assert Direct.enter(direct, me, 1, key)
    assert_received {:watch, ^me}
    calls = Calls.watch(calls, me)
    assert Direct.enter(direct, me, 2, key)
    refute_received {:watch, ^me}
    assert {:ok, {^me, ^key}, calls} = Calls.take_direct(calls, 2)
    assert Calls.take_direct(calls, 2) == :error
    refute Calls.none?(calls)
    calls = Calls.close(calls)
    assert Calls.all(calls) == [{me, key}]
    refute Direct.enter(direct, me, 3, key)
    assert Calls.take_direct(calls, 3) == :error
    calls = calls |> Calls.forget({me, key}) |> Calls.retire()
    assert Calls.none?(calls)
    assert_raise ArgumentError, fn -> Direct.enter(direct, me, 4, key) end
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
