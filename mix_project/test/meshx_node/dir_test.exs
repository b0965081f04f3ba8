defmodule MeshxNode.DirTest do
  # Whose directory may be believed to be the agent's. The agent's own check is tested with the same cases:
  # cnode/src/way.rs.
  use ExUnit.Case, async: true

  setup do
    dir = Path.join("/tmp", "mx" <> Base.encode16(:crypto.strong_rand_bytes(5), case: :lower))
    make(dir, 0o700)
    on_exit(fn -> File.rm_rf!(dir) end)
    {:ok, dir: dir}
  end

  defp make(path, mode) do
    File.mkdir!(path)
    # File.chmod/2 leaves out the sticky bit.
    {"", 0} = System.cmd("chmod", [Integer.to_string(mode, 8), path])
    path
  end

  defp check(path), do: :meshx_dir.check(to_charlist(path))

  test "a directory that others may write is refused", %{dir: dir} do
    assert check(dir) == :ok
    File.chmod!(dir, 0o702)
    assert {:error, {:not_permitted, text}} = check(dir)
    assert text =~ "mode 702"
  end

  test "a parent that others may write needs the sticky bit", %{dir: dir} do
    for {mode, allowed} <- [
          {0o755, true},
          {0o1777, true},
          {0o1770, true},
          {0o770, false},
          {0o702, false}
        ] do
      parent = make(Path.join(dir, Integer.to_string(mode, 8)), mode)
      agent = parent |> Path.join("between") |> make(0o700) |> Path.join("agent") |> make(0o700)

      if allowed do
        assert check(agent) == :ok
      else
        assert {:error, {:not_permitted, text}} = check(agent)
        assert text =~ "#{parent} has mode #{Integer.to_string(mode, 8)}"
      end
    end
  end

  test "links are followed through the directories they lead through", %{dir: dir} do
    shared = make(Path.join(dir, "shared"), 0o777)
    agent = make(Path.join(shared, "agent"), 0o700)
    safe = make(Path.join(dir, "safe"), 0o700)
    File.ln_s!(agent, Path.join(safe, "absolute"))
    File.ln_s!("../shared/agent", Path.join(safe, "relative"))
    File.ln_s!("../safe", Path.join(safe, "back"))

    for link <- ["absolute", "relative", "back/back/relative"] do
      assert {:error, {:not_permitted, text}} = check(Path.join(safe, link))
      assert text =~ "#{shared} has mode 777"
    end

    assert check(Path.join(safe, "back/back")) == :ok
  end
end
