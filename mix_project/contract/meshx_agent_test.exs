Code.require_file("real_agent.exs", __DIR__)

defmodule Meshx.Agent.RealContractTest do
  # MESHX_DIR=... mix test contract/meshx_agent_test.exs
  use Meshx.ServiceMesh.Contract, adapter: Meshx.Agent, proxy: {"contract-caller", "caller-1"}

  setup_all do: Meshx.RealAgent.setup()
end
