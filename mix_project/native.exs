defmodule Mix.Tasks.Compile.MeshxNif do
  @moduledoc """
  Builds the NIF with cargo and puts it into the build's `priv/native`.

  Needs no package of hex. mix.exs requires this file, since the library must be there before Elixir's compiler loads
  the module that loads it; it therefore lies outside of `lib`.

  | `MESHX_NIF` | |
  |---|---|
  | unset | without cargo, or when the build fails: a warning, and RPC uses its Elixir codec |
  | `require` | a missing library is an error |
  | `skip` | nothing is built; a library of other sources than these is removed |

  cargo's own directory lies below `$CARGO_TARGET_DIR` when that is set, else below the build path, since a
  dependency's sources may be read-only.
  """
  use Mix.Task.Compiler

  # The repository beside the mix project, or the copy of it that a package carries.
  @roots ["..", "native_src"]
  @sources ~w(Cargo.toml Cargo.lock native/{etf,frame,nif}/Cargo.toml native/nif/build.rs native/{etf,frame,nif}/src/**/*.rs)
  @library if match?({:unix, :darwin}, :os.type()),
             do: "libmeshx_nif.dylib",
             else: "libmeshx_nif.so"

  @impl true
  def run(_args) do
    case System.get_env("MESHX_NIF", "") do
      "skip" -> skip()
      "require" -> build(:error)
      "" -> build(:warning)
      other -> Mix.raise("MESHX_NIF is #{inspect(other)}, \"require\" or \"skip\" wanted")
    end
  end

  @impl true
  def manifests, do: [stamp_file()]

  @impl true
  def clean do
    File.rm(stamp_file())
    File.rm(installed())
  end

  # What an earlier run built stays in use when it is of these sources. Another may speak another protocol than the
  # code beside it.
  defp skip do
    with {:ok, root} <- find_root(), :fresh <- state(stamp(root)) do
      {:noop, []}
    else
      _stale ->
        if File.regular?(installed()),
          do: Mix.shell().info("Removing a NIF of other sources (MESHX_NIF=skip)")

        clean()
        {:noop, []}
    end
  end

  defp build(severity) do
    with {:ok, root} <- find_root(),
         stamp = stamp(root),
         :stale <- state(stamp),
         {:ok, cargo} <- find_cargo(),
         :ok <- cargo(cargo, root),
         :ok <- install(root) do
      File.mkdir_p!(Path.dirname(stamp_file()))
      File.write!(stamp_file(), stamp)
      {:ok, []}
    else
      :fresh -> {:noop, []}
      {:error, reason} -> failed(severity, reason)
    end
  end

  defp find_root do
    case Enum.find(@roots, &File.regular?(Path.join(&1, "native/nif/Cargo.toml"))) do
      nil -> {:error, "its sources are neither in ../native nor in native_src/native"}
      root -> {:ok, Path.expand(root)}
    end
  end

  defp find_cargo do
    case System.find_executable("cargo") do
      nil -> {:error, "there is no cargo on the PATH (https://rustup.rs installs it)"}
      cargo -> {:ok, cargo}
    end
  end

  defp state(stamp) do
    if File.regular?(installed()) and File.read(stamp_file()) == {:ok, stamp},
      do: :fresh,
      else: :stale
  end

  # Contents, not times: a checkout or a cache changes times.
  defp stamp(root) do
    files = @sources |> Enum.flat_map(&Path.wildcard(Path.join(root, &1))) |> Enum.sort()

    digest =
      :crypto.hash(:sha256, Enum.map(files, &[Path.relative_to(&1, root), 0, File.read!(&1)]))

    Base.encode16(digest)
  end

  defp cargo(cargo, root) do
    # The manifest makes meshx_nif the primary package: only then is `nif_init` exported.
    common = ["--release", "--locked", "--manifest-path", Path.join(root, "native/nif/Cargo.toml")]
    Mix.shell().info("Compiling the NIF (cargo build --release)")
    run_cargo(cargo, ["build" | common], root)
  end

  defp run_cargo(cargo, args, root) do
    env = [{"CARGO_TARGET_DIR", target_dir(root)}]

    case System.cmd(cargo, args, env: env, stderr_to_stdout: true) do
      {_output, 0} -> :ok
      {output, status} -> {:error, "cargo #{hd(args)} ended with status #{status}:\n#{output}"}
    end
  end

  # By rename: a library that a VM has mapped must never be written to.
  defp install(root) do
    built = Path.join([target_dir(root), "release", @library])
    new = installed() <> ".#{System.pid()}.new"

    with :ok <- File.mkdir_p(Path.dirname(new)),
         {:ok, _bytes} <- File.copy(built, new),
         :ok <- File.rename(new, installed()) do
      :ok
    else
      {:error, posix} ->
        {:error, "#{built} cannot be copied to #{installed()}: #{:file.format_error(posix)}"}
    end
  end

  defp failed(:error, reason),
    do: Mix.raise("the NIF could not be built (MESHX_NIF=require): " <> reason)

  defp failed(:warning, reason) do
    # Not an older one either: it may speak an older protocol than the code beside it.
    clean()

    Mix.shell().error(
      "warning: the NIF could not be built, RPC will use its slower Elixir codec: #{reason}\n" <>
        "         MESHX_NIF=skip silences this, MESHX_NIF=require makes it an error"
    )

    {:noop, []}
  end

  # `.so` on every Unix: that is what erlang:load_nif/2 looks for.
  defp installed, do: Path.join([Mix.Project.app_path(), "priv", "native", "meshx_nif.so"])
  defp stamp_file, do: Path.join(Mix.Project.manifest_path(), "compile.meshx_nif")

  # Absolute: cargo takes a relative directory from where it runs. One for each checkout: cargo tells crates of two
  # checkouts apart by the times of their files alone, and might take the other's library for ours.
  defp target_dir(root) do
    case System.get_env("CARGO_TARGET_DIR", "") do
      "" -> Path.join(Mix.Project.build_path(), "meshx_nif")
      directory -> Path.expand("meshx_nif-#{:erlang.phash2(root, 0x1000_0000)}", directory)
    end
  end
end
