defmodule Mix.Tasks.Meshx.RunTest do
  # Sets the environment.
  use ExUnit.Case

  alias Mix.Tasks.Meshx.Run

  setup do
    dir = Path.join(System.tmp_dir!(), "meshx_run_#{System.unique_integer([:positive])}")
    File.mkdir_p!(dir)
    program = Path.join(dir, "meshx")
    present = System.get_env("MESHX_PROGRAM")
    System.put_env("MESHX_PROGRAM", program)

    on_exit(fn ->
      File.rm_rf!(dir)

      if present,
        do: System.put_env("MESHX_PROGRAM", present),
        else: System.delete_env("MESHX_PROGRAM")
    end)

    {:ok, dir: dir, program: program}
  end

  # A program that leaves word of its arguments and environment, and ends with this status.
  defp program(%{dir: dir, program: program}, status) do
    File.write!(program, """
    #!/bin/sh
    printf '%s\\n' "$@" "$MIX_ENV" > '#{dir}/said'
    exit #{status}
    """)

    File.chmod!(program, 0o755)
  end

  defp said(%{dir: dir}),
    do: dir |> Path.join("said") |> File.read!() |> String.split("\n", trim: true)

  test "runs mix run --no-halt unless told otherwise, with the modules of this build", context do
    program(context, 0)
    assert :ok == Run.run(["shop@h1", "--hidden"])
    me = System.pid()
    assert ["run", "--end-with", ^me, "--ebin", ebin | rest] = said(context)
    assert rest == ["shop@h1", "--hidden", "--", "mix", "run", "--no-halt", "test"]
    assert File.regular?(Path.join(ebin, "meshx_dist.beam"))

    Run.run(["shop@h1", "--ebin=/x", "--", "sh", "-c", "a  b"])

    assert said(context) |> Enum.drop(3) == [
             "shop@h1",
             "--ebin=/x",
             "--",
             "sh",
             "-c",
             "a  b",
             "test"
           ]
  end

  test "ends as the command does", context do
    program(context, 7)
    assert catch_exit(Run.run(["shop@h1"])) == {:shutdown, 7}
    program(context, 0)
    File.write!(context.program, "#!/bin/sh\nkill -9 $$\n")
    assert catch_exit(Run.run(["shop@h1"])) == {:shutdown, 137}
  end

  test "says what to run when the terminal is wanted, and starts nothing", context do
    program(context, 0)

    for command <- [["iex", "-S", "mix"], ["/usr/bin/iex"], ["erl", "-hidden"]] do
      error =
        assert_raise Mix.Error, fn -> Run.run(["shop@h1", "--cookie", "it's", "--"] ++ command) end

      line = "#{context.program} run shop@h1 --cookie 'it'\\''s' -- #{Enum.join(command, " ")}"
      assert error.message =~ "wants the terminal" and error.message =~ line
    end

    refute File.exists?(Path.join(context.dir, "said"))
    assert :ok == Run.run(["shop@h1", "--", "erl", "-noinput"])
  end

  test "wants a name and a program that is there", context do
    assert_raise Mix.Error, ~r/no node name/, fn -> Run.run(["--", "mix", "run"]) end
    error = assert_raise Mix.Error, fn -> Run.run(["shop@h1"]) end
    assert error.message =~ "MESHX_PROGRAM is #{context.program}, which is no file"
  end
end
