defmodule Meshx.AgentContractTest do
  use Meshx.ServiceMesh.Contract, adapter: Meshx.Agent, proxy: {"shop", "shop-1"}, silence: true
  use Meshx.MeshCase

  def silence(%{agent: agent}) do
    Meshx.ScriptedAgent.set(agent, :control, fn
      _id, :register_service, _args -> :silent
      _id, _command, _args -> :default
    end)
  end
end

defmodule MeshxConsul.ContractTest do
  # On the scripted agent. The real one, with a real Consul: contract/meshx_consul_test.exs.
  use Meshx.ServiceMesh.Contract, adapter: MeshxConsul, ownership: :vm, silence: true
  use Meshx.MeshCase

  def silence(%{agent: agent}) do
    Meshx.ScriptedAgent.set(agent, :control, fn
      _id, :register_service, _args -> :silent
      _id, _command, _args -> :default
    end)
  end
end
