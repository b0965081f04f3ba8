defmodule MeshxNode.Adapter do
  @moduledoc false
  # What `meshx_adapter_dist` asks a mesh adapter for, by the options of `config :meshx_node`.

  alias Meshx.Options
  alias MeshxNode.Default
  alias MeshxRpc.Address

  @app :meshx_node
  @backlog 128

  # Functions cannot be module attributes, so the schema is a function.
  def schema do
    [
      mesh_adapter: [
        type: {:custom, &adapter/1, "a module with the functions of Meshx.ServiceMesh"},
        required: true,
        doc: "the adapter that carries the distribution"
      ],
      service_params: [
        type: {:custom, &function(&1, 2), "a function of 2 arguments"},
        default: &Default.service_params/2,
        doc: "called with name and host: the `params` of `start/4`"
      ],
      service_reg: [type: :any, default: [], doc: "the `template` of `start/4`"],
      upstream_params: [
        type: {:custom, &function(&1, 1), "a function of 1 argument"},
        default: &Default.upstream_params/1,
        doc: "called with the other node: the upstream of `connect/3`"
      ],
      upstream_reg: [type: :any, doc: "the `template` of `connect/3`"],
      upstream_proxy: [
        type: {:custom, &function(&1, 2), "a function of 2 arguments"},
        default: &Default.upstream_proxy/2,
        doc: "called with the other node and this one: the `proxy` of `connect/3`"
      ],
      force_registration?: [type: :boolean, default: false, doc: "given to `start/4`"],
      timeout: [type: {:range, 1, 600_000}, default: 5_000, doc: "ms, given to `start/4`"]
    ]
  end

  @doc "The options; `mesh_adapter` has to be there."
  @spec read() :: {:ok, map()} | {:error, {:invalid_request, String.t()}}
  def read do
    {:ok, Options.validate!(schema(), Application.get_all_env(@app), "config :meshx_node")}
  rescue
    error in ArgumentError -> {:error, {:invalid_request, error.message}}
  end

  @doc "Registers the service of a node and listens where the adapter says."
  @spec listen(atom(), charlist()) ::
          {:ok, port(), Address.t(), {module(), String.t()}} | {:error, {atom(), String.t()}}
  def listen(name, host) do
    with {:ok, config} <- read(),
         {:ok, id, address} <- register(config, name, host) do
      with :ok <- local(address, "listens"),
           {:ok, socket, address} <- Address.listen(address, @backlog) do
        {:ok, socket, address, {config.mesh_adapter, id}}
      else
        error ->
          _ = config.mesh_adapter.stop(id)
          failed(error, "listening at #{inspect(address)}")
      end
    end
  end

  defp register(config, name, host) do
    answer =
      answer(fn ->
        config.mesh_adapter.start(
          config.service_params.(name, host),
          config.service_reg,
          config.force_registration?,
          config.timeout
        )
      end)

    case answer do
      {:ok, id, address} ->
        {:ok, id, address}

      {:ok, :already_started} ->
        {:error,
         {:name_taken,
          "this VM has registered the node's service already; config :meshx_node, force_registration?: true registers it again"}}

      other ->
        failed(other, "#{inspect(config.mesh_adapter)}.start/4")
    end
  end

  @doc "Ends what `listen/2` began, but for the socket."
  @spec close(Address.t(), {module(), String.t()}) :: term()
  def close(address, {adapter, id}) do
    Address.remove(address)
    answer(fn -> adapter.stop(id) end)
  end

  @doc "Connects to another node by an upstream."
  @spec dial(node(), node(), pos_integer()) :: {:ok, port()} | {:error, {atom(), String.t()}}
  def dial(node, my_node, timeout) do
    with {:ok, config} <- read(),
         {:ok, address} <- upstream(config, node, my_node),
         :ok <- local(address, "is reached") do
      with {:error, _reason} = error <- Address.connect(address, timeout),
           do: failed(error, "connecting to #{inspect(address)}")
    end
  end

  defp upstream(config, node, my_node) do
    answer =
      answer(fn ->
        config.mesh_adapter.connect(
          [config.upstream_params.(node)],
          config.upstream_reg,
          config.upstream_proxy.(node, my_node)
        )
      end)

    case answer do
      {:ok, [{:ok, address}]} -> {:ok, address}
      {:ok, [error]} -> failed(error, "#{inspect(config.mesh_adapter)}.connect/3")
      other -> failed(other, "#{inspect(config.mesh_adapter)}.connect/3")
    end
  end

  # Distribution is not encrypted here, and its cookie is no protection against who reads along.
  defp local(address, what) do
    with {:ok, address} <- Address.check(address), true <- Address.local?(address) do
      :ok
    else
      _elsewhere ->
        {:error,
         {:not_permitted,
          "the node #{what} at #{inspect(address)}, wanted a Unix socket or an address of loopback"}}
    end
  end

  # It runs in net_kernel, which must not end with an adapter.
  defp answer(fun) do
    fun.()
  catch
    class, reason -> {:error, {class, reason}}
  end

  defp failed({:error, {cause, text}} = error, _doing) when is_atom(cause) and is_binary(text),
    do: error

  defp failed({:error, reason}, doing),
    do: {:error, {:unreachable, "#{doing} failed: #{inspect(reason, limit: 20)}"}}

  defp failed(other, doing),
    do: {:error, {:invalid_request, "#{doing} answered #{inspect(other, limit: 20)}"}}

  defp adapter(adapter) do
    with true <- is_atom(adapter) and Code.ensure_loaded?(adapter),
         true <- Enum.all?([start: 4, stop: 1, connect: 3, disconnect: 3], &exported?(adapter, &1)) do
      {:ok, adapter}
    else
      _other -> :error
    end
  end

  defp exported?(module, {name, arity}), do: function_exported?(module, name, arity)
  defp function(fun, arity), do: if(is_function(fun, arity), do: {:ok, fun}, else: :error)
end
