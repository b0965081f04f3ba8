defmodule MeshxRpc.ExamplesTest do
  # examples/rpc as its README says, with the meshx that is being tested.
  use ExUnit.Case, async: true

  @moduletag timeout: 180_000
  @examples Path.expand("../../../examples/rpc", __DIR__)

  setup do
    directory = Path.join(System.tmp_dir!(), "mxe#{System.unique_integer([:positive])}")
    File.mkdir!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, directory: directory, address: Path.join(directory, "s")}
  end

  defp arguments(expression) do
    paths = for app <- [:meshx], do: Path.join(to_string(:code.lib_dir(app)), "ebin")
    files = Enum.sort(Path.wildcard(Path.join(@examples, "lib/*.ex")))
    Enum.flat_map(paths, &["-pa", &1]) ++ Enum.flat_map(files, &["-r", &1]) ++ ["-e", expression]
  end

  # What `mix run -e` is there. Its input is ours, so it ends with us.
  defp start(expression) do
    port =
      Port.open({:spawn_executable, System.find_executable("elixir")}, [
        :binary,
        :exit_status,
        :stderr_to_stdout,
        {:line, 10_000},
        args: arguments(expression)
      ])

    {port, lines_until(port, "serving", [])}
  end

  defp lines_until(port, text, seen) do
    receive do
      {^port, {:data, {:eol, line}}} ->
        if line =~ text,
          do: Enum.reverse([line | seen]),
          else: lines_until(port, text, [line | seen])

      {^port, {:exit_status, status}} ->
        flunk("it ended with #{status}: #{Enum.join(Enum.reverse(seen), "\n")}")
    after
      120_000 -> flunk("no #{inspect(text)} in: #{Enum.join(Enum.reverse(seen), "\n")}")
    end
  end

  defp run(expression) do
    {output, status} = System.cmd("elixir", arguments(expression), stderr_to_stdout: true)
    assert status == 0, output
    output
  end

  test "a pair", %{address: address} do
    {port, _} = start(~s|Pair.serve("#{address}")|)
    assert run(~s|Pair.ask("#{address}")|) =~ "all answers are right"

    assert ["noted: number 1", "noted: number 2", "noted: number 3", "noted: done"] =
             lines_until(port, "done", [])

    Port.close(port)
  end

  test "a copy there and back, in constant memory", %{directory: directory, address: address} do
    files = Path.join(directory, "files")
    File.mkdir!(files)
    from = Path.join(directory, "from")
    size = 768 * 1_048_576
    # Each block another, so that one in the wrong place is seen.
    blocks = Stream.map(1..768, &:binary.copy(<<&1::32>>, 262_144))
    blocks |> Stream.into(File.stream!(from, [], 1_048_576)) |> Stream.run()
    {port, _} = start(~s|Copy.serve("#{address}", "#{files}")|)

    for {expression, copy} <- [
          {~s|Copy.put("#{address}", "#{from}", "there")|, Path.join(files, "there")},
          {~s|Copy.get("#{address}", "there", "#{from}.back")|, from <> ".back"}
        ] do
      output = run(expression)
      assert output =~ "#{size} bytes"
      assert hash(copy) == hash(from)
      [_, mib] = Regex.run(~r/client: at most (\d+) MiB/, output)

      # A VM with Elixir's compiler is about 100 MiB, and what its processes have done with waits for their next
      # collection: up to 230 MiB more were seen, of files of any size. Whoever held the file would add 768.
      assert String.to_integer(mib) < 576, output
    end

    refused = ~s|Copy.get("#{address}", "../from", "#{from}.refused")|
    output = catch_flunk(fn -> run(refused) end)
    assert output =~ "is not the name of a file"
    Port.close(port)
  end

  defp catch_flunk(fun) do
    fun.()
    flunk("it went well")
  rescue
    error in ExUnit.AssertionError -> error.message
  end

  defp hash(path),
    do:
      path
      |> File.stream!([], 1_048_576)
      |> Enum.reduce(:crypto.hash_init(:sha256), &:crypto.hash_update(&2, &1))
      |> :crypto.hash_final()
end
