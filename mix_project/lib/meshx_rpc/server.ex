defmodule MeshxRpc.Server do
  @moduledoc """
  Offers the functions of a module to remote callers.

      defmodule MyApp.Api do
        use MeshxRpc.Server, address: {:tcp, {127, 0, 0, 1}, 4000}

        def echo(argument), do: argument
      end

      Supervisor.start_link([MyApp.Api], strategy: :one_for_one)

  A call runs `apply(MyApp.Api, function, [argument])` in a process of its own. What may be called is
  every function that the module exports with one argument, or those of them that `:functions` names;
  `child_spec/1`, `module_info/1` and other injected ones never, nor what OTP calls (`init/1` of a GenServer).

  A call whose caller died, gave up or passed its deadline is ended by killing that process.

  Options of `use` and of `child_spec/1` are merged, the latter win:

  #{Meshx.Options.docs(MeshxRpc.Options.server())}

  `:guard` has the keys of `MeshxRpc.Guard`.

  A server that cannot be reached from other hosts - a Unix socket (mode 0600), a loopback address, a
  mesh - may do without `:shared_key`; one that can refuses to start without it.
  """

  @doc """
  The W3C `traceparent` that came with the request that this process runs, or nil.

  It is the caller's: well-formed, and not to be trusted. A client sends one when it has the option `:traceparent`.
  """
  @spec traceparent() :: binary() | nil
  def traceparent, do: MeshxRpc.Traceparent.get()

  @doc "What `use` defines."
  @callback child_spec(options :: keyword()) :: Supervisor.child_spec()
  @optional_callbacks child_spec: 1

  @doc false
  defmacro __using__(options) do
    quote bind_quoted: [options: options] do
      @meshx_rpc_options options

      @doc "A child specification of the server; `options` are added to those of `use MeshxRpc.Server`."
      def child_spec(options \\ []) do
        MeshxRpc.Server.Pool.child_spec(__MODULE__, Keyword.merge(@meshx_rpc_options, options))
      end

      defoverridable child_spec: 1
    end
  end
end
