defmodule MeshxRpc.Server.Internal do
  @moduledoc false
  # The functions that every server has beside those of its module: what streams and casts are made of. Their names
  # begin with a zero byte. Layouts are in docs/rpc-protocol.md.
  #
  # They run as any other request does: in a process of their own, counted, guarded, ended by CANCEL and deadline.

  alias MeshxRpc.{Message, Stream, Term}
  alias MeshxRpc.Server.{Casts, Functions, Streams}
  alias MeshxRpc.Stream.{Incoming, Producer}

  @functions %{
    "\0open" => {:internal, :open},
    "\0pull" => {:internal, :pull},
    "\0push" => {:internal, :push},
    "\0cast" => {:internal, :cast}
  }

  # Whether the result is a term or a stream.
  @call 1
  @stream 2

  @doc "Their names, for the table of what may be called."
  def functions, do: @functions

  @doc """
  Runs one. The term flag of its argument is 0: the bytes themselves. A `:reply` is an answer to us, a `:result` one to
  the user.
  """
  @spec run(atom(), byte(), binary(), map()) :: {:result | :reply | :error, Term.encoded()}
  def run(
        :open,
        0,
        <<token::binary-size(16), mode, want::32, flag, count, places::binary-size(count), fun_len,
          name::binary-size(fun_len), plain::binary>>,
        config
      )
      when mode in [@call, @stream] do
    streams = for n <- 0..(count - 1)//1, do: Incoming.new(token, n, config)

    with {:ok, fun} <- Functions.own(config, name),
         {:ok, plain} <- Message.decode(config.message, config.codec, flag, plain, config.guard),
         {:ok, argument} <- Stream.put_in(plain, :binary.bin_to_list(places), streams),
         true <- Streams.register(config.streams, token) do
      open(mode, {token, want}, config, fn -> apply(config.module, fun, [argument]) end)
    else
      :error -> {:error, Term.encode_error(Term.undef(config.module, name))}
      {:error, :refused} -> {:error, Term.encode_error(:serialization_fail)}
      {:error, reason} -> {:error, Term.encode_error(reason)}
      _misplaced_or_taken -> invalid()
    end
  end

  def run(:pull, 0, <<token::binary-size(16), number::32>>, config) do
    case Producer.pull(config.streams, token, number) do
      {:ok, iovec, size} -> {:reply, {0, iovec, size}}
      # The answer of the call itself says how it ended.
      :over -> {:reply, {0, [], 0}}
    end
  end

  def run(:push, 0, <<token::binary-size(16), index, number::32, status, pieces::binary>>, config)
      when status in 0..2 do
    pid = Streams.whereis(config.streams, token)
    Incoming.push(pid, token, index, number, {status, pieces})
    {:reply, {0, [], 0}}
  end

  def run(:cast, 0, argument, config) do
    case Casts.run(config, argument) do
      {:ok, answer} -> {:reply, Term.encode(answer)}
      {:error, reason} -> {:error, Term.encode_error(reason)}
    end
  end

  def run(_name, _flag, _argument, _config), do: invalid()

  defp open(@call, _token, config, fun) do
    case Message.encode(config.message, fun.()) do
      {:ok, encoded} -> {:result, encoded}
      {:error, reason} -> {:error, Term.encode_error(reason)}
    end
  end

  defp open(@stream, {token, want}, config, fun),
    do: {:result, Term.encode(Producer.run(token, want, config, fun))}

  defp invalid, do: {:error, Term.encode_error(:invalid_state)}
end
