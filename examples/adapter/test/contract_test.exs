for kind <- [:uds, :tcp] do
  defmodule Module.concat(SocketDir.ContractTest, kind) do
    use Meshx.ServiceMesh.Contract,
      adapter: SocketDir,
      template: [kind: kind],
      cut: false

    setup do
      dir = Path.join(System.tmp_dir!(), "sd#{System.unique_integer([:positive])}")
      start_supervised!({SocketDir, dir: dir})
      on_exit(fn -> File.rm_rf!(dir) end)
    end
  end
end
