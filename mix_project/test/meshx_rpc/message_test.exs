defmodule MeshxRpc.MessageTest do
  use MeshxRpc.Case, async: true

  alias MeshxRpc.{Message, Term}

  @moduletag capture_log: true

  def sha(block, :sha256), do: :crypto.hash(:sha256, block)

  def sha(block, {:told, pid}),
    do: tap(sha(block, :sha256), fn _ -> send(pid, byte_size(block)) end)

  def sha(_block, :crash), do: raise("no checksum today")
  def sha(_block, :no_binary), do: 7
  def sha(_block, :hang), do: Process.sleep(:infinity)

  # Slower than timeout_cks in all, but not for one block.
  def sha(block, {:slow, milliseconds}) do
    Process.sleep(milliseconds)
    sha(block, :sha256)
  end

  def hang_and_tell(block, test) do
    send(test, {:hanging, self()})
    sha(block, :hang)
  end

  # Terms upside down, with a flag of its own.
  def serialize(:unwanted, _argument), do: {:error, :not_today}
  def serialize(:crash, _argument), do: raise(ArgumentError, "cannot")

  def serialize(term, argument),
    do: {:ok, term |> :erlang.term_to_binary() |> flip(), argument}

  def deserialize(binary, argument, argument),
    do: {:ok, binary |> flip() |> :erlang.binary_to_term()}

  def deserialize(_binary, _argument, flag), do: {:error, {:flag, flag}}

  defp flip(binary), do: binary |> :binary.bin_to_list() |> Enum.reverse() |> :binary.list_to_bin()

  defp message(options) do
    struct!(
      %Message{serialize: nil, deserialize: nil, cks: nil, timeout_cks: 5_000, block: 1_000},
      options
    )
  end

  defp decode(message, {flag, iovec, size}) do
    bytes = IO.iodata_to_binary(iovec)
    assert byte_size(bytes) == size
    Message.decode(message, MeshxRpc.Codec.Elixir, flag, bytes, MeshxRpc.Guard.policy(%{}))
  end

  defp cks(argument), do: {__MODULE__, :sha, argument}

  test "blocks of any size have their checksums, and say so when a byte is another" do
    message = message(cks: cks(:sha256))

    for size <- [0, 1, 999, 1_000, 1_001, 5_432], term = :crypto.strong_rand_bytes(size) do
      {:ok, {0, iovec, _size} = encoded} = Message.encode(message, term)
      assert decode(message, encoded) == {:ok, term}
      bytes = IO.iodata_to_binary(iovec)

      for at <- Enum.take_random(0..(byte_size(bytes) - 1), 40) do
        {before, <<byte, rest::binary>>} = :erlang.split_binary(bytes, at)
        changed = before <> <<Bitwise.bxor(byte, 1)>> <> rest

        # The size of a block may change when there is only one.
        wanted =
          if at in (byte_size(bytes) - 8)..(byte_size(bytes) - 5)//1 and size <= 1_000,
            do: [{:ok, term}, {:error, :invalid_cks}],
            else: [{:error, :invalid_cks}]

        assert decode(message, {0, [changed], byte_size(bytes)}) in wanted
      end

      for cut <- [0, 1, div(byte_size(bytes), 2), byte_size(bytes) - 1] do
        assert decode(message, {0, [binary_part(bytes, 0, cut)], cut}) == {:error, :invalid_cks}
      end
    end
  end

  test "an iovec of any parts is one message" do
    message = message(cks: cks(:sha256))
    term = for n <- 1..200, do: :binary.copy(<<n>>, n * 7)
    {:ok, {1, iovec, _size} = encoded} = Message.encode(message, term)
    assert length(iovec) > 2
    assert decode(message, encoded) == {:ok, term}
  end

  test "a peer cannot make the function run more often than there are blocks" do
    message = message(cks: cks({:told, self()}))
    entries = :binary.copy(<<0>>, 10_000)
    bytes = <<"data", entries::binary, 4::64, 1_000::32, byte_size(entries)::32>>
    assert decode(message, {0, [bytes], byte_size(bytes)}) == {:error, :invalid_cks}
    # Nor blocks smaller than any sender may have.
    bytes = <<"data", 0, 0, 0, 0, 4::64, 1::32, 4::32>>
    assert decode(message, {0, [bytes], byte_size(bytes)}) == {:error, :invalid_cks}
    refute_received _size
  end

  test "nor memory: what is too much is counted, not collected" do
    message = message(cks: cks(:sha256))
    entries = :binary.copy(<<0>>, 4_000_000)
    bytes = <<entries::binary, 0::64, 1_000::32, byte_size(entries)::32>>
    words = 100_000

    {_pid, monitor} =
      spawn_monitor(fn ->
        Process.flag(:max_heap_size, %{size: words, kill: true, error_logger: false})
        exit(decode(message, {0, [bytes], byte_size(bytes)}))
      end)

    assert_receive {:DOWN, ^monitor, :process, _pid, {:error, :invalid_cks}}, 10_000
  end

  test "a caller that is killed takes a function that hangs with it" do
    test = self()
    message = message(cks: {__MODULE__, :hang_and_tell, test}, timeout_cks: 600_000)
    caller = spawn(fn -> Message.encode(message, "x") end)
    assert_receive {:hanging, pid}, 10_000
    monitor = Process.monitor(pid)
    Process.exit(caller, :kill)
    assert_receive {:DOWN, ^monitor, :process, _pid, :killed}, 10_000
  end

  test "the caller's time is for all blocks" do
    slow = message(cks: cks({:slow, 50}), timeout_cks: 60_000)
    term = :binary.copy("x", 600_000)
    until = :erlang.monotonic_time(:millisecond) + 200
    assert Message.encode(slow, term, until) == {:error, :timeout}
    {:ok, {flag, iovec, _size}} = Message.encode(message(cks: cks(:sha256)), term)
    bytes = IO.iodata_to_binary(iovec)
    policy = MeshxRpc.Guard.policy(%{})
    until = :erlang.monotonic_time(:millisecond) + 200

    assert Message.decode(slow, MeshxRpc.Codec.Elixir, flag, bytes, policy, until) ==
             {:error, :timeout}

    {_server, address} = server(cks_mfa: cks(:sha256))
    client = client_down(address, cks_mfa: cks({:slow, 50}))
    assert Client.Pool.call(client, :echo, term, 200, 50, 10) == {:error_rpc, :timeout}
    request = Client.Async.send_request(client, :echo, term, 200)
    assert Client.Async.receive_response(request, 10_000) == {:error_rpc, :timeout}
  end

  test "a function that fails, hangs or answers nonsense is named, and leaves nothing behind" do
    assert Message.encode(message(cks: cks(:crash)), "x") == {:error, :invalid_cks}
    assert Message.encode(message(cks: cks(:no_binary)), "x") == {:error, :invalid_cks}
    hanging = message(cks: cks(:hang), timeout_cks: 20)
    assert Message.encode(hanging, "x") == {:error, :timeout_cks}
    {:ok, encoded} = Message.encode(message(cks: cks(:sha256)), "x")
    assert decode(hanging, encoded) == {:error, :timeout_cks}
    refute_received _anything
  end

  test "the time is for one block" do
    message = message(cks: cks({:slow, 400}), timeout_cks: 3_500)
    term = :binary.copy("x", 10_000)
    assert {:ok, _encoded} = Message.encode(message, term)
  end

  test "serializers of the user's own, and their errors" do
    message =
      message(
        serialize: {__MODULE__, :serialize, 77},
        deserialize: {__MODULE__, :deserialize, 77}
      )

    {:ok, {77, _iovec, _size} = encoded} = Message.encode(message, %{a: [1, 2]})
    assert decode(message, encoded) == {:ok, %{a: [1, 2]}}
    assert Message.encode(message, :unwanted) == {:error, :not_today}
    assert {:error, %ArgumentError{message: "cannot"}} = Message.encode(message, :crash)
    assert decode(message, {5, ["x"], 1}) == {:error, {:flag, 5}}
    assert {:error, {:badarg, _stack}} = decode(message, {77, ["x"], 1})
    assert Message.encode(nil, "x") == {:ok, Term.encode("x")}
  end

  for codec <- MeshxRpc.Case.codecs() do
    describe "#{inspect(codec)}" do
      @describetag codec: codec

      test "calls with all of it", %{codec: codec} do
        options = [
          codec: codec,
          cks_mfa: {__MODULE__, :sha, :sha256},
          serialize_mfa: {__MODULE__, :serialize, 9},
          deserialize_mfa: {__MODULE__, :deserialize, 9},
          blk_max_size: 300
        ]

        {_server, address} = server(options)
        client = client(address, options)
        term = %{text: String.duplicate("é", 2_000), list: Enum.to_list(1..500)}
        assert Client.Pool.call(client, :echo, term) == term
        assert Client.Pool.call(client, :echo, :unwanted) == {:error_rpc, :not_today}
        # Errors are external terms, whatever the serializer.
        assert {:error_rpc, %ArgumentError{message: "no"}} = Client.Pool.call(client, :fail)
        assert {:error_rpc, {:undef, _stack}} = Client.Pool.call(client, :nothing)
      end

      test "a server whose function differs or hangs: its calls fail by name, the others go on",
           %{codec: codec} do
        for {argument, reason} <- [{{:slow, 1}, nil}, {:hang, :timeout_cks}, {:crash, :invalid_cks}] do
          timeout = if argument == :hang, do: 50, else: 30_000

          {_server, address} =
            server(codec: codec, cks_mfa: {__MODULE__, :sha, argument}, timeout_cks: timeout)

          id =
            client_down(address,
              codec: codec,
              cks_mfa: {__MODULE__, :sha, :sha256},
              timeout_cks: 30_000
            )

          answer = Client.Pool.call(id, :echo, "x", 30_000, 1_000, 5)
          assert answer == if(reason, do: {:error_rpc, reason}, else: "x")
        end
      end
    end
  end

  test "a checksum on one side only is no common setting, and both are told" do
    {_server, address} = server(cks_mfa: {__MODULE__, :sha, :sha256})
    client = client_down(address)
    assert Client.Pool.call(client, :echo, 1, 5_000, 20, 10) == {:error_rpc, :closed}
    await(fn -> Client.Pool.info(client).down != [] end)
    assert [{:settings, text}] = Client.Pool.info(client).down
    assert text =~ "checksums none, crc32, crc32c are offered, wanted one of user"
  end
end
