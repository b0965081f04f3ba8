defmodule MeshxRpc.Traceparent do
  @moduledoc false
  # W3C Trace Context's `traceparent`, from a caller to the function that it calls: behind the argument, with its
  # length in the last byte. Only on connections whose hello agreed on it, so others pay nothing.

  @key :"$meshx_rpc_traceparent"

  @doc "Asks the user's function, in the caller's process."
  @spec ask(nil | {module(), atom(), [term()]}) :: binary() | nil
  def ask(nil), do: nil

  def ask({module, fun, args}) do
    text = apply(module, fun, args)
    if valid?(text), do: text
  catch
    # A trace is no reason to fail a call.
    _kind, _reason -> nil
  end

  @doc "The message with it at its end."
  @spec append(MeshxRpc.Term.encoded(), binary() | nil) :: MeshxRpc.Term.encoded()
  def append({flag, iovec, size}, nil), do: {flag, iovec ++ [<<0>>], size + 1}

  def append({flag, iovec, size}, text) do
    length = byte_size(text)
    {flag, iovec ++ [<<text::binary, length>>], size + length + 1}
  end

  @doc "The message without it."
  @spec split(binary()) :: {:ok, binary(), binary() | nil} | :error
  def split(bytes) when bytes != "" do
    length = :binary.last(bytes)
    size = byte_size(bytes) - length - 1

    if size >= 0 do
      text = binary_part(bytes, size, length)
      {:ok, binary_part(bytes, 0, size), if(valid?(text), do: :binary.copy(text))}
    else
      :error
    end
  end

  def split(_empty), do: :error

  @doc "For the function that runs in this process."
  @spec put(binary() | nil) :: :ok
  def put(nil), do: :ok

  def put(text) do
    Process.put(@key, text)
    :ok
  end

  @spec get() :: binary() | nil
  def get, do: Process.get(@key)

  # version-trace_id-parent_id-flags in lower hexadecimal digits; later versions may add fields. What is longer than
  # a length can say, or has other characters, is none.
  defp valid?(
         <<version::binary-2, ?-, trace::binary-32, ?-, parent::binary-16, ?-, flags::binary-2,
           more::binary>>
       )
       when byte_size(more) <= 200 do
    version != "ff" and (more == "" or (version != "00" and match?(<<?-, _::binary>>, more))) and
      Enum.all?([version, trace, parent, flags], &hex?/1) and trace != String.duplicate("0", 32) and
      parent != String.duplicate("0", 16) and printable?(more)
  end

  defp valid?(_other), do: false

  defp hex?(text), do: for(<<c <- text>>, c not in ?0..?9 and c not in ?a..?f, do: c) == []
  defp printable?(text), do: for(<<c <- text>>, c not in ?!..?~, do: c) == []
end
