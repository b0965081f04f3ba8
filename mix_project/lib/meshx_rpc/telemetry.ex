defmodule MeshxRpc.Telemetry do
  @moduledoc """
  Events of clients and servers: `docs/telemetry.md` has the table.

  They go to [`:telemetry`](https://hex.pm/packages/telemetry) when that application is there, to what
  `MeshxRpc.attach_telemetry/2` attached when it is not, and in either case to the option `:telemetry_handler`.
  Meshx does not depend on `:telemetry`.

  Where nobody has attached a handler to an event, nothing is measured for it.
  """

  alias MeshxRpc.Link
  require Logger

  @names [:init, :hsk, :idle, :recv, :send, :call, :cast]
  # A plain atom: it is looked up for each call.
  @attached __MODULE__

  # Not a dependency: it may be there or not.
  @compile {:no_warn_undefined, [:telemetry, :telemetry_handler_table]}

  @enforce_keys [:id, :events, :handler, :backend]
  defstruct @enforce_keys

  @typedoc "Where events of one client or server go."
  @type t :: %__MODULE__{
          id: atom(),
          events: %{atom() => [atom()]},
          handler: nil | {module(), atom(), term()},
          backend: :telemetry | :table | :own
        }

  @type name :: :init | :hsk | :idle | :recv | :send | :call | :cast

  @doc "The names that follow a prefix."
  @spec names() :: [name()]
  def names, do: @names

  @doc false
  @spec new(atom(), [atom()], nil | {module(), atom(), term()}) :: t()
  def new(id, prefix, handler) do
    events = Map.new(@names, &{&1, prefix ++ [&1]})
    %__MODULE__{id: id, events: events, handler: handler, backend: backend()}
  end

  @doc false
  # Whether anybody listens: what costs time is done only then. It is asked for each call, so it is one lookup.
  @spec on?(t(), name()) :: boolean()
  def on?(%{handler: nil, backend: :table, events: events}, name),
    do: :telemetry_handler_table.list_for_event(Map.fetch!(events, name)) != []

  # A version of :telemetry that keeps its handlers elsewhere: it finds out itself.
  def on?(%{handler: nil, backend: :telemetry}, _name), do: true
  def on?(%{handler: nil, backend: :own}, _name), do: :persistent_term.get(@attached, %{}) != %{}
  def on?(_with_a_handler, _name), do: true

  @doc false
  @spec emit(t(), name(), map(), map()) :: :ok
  def emit(telemetry, name, measurements, metadata) do
    event = Map.fetch!(telemetry.events, name)
    metadata = Map.put(metadata, :id, telemetry.id)

    with {module, fun, argument} <- telemetry.handler,
         do: handle({module, fun, argument}, event, measurements, metadata)

    case telemetry.backend do
      :own -> own(event, measurements, metadata)
      _telemetry -> :telemetry.execute(event, measurements, metadata)
    end

    :ok
  end

  @doc false
  # For processes that serve many: no handler of the user's runs in them.
  @spec emit_aside(t(), name(), map(), map()) :: :ok
  def emit_aside(telemetry, name, measurements, metadata) do
    if on?(telemetry, name),
      do: spawn(__MODULE__, :emit, [telemetry, name, measurements, metadata])

    :ok
  end

  @doc false
  # The measurements of 0.1, all of them in every event.
  @spec measurements(keyword()) :: map()
  def measurements(given) do
    times = [ser: 0, dser: 0, exec: 0, hsk: 0, idle: 0, recv: 0, send: 0]

    %{
      blocks: %{send: given[:blocks_sent] || 0, recv: given[:blocks_received] || 0},
      size: %{send: given[:sent] || 0, recv: given[:received] || 0},
      time: Keyword.merge(times, Keyword.get(given, :time, []))
    }
  end

  @doc false
  @spec blocks(non_neg_integer(), pos_integer()) :: pos_integer()
  def blocks(size, block), do: max(div(size + block - 1, block), 1)

  @doc false
  @spec now() :: integer()
  def now, do: System.monotonic_time(:microsecond)

  @doc false
  # What a function failed with may hold its argument: of terms that are not ours only the kind is told.
  @spec result(term()) :: :ok | {:error_rpc, term()}
  def result({:error_rpc, reason}), do: {:error_rpc, kind(reason)}
  def result(_result), do: :ok

  defp kind(reason) when is_atom(reason), do: reason
  defp kind(%{__exception__: true, __struct__: module}), do: {:exception, module}
  defp kind({{:nocatch, _value}, _stack}), do: :nocatch
  defp kind({reason, stack}) when is_atom(reason) and is_list(stack), do: reason
  defp kind(_other), do: :other

  @doc false
  # Why a connection is not there: that has nothing of a function's.
  @spec cause(:ok | :idle | term()) :: :ok | :ok_reconnect | {:error_rpc, term()}
  def cause(:ok), do: :ok
  def cause(:idle), do: :ok_reconnect
  def cause({cause, text}) when is_atom(cause) and is_binary(text), do: {:error_rpc, {cause, text}}

  def cause({what, reason}) when what in [:connect, :mesh, :listen],
    do: {:error_rpc, {what, kind(reason)}}

  def cause(reason), do: {:error_rpc, kind(reason)}

  @doc false
  @spec attach([atom()], term()) :: :ok
  def attach(prefix, id) do
    case MeshxRpc.Options.Check.prefix(prefix) do
      {:ok, _prefix} -> :ok
      :error -> raise ArgumentError, "prefix is #{inspect(prefix)}, wanted a list of atoms"
    end

    events = for name <- @names, do: prefix ++ [name]
    id = if id == nil, do: List.last(prefix), else: id

    attached =
      if backend() == :own,
        do: attach_own(id, events),
        else: :telemetry.attach_many(id, events, &__MODULE__.log/4, nil)

    with {:error, :already_exists} <- attached do
      raise ArgumentError, "a handler with the id #{inspect(id)} is attached already"
    end
  end

  @doc false
  @spec detach(term()) :: :ok | {:error, :not_found}
  def detach(id) do
    if backend() == :own,
      do:
        change(fn own -> if own[id], do: {:ok, Map.delete(own, id)}, else: {:error, :not_found} end),
      else: :telemetry.detach(id)
  end

  # Without :telemetry

  defp attach_own(id, events) do
    change(fn own ->
      if own[id], do: {:error, :already_exists}, else: {:ok, Map.put(own, id, events)}
    end)
  end

  defp change(fun) do
    :global.trans(
      {@attached, self()},
      fn ->
        with {:ok, own} <- fun.(:persistent_term.get(@attached, %{})),
             do: :persistent_term.put(@attached, own)
      end,
      [node()]
    )
  end

  defp own(event, measurements, metadata) do
    for {_id, events} <- :persistent_term.get(@attached, %{}),
        event in events,
        do: handle({__MODULE__, :log, nil}, event, measurements, metadata)
  end

  # A handler must not fail the call that it hears of.
  defp handle({module, fun, argument}, event, measurements, metadata) do
    apply(module, fun, [event, measurements, metadata, argument])
  catch
    kind, reason ->
      Logger.error(
        "MeshxRpc: telemetry handler #{inspect(module)}.#{fun}/4 failed: " <>
          Exception.format(kind, reason, __STACKTRACE__)
      )
  end

  # It may be loaded, and not started yet.
  defp backend do
    cond do
      not Code.ensure_loaded?(:telemetry) -> :own
      not function_exported?(:telemetry, :execute, 3) -> :own
      match?({:error, _}, Application.ensure_all_started(:telemetry)) -> :telemetry
      table?() -> :table
      true -> :telemetry
    end
  end

  defp table? do
    Code.ensure_loaded?(:telemetry_handler_table) and
      function_exported?(:telemetry_handler_table, :list_for_event, 1)
  end

  # Printing

  @doc false
  def log(event, measurements, metadata, _config) do
    level = if match?({:error_rpc, _}, metadata.result), do: :error, else: :debug
    Logger.log(level, fn -> text(event, measurements, metadata) end)
  end

  defp text(event, %{blocks: blocks, size: size, time: time}, metadata) do
    spent = for {name, microseconds} <- time, microseconds > 0, do: {name, microseconds / 1_000}
    {idle, spent} = Keyword.pop(spent, :idle, 0)
    total = Float.round(Enum.sum(Keyword.values(spent)) / 1, 3)
    shown = [:address, :id, :fun_name, :fun_req, :result, :local, :remote]
    rest = metadata |> Map.drop(shown) |> Enum.reject(fn {_key, value} -> value == nil end)
    # A peer's own text, when there is no such function.
    name = if fun = metadata[:fun_name], do: " " <> Link.printable(to_string(fun)), else: ""

    """
    #{inspect(event)}#{name} -> #{inspect(metadata.result)}
    total: #{total} ms #{inspect(spent)} idle: #{idle} ms
    sent: #{bytes(size.send)} in #{blocks.send} blocks, received: #{bytes(size.recv)} in #{blocks.recv}
    address: #{inspect(metadata[:address])} local: #{ref(metadata[:local])} remote: #{ref(metadata[:remote])}
    #{inspect(rest)}
    """
  end

  defp ref(%{conn_ref: conn} = refs),
    do: inspect(%{refs | conn_ref: Base.encode64(conn, padding: false)})

  defp ref(none), do: inspect(none)

  defp bytes(count) when count < 1_000, do: "#{count} B"
  defp bytes(count) when count < 1_000_000, do: "#{Float.round(count / 1_000, 1)} kB"
  defp bytes(count), do: "#{Float.round(count / 1_000_000, 1)} MB"
end
