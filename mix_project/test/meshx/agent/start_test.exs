defmodule Meshx.Agent.StartTest do
  # Sets the environment.
  use ExUnit.Case

  alias Meshx.Agent.{Private, Start}

  setup do
    present = Map.take(System.get_env(), ["MESHX_DIR", "MESHX_PROGRAM"])
    dir = Path.join(System.tmp_dir!(), "meshx_start_#{System.unique_integer([:positive])}")
    File.mkdir_p!(dir)

    on_exit(fn ->
      Enum.each(["MESHX_DIR", "MESHX_PROGRAM"], &System.delete_env/1)
      System.put_env(present)
      File.rm_rf!(dir)
    end)

    System.delete_env("MESHX_DIR")
    {:ok, dir: dir}
  end

  defp program(dir, script) do
    path = Path.join(dir, "meshx")
    File.write!(path, "#!/bin/sh\n" <> script)
    File.chmod!(path, 0o755)
    System.put_env("MESHX_PROGRAM", path)
    path
  end

  test "starts nothing unless told to" do
    assert Start.children(:require) == []
    error = assert_raise ArgumentError, fn -> Start.children(:mine) end
    assert error.message =~ "wanted :require, :shared"
    assert_raise ArgumentError, fn -> Start.children({:shared, idle_exit: 0}) end
  end

  # A VM that has an agent's client is one that has an agent: other tests may have started it.
  test "uses an agent that is configured, and starts none beside it", %{dir: dir} do
    if Process.whereis(:meshx_agent) == nil do
      program(dir, "touch #{dir}/started\n")
      System.put_env("MESHX_DIR", "/nobody")
      assert Start.children(:shared) == []
      assert_raise RuntimeError, ~r/MESHX_DIR names the agent/, fn -> Start.children(:private) end
      refute File.exists?(Path.join(dir, "started"))

      System.delete_env("MESHX_DIR")
      program(dir, "echo 'meshx: it is the system'; exit 69\n")

      assert_raise RuntimeError, ~r/agent: :shared: meshx: it is the system/, fn ->
        Start.children(:shared)
      end
    end
  end

  @tag :capture_log
  test "a private agent's directory is told, and it ends with its process", %{dir: dir} do
    for {said, wanted} <- [
          {"/tmp/x hosts=h1", "/tmp/x"},
          {~S("/tmp/a \"b\" c" hosts=h1), ~S(/tmp/a "b" c)}
        ] do
      program =
        program(dir, "echo 'meshx agent ready dir=#{said}'\ncat > /dev/null; echo > #{dir}/ended\n")

      {:ok, pid} = Private.start_link(program)
      assert System.get_env("MESHX_DIR") == wanted
      GenServer.stop(pid)
      assert wait(fn -> File.exists?(Path.join(dir, "ended")) end)
      File.rm!(Path.join(dir, "ended"))
    end

    Process.flag(:trap_exit, true)
    assert Private.start_link(program(dir, "exit 69\n")) == {:error, {:agent_ended, 69}}

    {:ok, pid} =
      Private.start_link(program(dir, "echo meshx agent ready dir=/x hosts=h\nexit 70\n"))

    assert_receive {:EXIT, ^pid, {:agent_ended, 70}}, 10_000
  end

  defp wait(condition, tries \\ 1_000) do
    condition.() or (tries > 0 and Process.sleep(10) == :ok and wait(condition, tries - 1))
  end
end
