defmodule Mix.Tasks.Meshx.Gen.ReleaseTest do
  # Changes the current directory.
  use ExUnit.Case

  alias Mix.Tasks.Meshx.Gen.Release

  @files ["rel/vm.args.eex", "rel/remote.vm.args.eex"]

  setup do
    Mix.shell(Mix.Shell.Process)
    dir = Path.join(System.tmp_dir!(), "meshx_gen_release_#{System.unique_integer([:positive])}")
    File.mkdir_p!(Path.join(dir, "rel"))

    on_exit(fn ->
      Mix.shell(Mix.Shell.IO)
      File.rm_rf!(dir)
    end)

    {:ok, dir: dir}
  end

  defp run(%{dir: dir}, args \\ []), do: File.cd!(dir, fn -> Release.run(args) end)
  defp read(%{dir: dir}, file), do: File.read!(Path.join(dir, file))
  defp write(%{dir: dir}, file, text), do: File.write!(Path.join(dir, file), text)

  test "writes both files, and again changes nothing", context do
    run(context)
    written = Enum.map(@files, &read(context, &1))
    for text <- written, do: assert(text =~ "\n-proto_dist meshx\n-no_epmd\n")
    assert [vm, remote] = written
    assert remote =~ "\n-meshx_session\n"
    refute vm =~ "-meshx_session"
    run(context)
    assert Enum.map(@files, &read(context, &1)) == written
  end

  test "keeps comments and blank lines, as mix release.init writes them", context do
    comments = "## Customize flags\n\n##+Q 65536\n"
    write(context, "rel/vm.args.eex", comments)
    run(context)
    assert String.starts_with?(read(context, "rel/vm.args.eex"), comments <> "\n## ")
    assert read(context, "rel/vm.args.eex") =~ "\n-proto_dist meshx\n"
  end

  test "leaves a file that has the flags among others", context do
    own = "+S 2\n-proto_dist meshx\n  -no_epmd\n"
    write(context, "rel/vm.args.eex", own)
    run(context)
    assert read(context, "rel/vm.args.eex") == own
  end

  test "refuses a file with other flags and writes nothing, unless forced", context do
    write(context, "rel/remote.vm.args.eex", "-proto_dist inet_tls\n")
    error = assert_raise Mix.Error, fn -> run(context) end
    assert error.message =~ "rel/remote.vm.args.eex has flags of its own"
    assert error.message =~ "-meshx_session" and error.message =~ "--force"
    refute File.exists?(Path.join(context.dir, "rel/vm.args.eex"))
    assert read(context, "rel/remote.vm.args.eex") == "-proto_dist inet_tls\n"
    run(context, ["--force"])
    refute read(context, "rel/remote.vm.args.eex") =~ "inet_tls"
    assert read(context, "rel/remote.vm.args.eex") =~ "-proto_dist meshx"
  end

  test "takes no other arguments", context do
    for args <- [["--nonsense"], ["file"]],
        do: assert_raise(Mix.Error, ~r/takes no argument/, fn -> run(context, args) end)
  end
end
