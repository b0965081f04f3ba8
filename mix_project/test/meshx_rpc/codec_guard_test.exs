defmodule MeshxRpc.CodecGuardTest do
  use ExUnit.Case, async: true

  import MeshxRpc.CodecPeer, only: [at: 2]
  alias MeshxRpc.Codec

  # The names of what is refused are part of the contract; texts are for people.
  defp refused(codec, binary, policy \\ %{}) do
    assert {:error, {name, text}} = codec.guard(binary, policy)
    assert is_binary(text) and text != ""
    name
  end

  defp nested(depth, tag), do: <<131, :binary.copy(tag, depth)::binary, 106>>

  for codec <- [Codec.Nif, Codec.Elixir] do
    describe inspect(codec) do
      @describetag codec: codec

      test "takes ordinary terms", %{codec: codec} do
        for term <- terms(), options <- [[], [minor_version: 1]] do
          assert codec.guard(:erlang.term_to_binary(term, options), %{}) == :ok, inspect(term)
        end
      end

      test "takes terms of many slices", %{codec: codec} do
        binary = :erlang.term_to_binary(for n <- 1..40_000, do: {n, [n, "x"], %{a: n}})
        assert byte_size(binary) > 4 * 128 * 1024
        assert codec.guard(binary, %{}) == :ok
        <<most::binary-size(700_000), _, rest::binary>> = binary
        assert refused(codec, <<most::binary, 255, rest::binary>>) == :malformed
      end

      test "refuses nesting", %{codec: codec} do
        for tag <- [<<104, 1>>, <<108, 1::32>>, <<105, 1::32>>, <<116, 1::32, 106>>] do
          assert refused(codec, nested(1_000_000, tag)) in [:too_deep, :malformed]
          tail = if tag == <<108, 1::32>>, do: :binary.copy(<<106>>, 300), else: ""
          assert refused(codec, nested(300, tag) <> tail) == :too_deep
        end

        assert codec.guard(nested(256, <<104, 1>>), %{}) == :ok
        assert refused(codec, nested(257, <<104, 1>>)) == :too_deep
        assert refused(codec, nested(4, <<104, 1>>), %{max_depth: 3}) == :too_deep
        # A list in pieces is one list.
        pieces = :binary.copy(<<108, 1::32, 97, 1>>, 1_000)
        assert codec.guard(<<131, pieces::binary, 106>>, %{}) == :ok
      end

      test "refuses announced counts that the bytes cannot hold", %{codec: codec} do
        for head <- [<<108>>, <<105>>, <<116>>, <<109>>, <<111>>],
            bytes <- ["", "some more bytes"] do
          assert refused(codec, <<131, head::binary, 0xFFFFFFFF::32, bytes::binary>>) in [
                   :malformed,
                   :integer_too_long
                 ]
        end

        many = :binary.copy(<<108, 10_000_000::32>>, 200)
        assert refused(codec, <<131, many::binary>>) == :malformed
      end

      test "refuses compressed terms", %{codec: codec} do
        bomb = :erlang.term_to_binary(:binary.copy(<<0>>, 50_000_000), [:compressed])
        assert byte_size(bomb) < 100_000
        assert refused(codec, bomb) == :compressed_not_allowed
      end

      test "refuses functions unless told otherwise", %{codec: codec} do
        x = self()
        closure = :erlang.term_to_binary(%{a: [fn -> x end]})
        named = :erlang.term_to_binary({:b, &String.length/1})
        assert refused(codec, closure) == :not_allowed
        assert refused(codec, named) == :not_allowed
        assert codec.guard(closure, %{allow_funs: true}) == :ok
        assert codec.guard(named, %{allow_exports: true}) == :ok
      end

      test "refuses pids, ports and references when told", %{codec: codec} do
        for {key, term} <- [
              allow_pids: self(),
              allow_ports: hd(Port.list()),
              allow_references: make_ref()
            ] do
          binary = :erlang.term_to_binary([term])
          assert codec.guard(binary, %{}) == :ok
          assert refused(codec, binary, %{key => false}) == :not_allowed
        end
      end

      test "every number has a limit", %{codec: codec} do
        list = :erlang.term_to_binary(Enum.to_list(1..1_000))
        assert refused(codec, list, %{max_terms: 1_001}) == :too_many_terms
        assert codec.guard(list, %{max_terms: 1_002}) == :ok
        string = :erlang.term_to_binary(List.duplicate(97, 1_000))
        assert refused(codec, string, %{max_terms: 1_000}) == :too_many_terms
        assert refused(codec, list, %{max_bytes: byte_size(list) - 1}) == :too_long
        assert codec.guard(list, %{max_bytes: byte_size(list)}) == :ok

        atoms = :erlang.term_to_binary(List.duplicate(:abc, 100))
        assert refused(codec, atoms, %{max_atoms: 99}) == :too_many_atoms
        assert refused(codec, atoms, %{max_atom_bytes: 299}) == :too_many_atom_bytes
        assert codec.guard(atoms, %{max_atoms: 100, max_atom_bytes: 300}) == :ok

        assert refused(codec, string, %{max_heap_words: 1_999}) == :too_many_heap_words
        assert codec.guard(string, %{max_heap_words: 2_000}) == :ok

        integer = :erlang.term_to_binary(Integer.pow(2, 8 * 100) - 1)
        assert refused(codec, integer, %{max_integer_bytes: 99}) == :integer_too_long
        assert codec.guard(integer, %{max_integer_bytes: 100}) == :ok

        assert refused(codec, :erlang.term_to_binary(Integer.pow(2, 8 * 5_000))) ==
                 :integer_too_long
      end

      test "pairs of all maps together have a limit", %{codec: codec} do
        one = :erlang.term_to_binary(Map.new(1..100, &{&1, []}))
        assert refused(codec, one, %{max_map_pairs: 99}) == :too_many_map_pairs
        assert codec.guard(one, %{max_map_pairs: 100}) == :ok
        many = :erlang.term_to_binary(for n <- 1..50, do: %{n => %{a: n}, b: n})
        assert refused(codec, many, %{max_map_pairs: 149}) == :too_many_map_pairs
        assert codec.guard(many, %{max_map_pairs: 150}) == :ok
        # What held a scheduler for about 100 ms.
        pairs = for n <- 1..500_000, into: "", do: <<98, n::32, 106>>
        assert refused(codec, <<131, 116, 500_000::32, pairs::binary>>) == :too_many_map_pairs
      end

      test "bytes of keys have a limit, and count for each map that they are a key of", %{
        codec: codec
      } do
        # Version, head; the key is of 5 + 10 bytes.
        one = :erlang.term_to_binary(%{"0123456789" => "a value that does not count"})
        assert refused(codec, one, %{max_key_bytes: 14}) == :too_many_key_bytes
        assert codec.guard(one, %{max_key_bytes: 15}) == :ok
        # As a key of a key: 15 bytes twice, and the head and the value of the map between once.
        two = :erlang.term_to_binary(%{%{"0123456789" => []} => [], {} => ["0123456789"]})
        assert refused(codec, two, %{max_key_bytes: 37}) == :too_many_key_bytes
        assert codec.guard(two, %{max_key_bytes: 38}) == :ok
        # 4 MiB that 250 maps hash, which held a scheduler for 0.7 s.
        pad = for n <- 1..32, into: "", do: <<97, n, 106>>
        heads = :binary.copy(<<116, 33::32>>, 250)
        key = <<109, 4_000_000::32, 0::size(4_000_000)-unit(8)>>
        nested = [131, heads, key, :binary.copy(<<106, pad::binary>>, 250)]
        assert refused(codec, IO.iodata_to_binary(nested)) == :too_many_key_bytes
      end

      test "nodes that identifiers name have a limit, creations counted", %{codec: codec} do
        pid = fn node, creation -> [88, node, <<7::32, 0::32, creation::32>>] end
        port = fn node, creation -> [120, node, <<7::64, creation::32>>] end
        reference = fn node, creation -> [90, <<2::16>>, node, <<creation::32, 1::32, 2::32>>] end

        list = fn parts ->
          IO.iodata_to_binary([<<131, 108, length(parts)::32>>, parts, 106])
        end

        {latin1, utf8} = {<<100, 3::16, ?a, ?@, 0xE9>>, <<119, 4, "a@é">>}

        same =
          for _ <- 1..100, make <- [pid, port, reference], at <- [latin1, utf8], do: make.(at, 9)

        assert codec.guard(list.(same), %{max_nodes: 1}) == :ok
        assert refused(codec, list.(same), %{max_nodes: 0}) == :too_many_nodes

        for make <- [pid, port, reference] do
          creations = for n <- 1..65, do: make.(utf8, n)
          assert refused(codec, list.(creations)) == :too_many_nodes
          assert codec.guard(list.(creations), %{max_nodes: 65}) == :ok
          assert codec.guard(list.(tl(creations)), %{}) == :ok
          names = for n <- 1..65, do: make.(<<119, 3, "n", n + 40, "@">>, 9)
          assert refused(codec, list.(names)) == :too_many_nodes
          assert codec.guard(list.(tl(names)), %{}) == :ok
        end

        # Forms of earlier releases, with creations of one byte.
        old = [
          [103, latin1, <<7::32, 0::32, 1>>],
          [102, latin1, <<7::32, 2>>],
          [101, latin1, <<7::32, 3>>],
          [114, <<2::16>>, latin1, <<4, 0::64>>],
          [89, latin1, <<7::32, 5::32>>]
        ]

        assert refused(codec, list.(old), %{max_nodes: 4}) == :too_many_nodes
        assert codec.guard(list.(old), %{max_nodes: 5}) == :ok
      end

      test "refuses what is no term", %{codec: codec} do
        assert refused(codec, "") == :version
        assert refused(codec, "hello") == :version
        assert refused(codec, <<131>>) == :malformed
        assert refused(codec, <<131, 97, 1, 0>>) == :trailing
        assert refused(codec, <<131, 119, 2, 0xC3, 0x28>>) == :malformed
        assert refused(codec, <<131, 70, 0x7FF0000000000000::64>>) == :malformed
        assert refused(codec, <<131, 100, 256::16, :binary.copy("a", 256)::binary>>) == :malformed

        # For which some OTP 27 would allocate 2^61 bytes.
        assert refused(codec, <<131, 77, 0::32, 0>>) == :malformed

        # Of a number that does not end, the VM takes what is in its memory behind the message for more digits.
        digits = "1." <> String.duplicate("0", 28)
        assert codec.guard(<<131, 99, digits::binary, 0>>, %{}) == :ok
        assert refused(codec, <<131, 99, digits::binary, ?0>>) == :malformed

        for tag <- [67, 68, 69, 82, 117, 121, 131, 255],
            do: assert(refused(codec, <<131, tag>>) == :malformed)
      end

      test "a policy that does not exist is an error", %{codec: codec} do
        assert_raise ArgumentError, ~r/unknown guard policy/, fn ->
          codec.guard(<<131, 106>>, %{max_size: 1})
        end

        assert_raise ArgumentError, ~r/cannot be/, fn ->
          codec.guard(<<131, 106>>, %{max_terms: :infinity})
        end
      end
    end
  end

  # The VM's own function, which yields, could end the VM (erlang/otp issue 11404).
  test "what takes long to decode is decoded on a dirty scheduler, and nothing by what yields" do
    keys = fn n, size -> Map.new(1..n, &{:binary.copy(<<&1>>, size), &1}) end

    for {term, how} <- [
          {{:ok, %{id: 1}}, :at_once},
          {Enum.to_list(1..2_000), :at_once},
          {Enum.to_list(1..2_100), :aside},
          # With its atoms in a table.
          {List.duplicate(:a, 2_100), :otherwise},
          {List.duplicate(%{id: 1, ok: true}, 10_000), :otherwise},
          {List.duplicate(%{id: 1, ok: true}, 50_000), :aside},
          {Map.new(1..1_000, &{&1, &1}), :at_once},
          {Map.new(1..1_100, &{&1, &1}), :aside},
          {Map.new(1..262_144, &{&1, &1}), :aside},
          {keys.(3, 40_000), :at_once},
          {keys.(4, 40_000), :aside},
          {{:ok, :binary.copy("x", 10_000_000)}, :aside}
        ] do
      binary = :erlang.term_to_binary(term)
      assert decoded(Codec.Nif, binary) == {{:ok, term}, how}
      assert decoded(Codec.Elixir, binary) == {{:ok, term}, :otherwise}
    end

    # There as here: no new atoms, and the guard first.
    names = for n <- 1..3_000, do: "known_to_nobody_but_codec_guard_test_#{n}"
    atoms = for name <- names, do: <<119, byte_size(name), name::binary>>
    list = <<131, 108, 3_000::32, IO.iodata_to_binary(atoms)::binary, 106>>
    assert {{:error, text}, :aside} = decoded(Codec.Nif, list)
    assert text =~ "atoms that this VM does not know"
    pairs = :erlang.term_to_binary(Map.new(1..3_000, &{&1, &1}))

    refused =
      {{:error,
        {:too_many_map_pairs, "3000 pairs in maps by offset 1, the limit is 2999 (max_map_pairs)"}},
       :otherwise}

    assert decoded(Codec.Nif, pairs, %{max_map_pairs: 2_999}) == refused
  end

  # What `MeshxRpc.Term` makes of it, and what of the NIF did.
  defp decoded(codec, binary, policy \\ %{}) do
    native = Codec.Nif.Native
    test = self()

    pid =
      spawn_link(fn ->
        receive do
          :go -> send(test, {:decoded, MeshxRpc.Term.decode(codec, 1, binary, policy)})
        end
      end)

    Code.ensure_loaded!(native)
    assert :erlang.trace_pattern({native, :binary_to_term, 1}, true, [:local]) == 1
    assert :erlang.trace_pattern({native, :decode, 3}, true, [:local]) == 1
    1 = :erlang.trace(pid, true, [:call])
    send(pid, :go)
    assert_receive {:decoded, result}, 60_000
    # The process may be gone, and what it did is still told.
    delivered = :erlang.trace_delivered(pid)
    assert_receive {:trace_delivered, ^pid, ^delivered}, 60_000

    {result, how(calls(pid))}
  end

  defp calls(pid) do
    receive do
      {:trace, ^pid, :call, {module, :decode, arguments}} ->
        [{:decode, apply(module, :decode, arguments)} | calls(pid)]

      {:trace, ^pid, :call, {_module, :binary_to_term, [_binary]}} ->
        [:binary_to_term | calls(pid)]
    after
      0 -> []
    end
  end

  defp how([{:decode, {:ok, _term}}]), do: :at_once
  defp how([{:decode, _more_or_aside}, :binary_to_term]), do: :aside
  defp how(_other), do: :otherwise

  test "both guards say the same of damaged terms, and never more than binary_to_term" do
    seed = ExUnit.configuration()[:seed]
    binaries = Enum.map(terms(), &:erlang.term_to_binary/1)

    for run <- 1..20_000 do
      :rand.seed(:exsss, {seed, run, 2})
      binary = damage(Enum.random(binaries), :rand.uniform(3))
      policy = Enum.random([%{max_depth: 5}, %{max_map_pairs: 3, max_key_bytes: 9, max_nodes: 1}])
      nif = Codec.Nif.guard(binary, policy)
      elixir = Codec.Elixir.guard(binary, policy)

      assert result(nif) == result(elixir),
             "run #{run} of seed #{seed}: #{inspect({binary, nif, elixir})}"
    end
  end

  # Which of two faults is met first may differ; that there is one may not.
  defp result(:ok), do: :ok
  defp result({:error, _}), do: :error

  defp damage(binary, 0), do: binary

  defp damage(binary, times) do
    at = :rand.uniform(byte_size(binary)) - 1
    {before, byte, rest} = at(binary, at)

    case :rand.uniform(4) do
      1 -> <<before::binary, rest::binary, 0>>
      2 -> <<before::binary, byte, byte, rest::binary>>
      _ -> <<before::binary, :rand.uniform(256) - 1, rest::binary>>
    end
    |> damage(times - 1)
  end

  defp terms do
    [
      [],
      {},
      %{},
      "",
      <<1::3>>,
      <<1, 2, 3::5>>,
      0,
      255,
      -1,
      1_000_000,
      Integer.pow(2, 59),
      -Integer.pow(2, 63),
      Integer.pow(2, 64),
      Integer.pow(7, 900),
      1.5,
      :atom,
      :é,
      :日本,
      ~c"string",
      [1 | 2],
      [a: 1, b: [2, {3, %{4 => "five"}}]],
      self(),
      make_ref(),
      hd(Port.list()),
      Map.new(1..50, &{&1, "#{&1}"}),
      :binary.copy("large", 50),
      {:ok, [%{id: 1, tags: [:a, :b], at: 1.5, of: self()}, nil, true]},
      %{%{1 => 2} => %{[] => self(), {2} => make_ref()}}
    ]
  end
end
