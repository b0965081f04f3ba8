defmodule Meshx.Agent.Private do
  @moduledoc false
  # The agent of this VM alone: the program ends when its standard input does, and so with this process and with the VM.

  use GenServer

  # How long it may take until it serves, in milliseconds.
  @start_time 30_000

  def start_link(program), do: GenServer.start_link(__MODULE__, program)

  @impl true
  def init(program) do
    port =
      Port.open(
        {:spawn_executable, program},
        [:binary, :exit_status, {:line, 4_096}, args: ["agent", "--private"]]
      )

    receive do
      {^port, {:data, {:eol, "meshx agent ready dir=" <> rest}}} ->
        # Where the client looks, at once and when it connects again.
        System.put_env("MESHX_DIR", dir(rest))
        {:ok, port}

      {^port, {:exit_status, status}} ->
        {:stop, {:agent_ended, status}}
    after
      @start_time -> {:stop, {:agent_not_ready, @start_time}}
    end
  end

  @impl true
  def handle_info({port, {:exit_status, status}}, port), do: {:stop, {:agent_ended, status}, port}
  def handle_info(_other, port), do: {:noreply, port}

  # A directory with blanks is quoted as in JSON, and ours has no escapes in it but those of quotes and backslashes.
  defp dir(<<?", rest::binary>>), do: quoted(rest, "")
  defp dir(rest), do: rest |> String.split(" ", parts: 2) |> hd()

  defp quoted(<<?\\, char, rest::binary>>, dir), do: quoted(rest, dir <> <<char>>)
  defp quoted(<<?", _::binary>>, dir), do: dir
  defp quoted(<<char, rest::binary>>, dir), do: quoted(rest, dir <> <<char>>)
end
