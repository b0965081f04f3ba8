defmodule MeshxRpc.Address do
  @moduledoc false
  # `{:tcp, ip, port}` and `{:uds, path}`: checking, listening, connecting.

  # sun_path has 108 bytes with its closing zero, on Linux.
  @max_path 107

  # Whole reads for the codec, small calls at once. The watermarks are equal so that the port is busy exactly
  # while its queue is that long: `MeshxRpc.Link` never writes then.
  @watermark 262_144
  @options [
    :binary,
    packet: :raw,
    active: false,
    buffer: 131_072,
    recbuf: 262_144,
    sndbuf: 262_144,
    high_watermark: @watermark,
    low_watermark: @watermark,
    show_econnreset: true
  ]
  # A peer whose host is gone says nothing: after 20 s of silence it is asked, and given up after a minute.
  # TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT and TCP_USER_TIMEOUT (milliseconds) of Linux.
  @probes for {option, value} <- [{4, 20}, {5, 10}, {6, 4}, {18, 60_000}],
              do: {:raw, 6, option, <<value::32-native>>}
  @tcp_options [nodelay: true, keepalive: true]
  # TCP_CONGESTION. Nothing is lost within a host, and there is nothing to share: what BBR, which many hosts have as their
  # default, does for that is to wait. Reno is part of every Linux and allowed to everyone.
  @local_options [{:raw, 6, 13, "reno"}]

  @type t :: {:tcp, :inet.ip_address(), :inet.port_number()} | {:uds, String.t()}

  @doc "Bytes in the port's queue from which on a write would have to wait."
  @spec watermark() :: pos_integer()
  def watermark, do: @watermark

  @doc "What `Meshx.Options` says of an address."
  def wanted,
    do: "{:tcp, ip, port} with an ip tuple, or {:uds, path} with a path of 1 to #{@max_path} bytes"

  @spec check(term()) :: {:ok, t()} | :error
  def check({:tcp, ip, port} = address) when is_tuple(ip) and port in 0..65_535,
    do: if(:inet.is_ip_address(ip), do: {:ok, address}, else: :error)

  def check({:uds, path} = address) when is_binary(path) and byte_size(path) in 1..@max_path,
    do: if(:binary.match(path, <<0>>) == :nomatch, do: {:ok, address}, else: :error)

  def check(_other), do: :error

  @doc "Whether only processes of this host can connect."
  @spec local?(t()) :: boolean()
  def local?({:uds, _path}), do: true
  def local?({:tcp, {127, _, _, _}, _port}), do: true
  def local?({:tcp, {0, 0, 0, 0, 0, 0, 0, 1}, _port}), do: true
  def local?({:tcp, {0, 0, 0, 0, 0, 0xFFFF, high, _}, _port}), do: div(high, 256) == 127
  def local?(_tcp), do: false

  @doc "Listens, and answers with the socket and the address that it got. `own` are options of the user's."
  @spec listen(t(), pos_integer(), list()) :: {:ok, port(), t()} | {:error, term()}
  def listen(address, backlog, own \\ [])

  def listen({:tcp, ip, port} = address, backlog, own) do
    options = [
      family(ip),
      {:ip, ip},
      {:reuseaddr, true},
      {:backlog, backlog} | tcp_options(address, own)
    ]

    with {:ok, socket} <- :gen_tcp.listen(port, options),
         {:ok, {ip, port}} <- :inet.sockname(socket),
         do: {:ok, socket, {:tcp, ip, port}}
  end

  # The socket is made in a directory of its own and moved to its place when its mode is 0600:
  # there is no moment in which another user can connect, and a stale one is replaced.
  def listen({:uds, path}, backlog, own) do
    directory =
      Path.join(
        Path.dirname(path),
        ".#{Base.url_encode64(:crypto.strong_rand_bytes(6), padding: false)}"
      )

    inner = Path.join(directory, "s")

    with :ok <- short(inner),
         :ok <- unused(path),
         :ok <- File.mkdir(directory) do
      try do
        with :ok <- File.chmod(directory, 0o700),
             {:ok, socket} <-
               :gen_tcp.listen(
                 0,
                 [{:ifaddr, {:local, inner}}, {:backlog, backlog} | @options] ++ own
               ),
             :ok <- File.chmod(inner, 0o600),
             :ok <- :prim_file.rename(inner, path),
             do: {:ok, socket, {:uds, path}}
      after
        File.rm(inner)
        File.rmdir(directory)
      end
    end
  end

  @spec connect(t(), timeout(), list()) :: {:ok, port()} | {:error, term()}
  def connect(address, timeout, own \\ [])

  def connect({:tcp, ip, port} = address, timeout, own),
    do: :gen_tcp.connect(ip, port, [family(ip) | tcp_options(address, own)], timeout)

  def connect({:uds, path}, timeout, own),
    do: :gen_tcp.connect({:local, path}, 0, [:local | @options] ++ own, timeout)

  @doc "Removes the file of a Unix socket that is no longer listened on."
  @spec remove(t()) :: :ok
  def remove({:uds, path}) do
    _ = File.rm(path)
    :ok
  end

  def remove(_tcp), do: :ok

  @doc "The other end, for messages to people."
  @spec peer(port()) :: String.t()
  def peer(socket) do
    case :inet.peername(socket) do
      {:ok, {:local, _path}} -> "a local process"
      {:ok, {ip, port}} -> "#{:inet.ntoa(ip)}:#{port}"
      _ -> "a peer that is gone"
    end
  end

  defp tcp_options(address, own) do
    linux =
      cond do
        :os.type() != {:unix, :linux} -> []
        local?(address) -> @probes ++ @local_options
        true -> @probes
      end

    @options ++ @tcp_options ++ Enum.reject(linux, &given?(&1, own)) ++ own
  end

  # Of raw options that are there twice the first wins, of others the last.
  defp given?({:raw, protocol, option, _ours}, own),
    do: Enum.any?(own, &match?({:raw, ^protocol, ^option, _value}, &1))

  defp family(ip) when tuple_size(ip) == 8, do: :inet6
  defp family(_ip), do: :inet

  defp short(path) when byte_size(path) <= @max_path, do: :ok
  defp short(_path), do: {:error, :enametoolong}

  # A socket that answers is another server's; other files are not ours to remove.
  defp unused(path) do
    case File.lstat(path) do
      {:error, :enoent} ->
        :ok

      {:ok, %{type: :other}} ->
        case :gen_tcp.connect({:local, path}, 0, [:local], 1_000) do
          {:ok, socket} ->
            :gen_tcp.close(socket)
            {:error, :eaddrinuse}

          {:error, :econnrefused} ->
            :ok

          {:error, reason} ->
            {:error, reason}
        end

      {:ok, _file} ->
        {:error, :eexist}

      {:error, reason} ->
        {:error, reason}
    end
  end
end
