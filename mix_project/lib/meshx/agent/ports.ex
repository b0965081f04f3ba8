defmodule Meshx.Agent.Ports do
  @moduledoc false
  # Free TCP ports of a range, one after the other, so that an address that somebody still remembers leads to nobody
  # else for as long as can be.

  @doc "A port that is not in `taken` and that can be listened on, from `next` on, and where to look the next time."
  @spec find(:inet.ip_address(), Range.t(), :up | :down, nil | integer(), MapSet.t()) ::
          {:ok, :inet.port_number(), integer()} | {:error, :in_use | :inet.posix()}
  def find(ip, first..last//1, direction, next, taken) do
    size = last - first + 1
    step = if direction == :up, do: 1, else: -1
    start = next || if direction == :up, do: first, else: last

    0..(size - 1)
    |> Stream.map(&(first + Integer.mod(start - first + &1 * step, size)))
    |> Stream.reject(&MapSet.member?(taken, &1))
    |> Enum.find_value({:error, :in_use}, fn port ->
      case listen(ip, port) do
        :ok -> {:ok, port, port + step}
        # Of this port; whatever else is wrong is so with all of them.
        {:error, reason} when reason in [:eaddrinuse, :eacces] -> nil
        {:error, reason} -> {:error, reason}
      end
    end)
  end

  defp listen(ip, port) do
    family = if tuple_size(ip) == 8, do: :inet6, else: :inet

    with {:ok, socket} <- :gen_tcp.listen(port, [family, ip: ip, reuseaddr: true]),
         do: :gen_tcp.close(socket)
  end
end
