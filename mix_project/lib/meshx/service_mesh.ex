defmodule Meshx.ServiceMesh do
  @moduledoc """
  What MeshxRpc and MeshxNode ask of a service mesh. An adapter is a module with these four functions.

  `Meshx.Agent` is the adapter to the meshx agent of this host, `MeshxConsul` the same with the functions and
  templates of Meshx 0.1. docs/adapters.md tells how to write another one; it passes
  `Meshx.ServiceMesh.Contract`.

  Addresses are always on this host: the mesh carries the bytes between hosts, with mutual TLS.
  """

  @typedoc "Where a service listens, or where an upstream is reached."
  @type address ::
          {:tcp, ip :: :inet.ip_address(), port :: :inet.port_number()} | {:uds, path :: String.t()}

  @typedoc "A service: its name, its name and instance id, or a map for the adapter's template."
  @type params ::
          atom() | String.t() | {name :: atom() | String.t(), id :: atom() | String.t()} | map()

  @doc """
  Registers a service and answers with its id and the address that it must listen on.

  `{:ok, :already_started}` when this VM has it already; `force_registration?` registers it anew then.
  `timeout` is how long to wait until the mesh knows it, in milliseconds. Whatever goes wrong is an `{:error, reason}`,
  wrong arguments too: no adapter raises or exits, and after an error nothing of the service is left.
  """
  @callback start(params(), template :: term(), force_registration? :: boolean(), timeout()) ::
              {:ok, service_id :: String.t(), address()}
              | {:ok, :already_started}
              | {:error, reason :: term()}

  @doc "Deregisters a service that `c:start/4` registered. An error when this VM has no such one."
  @callback stop(service_id :: atom() | String.t()) :: :ok | {:error, reason :: term()}

  @doc """
  Prepares upstreams: each answer, in the order of `upstreams`, is an address that leads to the service.

  `proxy` names the local service on whose behalf the calls are made, and its instance;
  `nil` leaves it to the adapter.
  """
  @callback connect(
              upstreams :: [params()],
              template :: term(),
              proxy :: {name :: atom() | String.t(), id :: atom() | String.t()} | nil
            ) ::
              {:ok, [{:ok, address()} | {:error, reason :: term()}]} | {:error, reason :: term()}

  @doc """
  Removes upstreams; answers with the names of those that were there.

  Connections that were made over them live on, unless `restart_proxy?`.
  """
  @callback disconnect(
              upstreams :: [params()],
              proxy_id :: atom() | String.t() | nil,
              restart_proxy? :: boolean()
            ) :: {:ok, deleted :: [String.t()]} | {:error, reason :: term()}

  @doc """
  Why the last connection to an upstream was refused, `:at` in unix seconds; `:error` when nothing is known.

  Optional. A client whose connection ends before it has begun asks, to tell more than that it was reset.
  """
  @callback refusal(upstream :: params()) ::
              {:ok, %{cause: atom(), text: String.t(), at: integer()}} | :error

  @optional_callbacks refusal: 1

  @doc """
  For adapters: `c:connect/3` of all upstreams that `fun` makes requests of, `{:ok, request}`, by one call of `connect`, which
  answers a list of results or an error. The errors of the others are in their places.
  """
  @spec each(
          [params()],
          (params() -> {:ok, term()} | {:error, term()}),
          ([term()] ->
             [term()]
             | {:error, term()})
        ) ::
          {:ok, [{:ok, address()} | {:error, term()}]} | {:error, term()}
  def each(upstreams, fun, connect) do
    requests = Enum.map(upstreams, fun)

    with answers when is_list(answers) <- connect.(for {:ok, request} <- requests, do: request) do
      {results, []} =
        Enum.map_reduce(requests, answers, fn
          {:ok, _request}, [answer | answers] -> {answer, answers}
          {:error, _reason} = error, answers -> {error, answers}
        end)

      {:ok, results}
    end
  end
end
