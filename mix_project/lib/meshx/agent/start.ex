defmodule Meshx.Agent.Start do
  @moduledoc false
  # `config :meshx, agent: WHICH`: the agent of a VM that was not started by `meshx run` (docs/nodes.md).

  alias Meshx.Agent.Private

  # An agent that ends takes a connection with it that it has not accepted: another look, and it is started again.
  @looks 3

  @type which :: :require | :shared | {:shared, [idle_exit: pos_integer()]} | :private

  @doc """
  What Meshx' supervisor starts for it. Raises when there is no agent to be had.

  A VM whose distribution goes through an agent has one already.
  """
  @spec children(term()) :: [Supervisor.child_spec()]
  def children(:require), do: []

  def children(which) do
    which = check!(which)

    cond do
      Process.whereis(:meshx_agent) -> []
      which == :private -> private(configured())
      true -> shared(elem(which, 1), configured())
    end
  end

  defp check!(:shared), do: {:shared, []}
  defp check!(:private), do: :private

  defp check!({:shared, [idle_exit: seconds]} = which) when is_integer(seconds) and seconds > 0,
    do: which

  defp check!(other) do
    raise ArgumentError,
          "config :meshx, agent: #{inspect(other)}; wanted :require, :shared, {:shared, idle_exit: SECONDS} or :private"
  end

  # Where an agent is configured that one is used, and may come later.
  defp shared(_options, {:ok, _where}), do: []

  defp shared(options, :error) do
    idle = for {:idle_exit, seconds} <- options, word <- ["--idle-exit", "#{seconds}"], do: word
    connect(["start" | idle], @looks)
    []
  end

  # The client's connection holds the agent for as long as this VM runs.
  defp connect(args, looks) do
    case System.cmd(program!(), args, stderr_to_stdout: true) do
      {_ready, 0} -> :ok
      {text, _status} -> raise "config :meshx, agent: :shared: #{String.trim(text)}"
    end

    with {:ok, _client} <- :meshx_agent.start(),
         {:ok, _hello} <- :meshx_agent.await() do
      :ok
    else
      {:error, _reason} when looks > 1 -> connect(args, looks - 1)
      {:error, reason} -> raise "config :meshx, agent: :shared: #{inspect(reason)}"
    end
  end

  defp private({:ok, where}) do
    raise "config :meshx, agent: :private: #{where} names the agent of this host, and none is started beside it; " <>
            "leave the option out, or #{where}"
  end

  defp private(:error), do: [{Private, program!()}]

  defp program! do
    case Meshx.Program.find() do
      {:ok, program} -> program
      {:error, reason} -> raise "config :meshx, agent: #{reason}"
    end
  end

  # As meshx_dir finds it.
  defp configured do
    cond do
      match?({:ok, [_ | _]}, :init.get_argument(:meshx_dir)) -> {:ok, "-meshx_dir"}
      System.get_env("MESHX_DIR", "") != "" -> {:ok, "MESHX_DIR"}
      true -> :error
    end
  end
end
