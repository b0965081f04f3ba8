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
          Calls.forget(calls, call, stream)
      end

    assert monitors() == before + 1
    assert Calls.empty?(calls)
    open = for n <- 1..3, do: {{caller, make_ref()}, n}
    calls = for {call, n} <- open, reduce: calls, do: (calls -> Calls.add(calls, call, n))
    send(caller, :end)
    assert_receive {:DOWN, _monitor, :process, ^caller, :normal}, 10_000
    assert {found, calls} = Calls.of(calls, caller)
    assert Enum.sort(found) == Enum.sort(open)
    calls = for {call, n} <- open, reduce: calls, do: (calls -> Calls.forget(calls, call, n))
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
          calls = calls |> Calls.add(call, nil) |> Calls.forget(call, nil)
          assert monitors() <= before + 1_024 + 4
          calls
      end

    # The one with a call is.
    send(busy, :end)
    assert_receive {:DOWN, _monitor, :process, ^busy, :normal}, 10_000
    assert Calls.all(calls) == [{{busy, key}, 1}]
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
          calls = calls |> Calls.add(call, nil) |> Calls.forget(call, nil)
          assert monitors() <= before + 1_024 + 2
          calls
      end

    assert :ets.member(direct.watched, writer)
    assert :ets.info(direct.watched, :size) == map_size(calls.callers)
    send(writer, :end)
    assert_receive {:DOWN, _monitor, :process, ^writer, :normal}, 10_000
    calls = Calls.adopt(calls)
    assert {[{{^writer, ^key}, 7}], calls} = Calls.of(calls, writer)
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
    assert Calls.all(calls) == [{{me, key}, 1}]
    refute Direct.enter(direct, me, 3, key)
    assert Calls.take_direct(calls, 3) == :error
    calls = calls |> Calls.forget({me, key}, 1) |> Calls.retire()
    assert Calls.none?(calls)
    assert_raise ArgumentError, fn -> Direct.enter(direct, me, 4, key) end
  end

  test "a call without a stream gets one, and is above any last stream until then" do
    [one, two] = calls = for _ <- 1..2, do: {self(), :erlang.alias()}
    state = for call <- calls, reduce: calls(), do: (state -> Calls.add(state, call, nil))

    assert Enum.sort(Calls.above(state, 0xFFFF_FFFF)) ==
             Enum.sort(for call <- calls, do: {call, nil})

    state = Calls.opened(state, one, 7)
    assert {{:ok, 7}, state} = Calls.stream(state, one)
    assert {{:ok, nil}, state} = Calls.stream(state, two)
    assert Calls.above(state, 7) == [{two, nil}]
    state = Calls.finish(state, one, 7, {:failed, :closed})
    assert {:error, state} = Calls.stream(state, one)
    assert Calls.on_stream(state, 7) == :error
    assert Calls.last?(state)
    {_caller, key} = one
    assert_received {^key, :failed, :closed}
  end

  test "whatever happens in whatever order, calls are found by stream, by call and by caller" do
    callers = for _ <- 1..20, do: caller()

    for _round <- 1..20 do
      load = :counters.new(1, [])
      calls = Calls.renew(Calls.new(load, 1), 0, Direct.new(Shared.new(0)))

      # model: call => stream, or nil.
      Enum.reduce(1..600, {calls, %{}, 0}, fn _step, {calls, model, last} ->
        {calls, model, last} = step(Enum.random(1..10), calls, model, last, callers)
        assert Calls.count(calls) == map_size(model)
        assert :counters.get(load, 1) == map_size(model)
        {calls, model, last}
      end)
      |> check(callers)
    end
  end

  defp check({calls, model, last}, callers) do
    assert calls |> Calls.all() |> Map.new() == model
    half = div(last, 2)
    above = for {call, stream} <- model, stream == nil or stream > half, do: {call, stream}
    assert calls |> Calls.above(half) |> Enum.sort() == Enum.sort(above)

    for {call, stream} <- model do
      assert {{:ok, ^stream}, _calls} = Calls.stream(calls, call)
      if stream, do: assert(Calls.on_stream(calls, stream) == {:ok, call})
    end

    for caller <- callers do
      {of, _calls} = Calls.of(calls, caller)
      assert Enum.sort(of) == for({{^caller, _}, _} = one <- model, do: one) |> Enum.sort()
    end
  end

  # Together, and last first.
  defp step(n, calls, model, last, callers) when n <= 3 do
    added = for _ <- 1..Enum.random(2..30), do: {Enum.random(callers), :erlang.alias()}
    last = last + length(added)
    {Calls.add_all(calls, added, last), Map.merge(model, last_first(added, last)), last}
  end

  defp step(4, calls, model, last, callers) do
    call = {Enum.random(callers), :erlang.alias()}
    {Calls.add(calls, call, nil), Map.put(model, call, nil), last}
  end

  defp step(5, calls, model, last, _callers) do
    case for({call, nil} <- model, do: call) do
      [] -> {calls, model, last}
      [call | _] -> {Calls.opened(calls, call, last + 1), Map.put(model, call, last + 1), last + 1}
    end
  end

  # As many as there are, until one that is not ours; in parts, when they are many.
  defp step(n, calls, model, last, _callers) when n <= 8 do
    taken = for({call, stream} <- model, stream, do: {call, stream}) |> Enum.take_random(40)
    events = for {_call, stream} <- taken, do: {:response, stream, :result, 0, "r"}
    rest = [{:response, last + 1, :result, 0, "x"}, {:pong, "12345678"}]
    {calls, model} = answer(calls, model, taken, events ++ rest, Enum.random([0, 7, 8, 100]))
    assert Calls.answer(calls, rest) == :none
    {calls, model, last}
  end

  # Given up, or unknown.
  defp step(9, calls, model, last, callers) do
    assert {:error, calls} = Calls.stream(calls, {hd(callers), make_ref()})

    case Enum.take_random(model, 1) do
      [] ->
        {calls, model, last}

      [{call, stream}] ->
        assert {{:ok, ^stream}, calls} = Calls.stream(calls, call)
        calls = Calls.forget(calls, call, stream)
        assert {:error, calls} = Calls.stream(calls, call)
        {calls, Map.delete(model, call), last}
    end
  end

  defp step(10, calls, model, last, callers) do
    caller = Enum.random(callers)
    {of, calls} = Calls.of(calls, caller)
    assert Enum.sort(of) == for({{^caller, _}, _} = one <- model, do: one) |> Enum.sort()
    {calls, model, last}
  end

  defp answer(calls, model, taken, events, waiting) do
    case Calls.answer(calls, events, waiting) do
      :none ->
        assert taken == []
        {calls, model}

      {calls, left} ->
        {now, later} = Enum.split(taken, length(events) - length(left))
        assert now != []

        if waiting < 8 and 2 * length(events) > map_size(model),
          do: assert(length(now) <= max(4, div(length(events) + 1, 2))),
          else: assert(later == [])

        for {{_caller, key}, _stream} <- now, do: assert_received({^key, :result, 0, "r"})
        for {{_caller, key}, _stream} <- later, do: refute_received({^key, :result, 0, "r"})
        model = Map.drop(model, for({call, _stream} <- now, do: call))
        assert Calls.count(calls) == map_size(model)
        answer(calls, model, later, left, waiting)
    end
  end

  defp last_first(calls, last),
    do: for({call, n} <- Enum.with_index(calls), into: %{}, do: {call, last - n})

  test "the last answer of a read makes the connection idle before its caller has it" do
    shared = Shared.new(0)
    calls = Calls.renew(calls(), 0, Direct.new(shared))
    Shared.busy(shared)
    [one, two] = for _ <- 1..2, do: {self(), :erlang.alias()}
    calls = Calls.add_all(calls, [two, one], 2)
    {calls, []} = Calls.answer(calls, [{:response, 1, :result, 0, ""}], 0)
    assert Shared.busy?(shared)
    {calls, []} = Calls.answer(calls, [{:response, 2, :error, 0, ""}])
    refute Shared.busy?(shared)
    assert Calls.none?(calls)
    # We ask for none of these, and what to do is not for a loop.
    assert Calls.answer(calls, [{:response, 3, :started, 0, ""}]) == :none
  end
end
