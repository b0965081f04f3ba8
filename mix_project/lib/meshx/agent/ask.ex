defmodule Meshx.Agent.Ask do
  @moduledoc false
  # What a job of `Meshx.Agent.Server` does: it asks the agent, waits, and looks through the answer.

  # The agent asks the mesh a few questions for a registration, each for at most 5 s, and says so when one is not answered.
  @answer 20_000

  @doc "Registers a service: what the agent made of it, with its address as written and as we know it."
  def register(args) do
    with {:ok, made} <- ask(:register_service, args, Map.get(args, :wait, 0) + @answer) do
      case made do
        %{id: id, address: wire} when is_binary(id) ->
          with {:ok, address} <- address(wire),
               do: {:ok, %{id: id, wire: wire, address: address}}

        _incomplete ->
          {:error, {:invalid_request, "the agent's answer to register_service is incomplete"}}
      end
    end
  end

  @doc "Makes an upstream; `args` may be a function that finds them out."
  def connect(fun) when is_function(fun) do
    with {:ok, args} <- fun.(), do: connect(args)
  end

  def connect(args) do
    with {:ok, made} <- ask(:connect, args) do
      case made do
        %{upstream: id, address: wire} when is_binary(id) ->
          with {:ok, address} <- address(wire), do: {:ok, %{id: id, args: args, address: address}}

        _incomplete ->
          {:error, {:invalid_request, "the agent's answer to connect is incomplete"}}
      end
    end
  end

  @doc """
  Asks the agent, once there is a connection to it. A `:token` is a function that gives it, so that it shows in no
  state and no report.
  """
  def ask(command, args, timeout \\ 5_000) do
    args =
      case args do
        %{token: token} when is_function(token) -> %{args | token: token.()}
        _ -> args
      end

    with {:ok, _hello} <- :meshx_agent.await(), do: :meshx_agent.call(command, args, timeout)
  end

  @doc "Whether there is something at an address that was registered before."
  def present({:uds, path}) do
    if File.exists?(path),
      do: :ok,
      else: {:error, {:no_socket, "its socket #{path} is gone"}}
  end

  def present(_tcp), do: :ok

  @doc "An address as the agent writes it."
  def wire({:uds, path}), do: {:uds, path}
  def wire({:tcp, ip, port}), do: {:tcp, to_string(:inet.ntoa(ip)), port}

  defp address({:uds, path}) when is_binary(path), do: {:ok, {:uds, path}}

  defp address({:tcp, ip, port}) when is_binary(ip) and port in 1..65_535 do
    case :inet.parse_strict_address(to_charlist(ip)) do
      {:ok, ip} -> {:ok, {:tcp, ip, port}}
      {:error, _} -> unusable({:tcp, ip, port})
    end
  end

  defp address(other), do: unusable(other)

  defp unusable(address) do
    text = "the agent's address is #{inspect(address)}, wanted {:tcp, ip, port} or {:uds, path}"

    {:error, {:invalid_request, text}}
  end
end
