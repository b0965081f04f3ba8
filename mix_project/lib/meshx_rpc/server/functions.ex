defmodule MeshxRpc.Server.Functions do
  @moduledoc false
  # Which functions of a server's module may be called: names as binaries, so that looking one up makes no atom.
  #
  # A module that is loaded anew may have others: a name that is not known is looked for once more when the
  # module is no longer the one that we know.

  # What compilers and behaviours export beside what people write.
  @injected [:module_info, :__info__, :behaviour_info, :child_spec]
  # Their callbacks are for OTP to call. A behaviour of the user's own may well describe the functions of a server.
  @otp [
    Agent,
    Application,
    DynamicSupervisor,
    GenServer,
    Supervisor,
    :application,
    :gen_event,
    :gen_server,
    :gen_statem,
    :supervisor,
    :supervisor_bridge
  ]

  alias MeshxRpc.Server.Internal

  @type t :: %{version: term(), names: %{binary() => atom() | {:internal, atom()}}}

  @doc "Raises when `:functions` has a name that cannot be called."
  @spec check!(map(), String.t()) :: :ok
  def check!(%{module: module, functions: wanted}, what) do
    unless Code.ensure_loaded?(module) do
      raise ArgumentError, "#{what}: module #{inspect(module)} cannot be loaded"
    end

    offered = offered(module)

    with true <- is_list(wanted), [name | _] <- wanted -- offered do
      raise ArgumentError,
            "#{what}: option :functions has #{inspect(name)}, wanted names of functions that " <>
              "#{inspect(module)} exports with one argument, except callbacks of OTP and what compilers add: " <>
              inspect(offered, limit: 20)
    end

    :ok
  end

  @doc "The functions that may be called now."
  @spec new(module(), :all | [atom()]) :: t()
  def new(module, wanted) do
    names =
      for name <- offered(module),
          wanted == :all or name in wanted,
          do: {Atom.to_string(name), name}

    %{version: version(module), names: Map.merge(Map.new(names), Internal.functions())}
  end

  @doc "The function of that name. The second element is nil unless the module was loaded anew."
  @spec find(t(), binary(), module(), :all | [atom()]) ::
          {{:ok, atom() | {:internal, atom()}} | :error, nil | t()}
  def find(functions, name, module, wanted) do
    case functions.names do
      %{^name => fun} ->
        {{:ok, fun}, nil}

      _unknown ->
        if version(module) in [nil, functions.version] do
          {:error, nil}
        else
          functions = new(module, wanted)
          {Map.fetch(functions.names, name), functions}
        end
    end
  end

  @doc """
  A function of the module itself, for requests that name one in their argument. One that the module has no longer,
  loaded anew, is none: whoever asks may tell that it starts before it does.
  """
  @spec own(map(), binary()) :: {:ok, atom()} | :error
  def own(%{module: module} = config, name) do
    with {{:ok, fun}, _functions} when is_atom(fun) <-
           find(config.offered, name, module, config.functions),
         true <- Code.ensure_loaded?(module) and function_exported?(module, fun, 1) do
      {:ok, fun}
    else
      _unknown_or_ours -> :error
    end
  end

  # nil: the module is not loaded, or was deleted and will be loaded by the next call.
  defp version(module) do
    :erlang.get_module_info(module, :md5)
  rescue
    ArgumentError -> nil
  end

  defp offered(module) do
    callbacks = callbacks(module)

    for {name, 1} <- module.module_info(:exports),
        name not in @injected and name not in callbacks,
        text = Atom.to_string(name),
        not String.starts_with?(text, ["MACRO-", "__", <<0>>]),
        do: name
  end

  defp callbacks(module) do
    behaviours =
      for {key, modules} <- module.module_info(:attributes),
          key in [:behaviour, :behavior],
          behaviour <- modules,
          # Where modules are loaded when they are used, it may not be yet.
          behaviour in @otp and Code.ensure_loaded?(behaviour),
          do: behaviour

    for behaviour <- behaviours, {name, 1} <- behaviour.behaviour_info(:callbacks), do: name
  end
end
