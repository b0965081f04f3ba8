defmodule Meshx.Program do
  @moduledoc false
  # The program meshx: where it is, and how it is built.

  @variable "MESHX_PROGRAM"

  @doc false
  # The file that `$MESHX_PROGRAM` names, the one in priv/bin, or the one on the search path.
  @spec find() :: {:ok, Path.t()} | {:error, String.t()}
  def find do
    with {:ok, nil} <- named() do
      cond do
        File.regular?(shipped()) ->
          {:ok, shipped()}

        found = System.find_executable("meshx") ->
          {:ok, found}

        true ->
          {:error,
           "the program meshx is neither at #{shipped()} (`mix meshx.run` builds it there) nor on the PATH; " <>
             "or set #{@variable} to it"}
      end
    end
  end

  @doc false
  # For a mix project: as `find/0`, but the one in priv/bin is made of the sources beside the dependency, when they are
  # there. Says so by raising a `Mix.Error` when there is none.
  @spec ensure!() :: Path.t()
  def ensure! do
    result =
      with {:ok, nil} <- named() do
        if sources?(), do: {:ok, install(build!(), shipped())}, else: find()
      end

    case result do
      {:ok, program} -> program
      {:error, reason} -> Mix.raise(reason)
    end
  end

  @doc false
  # What a release ships: the file that `$MESHX_PROGRAM` names, or one that is built.
  @spec for_release!() :: Path.t()
  def for_release! do
    case named() do
      {:ok, nil} -> build!()
      {:ok, program} -> program
      {:error, reason} -> Mix.raise(reason)
    end
  end

  defp named do
    path = System.get_env(@variable, "")

    cond do
      path == "" -> {:ok, nil}
      File.regular?(path) -> {:ok, Path.expand(path)}
      true -> {:error, "#{@variable} is #{path}, which is no file; wanted the program meshx"}
    end
  end

  @doc false
  # Where the carrier is that belongs to this code.
  @spec ebin() :: Path.t()
  def ebin, do: :meshx_dist |> :code.which() |> List.to_string() |> Path.dirname()

  defp shipped, do: Path.expand("../priv/bin/meshx", ebin())

  defp sources?, do: File.regular?(manifest())
  defp manifest, do: Path.join(root(), "cnode/Cargo.toml")

  # The repository beside the dependency, or beside the mix project of meshx itself.
  defp root do
    Mix.Project.deps_paths() |> Map.get(:meshx, File.cwd!()) |> Path.join("..") |> Path.expand()
  end

  defp build! do
    unless sources?() do
      Mix.raise(
        "the agent cannot be built: its sources are not in #{root()}/cnode; " <>
          "set #{@variable} to the program meshx"
      )
    end

    target =
      case System.get_env("CARGO_TARGET_DIR", "") do
        "" -> Path.join(Mix.Project.build_path(), "meshx_agent")
        directory -> Path.expand(directory)
      end

    built = Path.join(target, "release/meshx")
    args = ~w(build --release --locked --bin meshx --manifest-path) ++ [manifest()]

    # Cargo knows whether there is something to do, which takes minutes the first time.
    unless File.regular?(built),
      do: Mix.shell().info("Compiling the agent (cargo build --release), which takes some minutes")

    case cargo(args, target) do
      {_output, 0} ->
        built

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

  # By rename: a program that runs cannot be written to.
  defp install(built, target) do
    if newer?(built, target) do
      new = "#{target}.#{System.pid()}.new"
      File.mkdir_p!(Path.dirname(target))
      File.cp!(built, new)
      File.chmod!(new, 0o755)
      File.rename!(new, target)
    end

    target
  end

  defp newer?(built, target) do
    case File.stat(target) do
      {:ok, %{mtime: installed}} -> File.stat!(built).mtime > installed
      {:error, _posix} -> true
    end
  end
end
