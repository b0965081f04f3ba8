defmodule Mix.Tasks.Meshx.Run do
  @shortdoc "Runs a command whose node is in the mesh"

  @moduledoc """
  Runs a command whose Erlang or Elixir node is in the mesh, by the program `meshx run`.

      mix meshx.run NAME [OPTIONS] [-- COMMAND ARGUMENTS]

  The command is `mix run --no-halt` unless one is given. The options are those of `meshx run`:

      mix meshx.run shop@h1 --agent shared
      mix meshx.run shop@h1 --cookie secret -- mix phx.server
      mix meshx.run shop@h1 -- elixir -e 'IO.inspect(Node.ping(:cart@h1))'

  With `--agent shared` there need not be an agent: one is started in the background for all nodes of this user.

  The program is the file that `$MESHX_PROGRAM` names, or is built from the sources beside the dependency with cargo,
  which takes some minutes the first time; without the sources it is the one on the `PATH`.

  What the command prints goes where mix' own output goes, and its exit status is that of mix. It ends with mix: it
  gets SIGTERM when mix gets it, and when mix has ended in any way. It reads nothing: the terminal stays with mix. A
  command that wants it, `iex`, is refused with the line to run instead.
  """
  use Mix.Task

  @default ["mix", "run", "--no-halt"]

  @impl true
  def run(args) do
    {options, command} = split(args)

    if options == [],
      do: Mix.raise("no node name; wanted mix meshx.run NAME@HOST [OPTIONS] [-- COMMAND]")

    program = Meshx.Program.ensure!()
    if terminal?(command), do: refuse(program, options, command)

    case start(program, options, command) do
      0 -> :ok
      status -> exit({:shutdown, status})
    end
  end

  defp split(args) do
    case Enum.split_while(args, &(&1 != "--")) do
      {options, ["--" | [_ | _] = command]} -> {options, command}
      {options, _none} -> {options, @default}
    end
  end

  # A child of a VM is no foreground job of the terminal.
  defp terminal?([command | arguments]) do
    case Path.basename(command) do
      "iex" -> true
      "erl" -> not Enum.any?(arguments, &(&1 in ["-noinput", "-noshell", "-detached"]))
      _other -> false
    end
  end

  defp refuse(program, options, [name | _] = command) do
    words = [program, "run"] ++ options ++ ["--"] ++ command

    Mix.raise(
      "#{Path.basename(name)} wants the terminal, which mix cannot give away; run this instead:\n\n    " <>
        Enum.map_join(words, " ", &shell_word/1)
    )
  end

  defp shell_word(word) do
    if word =~ ~r{\A[\w@%+=:,./-]+\z},
      do: word,
      else: "'" <> String.replace(word, "'", "'\\''") <> "'"
  end

  # The command has our output itself (`:nouse_stdio`): nothing is copied.
  defp start(program, options, command) do
    ebin =
      if Enum.any?(options, &String.starts_with?(&1, "--ebin")),
        do: [],
        else: ["--ebin", Meshx.Program.ebin()]

    args = ["run", "--end-with", System.pid()] ++ ebin ++ options ++ ["--"] ++ command
    env = [{~c"MIX_ENV", Atom.to_charlist(Mix.env())}]

    port =
      Port.open(
        {:spawn_executable, program},
        [:nouse_stdio, :exit_status, args: args, env: env]
      )

    me = self()

    # The VM's own handler runs after this one and would stop mix: it waits until the command has ended, and mix with it.
    {:ok, trap} =
      System.trap_signal(:sigterm, fn ->
        send(me, {port, :sigterm})
        Process.sleep(:infinity)
      end)

    receive do
      {^port, {:exit_status, status}} ->
        System.untrap_signal(:sigterm, trap)
        status

      {^port, :sigterm} ->
        with {:os_pid, pid} <- Port.info(port, :os_pid),
             do: System.cmd("kill", ["-TERM", "#{pid}"], stderr_to_stdout: true)

        receive do
          {^port, {:exit_status, status}} -> status
        end
    end
  end
end
