defmodule Copy do
  @moduledoc """
  Copies files of any size between two VMs, piece by piece: memory stays the same whatever their size.
  """

  @piece 262_144

  defmodule Server do
    use MeshxRpc.Server

    @doc "The file's pieces."
    def read(name), do: Copy.pieces(path!(name))

    @doc "Writes the pieces; how many bytes they were."
    def write({name, pieces}), do: Copy.write(path!(name), pieces)

    # Names only: nobody reaches out of the directory.
    defp path!(name) do
      unless is_binary(name) and name != "" and Path.basename(name) == name and
               name not in [".", ".."],
             do: raise(ArgumentError, "#{inspect(name)} is not the name of a file")

      Path.join(:persistent_term.get(Copy), name)
    end
  end

  defmodule Client do
    use MeshxRpc.Client
  end

  @doc "Offers the files of a directory until its input ends."
  def serve(address, directory) do
    :persistent_term.put(Copy, directory)
    children = [{Server, address: address(address)}]
    {:ok, _pid} = Supervisor.start_link(children, strategy: :one_for_one)
    IO.puts("serving #{directory} at #{address}")
    IO.read(:stdio, :line)
    report("server")
  end

  @doc "Fetches a file."
  def get(address, name, to),
    do: timed(address, fn -> write(to, Client.stream(:read, name, window: 4 * 1_048_576)) end)

  @doc "Sends a file."
  def put(address, from, name),
    do: timed(address, fn -> Client.call!(:write, {name, MeshxRpc.Stream.new(pieces(from))}) end)

  @doc "A file as a lazy Enumerable of binaries."
  def pieces(path) do
    Stream.resource(
      fn -> File.open!(path, [:read, :raw, :binary]) end,
      fn file ->
        case :file.read(file, @piece) do
          {:ok, bytes} -> {[bytes], file}
          :eof -> {:halt, file}
          {:error, reason} -> raise File.Error, reason: reason, action: "read", path: path
        end
      end,
      &File.close/1
    )
  end

  @doc "Writes pieces to a file."
  def write(path, pieces) do
    file = File.open!(path, [:write, :raw, :binary])

    try do
      Enum.reduce(pieces, 0, fn piece, size ->
        :ok = :file.write(file, piece)
        size + byte_size(piece)
      end)
    after
      File.close(file)
    end
  end

  defp timed(address, copy) do
    children = [{Client, address: address(address), pool_opts: [size: 1]}]
    {:ok, _pid} = Supervisor.start_link(children, strategy: :one_for_one)
    {microseconds, bytes} = :timer.tc(copy)
    IO.puts("#{bytes} bytes, #{round(bytes / microseconds)} MB/s")
    report("client")
  end

  # The most memory that the operating system ever gave this VM.
  defp report(who) do
    with {:ok, status} <- File.read("/proc/self/status"),
         [_, kib] <- Regex.run(~r/VmHWM:\s+(\d+) kB/, status),
         do: IO.puts("#{who}: at most #{div(String.to_integer(kib), 1_024)} MiB of memory")

    :ok
  end

  # "127.0.0.1:4040", or the path of a Unix socket
  defp address(text) do
    with [host, port] <- String.split(text, ":"),
         {:ok, ip} <- :inet.parse_address(to_charlist(host)) do
      {:tcp, ip, String.to_integer(port)}
    else
      _path -> {:uds, text}
    end
  end
end
