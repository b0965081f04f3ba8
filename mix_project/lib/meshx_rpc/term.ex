defmodule MeshxRpc.Term do
  @moduledoc false
  # Arguments, results and failures as bytes, and back: nothing of a peer is decoded before its guard has
  # looked through it, and no atom is made.

  @raw 0
  @external 1

  @type encoded :: {flag :: byte(), iovec :: [binary()], size :: non_neg_integer()}

  @doc "A binary goes as it is, everything else as an external term."
  @spec encode(term()) :: encoded()
  def encode(binary) when is_binary(binary), do: {@raw, [binary], byte_size(binary)}

  def encode(term) do
    iovec = :erlang.term_to_iovec(term)
    {@external, iovec, :erlang.iolist_size(iovec)}
  end

  @doc "As `encode/1`, for the reason of a failure: always an external term."
  @spec encode_error(term()) :: encoded()
  def encode_error(reason) do
    iovec = :erlang.term_to_iovec(reason)
    {@external, iovec, :erlang.iolist_size(iovec)}
  end

  @spec decode(module(), byte(), binary(), policy :: map()) :: {:ok, term()} | {:error, term()}
  def decode(_codec, @raw, binary, _policy), do: {:ok, binary}

  def decode(codec, @external, binary, policy) do
    codec.decode(binary, policy)
  rescue
    ArgumentError -> {:error, "it has atoms that this VM does not know, or is malformed"}
  end

  def decode(_codec, flag, _binary, _policy),
    do: {:error, "its serializer is #{flag}, wanted 0 or 1"}

  @doc """
  What went wrong while a function ran, as the `reason` of `{:error_rpc, reason}`.

  A stack trace has modules and functions that the caller's VM need not know, so their names go as
  binaries; arguments stay here.
  """
  @spec failure(:error | :exit | :throw, term(), Exception.stacktrace()) :: term()
  def failure(:error, %{__exception__: true} = exception, _stack), do: exception
  def failure(:error, reason, stack), do: {reason, portable(stack)}
  def failure(:throw, value, stack), do: {{:nocatch, value}, portable(stack)}
  def failure(:exit, reason, _stack), do: reason

  @doc "As `failure/3`, for a request that another process took with it: what that one failed with has a stack too."
  @spec exit_reason(term()) :: term()
  def exit_reason({reason, stack} = whole) when length(stack) > 0 do
    cond do
      not Enum.all?(stack, &entry?/1) -> whole
      is_exception(reason) -> reason
      true -> {reason, portable(stack)}
    end
  end

  def exit_reason(reason), do: reason

  @doc "The reason as its caller sees it: names in stack traces are atoms again where this VM knows them."
  @spec localize(term()) :: term()
  # These say what became of the request, and decide whether a call is made again: a function that exits with one of
  # them, or a serializer that fails with it, says no such thing.
  def localize(reason) when reason in [:closed, :tcp_closed, :full], do: {:exit, reason}

  def localize({reason, stack}) when length(stack) > 0,
    do: {reason, Enum.map(stack, &localize_entry/1)}

  def localize(reason), do: reason

  @doc "The failure of a function that this server does not offer."
  @spec undef(module(), binary()) :: term()
  def undef(module, fun), do: {:undef, [{Atom.to_string(module), fun, 1, []}]}

  defp portable(stack) do
    for {module, fun, arity, location} <- stack do
      arity = if is_list(arity), do: length(arity), else: arity
      fun = if is_atom(fun), do: Atom.to_string(fun), else: "fun"
      {Atom.to_string(module), fun, arity, Keyword.take(location, [:file, :line])}
    end
  end

  defp entry?({module, _fun, arity, location}),
    do:
      is_atom(module) and (is_integer(arity) or (is_list(arity) and not List.improper?(arity))) and
        Keyword.keyword?(location)

  defp entry?(_other), do: false

  defp localize_entry({module, fun, arity, location}) when is_binary(module) and is_binary(fun),
    do: {known_atom(module), known_atom(fun), arity, location}

  defp localize_entry(entry), do: entry

  defp known_atom(name) do
    String.to_existing_atom(name)
  rescue
    ArgumentError -> name
  end
end
