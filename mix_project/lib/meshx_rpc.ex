defmodule MeshxRpc do
  @moduledoc """
  Remote calls over TCP, Unix sockets or a service mesh, with many calls at once on one connection.

  `MeshxRpc.Server` offers a module's functions, `MeshxRpc.Client` calls them;
  `MeshxRpc.Server.Pool` and `MeshxRpc.Client.Pool` are the same without macros.
  The bytes are described in `docs/rpc-protocol.md`.

  ## Processes

  ```
  server: Supervisor (registered as the server's id)
    DynamicSupervisor
      connection                one for each client connection
        request                 one for each call that runs, linked to its connection
    streams                     which process runs the call that a stream belongs to
    casts                       runs casts, which outlive their connection; lanes of those with a key
    listener                    listening socket, limits, registration with the mesh
      acceptor                  :acceptors of them, linked to the listener

  client: Supervisor (registered as the client's id; owner of an ETS table of that name)
    upstream                    with :mesh only: asks the mesh for an address
    connection                  pool_opts[:size] of them
    growth                      further connections: while all are busy, and in the place of those that drain
    casts                       casts until the server has started them
  ```

  Nothing else is registered, so a VM can have any number of them. The supervisor of a server restarts
  listener and connections together; a connection of a server is not restarted, one of a client is.

  A call runs in its caller's process as far as it can: it serialises the argument, chooses the connection
  with the fewest calls, and decodes the result. The connection process decides what is sent next
  (`MeshxRpc.Writer`) and collects what waits for it into one write. It monitors the caller before the first
  byte goes out; a caller that dies or gives up makes it send CANCEL, and the server kills the request's process.

  ## Stopping

  A server that stops takes no new connections and no new calls (GOAWAY), lets what it has begun end, for at most
  `:drain` ms (5,000), and closes. Calls that it did not begin are `:closed` for their callers, and made again on
  another connection, which the pool makes at once; those that had no time to end are `:tcp_closed`. So servers behind
  a mesh or a balancer can be restarted one after the other under load.

  ## Without mesh, agent or node names

  An address is all that two VMs need: `{:uds, path}`, `{:tcp, ip, port}`, or one end of a relay like `ssh -L`.
  `examples/rpc` is that.
  """

  @doc """
  Prints the events of clients and servers whose `:telemetry_prefix` is this one: errors with level `:error`, others
  with `:debug`. For development.

  `id` names the handler, default the last element of the prefix. Any prefix will do. Without the application
  `:telemetry` it works too.
  """
  @spec attach_telemetry([atom()], term()) :: :ok
  def attach_telemetry(telemetry_prefix, id \\ nil),
    do: MeshxRpc.Telemetry.attach(telemetry_prefix, id)

  @doc "Ends what `attach_telemetry/2` began."
  @spec detach_telemetry(term()) :: :ok | {:error, :not_found}
  def detach_telemetry(id), do: MeshxRpc.Telemetry.detach(id)
end
