defmodule MeshxRpc.Client.Async do
  @moduledoc """
  Calls whose results are fetched later, in the manner of `:erpc.send_request/4`.

      a = MeshxRpc.Client.Async.send_request(:api, :total, cart)
      b = MeshxRpc.Client.Async.send_request(:api, :stock, lamp)
      {MeshxRpc.Client.Async.receive_response(a), MeshxRpc.Client.Async.receive_response(b, 5_000)}

  A request belongs to the process that made it: only that one gets the response, and when it dies the server ends the
  work. It is sent once: nothing is made again. Responses are what `call` answers with, `{:error_rpc, reason}` included. One
  that is not fetched stays in the mailbox; `abandon/1` takes it away.

  Collections hold requests under labels; `receive_any/2` fetches whichever comes first.
  """

  alias MeshxRpc.Client.{Pool, Request}
  alias MeshxRpc.{Message, Stream, Term, Traceparent}

  @enforce_keys [:request, :connection, :pool, :timer]
  defstruct @enforce_keys

  @opaque t :: %__MODULE__{}
  @typedoc "Requests by label."
  @opaque collection :: [{t(), label :: term()}]

  @doc """
  Sends a request and returns at once. After `timeout` ms the server ends its work and the response is
  `{:error_rpc, :timeout}`, also of a server that says nothing any more. An argument cannot have streams.
  """
  @spec send_request(atom(), atom() | String.t(), term(), timeout()) :: t()
  def send_request(name, fun, argument \\ [], timeout \\ :infinity) do
    name |> Pool.fetch!() |> request(Request.name!(fun), argument, Request.until(timeout))
  end

  defp request(pool, fun, argument, until) do
    if Stream.in?(argument), do: raise(ArgumentError, "a stream cannot be sent with send_request")

    {connection, request, timer} =
      with {:ok, {_flag, _iovec, size} = encoded} <- Message.encode(pool.message, argument, until),
           {:ok, pid, max, trace} when size <= max <- Pool.route(pool) do
        encoded = if trace, do: traced(pool, encoded), else: encoded
        left = Request.left(until)
        request = Request.start(pid, fun, left, encoded)
        {pid, request, Request.expire(pid, request, left)}
      else
        {:error, reason} -> {nil, Request.failed(Term.localize(reason)), nil}
        {:ok, _pid, _max, _trace} -> {nil, Request.failed(:error_too_long), nil}
        :none -> {nil, Request.failed(:closed), nil}
      end

    pool = Map.take(pool, [:codec, :guard, :message])
    %__MODULE__{request: request, connection: connection, pool: pool, timer: timer}
  end

  defp traced(pool, encoded),
    do: Traceparent.append(encoded, Traceparent.ask(pool.traceparent))

  @doc "Sends a request and adds it to a collection."
  @spec send_request(atom(), atom() | String.t(), term(), timeout(), term(), collection()) ::
          collection()
  def send_request(name, fun, argument, timeout, label, collection),
    do: add(send_request(name, fun, argument, timeout), label, collection)

  @doc "Waits for the response. After `timeout` ms the request is abandoned, with `{:error_rpc, :timeout}`."
  @spec receive_response(t(), timeout()) :: term() | {:error_rpc, term()}
  def receive_response(request, timeout \\ :infinity)

  def receive_response(%__MODULE__{} = id, timeout) do
    case Request.await(id.request, timeout) do
      {:ok, outcome} ->
        value(id, outcome)

      :timeout ->
        abandon(id)
        {:error_rpc, :timeout}
    end
  end

  @doc "Waits for the response; after `timeout` ms it can still be waited for again."
  @spec wait_response(t(), timeout()) :: {:response, term()} | :no_response
  def wait_response(%__MODULE__{} = id, timeout \\ 0) do
    case Request.await(id.request, timeout) do
      {:ok, outcome} -> {:response, value(id, outcome)}
      :timeout -> :no_response
    end
  end

  @doc "Whether a message that the process received is the response."
  @spec check_response(term(), t()) :: {:response, term()} | :no_response
  def check_response(message, %__MODULE__{} = id) do
    case Request.outcome(id.request, message) do
      {:ok, outcome} -> {:response, value(id, outcome)}
      :no -> :no_response
    end
  end

  @doc "Gives a request up: the server ends its work."
  @spec abandon(t()) :: :ok
  def abandon(%__MODULE__{} = id) do
    Request.unexpire(id.timer)
    Request.cancel(id.connection, id.request)
  end

  defp value(id, outcome) do
    Request.unexpire(id.timer)
    Request.value(outcome, id.pool)
  end

  @doc "An empty collection."
  @spec new() :: collection()
  def new, do: []

  @doc "Adds a request."
  @spec add(t(), term(), collection()) :: collection()
  def add(%__MODULE__{} = id, label, collection), do: [{id, label} | collection]

  @doc "How many requests a collection has."
  @spec size(collection()) :: non_neg_integer()
  def size(collection), do: length(collection)

  @doc """
  Waits for the first response of a collection and says which it was. After `timeout` ms nothing is abandoned.
  """
  @spec receive_any(collection(), timeout()) ::
          {term(), label :: term(), collection()} | :no_request | :timeout
  def receive_any(collection, timeout \\ :infinity)
  def receive_any([], _timeout), do: :no_request

  def receive_any(collection, timeout) do
    ids = Map.new(collection, fn {id, label} -> {id.request, {id, label}} end)

    receive do
      {request, _, _} = message when is_map_key(ids, request) ->
        any(ids, request, message)

      {request, _, _, _} = message when is_map_key(ids, request) ->
        any(ids, request, message)

      {:DOWN, request, _, _, _} = message when is_map_key(ids, request) ->
        any(ids, request, message)
    after
      timeout -> :timeout
    end
  end

  defp any(ids, request, message) do
    {{id, label}, rest} = Map.pop!(ids, request)
    {:response, response} = check_response(message, id)
    {response, label, Map.values(rest)}
  end

  @doc """
  Calls the same function through several pools at once and waits for all: the results in the order of the pools.
  """
  @spec multicall([atom()], atom() | String.t(), term(), timeout()) :: [term()]
  def multicall(pools, fun, argument \\ [], timeout \\ :infinity) do
    until = Request.until(timeout)
    fun = Request.name!(fun)
    # Before the first is sent: an unknown one must not leave answers of others behind.
    pools = Enum.map(pools, &Pool.fetch!/1)
    requests = Enum.map(pools, &request(&1, fun, argument, until))
    Enum.map(requests, &receive_response(&1, Request.left(until)))
  end
end
