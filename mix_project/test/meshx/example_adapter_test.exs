# examples/adapter as its README says, with the meshx that is being tested.
example = Path.expand("../../../examples/adapter", __DIR__)
Code.require_file(Path.join(example, "lib/socket_dir.ex"))
Code.require_file(Path.join(example, "test/contract_test.exs"))

defmodule Meshx.ExampleAdapterTest do
  use ExUnit.Case, async: true

  @moduletag timeout: 180_000
  @example example

  setup do
    directory = Path.join(System.tmp_dir!(), "mxs#{System.unique_integer([:positive])}")
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, directory: directory}
  end

  test "it is under 200 lines" do
    assert @example |> Path.join("lib/socket_dir.ex") |> File.stream!() |> Enum.count() < 200
  end

  for kind <- [:uds, :tcp] do
    test "two VMs meet over it: RPC and distribution, #{kind}", %{directory: directory} do
      arguments = "#{inspect(directory)}, #{inspect(unquote(kind))}"
      port = start("Meet.serve(#{arguments})")
      await(port, "serving", [])

      {output, status} =
        System.cmd("elixir", arguments("Meet.ask(#{arguments})"), stderr_to_stdout: true)

      assert status == 0, output

      for line <- [
            "hello RPC, this is :greeter@here",
            "hello node, this is :greeter@here",
            "nobody is no_such_service",
            "all answers are right"
          ],
          do: assert(output =~ line)

      Port.close(port)
    end
  end

  test "a VM that boots with a name says why it can't" do
    # The carrier has to be there that early.
    flags = "-proto_dist Elixir.MeshxNode -no_epmd -pa " <> ebin()
    arguments = ["--erl", flags, "--name", "a@here", "-e", "IO.puts(:booted)"]
    {output, status} = System.cmd("elixir", arguments, stderr_to_stdout: true)
    assert status != 0
    assert output =~ "a mesh adapter does not run while the VM boots"
    refute output =~ "booted"
  end

  test "another carrier is refused" do
    expression = "IO.inspect(MeshxNode.start(:a@here, :cookie))"
    {output, 0} = System.cmd("elixir", ["-pa", ebin(), "-e", expression], stderr_to_stdout: true)
    assert output =~ "the VM has another carrier"
  end

  defp ebin, do: Path.join(to_string(:code.lib_dir(:meshx)), "ebin")

  # What `mix run` does there, without compiling meshx again.
  defp arguments(expression) do
    files = @example |> Path.join("lib/*.ex") |> Path.wildcard() |> Enum.sort(:desc)

    ["--erl", "-proto_dist Elixir.MeshxNode -no_epmd", "-pa", ebin()] ++
      Enum.flat_map(files, &["-r", &1]) ++
      ["-e", "{:ok, _} = Application.ensure_all_started(:meshx); " <> expression]
  end

  # Its input is ours, so it ends with us.
  defp start(expression) do
    Port.open({:spawn_executable, System.find_executable("elixir")}, [
      :binary,
      :exit_status,
      :stderr_to_stdout,
      {:line, 10_000},
      args: arguments(expression)
    ])
  end

  defp await(port, text, seen) do
    receive do
      {^port, {:data, {:eol, line}}} ->
        unless line =~ text, do: await(port, text, [line | seen])

      {^port, {:exit_status, status}} ->
        flunk("it ended with #{status}: #{seen |> Enum.reverse() |> Enum.join("\n")}")
    after
      120_000 -> flunk("no #{inspect(text)} in: #{seen |> Enum.reverse() |> Enum.join("\n")}")
    end
  end
end
