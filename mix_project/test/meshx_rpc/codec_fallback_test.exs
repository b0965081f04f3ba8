defmodule MeshxRpc.CodecFallbackTest do
  # A VM that has the application's modules but not its library.
  use ExUnit.Case, async: true

  setup do
    directory =
      Path.join(
        System.tmp_dir!(),
        "meshx-fallback-#{System.pid()}-#{System.unique_integer([:positive])}"
      )

    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, directory: directory}
  end

  @script """
  tasks = for _ <- 1..20, do: Task.async(&MeshxRpc.Codec.impl/0)
  IO.inspect(tasks |> Enum.map(&Task.await(&1, 60_000)) |> Enum.uniq())
  IO.inspect(MeshxRpc.Codec.Nif.load())
  IO.inspect(MeshxRpc.Codec.impl().guard(:erlang.term_to_binary(:ok), %{}))
  """

  test "runs on the Elixir codec and says so once", %{directory: directory} do
    ebin = Path.join(directory, "meshx/ebin")
    File.mkdir_p!(Path.dirname(ebin))
    File.cp_r!(Application.app_dir(:meshx, "ebin"), ebin)

    {output, 0} = System.cmd("elixir", ["-pa", ebin, "-e", @script], stderr_to_stdout: true)
    assert output =~ "[MeshxRpc.Codec.Elixir]"
    assert [_, rest] = String.split(output, "the NIF could not be loaded")
    assert rest =~ "load_failed"
    assert rest =~ "Install cargo"
    assert output =~ ":ok\n"
  end

  test "a damaged library does not keep the application from starting", %{directory: directory} do
    ebin = Path.join(directory, "meshx/ebin")
    native = Path.join(directory, "meshx/priv/native")
    Enum.each([Path.dirname(ebin), native], &File.mkdir_p!/1)
    File.cp_r!(Application.app_dir(:meshx, "ebin"), ebin)
    File.write!(Path.join(native, "meshx_nif.so"), "not a library")

    {output, 0} = System.cmd("elixir", ["-pa", ebin, "-e", @script], stderr_to_stdout: true)
    assert output =~ "[MeshxRpc.Codec.Elixir]"
  end
end
