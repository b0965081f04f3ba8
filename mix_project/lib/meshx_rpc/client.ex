defmodule MeshxRpc.Client do
  @moduledoc """
  Calls the functions of a `MeshxRpc.Server`.

      defmodule MyApp.ApiClient do
        use MeshxRpc.Client, address: {:tcp, {127, 0, 0, 1}, 4000}
      end

      MyApp.ApiClient.call(:echo, "hello")
      MyApp.ApiClient.call!(:sum, [1, 2, 3], 5_000)
      MyApp.ApiClient.cast(:warm_up)

  The arguments of `call`, `call!` and `cast` are the function's name, its argument (`[]`), a timeout in
  ms for the whole call (`:infinity`), how often it is made again when it certainly has not run (5), and
  the pause before that in ms (100).

  `MeshxRpc.Client.Async` calls without waiting, and through several clients at once; `MeshxRpc.Stream` tells how
  arguments and results move piece by piece.

  `call` answers with what the function returned, or with `{:error_rpc, reason}`. After `:closed` and `:full` the function
  has certainly not run; after every other reason it may have, see `may_have_run?/1`. After `:closed` a call is made again by itself. `retry_unsafe: true` makes it again after `:tcp_closed` too, as 0.1 did.

  | Reason | |
  |---|---|
  | `:closed` | no connection; the call has not run. Why is in the log and in `MeshxRpc.Client.Pool.info/1` |
  | `:tcp_closed` | the connection was lost; the call may have run |
  | `:timeout` | the timeout passed, here or there; the function was killed |
  | `:full` | a queue, the server's byte budget or its `max_concurrency` is used up; the call has not run |
  | `:unread` | the function has run, and its result found no room: other results wait to be read or taken |
  | `:killed` | the process that ran the function was killed |
  | `:invalid_cks` | a block did not arrive as it was sent |
  | `:timeout_cks` | a checksum of your own (`:cks_mfa`) took longer than `:timeout_cks` for a block: the argument's here, when the call has not run, or one there, or the result's |
  | `:error_too_long` | the argument or the result is longer than the other side takes |
  | `:serialization_fail` | the argument or the result has functions, atoms that the receiver does not know, or exceeds `MeshxRpc.Guard` |
  | `:invalid_state` | the other side broke the protocol |
  | `{:undef, stack}` | the server offers no such function |
  | an exception | the function raised it |
  | `{{:nocatch, value}, stack}` | the function threw `value` |
  | `{reason, stack}` | the function failed with an Erlang error |
  | any other term | the function called `exit` with it, or a serializer of your own failed with it; `{:exit, reason}` for `:closed`, `:tcp_closed` and `:full` |

  Modules and functions in a `stack` that this VM has no atom for are binaries.

  `call!` raises the exception, and `MeshxRpc.Error` for other reasons. `cast` always answers `:ok`.

  Options of `use` and of `child_spec/1` are merged, the latter win:

  #{Meshx.Options.docs(MeshxRpc.Options.client())}

  `:guard` has the keys of `MeshxRpc.Guard`.
  """

  @doc """
  Whether the function may have run, by the reason of `{:error_rpc, reason}`. False only when it certainly has not:
  the request was never sent whole, or the server said that it will not run it.

      iex> MeshxRpc.Client.may_have_run?(:closed)
      false
      iex> MeshxRpc.Client.may_have_run?(:tcp_closed)
      true
  """
  @spec may_have_run?(reason :: term()) :: boolean()
  def may_have_run?(reason), do: reason not in [:closed, :full]

  @doc "What `use` defines, for tests that stand in for a client."
  @callback child_spec(options :: keyword()) :: Supervisor.child_spec()
  @callback call(
              fun :: atom() | String.t(),
              args :: term(),
              timeout(),
              retry :: non_neg_integer(),
              retry_sleep :: non_neg_integer()
            ) :: term() | {:error_rpc, reason :: term()}
  @callback call!(
              fun :: atom() | String.t(),
              args :: term(),
              timeout(),
              retry :: non_neg_integer(),
              retry_sleep :: non_neg_integer()
            ) :: term()
  @callback cast(
              fun :: atom() | String.t(),
              args :: term(),
              timeout() | keyword(),
              retry :: non_neg_integer(),
              retry_sleep :: non_neg_integer()
            ) :: :ok | {:error_rpc, reason :: term()}
  @optional_callbacks child_spec: 1, call: 5, call!: 5, cast: 5

  @doc false
  defmacro __using__(options) do
    quote bind_quoted: [options: options] do
      @meshx_rpc_options options

      @doc "A child specification of the client; `options` are added to those of `use MeshxRpc.Client`."
      def child_spec(options \\ []) do
        MeshxRpc.Client.Pool.child_spec(__MODULE__, Keyword.merge(@meshx_rpc_options, options))
      end

      @doc "Calls a function of the server: see `MeshxRpc.Client`."
      def call(fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100),
        do: MeshxRpc.Client.Pool.call(__MODULE__, fun, args, timeout, retry, retry_sleep)

      @doc "As `call/5`, but raises."
      def call!(fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100),
        do: MeshxRpc.Client.Pool.call!(__MODULE__, fun, args, timeout, retry, retry_sleep)

      @doc "Starts a function of the server and does not wait for it: see `MeshxRpc.Client.Pool.cast/6`."
      def cast(fun, args \\ [], timeout \\ :infinity, retry \\ 5, retry_sleep \\ 100),
        do: MeshxRpc.Client.Pool.cast(__MODULE__, fun, args, timeout, retry, retry_sleep)

      @doc "Calls a function whose result is an Enumerable, and moves it piece by piece: see `MeshxRpc.Stream`."
      def stream(fun, args \\ [], options \\ []),
        do: MeshxRpc.Client.Pool.stream(__MODULE__, fun, args, options)

      @doc "Calls a function and does not wait: `MeshxRpc.Client.Async` fetches the result."
      def send_request(fun, args \\ [], timeout \\ :infinity),
        do: MeshxRpc.Client.Async.send_request(__MODULE__, fun, args, timeout)

      defoverridable child_spec: 1
    end
  end
end
