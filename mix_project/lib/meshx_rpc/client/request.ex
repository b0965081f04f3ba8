defmodule MeshxRpc.Client.Request do
  @moduledoc false
  # One request on one connection, without waiting for it: what calls of several steps are made of.
  #
  # It is known by an alias of the asking process. Its answer is one message, which `outcome/2` recognises; after that
  # the alias is gone.

  alias MeshxRpc.Client.Pool
  alias MeshxRpc.{Message, Term}

  @type t :: reference()

  @type outcome ::
          {:result | :error, flag :: byte(), binary()} | {:failed, reason :: atom()}

  @max_fun 255
  @max_timeout 0xFFFF_FFFF
  @max_sleep 0x7FFF_FFFF

  @doc "The connection to send it on, and the largest argument that the server takes."
  @spec connection(map()) :: {:ok, pid(), non_neg_integer()} | :none
  def connection(pool), do: Pool.connection(pool)

  @doc "Sends it; `left` is how long it may take, in milliseconds."
  @spec start(pid(), binary(), timeout(), Term.encoded()) :: t()
  def start(connection, fun, left, encoded) do
    request = :erlang.monitor(:process, connection, alias: :reply_demonitor)
    send(connection, {:call, request, self(), fun, left, encoded})
    request
  end

  @doc """
  Has its connection give it up after so many milliseconds, with `:timeout`: the server, which has a deadline of its own,
  may be stopped.
  """
  @spec expire(pid(), t(), timeout()) :: reference() | nil
  def expire(_connection, _request, :infinity), do: nil

  def expire(connection, request, left),
    do: :erlang.send_after(left, connection, {:expired, self(), request})

  @doc "It is over before that: nothing is to expire."
  @spec unexpire(reference() | nil) :: :ok
  def unexpire(nil), do: :ok
  def unexpire(timer), do: :erlang.cancel_timer(timer, async: true, info: false)

  @doc "A request that could not be sent: its answer is on its way to this process."
  @spec failed(reason :: atom()) :: t()
  def failed(reason) do
    request = make_ref()
    send(self(), {request, :failed, reason})
    request
  end

  @doc "Gives it up: the server ends its work, and its answer will not come."
  @spec cancel(pid() | nil, t()) :: :ok
  def cancel(connection, request) do
    :erlang.demonitor(request, [:flush])

    # What came until the end of the alias.
    receive do
      {^request, :failed, _reason} -> :ok
      {^request, _status, _flag, _bytes} -> :ok
    after
      0 -> if connection, do: send(connection, {:cancel, self(), request})
    end

    :ok
  end

  @doc "What a message says about it, `:no` when nothing."
  @spec outcome(t(), term()) :: {:ok, outcome()} | :no
  def outcome(request, message) do
    case message do
      {^request, :failed, reason} -> {:ok, {:failed, reason}}
      {^request, status, flag, bytes} -> {:ok, {status, flag, bytes}}
      # It was gone before our message came.
      {:DOWN, ^request, :process, _pid, :noproc} -> {:ok, {:failed, :closed}}
      {:DOWN, ^request, :process, _pid, _reason} -> {:ok, {:failed, :tcp_closed}}
      _other -> :no
    end
  end

  @doc "Waits for its answer."
  @spec await(t(), timeout()) :: {:ok, outcome()} | :timeout
  def await(request, left) do
    receive do
      {^request, _failed, _reason} = message -> outcome(request, message)
      {^request, _status, _flag, _bytes} = message -> outcome(request, message)
      {:DOWN, ^request, :process, _pid, _reason} = message -> outcome(request, message)
    after
      left -> :timeout
    end
  end

  @doc "The outcome as a caller sees it."
  @spec value(outcome(), %{
          optional(atom()) => term(),
          message: Message.t(),
          codec: module(),
          guard: map()
        }) :: term() | {:error_rpc, term()}
  def value({:failed, reason}, _pool), do: {:error_rpc, reason}

  def value({:result, flag, bytes}, pool) do
    case Message.decode(pool.message, pool.codec, flag, bytes, pool.guard) do
      {:ok, term} -> term
      {:error, :refused} -> {:error_rpc, :serialization_fail}
      {:error, reason} -> {:error_rpc, Term.localize(reason)}
    end
  end

  # What went wrong is an external term, whatever the serializers.
  def value({:error, flag, bytes}, pool) do
    case Term.decode(pool.codec, flag, bytes, pool.guard) do
      {:ok, reason} -> {:error_rpc, Term.localize(reason)}
      {:error, _why} -> {:error_rpc, :serialization_fail}
    end
  end

  @doc "The moment in which a timeout that begins now is over; raises when it cannot be waited for."
  @spec until(timeout()) :: :infinity | integer()
  def until(:infinity), do: :infinity

  def until(timeout) when is_integer(timeout) and timeout <= @max_timeout,
    do: :erlang.monotonic_time(:millisecond) + timeout

  def until(timeout) do
    raise ArgumentError,
          "timeout is #{inspect(timeout)}, wanted milliseconds (at most #{@max_timeout}) or :infinity"
  end

  @doc "Raises when a request cannot be made again so often, or after such a pause."
  @spec again!(term(), term()) :: :ok
  def again!(retry, sleep)
      when is_integer(retry) and retry >= 0 and is_integer(sleep) and sleep in 0..@max_sleep,
      do: :ok

  def again!(retry, sleep) do
    raise ArgumentError,
          "retry is #{inspect(retry)} and retry_sleep #{inspect(sleep)}, " <>
            "wanted a number, 0 or more, and milliseconds (at most #{@max_sleep})"
  end

  @doc "Milliseconds until then."
  @spec left(:infinity | integer()) :: timeout()
  def left(:infinity), do: :infinity
  def left(until), do: max(until - :erlang.monotonic_time(:millisecond), 0)

  @doc "A function's name as it goes over the wire."
  @spec name!(atom() | binary()) :: binary()
  def name!(fun) when is_atom(fun), do: fun |> Atom.to_string() |> name!()
  def name!(<<first, _::binary>> = fun) when first > 0 and byte_size(fun) <= @max_fun, do: fun

  def name!(fun) do
    raise ArgumentError,
          "function name is #{inspect(fun)}, wanted an atom or a binary of 1 to #{@max_fun} bytes, the first not zero"
  end
end
