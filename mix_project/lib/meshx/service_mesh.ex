defmodule Meshx.ServiceMesh do
  @moduledoc """
  What MeshxRpc asks of a service mesh. An adapter is a module with these four functions.

  `Meshx.Agent` is the adapter to the meshx agent of this host.
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

  `force_registration?` registers again when this VM has registered it already;
  `timeout` is how long to wait until the mesh knows it, in milliseconds.
  """
  @callback start(params(), template :: term(), force_registration? :: boolean(), timeout()) ::
              {:ok, service_id :: String.t(), address()}
              | {:ok, :already_started}
              | {:error, reason :: term()}

  @doc "Deregisters a service that `c:start/4` registered."
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
            ) :: {:ok, [{:ok, address()} | {:error, reason :: term()}]}

  @doc "Removes upstreams; answers with those that were there."
  @callback disconnect(
              upstreams :: [params()],
              proxy_id :: atom() | String.t() | nil,
              restart_proxy? :: boolean()
            ) :: {:ok, deleted :: [String.t()]} | {:error, reason :: term()}
end
