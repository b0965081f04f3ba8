defmodule Meshx.RealAgent do
  @moduledoc false
  # The agent that $MESHX_DIR names, for the tests in this directory.

  def setup do
    case System.get_env("MESHX_DIR", "") do
      "" ->
        raise "MESHX_DIR is not set: it names the directory of a running agent (see docs/adapters.md)"

      _directory ->
        {:ok, _client} = :meshx_agent.start()

        case :meshx_agent.await() do
          {:ok, _hello} -> await_mesh(200)
          {:error, {cause, text}} -> raise "no agent: #{cause}: #{text}"
        end
    end
  end

  # A mesh that was just started may have no authority yet.
  defp await_mesh(left) do
    name = Meshx.ServiceMesh.Contract.Peer.name()

    case Meshx.Agent.start({name, name}, nil, false, 10_000) do
      {:ok, id, _address} ->
        Meshx.Agent.stop(id)

      {:error, {:not_ready, _text}} when left > 0 ->
        Process.sleep(100)
        await_mesh(left - 1)

      {:error, {cause, text}} ->
        raise "the agent's mesh does not work: #{cause}: #{text}"
    end
  end
end
