defmodule MeshxRpc.Server.Task do
  @moduledoc false
  # The process of one request: decodes its argument, runs the function, hands the result to the connection
  # as `{:done, pid, stream, status, encoded}`. It is linked to the connection, which ends it by killing it.

  alias MeshxRpc.{Message, Term}
  alias MeshxRpc.Server.Internal

  @spec start(pos_integer(), atom() | {:internal, atom()}, byte(), binary(), map()) :: pid()
  def start(stream, fun, flag, argument, config) do
    connection = self()
    :erlang.spawn_opt(fn -> run(connection, stream, fun, flag, argument, config) end, [:link])
  end

  defp run(connection, stream, {:internal, name}, flag, argument, config) do
    send(connection, {:done, self(), stream, internal(name, flag, argument, config)})
  end

  defp run(connection, stream, fun, flag, argument, config) do
    done =
      case Message.decode(config.message, config.codec, flag, argument, config.guard) do
        {:ok, argument} -> call(config, fun, argument)
        {:error, :refused} -> {:refused_term, nil}
        {:error, :invalid_cks} -> {:invalid_cks, nil}
        {:error, reason} -> {:error, Term.encode_error(reason)}
      end

    send(connection, {:done, self(), stream, done})
  end

  # Its argument is bytes, which no serializer of the user's made.
  defp internal(name, flag, argument, config) do
    Internal.run(name, flag, argument, config)
  catch
    kind, reason -> {:error, Term.encode_error(Term.failure(kind, reason, __STACKTRACE__))}
  end

  defp call(config, fun, argument) do
    result = apply(config.module, fun, [argument])

    case Message.encode(config.message, result) do
      {:ok, encoded} -> {:result, encoded}
      {:error, reason} -> {:error, Term.encode_error(reason)}
    end
  catch
    kind, reason -> {:error, Term.encode_error(Term.failure(kind, reason, __STACKTRACE__))}
  end
end
