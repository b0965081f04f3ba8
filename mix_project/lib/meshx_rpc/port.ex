defmodule MeshxRpc.Port do
  @moduledoc false
  # Writing to a socket's port without waiting in it, which `gen_tcp:send` would do.
  #
  # What `inet_drv` takes differs: up to OTP 25 it is the bytes; later they begin with the size of a reference in 16
  # bits and the reference, which comes back with the port's reply. No reference, no reply: a socket that is lost says
  # so by `tcp_closed` or `tcp_error` in either case. Which of the two this VM has is tried once.

  # A plain atom: it is looked up for each write.
  @head __MODULE__
  @no_reference <<0::16>>

  @doc "False: the port is busy, and nothing was taken. Raises `ArgumentError` when it is closed."
  @spec command(port(), iodata()) :: boolean()
  def command(socket, bytes) do
    case :persistent_term.get(@head, nil) do
      "" -> :erlang.port_command(socket, bytes, [:nosuspend])
      nil -> command(socket, bytes, prepare())
      head -> :erlang.port_command(socket, [head | bytes], [:nosuspend])
    end
  end

  defp command(socket, bytes, :ok), do: command(socket, bytes)

  @doc "Finds out what this VM wants. Who is not the first waits for the first."
  @spec prepare() :: :ok
  def prepare do
    find = fn ->
      if :persistent_term.get(@head, nil) == nil, do: :persistent_term.put(@head, head())
    end

    :global.trans({@head, self()}, find, [node()])
    :ok
  end

  defp head do
    case first_byte() do
      {:ok, "x"} -> @no_reference
      {:ok, _size} -> ""
      # Without a loopback to try it on.
      {:error, _reason} -> if System.otp_release() >= "26", do: @no_reference, else: ""
    end
  end

  # What arrives of an empty reference and an "x".
  defp first_byte do
    options = [:binary, active: false, ip: {127, 0, 0, 1}]

    with {:ok, listen} <- :gen_tcp.listen(0, options),
         {:ok, port} <- :inet.port(listen),
         {:ok, from} <- :gen_tcp.connect({127, 0, 0, 1}, port, [:binary, active: false], 1_000),
         {:ok, to} <- :gen_tcp.accept(listen, 1_000) do
      true = :erlang.port_command(from, [@no_reference, "x"])
      seen = :gen_tcp.recv(to, 1, 1_000)
      Enum.each([from, to, listen], &:gen_tcp.close/1)
      forget(from)
      seen
    end
  end

  defp forget(socket) do
    receive do
      {:inet_reply, ^socket, _status} -> :ok
    after
      0 -> :ok
    end
  end
end
