defmodule Meshx.Release do
  @moduledoc """
  Meshx in a release (`mix release`).

      mix meshx.gen.release

  writes the emulator flags, and a step in `mix.exs` brings the agent's program along:

      releases: [shop: [steps: [:assemble, &Meshx.Release.add_agent/1]]]

  The NIF is in the release by itself. Everything that goes over distribution (`remote`, `rpc`, `stop`, `restart`,
  `pid`) then goes over the agent of the host. That agent is no part of the node's life: it is started before, by
  the system (`examples/systemd`) or by hand with the program in the release,

      _build/prod/rel/shop/lib/meshx-VERSION/priv/bin/meshx agent --mesh consul

  and a node that finds none does not boot and says so.
  """

  @variable "MESHX_PROGRAM"

  @doc """
  A step of a release, after `:assemble`: puts the program `meshx` into the release's `lib/meshx-VERSION/priv/bin`.

  It is the file that `$MESHX_PROGRAM` names, or else built from the sources beside the dependency with cargo.
  """
  # The struct is Mix's, which is not there when this runs in a release.
  @spec add_agent(struct()) :: struct()
  def add_agent(%{path: path, applications: %{meshx: meshx}} = release) do
    target = Path.join([path, "lib", "meshx-#{meshx[:vsn]}", "priv", "bin", "meshx"])
    File.mkdir_p!(Path.dirname(target))
    File.cp!(program(System.get_env(@variable, "")), target)
    File.chmod!(target, 0o755)
    release
  end

  defp program(""), do: build()

  defp program(path) do
    if File.regular?(path),
      do: path,
      else: Mix.raise("#{@variable} is #{path}, which is no file; wanted the program meshx")
  end

  defp build do
    root = Mix.Project.deps_paths() |> Map.fetch!(:meshx) |> Path.join("..") |> Path.expand()

    unless File.regular?(Path.join(root, "cnode/Cargo.toml")) do
      Mix.raise(
        "the agent cannot be built: its sources are not in #{root}/cnode; " <>
          "set #{@variable} to the program meshx"
      )
    end

    target =
      case System.get_env("CARGO_TARGET_DIR", "") do
        "" -> Path.join(Mix.Project.build_path(), "meshx_agent")
        directory -> Path.expand(directory)
      end

    manifest = Path.join(root, "cnode/Cargo.toml")
    args = ~w(build --release --locked --bin meshx --manifest-path) ++ [manifest]
    Mix.shell().info("Compiling the agent (cargo build --release)")

    case cargo(args, target) do
      {_output, 0} ->
        Path.join(target, "release/meshx")

      {output, status} ->
        Mix.raise("the agent cannot be built: cargo ended with status #{status}:\n#{output}")
    end
  end

  defp cargo(args, target) do
    cargo =
      System.find_executable("cargo") ||
        Mix.raise("the agent cannot be built: there is no cargo on the PATH; or set #{@variable}")

    System.cmd(cargo, args, env: [{"CARGO_TARGET_DIR", target}], stderr_to_stdout: true)
  end
end
