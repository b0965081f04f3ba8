Code.require_file("real_agent.exs", __DIR__)

defmodule MeshxConsul.RealContractTest do
  # MESHX_DIR=... mix test contract/meshx_consul_test.exs
  use Meshx.ServiceMesh.Contract, adapter: MeshxConsul, ownership: :vm

  setup_all do: Meshx.RealAgent.setup()

  test "a service passes in the catalogue under the id that 0.1 gave it" do
    name = Peer.name()
    id = name <> "-" <> MeshxConsul.Template.host()
    assert {:ok, ^id, {:tcp, _ip, port}} = MeshxConsul.start(name)
    on_exit(fn -> MeshxConsul.stop(id) end)

    assert {:ok, %{"ID" => ^id, "Service" => ^name, "Status" => "passing", "Port" => ^port}} =
             MeshxConsul.info(id)

    assert id in MeshxConsul.list()
    assert MeshxConsul.stop(id) == :ok
    assert MeshxConsul.stop(id) == {:error, :service_not_owned}
  end
end
