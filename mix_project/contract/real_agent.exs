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
          {:ok, _hello} -> :ok
          {:error, {cause, text}} -> raise "no agent: #{cause}: #{text}"
        end
    end
  end
end
