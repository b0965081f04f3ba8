defmodule MeshxRpc.TestProxy do
  @moduledoc """
  Stands between a client and a server and sees whole frames.

  `fun.(direction, type, frame)` says what becomes of each: `:pass`, `:hold` (until `release/1`), or the bytes
  to send instead. Directions are `:request` (to the server) and `:response`.
  """
  use GenServer

  def start_link(options), do: GenServer.start_link(__MODULE__, options)
  def address(proxy), do: GenServer.call(proxy, :address)
  def release(proxy), do: GenServer.call(proxy, :release)

  @doc "Closes all connections; new ones are taken."
  def cut(proxy), do: GenServer.call(proxy, :cut)

  @doc "Where new connections lead."
  def target(proxy, address), do: GenServer.call(proxy, {:target, address})

  @doc "All frames of a direction so far, as they came."
  def seen(proxy, direction), do: GenServer.call(proxy, {:seen, direction})

  @impl true
  def init(options) do
    {:ok, listen} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listen)
    proxy = self()
    spawn_link(fn -> accept(listen, proxy) end)

    {:ok,
     %{
       address: {:tcp, {127, 0, 0, 1}, port},
       target: options[:target],
       fun: options[:fun],
       pairs: %{},
       buffers: %{},
       held: [],
       holding: true,
       seen: []
     }}
  end

  defp accept(listen, proxy) do
    with {:ok, socket} <- :gen_tcp.accept(listen) do
      :ok = :gen_tcp.controlling_process(socket, proxy)
      send(proxy, {:accepted, socket})
      accept(listen, proxy)
    end
  end

  @impl true
  def handle_call(:address, _from, state), do: {:reply, state.address, state}

  def handle_call(:release, _from, state) do
    for {to, frame} <- Enum.reverse(state.held), do: :gen_tcp.send(to, frame)
    {:reply, :ok, %{state | held: [], holding: false}}
  end

  def handle_call(:cut, _from, state) do
    for {socket, _} <- state.pairs, do: :gen_tcp.close(socket)
    {:reply, :ok, %{state | pairs: %{}, buffers: %{}, held: []}}
  end

  def handle_call({:target, address}, _from, state),
    do: {:reply, :ok, %{state | target: address}}

  def handle_call({:seen, direction}, _from, state),
    do: {:reply, for({^direction, frame} <- Enum.reverse(state.seen), do: frame), state}

  @impl true
  def handle_info({:accepted, client}, state) do
    {:tcp, ip, port} = state.target

    with {:ok, server} <- :gen_tcp.connect(ip, port, [:binary, active: true]),
         :ok <- :inet.setopts(client, active: true) do
      pair = %{client => {:request, server}, server => {:response, client}}
      {:noreply, %{state | pairs: Map.merge(state.pairs, pair)}}
    else
      {:error, _nobody_there} ->
        :gen_tcp.close(client)
        {:noreply, state}
    end
  end

  def handle_info({:tcp, from, _bytes}, state) when not is_map_key(state.pairs, from),
    do: {:noreply, state}

  def handle_info({:tcp, from, bytes}, state) do
    {direction, to} = state.pairs[from]

    {frames, rest} = split(Map.get(state.buffers, from, "") <> bytes, [])
    state = put_in(state.buffers[from], rest)
    {:noreply, Enum.reduce(frames, state, &frame(&1, &2, direction, to))}
  end

  def handle_info({:tcp_closed, from}, state) do
    with {_direction, to} <- state.pairs[from], do: :gen_tcp.close(to)
    {:noreply, state}
  end

  def handle_info(_other, state), do: {:noreply, state}

  defp frame(frame, state, direction, to) do
    <<_len::24, type, _rest::binary>> = frame
    state = %{state | seen: [{direction, frame} | state.seen]}

    case state.fun.(direction, type, frame) do
      :hold when state.holding ->
        %{state | held: [{to, frame} | state.held]}

      verdict ->
        _ = :gen_tcp.send(to, if(is_binary(verdict), do: verdict, else: frame))
        state
    end
  end

  defp split(<<len::24, _type, flags, _::binary>> = bytes, frames) do
    size = 12 + len + if(flags >= 0x80, do: 4, else: 0)

    if byte_size(bytes) < size do
      {Enum.reverse(frames), bytes}
    else
      {frame, rest} = :erlang.split_binary(bytes, size)
      split(rest, [frame | frames])
    end
  end

  defp split(bytes, frames), do: {Enum.reverse(frames), bytes}
end

defmodule MeshxRpc.TestPeer do
  @moduledoc "Speaks the protocol by hand, so that it can misbehave."
  alias MeshxRpc.{Frame, Hello}

  @max_window 0x7FFF_FFFF

  def config(options \\ []) do
    Map.merge(
      %{
        keys: [],
        checksums: [0],
        blk_max_size: 65_536,
        stream_window: @max_window,
        connection_window: @max_window,
        max_message: 1_000_000_000
      },
      Map.new(options)
    )
  end

  @doc "Connects and says hello; the socket is passive."
  def connect({:tcp, ip, port}, options \\ []) do
    {:ok, socket} =
      :gen_tcp.connect(ip, port, [:binary, active: false, recbuf: 4_096, buffer: 4_096])

    :ok = :gen_tcp.send(socket, Frame.hello(Hello.hello(config(options), Hello.nonce())))
    {0x02, 0, _ack} = frame(socket)
    {0x04, 0, ""} = frame(socket)
    socket
  end

  @doc "Accepts a connection and answers its hello."
  def accept(listen, options \\ []) do
    {:ok, socket} = :gen_tcp.accept(listen)
    {0x01, 0, hello} = frame(socket)
    {:ok, _agreed, ack, _proofs} = Hello.answer(config(options), hello, Hello.nonce())
    :ok = :gen_tcp.send(socket, [Frame.hello_ack(ack), Frame.ready()])
    socket
  end

  @doc "One whole request."
  def request(stream, fun, term_flag, bytes) do
    head = Frame.request_head(:infinity, byte_size(bytes), term_flag, fun)
    Frame.block(:request, true, 0, stream, [head, bytes], byte_size(head) + byte_size(bytes), nil)
  end

  @doc "The next frame that is no WINDOW: its type, stream and payload, or `:closed`."
  def frame(socket) do
    with {:ok, <<len::24, type, _flags, _seq::24, stream::32>>} <-
           :gen_tcp.recv(socket, 12, 10_000),
         {:ok, payload} <- if(len == 0, do: {:ok, ""}, else: :gen_tcp.recv(socket, len, 10_000)) do
      if type == 0x20, do: frame(socket), else: {type, stream, payload}
    else
      {:error, reason} when reason in [:closed, :econnreset] -> :closed
    end
  end
end
