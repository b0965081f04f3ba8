defmodule Meshx.NativeTest do
  # The compiler that builds the NIF, in a project of its own with a cargo that only copies.
  use ExUnit.Case, async: false

  alias Mix.Tasks.Compile.MeshxNif

  @moduletag :tmp_dir

  @project """
  defmodule Meshx.NativeTest.Project do
    use Mix.Project
    def project, do: [app: :meshx_native_test, version: "1.0.0"]
  end
  """

  setup %{tmp_dir: directory} do
    for crate <- ~w(etf frame nif) do
      File.mkdir_p!(Path.join(directory, "native_src/native/#{crate}/src"))
      File.write!(Path.join(directory, "native_src/native/#{crate}/Cargo.toml"), "[package]")
      File.write!(Path.join(directory, "native_src/native/#{crate}/src/lib.rs"), "// one")
    end

    File.write!(Path.join(directory, "mix.exs"), @project)
    library = if match?({:unix, :darwin}, :os.type()), do: "dylib", else: "so"

    File.write!(Path.join(directory, "cargo"), """
    #!/bin/sh
    mkdir -p "$CARGO_TARGET_DIR/release"
    cat native_src/native/nif/src/lib.rs > "$CARGO_TARGET_DIR/release/libmeshx_nif.#{library}"
    """)

    File.chmod!(Path.join(directory, "cargo"), 0o755)

    saved = Map.new(~w(PATH MESHX_NIF CARGO_TARGET_DIR), &{&1, System.get_env(&1)})
    shell = Mix.shell()
    Mix.shell(Mix.Shell.Process)
    System.put_env("PATH", directory <> ":" <> System.get_env("PATH"))
    System.delete_env("CARGO_TARGET_DIR")

    on_exit(fn ->
      Mix.shell(shell)

      for {name, value} <- saved,
          do: if(value, do: System.put_env(name, value), else: System.delete_env(name))
    end)

    {:ok, source: Path.join(directory, "native_src/native/nif/src/lib.rs")}
  end

  defp run(directory, setting) do
    System.put_env("MESHX_NIF", setting)

    Mix.Project.in_project(:meshx_native_test, directory, fn _module ->
      result = MeshxNif.run([])
      {result, File.read(Path.join(Mix.Project.app_path(), "priv/native/meshx_nif.so"))}
    end)
  end

  test "skip leaves a library of these sources, and none of others", %{
    tmp_dir: directory,
    source: source
  } do
    assert {{:noop, []}, {:error, :enoent}} = run(directory, "skip")
    assert {{:ok, []}, {:ok, "// one"}} = run(directory, "require")
    assert {{:noop, []}, {:ok, "// one"}} = run(directory, "require")
    assert {{:noop, []}, {:ok, "// one"}} = run(directory, "skip")

    File.write!(source, "// two")
    assert {{:noop, []}, {:error, :enoent}} = run(directory, "skip")
    assert_received {:mix_shell, :info, ["Removing a NIF of other sources" <> _]}
    assert {{:ok, []}, {:ok, "// two"}} = run(directory, "require")

    # One that nobody knows the sources of.
    System.put_env("MESHX_NIF", "skip")
    File.rm_rf!(Path.join(directory, "native_src"))
    assert {{:noop, []}, {:error, :enoent}} = run(directory, "skip")
  end

  test "a build that fails leaves no older library", %{tmp_dir: directory, source: source} do
    assert {{:ok, []}, {:ok, "// one"}} = run(directory, "require")
    File.write!(source, "// two")
    File.write!(Path.join(directory, "cargo"), "#!/bin/sh\nexit 3\n")
    assert {{:noop, []}, {:error, :enoent}} = run(directory, "")
    assert_received {:mix_shell, :error, ["warning: the NIF could not be built" <> _]}
    assert_raise Mix.Error, ~r/status 3/, fn -> run(directory, "require") end
    assert_raise Mix.Error, ~r/"require" or "skip" wanted/, fn -> run(directory, "perhaps") end
  end
end
