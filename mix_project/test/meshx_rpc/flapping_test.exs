defmodule MeshxRpc.FlappingTest do
  # A minute of connections that are cut every 20 to 150 ms, and crowds, each in a VM of its own.
  use MeshxRpc.Case, async: true
  alias MeshxRpc.{FaultScenario, TestVm}

  @moduletag timeout: 300_000

  defp vm(options \\ []), do: start_supervised!({TestVm, options})

  test "a minute of flapping: no wrong answer, no lost cast, nothing left behind" do
    milliseconds = String.to_integer(System.get_env("MESHX_FLAP_MS", "60000"))
    report = TestVm.call(vm(), FaultScenario, :flap, [milliseconds], milliseconds + 200_000)
    assert report.wrong == []

    # All kinds of work got through, and the cuts were felt.
    for kind <- [:calls, :bulk, :keyed, :casts, :down, :up, :broken],
        do: assert(Map.get(report.counts, {kind, :done}, 0) > 0, inspect(report.counts))

    assert report.counts |> Enum.filter(&match?({{_, :failed}, _}, &1)) |> length() > 0
    %{before: before, after: later} = report
    assert later.processes <= before.processes, inspect(report)
    assert later.ports <= before.ports, inspect(report)
    assert later.tables <= before.tables, inspect(report)

    # Modules that the emulator loads when it first has use for them bring some; each kind of work some hundreds.
    assert later.atoms - before.atoms < 200, inspect(report)
    # Some 100,000 calls: a leak of 40 bytes for each would be more.
    assert later.bytes - before.bytes < 4 * 1_048_576, inspect(report)
  end

  test "10,000 callers at once: each gets its own answer, or is told that the server is full" do
    vm = vm(args: ["+P", "100000"])

    assert TestVm.call(vm, FaultScenario, :crowd, [10_000, [max_concurrency: 20_000]]) == %{
             right: 10_000
           }

    answers = TestVm.call(vm, FaultScenario, :crowd, [10_000, [max_concurrency: 50]])

    assert answers |> Map.keys() |> Enum.all?(&(&1 in [:right, {:error_rpc, :full}])),
           inspect(answers)

    assert Enum.sum(Map.values(answers)) == 10_000
    assert answers.right > 0
  end
end
