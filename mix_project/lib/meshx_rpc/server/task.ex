defmodule MeshxRpc.Server.Task do
  @moduledoc false
  # The process of one request: decodes its argument, runs the function, hands the result to the connection
  # as `{:done, pid, stream, status, encoded}`. It is linked to the connection, which ends it by killing it.

  alias MeshxRpc.Term

  @spec start(pos_integer(), atom(), byte(), binary(), map()) :: pid()
  def start(stream, fun, flag, argument, config) do
    connection = self()
    :erlang.spawn_opt(fn -> run(connection, stream, fun, flag, argument, config) end, [:link])
  end

  defp run(connection, stream, fun, flag, argument, config) do
    done =
      case Term.decode(config.codec, flag, argument, config.guard) do
        {:ok, argument} -> call(config.module, fun, argument)
        {:error, _why} -> {:refused_term, nil}
      end

    send(connection, {:done, self(), stream, done})
  end

  defp call(module, fun, argument) do
    result = apply(module, fun, [argument])
    {:result, Term.encode(result)}
  catch
    kind, reason -> {:error, Term.encode_error(Term.failure(kind, reason, __STACKTRACE__))}
  end
end
