defmodule Meshx.ServiceMesh.Contract.Peer do
  @moduledoc false
  # A service that says its label before what it heard, and its callers. Plain sockets: a mesh carries bytes.

  alias MeshxRpc.Address

  @time 10_000

  @doc "Serves at an address until `stop/1`, or until the calling process ends."
  @spec serve(Address.t(), String.t()) :: pid()
  def serve(address, label) do
    caller = self()

    pid =
      spawn_link(fn ->
        case Address.listen(address, 64) do
          {:ok, listen, _address} ->
            send(caller, {self(), :ok})
            accept(listen, label)

          error ->
            send(caller, {self(), error})
        end
      end)

    receive do
      {^pid, :ok} -> pid
      {^pid, error} -> raise "cannot listen at #{inspect(address)}: #{inspect(error)}"
    after
      @time -> raise "no listener at #{inspect(address)}"
    end
  end

  @doc "Ends a service with all its connections."
  def stop(pid) do
    monitor = Process.monitor(pid)
    Process.unlink(pid)
    Process.exit(pid, :shutdown)
    receive do: ({:DOWN, ^monitor, :process, ^pid, _reason} -> :ok)
  end

  defp accept(listen, label) do
    {:ok, socket} = :gen_tcp.accept(listen)
    pid = spawn_link(fn -> receive(do: (:go -> echo(socket, label))) end)
    :ok = :gen_tcp.controlling_process(socket, pid)
    send(pid, :go)
    accept(listen, label)
  end

  defp echo(socket, label) do
    with {:ok, <<size::32>>} <- :gen_tcp.recv(socket, 4),
         {:ok, text} <- if(size == 0, do: {:ok, ""}, else: :gen_tcp.recv(socket, size)),
         :ok <- :gen_tcp.send(socket, framed(label <> " " <> text)),
         do: echo(socket, label)
  end

  @doc "Opens a connection."
  def open(address), do: Address.connect(address, @time)

  @doc "Says something on a connection: `{:ok, label, what was said}`, or an error when nothing comes back."
  def say(socket, text) do
    with :ok <- :gen_tcp.send(socket, framed(text)),
         {:ok, <<size::32>>} <- :gen_tcp.recv(socket, 4, @time),
         {:ok, answer} <- :gen_tcp.recv(socket, size, @time) do
      [label, text] = String.split(answer, " ", parts: 2)
      {:ok, label, text}
    end
  end

  @doc "Both on a connection of its own."
  def ask(address, text \\ "hello") do
    with {:ok, socket} <- open(address) do
      answer = say(socket, text)
      :gen_tcp.close(socket)
      answer
    end
  end

  @doc "Asks until there is the answer: a mesh may take a moment to tell everybody of a service."
  def ask_until(address, wanted), do: until(fn -> ask(address) end, wanted)

  @doc "The first wanted value of a function, or its last one."
  def until(fun, wanted, left \\ 500) do
    value = fun.()

    if wanted.(value) or left == 0 do
      value
    else
      Process.sleep(20)
      until(fun, wanted, left - 1)
    end
  end

  @doc "Whether the other side ends a connection within the time, in order or not."
  def ended?(socket, time \\ @time) do
    case :gen_tcp.recv(socket, 0, time) do
      {:error, reason} when reason in [:closed, :econnreset] -> true
      _open -> false
    end
  end

  @doc "Runs a function in a process of its own, which then ends; gives its value."
  def elsewhere(fun) do
    {pid, monitor} = spawn_monitor(fn -> exit({:value, fun.()}) end)

    receive do
      {:DOWN, ^monitor, :process, ^pid, {:value, value}} -> value
      {:DOWN, ^monitor, :process, ^pid, reason} -> {:crashed, reason}
    end
  end

  @doc "The id of a proxy. Not inline, where the compiler knows which it is."
  def proxy_id(nil), do: nil
  def proxy_id({_name, id}), do: id

  @doc "A service name that no other test has, of letters, digits and dashes."
  def name(prefix \\ "contract") do
    random = Base.encode16(:crypto.strong_rand_bytes(6), case: :lower)
    "#{prefix}-#{random}"
  end

  @doc "Milliseconds that a function takes, and its value."
  def timed(fun) do
    {time, value} = :timer.tc(fun)
    {div(time, 1_000), value}
  end

  defp framed(text), do: [<<byte_size(text)::32>>, text]
end
