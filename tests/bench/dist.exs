# One VM of `make bench-mesh`: a node that answers, or one that sends to it, told what to do line by line.
#
#   dist.exs NODE adapter DIR [SOCKET] | dist.exs boot         ready OSPID NODE
#
# With a SOCKET its peer is found behind that.
#
#   connect NODE                 until it is there                -> done
#   bulk MS                      messages of 1 MiB, one way       -> done BYTES MICROSECONDS
#   trip MS                      64 B there and back, in turn     -> done COUNT P50 P99 (microseconds)
#   settle                       collects garbage                 -> done
#   links COUNT                  connects and disconnects         -> done COUNT MICROSECONDS
#
# Whatever fails ends the VM: a wrong answer is not a measurement.

defmodule Bench.Dist do
  @size 1_048_576
  # Messages that may be under way: enough to keep the link full, few enough to be soon over.
  @window 16

  def start(["boot"]), do: :ok

  def start([node, "adapter", dir | relay]) do
    {:ok, _} = Application.ensure_all_started(:meshx)
    Application.put_env(:bench, :relay, relay)
    adapter = if relay == [], do: SocketDir, else: Bench.Relayed
    Application.put_env(:meshx_node, :mesh_adapter, adapter)
    {:ok, _pid} = SocketDir.start_link(dir: dir)
    {:ok, _pid} = MeshxNode.start(String.to_atom(node), :bench)
    :ok
  end

  def connect(node, left \\ 500) do
    cond do
      Node.connect(node) == true -> put_node(node)
      left == 0 -> exit(:not_connected)
      true -> Process.sleep(20) && connect(node, left - 1)
    end
  end

  defp put_node(node) do
    Application.put_env(:bench, :peer, node)
    "done"
  end

  defp peer, do: Application.fetch_env!(:bench, :peer)

  @doc "Answers every message with its size, or with itself when it is small."
  def echo(from) do
    receive do
      blob when byte_size(blob) > 64 -> send(from, byte_size(blob))
      blob -> send(from, blob)
    end

    echo(from)
  end

  def bulk(ms) do
    blob = :crypto.strong_rand_bytes(@size)
    far = far()
    start = System.monotonic_time()
    for _ <- 1..@window, do: send(far, blob)
    until = start + native(ms)
    bytes = flow(far, blob, until, 0)
    took = micros(System.monotonic_time() - start)
    # What is still under way belongs to nobody.
    for _ <- 1..@window, do: receive(do: (@size -> :ok))
    Process.exit(far, :kill)
    "done #{bytes} #{took}"
  end

  defp flow(far, blob, until, bytes) do
    receive do
      @size -> send(far, blob)
    end

    bytes = bytes + @size
    if System.monotonic_time() < until, do: flow(far, blob, until, bytes), else: bytes
  end

  def trip(ms) do
    blob = :crypto.strong_rand_bytes(64)
    far = far()
    times = trips(far, blob, System.monotonic_time() + native(ms), []) |> Enum.sort() |> List.to_tuple()
    Process.exit(far, :kill)
    at = fn part -> Float.round(elem(times, trunc((tuple_size(times) - 1) * part)) / 1000, 1) end
    "done #{tuple_size(times)} #{at.(0.5)} #{at.(0.99)}"
  end

  defp trips(far, blob, until, times) do
    before = System.monotonic_time()
    send(far, blob)
    receive(do: (^blob -> :ok))
    now = System.monotonic_time()
    times = [System.convert_time_unit(now - before, :native, :nanosecond) | times]
    if now < until, do: trips(far, blob, until, times), else: times
  end

  def links(count) do
    start = System.monotonic_time()

    for _ <- 1..count do
      true = Node.disconnect(peer())
      true = Node.connect(peer())
    end

    "done #{count} #{micros(System.monotonic_time() - start)}"
  end

  defp far, do: Node.spawn(peer(), __MODULE__, :echo, [self()])
  defp native(ms), do: System.convert_time_unit(ms, :millisecond, :native)
  defp micros(native), do: System.convert_time_unit(native, :native, :microsecond)

  def settle do
    Enum.each(Process.list(), &:erlang.garbage_collect/1)
    "done"
  end

  def loop do
    case IO.read(:stdio, :line) do
      line when is_binary(line) ->
        answer =
          case String.split(line) do
            ["connect", node] -> connect(String.to_atom(node))
            ["bulk", ms] -> bulk(String.to_integer(ms))
            ["trip", ms] -> trip(String.to_integer(ms))
            ["links", count] -> links(String.to_integer(count))
            ["settle"] -> settle()
          end

        IO.puts(answer)
        loop()

      _closed ->
        System.halt(0)
    end
  end
end

defmodule Bench.Relayed do
  defdelegate start(params, template, force_registration?, timeout), to: SocketDir
  defdelegate stop(service_id), to: SocketDir
  defdelegate disconnect(upstreams, proxy_id, restart_proxy?), to: SocketDir

  def connect(upstreams, _template, _proxy) do
    [socket] = Application.fetch_env!(:bench, :relay)
    {:ok, for(_ <- upstreams, do: {:ok, {:uds, socket}})}
  end
end

if match?([_, "adapter" | _], System.argv()) do
  Code.require_file("../../examples/adapter/lib/socket_dir.ex", __DIR__)
end

:ok = Bench.Dist.start(System.argv())
IO.puts("ready #{System.pid()} #{node()}")
Bench.Dist.loop()
