defmodule Mix.Tasks.Meshx.Gen.Release do
  @shortdoc "Writes the emulator flags of a release whose nodes are in the mesh"

  @moduledoc """
  Writes `rel/vm.args.eex` and `rel/remote.vm.args.eex`, so that `mix release` makes a release whose node is in the
  mesh, and whose `remote`, `rpc`, `stop`, `restart` and `pid` reach it there.

      mix meshx.gen.release

  A file that has the flags already stays as it is; one that has only comments, as `mix release.init` writes it, gets
  them at its end. A file with flags of its own is refused, and nothing is written: add the lines by hand, or let
  `--force` replace it.

  The agent's program comes into the release by a step in `mix.exs`, see `Meshx.Release`.
  """
  use Mix.Task

  @carrier """
  ## The meshx agent of this host carries distribution (mix meshx.gen.release); no EPMD runs.
  -proto_dist meshx
  -no_epmd
  """

  @files [
    {"rel/vm.args.eex", @carrier},
    {"rel/remote.vm.args.eex",
     @carrier <>
       """
       ## Consoles and commands dial the node of the release and are no nodes of the mesh themselves.
       -meshx_session
       """}
  ]

  @impl true
  def run(args) do
    force? =
      case OptionParser.parse(args, strict: [force: :boolean]) do
        {options, [], []} -> Keyword.get(options, :force, false)
        _other -> Mix.raise("mix meshx.gen.release takes no argument but --force")
      end

    plan = for {path, text} <- @files, do: {path, text, plan(File.read(path), text, force?)}

    case for {path, text, {:refuse, why}} <- plan, do: "#{path} #{why}; add to it:\n#{text}" do
      [] -> Enum.each(plan, &write/1)
      faults -> Mix.raise(Enum.join(faults, "\n") <> "\nor let --force replace the file")
    end

    Mix.shell().info("""

    In mix.exs, for the agent's program in the release:

        releases: [#{Mix.Project.config()[:app]}: [steps: [:assemble, &Meshx.Release.add_agent/1]]]
    """)
  end

  defp plan({:error, :enoent}, text, _force?), do: {:write, text}
  defp plan({:error, posix}, _text, _force?), do: {:refuse, "is #{:file.format_error(posix)}"}

  defp plan({:ok, present}, text, force?) do
    flags = flags(present)

    cond do
      flags(text) -- flags == [] -> :leave
      flags == [] -> {:write, String.trim_trailing(present) <> "\n\n" <> text}
      force? -> {:write, text}
      true -> {:refuse, "has flags of its own"}
    end
  end

  # The lines that are no comments.
  defp flags(text) do
    for line <- String.split(text, "\n"),
        line = String.trim(line),
        line != "" and not String.starts_with?(line, "#"),
        do: line
  end

  defp write({path, _text, :leave}), do: Mix.shell().info("* unchanged #{path}")
  defp write({path, _text, {:write, text}}), do: Mix.Generator.create_file(path, text, force: true)
end
