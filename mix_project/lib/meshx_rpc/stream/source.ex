defmodule MeshxRpc.Stream.Source do
  @moduledoc false
  # Enumerates, and hands the pieces to a process that sends them, at most `want` bytes and a piece ahead of it. There
  # are two processes because an Enumerable may make its own wait for the next piece, and those before must not wait too.

  alias MeshxRpc.Message
  alias MeshxRpc.Stream.Pieces

  @doc "Enumerates in this process; `sender` is linked to it."
  @spec run(Enumerable.t(), pid(), Message.t(), non_neg_integer()) :: :ok
  def run(enumerable, sender, message, want) do
    key = {__MODULE__, sender}

    Enum.each(enumerable, fn piece ->
      {_iovec, size} = encoded = Pieces.encode(message, piece)
      send(sender, {__MODULE__, :piece, encoded})
      Process.put(key, ahead(sender, Process.get(key, 0) + size, want))
    end)
  end

  @doc "The sender has sent so many bytes."
  @spec taken(pid(), pos_integer()) :: :ok
  def taken(source, size) do
    send(source, {__MODULE__, :taken, self(), size})
    :ok
  end

  defp ahead(sender, bytes, want) do
    receive do
      {__MODULE__, :taken, ^sender, size} -> ahead(sender, bytes - size, want)
    after
      if(bytes >= want and bytes > 0, do: :infinity, else: 0) -> bytes
    end
  end
end
