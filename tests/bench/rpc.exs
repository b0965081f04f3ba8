# One VM of `make bench-rpc`: a server or a client of one kind of RPC, told what to do line by line.
#
#   rpc.exs server erpc                      ready OSPID NODE
#   rpc.exs server rpc CHECKSUM CODEC        ready OSPID PORT
#   rpc.exs server mesh CHECKSUM             ready OSPID SERVICE
#   rpc.exs server socket                    ready OSPID PORT
#   rpc.exs client erpc NODE
#   rpc.exs client rpc CHECKSUM CODEC PORT
#   rpc.exs client mesh CHECKSUM SERVICE
#   rpc.exs client socket PORT               ready OSPID client
#
#   settle                       collects garbage                 -> done
#   slice                        the longest call of the NIF since -> done NANOSECONDS
#   run PAYLOAD CALLERS MS       echoes in a loop                 -> done CALLS MICROSECONDS
#   mixed PAYLOAD MS             64 B beside a loop of PAYLOAD    -> done P50 P99 BULK_CALLS MICROSECONDS (of small calls)
#
# Whatever fails ends the VM: a wrong answer is not a measurement.

defmodule Bench.Server do
  def echo(argument), do: argument
end

# What two VMs can do with sockets: one for each caller, a process behind it, nothing else.
defmodule Bench.Socket do
  @size 262_144
  @options [:binary, packet: 4, active: false, nodelay: true] ++
             [buffer: @size, recbuf: @size, sndbuf: @size]

  def listen do
    {:ok, listen} = :gen_tcp.listen(0, [ip: {127, 0, 0, 1}, backlog: 128] ++ @options)
    {:ok, port} = :inet.port(listen)
    spawn_link(fn -> accept(listen) end)
    port
  end

  defp accept(listen) do
    {:ok, socket} = :gen_tcp.accept(listen)
    server = spawn(fn -> receive(do: (:go -> serve(socket))) end)
    :ok = :gen_tcp.controlling_process(socket, server)
    send(server, :go)
    accept(listen)
  end

  defp serve(socket) do
    with {:ok, bytes} <- :gen_tcp.recv(socket, 0) do
      :ok = :gen_tcp.send(socket, bytes |> decode() |> Bench.Server.echo() |> encode())
      serve(socket)
    end
  end

  def call(port, argument) do
    socket = Process.get(:socket) || connect(port)
    :ok = :gen_tcp.send(socket, encode(argument))
    {:ok, bytes} = :gen_tcp.recv(socket, 0)
    decode(bytes)
  end

  # It goes with the caller.
  defp connect(port) do
    {:ok, socket} = :gen_tcp.connect({127, 0, 0, 1}, port, @options)
    Process.put(:socket, socket)
    socket
  end

  defp encode(binary) when is_binary(binary), do: [0 | binary]
  defp encode(term), do: [1 | :erlang.term_to_iovec(term)]
  defp decode(<<0, binary::binary>>), do: binary
  defp decode(<<1, bytes::binary>>), do: :erlang.binary_to_term(bytes, [:safe])
end

defmodule Bench do
  @timeout 30_000

  def server(["erpc"]), do: node()

  def server(["rpc", checksum, codec]) do
    options = [address: {:tcp, {127, 0, 0, 1}, 0}] ++ options(checksum, codec)
    {:ok, _pid} = MeshxRpc.Server.Pool.start_link(Bench.Server, options)
    {:ok, {:tcp, _ip, port}} = MeshxRpc.Server.Pool.address(Bench.Server)
    port
  end

  def server(["mesh", checksum]) do
    mesh = [adapter: Meshx.Agent, service: "bench-rpc"]
    options = [mesh: mesh] ++ options(checksum, "nif")
    {:ok, _pid} = MeshxRpc.Server.Pool.start_link(Bench.Server, options)
    await(fn -> match?({:ok, _}, MeshxRpc.Server.Pool.address(Bench.Server)) end)
    "bench-rpc"
  end

  def server(["socket"]), do: Bench.Socket.listen()

  def client(["erpc", node]) do
    node = String.to_atom(node)
    await(fn -> Node.connect(node) end)
    &:erpc.call(node, Bench.Server, :echo, [&1], @timeout)
  end

  def client(["rpc", checksum, codec, port]) do
    address = {:tcp, {127, 0, 0, 1}, String.to_integer(port)}
    rpc([address: address] ++ options(checksum, codec))
  end

  def client(["mesh", checksum, service]) do
    rpc([mesh: [adapter: Meshx.Agent, service: service]] ++ options(checksum, "nif"))
  end

  def client(["socket", port]) do
    port = String.to_integer(port)
    &Bench.Socket.call(port, &1)
  end

  defp rpc(options) do
    {:ok, _pid} = MeshxRpc.Client.Pool.start_link(:bench, [pool_opts: [size: 1]] ++ options)
    await(fn -> MeshxRpc.Client.Pool.info(:bench).connected == 1 end)

    fn argument ->
      case MeshxRpc.Client.Pool.call(:bench, :echo, argument, @timeout, 0) do
        {:error_rpc, reason} -> exit({:error_rpc, reason})
        result -> result
      end
    end
  end

  defp options(checksum, codec) do
    codec = %{"nif" => MeshxRpc.Codec.Nif, "elixir" => MeshxRpc.Codec.Elixir}[codec]
    # 16 callers with 16 MiB each are more than the defaults admit.
    [checksum: String.to_atom(checksum), codec: codec, max_queue: 1_073_741_824]
  end

  defp await(condition, left \\ 500) do
    cond do
      condition.() -> :ok
      left == 0 -> exit(:not_ready)
      true -> Process.sleep(20) && await(condition, left - 1)
    end
  end

  def payload("maps:" <> count),
    do: for(i <- 1..String.to_integer(count), do: %{id: i, name: "n#{i}", ok: rem(i, 2) == 0})

  def payload("reply"), do: {:ok, %{id: 17, body: :crypto.strong_rand_bytes(1024)}}
  def payload(size), do: :crypto.strong_rand_bytes(String.to_integer(size))

  def run(call, payload, callers, ms) do
    argument = payload(payload)
    ^argument = call.(argument)
    start = System.monotonic_time()
    until = start + System.convert_time_unit(ms, :millisecond, :native)

    counts = together(List.duplicate(fn -> repeat(call, argument, until, 0) end, callers))
    "done #{Enum.sum(counts)} #{since(start)}"
  end

  def mixed(call, payload, ms) do
    {small, large} = {payload("64"), payload(payload)}
    ^large = call.(large)
    start = System.monotonic_time()
    until = start + System.convert_time_unit(ms, :millisecond, :native)

    [times, bulk] =
      together([fn -> timed(call, small, until, []) end, fn -> repeat(call, large, until, 0) end])

    took = since(start)
    times = times |> Enum.sort() |> List.to_tuple()
    at = fn part -> micros(elem(times, trunc((tuple_size(times) - 1) * part))) end
    "done #{at.(0.5)} #{at.(0.99)} #{bulk} #{took}"
  end

  defp repeat(call, argument, until, count) do
    _ = call.(argument)
    if System.monotonic_time() < until, do: repeat(call, argument, until, count + 1), else: count + 1
  end

  defp timed(call, argument, until, times) do
    before = System.monotonic_time()
    _ = call.(argument)
    now = System.monotonic_time()
    times = [now - before | times]
    if now < until, do: timed(call, argument, until, times), else: times
  end

  # Every function in a process of its own; a failure of one is a failure of all.
  defp together(functions) do
    functions |> Enum.map(&Task.async/1) |> Task.await_many(:infinity)
  end

  defp since(start), do: micros(System.monotonic_time() - start)
  defp micros(native), do: System.convert_time_unit(native, :native, :microsecond)

  def settle do
    Enum.each(Process.list(), &:erlang.garbage_collect/1)
    "done"
  end

  def loop(call) do
    case IO.read(:stdio, :line) do
      line when is_binary(line) ->
        answer =
          case String.split(line) do
            ["settle"] -> settle()
            ["slice"] -> "done #{MeshxRpc.Codec.Nif.longest_slice()}"
            ["run", payload, callers, ms] -> run(call, payload, int(callers), int(ms))
            ["mixed", payload, ms] -> mixed(call, payload, int(ms))
          end

        IO.puts(answer)
        loop(call)

      _closed ->
        System.halt(0)
    end
  end

  defp int(text), do: String.to_integer(text)
end

ready = fn text -> IO.puts("ready #{System.pid()} #{text}") end
if hd(tl(System.argv())) != "erpc", do: {:ok, _} = Application.ensure_all_started(:meshx)

case System.argv() do
  ["server" | arguments] ->
    ready.(Bench.server(arguments))
    Bench.loop(nil)

  ["client" | arguments] ->
    call = Bench.client(arguments)
    ready.("client")
    Bench.loop(call)
end
