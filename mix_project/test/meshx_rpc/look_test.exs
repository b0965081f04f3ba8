defmodule MeshxRpc.LookTest do
  # When callers look for their answers before they wait for them.
  use ExUnit.Case, async: true
  alias MeshxRpc.Client.Look

  # A call that is answered in time, or not: whether it looked.
  defp call(here, answered) do
    look = Look.start(here)

    cond do
      is_nil(look) -> false
      answered -> Look.found(look) == :ok
      true -> not until_over(look)
    end
  end

  defp until_over(look), do: Look.again?(look) and until_over(look)

  defp passed_over(here),
    do: fn -> call(here, false) end |> Stream.repeatedly() |> Enum.find_index(& &1)

  test "it ends by itself" do
    look = Look.start(Look.new())
    assert Look.again?(look)
    refute until_over(look)
  end

  test "after each look for nothing twice as many calls just wait" do
    here = Look.new()

    assert for(_ <- 1..13, do: passed_over(here)) ==
             [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 1023, 1023]
  end

  test "answers in time make up for looks for nothing" do
    here = Look.new()
    for _ <- 1..4, do: passed_over(here)
    assert Enum.count(1..15, fn _ -> call(here, true) end) == 0
    assert Enum.count(1..4, fn _ -> call(here, true) end) == 4
    # 2 to the power of 4 without them, of which one looks.
    assert passed_over(here) == 0
    assert passed_over(here) == 15
    # Fewer in a row do not.
    assert Enum.count(1..(31 + 3), fn _ -> call(here, true) end) == 3
    assert passed_over(here) == 0
    assert passed_over(here) == 63
  end

  test "of a call that just waited nothing is to be told" do
    assert Look.found(nil) == :ok
  end
end
