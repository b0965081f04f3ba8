defmodule MeshxRpc.CodecIndexedTest do
  # One test says of the whole VM that it does not decode such terms.
  use ExUnit.Case, async: false

  import MeshxRpc.CodecPeer, only: [at: 2]
  alias MeshxRpc.Codec
  alias MeshxRpc.Codec.Nif.{Indexed, Native}

  @unknown "atoms that this VM does not know"

  test "this version of OTP decodes such terms" do
    assert Indexed.works?()
  end

  test "terms are what binary_to_term makes of them" do
    seed = ExUnit.configuration()[:seed]

    ways =
      for run <- 1..2_000 do
        :rand.seed(:exsss, {seed, run, 3})
        term = {rows(), List.duplicate(:ok, 600)}
        options = Enum.random([[], [minor_version: 1], [minor_version: 2]])
        binary = :erlang.term_to_binary(term, options)
        about = "run #{run} of seed #{seed}"
        assert :erlang.binary_to_term(binary, [:safe]) === term, about
        assert Codec.Nif.decode(binary, %{}) === {:ok, term}, about

        with {:indexed, names, bytes} <- written(binary) do
          assert byte_size(bytes) <= byte_size(binary), about
          assert Indexed.decode(names, bytes) === {:ok, term}, about
          :indexed
        end
      end

    # Neither is rare.
    assert %{indexed: indexed, ok: as_it_is} = Enum.frequencies(ways)
    assert indexed > 500 and as_it_is > 100, inspect({indexed, as_it_is})
  end

  test "bytes that no VM writes come to the same, damaged or not" do
    seed = ExUnit.configuration()[:seed]

    ways =
      for run <- 1..1_500 do
        :rand.seed(:exsss, {seed, run, 4})
        parts = for(_ <- 1..:rand.uniform(12), do: part(3)) ++ atoms_for_a_table()
        parts = Enum.shuffle(parts)
        whole = IO.iodata_to_binary([<<131, 108, length(parts)::32>>, parts, part(0)])
        binary = if rem(run, 2) == 0, do: whole, else: damage(whole, :rand.uniform(2))
        about = "run #{run} of seed #{seed}"
        as_it_is = as_it_is(binary)
        assert_same(MeshxRpc.Term.decode(Codec.Nif, 1, binary, %{}), as_it_is, about)

        case {written(binary), as_it_is} do
          {{:indexed, names, bytes}, {:ok, _term}} ->
            assert_same(Indexed.decode(names, bytes), as_it_is, about)
            :indexed

          {{:indexed, _names, _bytes}, {:error, text}} when is_binary(text) ->
            :indexed_and_refused

          {{:error, why}, {:error, why}} ->
            :refused

          {:ok, _either} ->
            :as_it_is
        end
      end

    # None is rare.
    counts = Enum.frequencies(ways)
    least = [indexed: 400, indexed_and_refused: 100, refused: 150, as_it_is: 1]
    for {way, least} <- least, do: assert(Map.get(counts, way, 0) > least, inspect(counts))
  end

  test "a VM that does not decode such terms gets them as they are" do
    term = List.duplicate(%{id: 1, ok: true}, 2_000)
    binary = :erlang.term_to_binary(term)
    key = Indexed
    assert Indexed.works?() and :persistent_term.get(key)
    :persistent_term.put(key, false)

    try do
      refute Indexed.works?()
      assert Codec.Nif.decode(binary, %{}) == {:ok, term}
    after
      :persistent_term.put(key, true)
    end
  end

  test "no atom is made, wherever it stands" do
    atom = fn name -> <<119, byte_size(name), name::binary>> end
    known = [119, 2, "ok"]

    for {name, at} <- [{"known_to_nobody_but_codec_indexed_test", 0}, {"nor_is_this_one_é", 599}] do
      atoms = List.duplicate(known, at) ++ [atom.(name)] ++ List.duplicate(known, 600 - at)
      binary = IO.iodata_to_binary([<<131, 108, 601::32>>, atoms, 106])
      assert {:indexed, _names, _bytes} = written(binary)
      assert {:error, text} = MeshxRpc.Term.decode(Codec.Nif, 1, binary, %{})
      assert text =~ @unknown
      assert_raise ArgumentError, fn -> :erlang.binary_to_existing_atom(name, :utf8) end
    end

    # As parts of other terms they would be, so those are not decoded this way.
    node = atom.("known_to_nobody@codec_indexed_test")

    for {id, policy} <- [
          {[88, node, <<1::32, 2::32, 3::32>>], %{}},
          {[120, node, <<1::64, 3::32>>], %{}},
          {[90, <<1::16>>, node, <<3::32, 4::32>>], %{}},
          {[113, node, node, <<97, 1>>], %{allow_exports: true}}
        ] do
      list = [<<131, 108, 601::32>>, id, List.duplicate(known, 600), 106]
      binary = IO.iodata_to_binary(list)
      assert written(binary, policy) == :ok
    end
  end

  test "what is refused otherwise is refused" do
    rows = :erlang.term_to_binary(List.duplicate(%{id: 1, ok: true}, 2_000))
    assert {:error, {:too_many_map_pairs, _text}} = Codec.Nif.decode(rows, %{max_map_pairs: 3_999})
    assert {:error, {:too_many_atoms, _text}} = Codec.Nif.decode(rows, %{max_atoms: 5_999})
    cut = binary_part(rows, 0, byte_size(rows) - 1)
    assert {:error, {:malformed, _text}} = Codec.Nif.decode(cut, %{})
    assert {:error, {:trailing, _text}} = Codec.Nif.decode(rows <> <<106>>, %{})

    # A key twice, which the guard does not see.
    twice = <<116, 2::32, 119, 2, "ok", 97, 1, 119, 2, "ok", 97, 2>>
    many = IO.iodata_to_binary([<<131, 108, 300::32>>, List.duplicate(twice, 300), 106])
    assert {:indexed, ["ok"], _bytes} = written(many)
    assert {:error, text} = MeshxRpc.Term.decode(Codec.Nif, 1, many, %{})
    assert text =~ "malformed"
  end

  test "more atoms than the table holds, and long ones" do
    names = for n <- 1..256, do: :"codec_indexed_test_#{n}"

    for {count, way} <- [{255, :indexed}, {256, :ok}] do
      term = List.duplicate(Enum.take(names, count), 5)
      binary = :erlang.term_to_binary(term)
      assert way == way(written(binary))
      assert Codec.Nif.decode(binary, %{}) == {:ok, term}
    end

    long = for text <- ["x", "é", "日"], do: String.to_atom(String.duplicate(text, 255))
    term = List.duplicate(long, 200)

    for options <- [[], [minor_version: 1], [minor_version: 2]] do
      binary = :erlang.term_to_binary(term, options)
      assert {:indexed, [_, _, _], _bytes} = written(binary)
      assert Codec.Nif.decode(binary, %{}) == {:ok, term}
    end
  end

  # Else a small part of a message that is kept would keep all of it.
  test "what is decoded shares no memory with the message" do
    term = for n <- 1..500, do: %{id: n, body: :binary.copy("x", 1_000), ok: true}
    binary = :erlang.term_to_binary(term)
    assert {:indexed, _names, _bytes} = written(binary)
    assert {:ok, ^term = decoded} = Codec.Nif.decode(binary, %{})
    for %{body: body} <- decoded, do: assert(:binary.referenced_byte_size(body) == 1_000)
  end

  # What the VM makes of it by itself, when the guard lets it pass.
  defp as_it_is(binary) do
    with :ok <- Codec.Nif.guard(binary, %{}), do: {:ok, :erlang.binary_to_term(binary, [:safe])}
  rescue
    ArgumentError -> {:error, "it has atoms that this VM does not know, or is malformed"}
  end

  # To the bit: 0.0 and -0.0 are the same to OTP 25.
  defp assert_same(one, other, about) do
    assert one === other, about
    assert :erlang.term_to_binary(one) == :erlang.term_to_binary(other), about
  end

  defp damage(binary, 0), do: binary

  defp damage(binary, times) do
    at = :rand.uniform(byte_size(binary)) - 1
    {before, _byte, rest} = at(binary, at)
    damage(<<before::binary, :rand.uniform(256) - 1, rest::binary>>, times - 1)
  end

  defp atoms_for_a_table do
    few = for _ <- 1..8, do: atom(Enum.random(atoms()))
    [<<109, 1_000::32, 0::8_000>> | for(_ <- 1..600, do: Enum.random(few))]
  end

  # In each form that a VM takes.
  defp atom(name) do
    text = Atom.to_string(name)
    short? = byte_size(text) < 256

    case {:rand.uniform(4), :unicode.characters_to_binary(text, :utf8, :latin1)} do
      {1, <<latin1::binary>>} -> <<100, byte_size(latin1)::16, latin1::binary>>
      {2, <<latin1::binary>>} -> <<115, byte_size(latin1), latin1::binary>>
      {3, _} when short? -> <<119, byte_size(text), text::binary>>
      _ -> <<118, byte_size(text)::16, text::binary>>
    end
  end

  defp part(0), do: leaf(:rand.uniform(10))

  defp part(depth) do
    parts = fn n -> for _ <- 1..n//1, do: part(depth - 1) end
    n = :rand.uniform(5) - 1

    case :rand.uniform(400) do
      1 -> never(:rand.uniform(14))
      2 -> Enum.random([<<119, 12, "nobody knows">>, <<116, 1::32, 97, 1, 106>>])
      way when way < 60 -> [<<104, n>>, parts.(n)]
      way when way < 90 -> [<<105, n::32>>, parts.(n)]
      way when way < 150 -> [<<108, n::32>>, parts.(n), part(depth - 1)]
      way when way < 220 -> map(Enum.take_random(atoms(), n), depth)
      # A key twice, which only the VM sees.
      way when way < 223 -> map([:ok, :é, :ok], depth)
      _ -> part(0)
    end
  end

  defp map(keys, depth),
    do: [<<116, length(keys)::32>>, for(key <- keys, do: [atom(key), part(depth - 1)])]

  # Integers with zeros before them, text behind a float's end, bits that are not used.
  defp leaf(1), do: <<98, Enum.random([0, 1, -1, 0x7FFFFFFF])::32>>
  defp leaf(2), do: <<110, 9, Enum.random([0, 1, 2, 255]), :rand.bytes(4)::binary, 0::40>>
  defp leaf(3), do: <<111, 12::32, 1, :rand.bytes(1)::binary, 0::88>>
  defp leaf(4), do: <<70, :rand.uniform(2) - 1::1, :rand.uniform(2047) - 1::11, 5::52>>
  defp leaf(5), do: <<99, "-2.5e-3", 0, :rand.bytes(23)::binary>>
  defp leaf(6), do: <<77, 9::32, :rand.uniform(8), :rand.bytes(9)::binary>>

  defp leaf(7),
    do: Enum.random([<<106>>, <<107, 0::16>>, <<110, 0, 1>>, <<111, 0::32, 0>>, <<105, 0::32>>])

  defp leaf(8), do: <<107, 3::16, :rand.bytes(3)::binary>>
  defp leaf(9), do: <<109, 65::32, :rand.bytes(65)::binary>>
  defp leaf(10), do: atom(Enum.random(atoms()))

  # What has no place in a term, most of it known to some VM: of a table, of a distribution header, a float that is not
  # one, of a VM's own memory, a record.
  defp never(1), do: <<82, 0>>
  defp never(2), do: <<121, 0::32, 106>>
  defp never(3), do: <<131, 106>>
  defp never(4), do: <<70, 0x7FF8::16, 0::48>>
  defp never(5), do: <<73, 5::16>>
  defp never(6), do: <<75, 5::24>>
  defp never(7), do: <<67, 0::32, 0, 119, 2, "ok", 119, 2, "ok">>
  defp never(8), do: <<119, 2, 0xC3, 0x28>>
  defp never(9), do: <<99, "1,5", 0::224>>
  defp never(10), do: <<99, :binary.copy("0", 31)::binary>>
  defp never(11), do: <<110, 255, 0>>
  defp never(12), do: <<105, 0xFFFFFFFF::32>>
  defp never(13), do: <<113, 119, 5, "lists", 119, 3, "map", 97, 2>>
  defp never(14), do: <<77, 0::32, 0>>

  defp written(binary, policy \\ %{}) do
    {prepared, _policy} = Codec.Nif.policy(policy)

    case Native.decode(prepared, binary, true) do
      {:more, guard} -> written_step(guard, binary)
      {:ok, _term} -> :ok
      :unknown -> :ok
      done -> done
    end
  end

  defp written_step(guard, binary) do
    with :more <- Native.guard_step(guard, binary), do: written_step(guard, binary)
  end

  defp rows do
    keys = Enum.take_random(atoms(), :rand.uniform(12))
    for _ <- 1..:rand.uniform(10), do: Map.new(keys, &{&1, value(3)})
  end

  defp atoms do
    [:a, :b, :id, :name, :ok, :error, nil, true, false, :é, :"Ã©", :日本, :"", Enum, :"with space"] ++
      [String.to_atom(String.duplicate("x", 255)), String.to_atom(String.duplicate("é", 255))]
  end

  defp value(0), do: Enum.random(atoms())

  # With one of these a term stays as it is.
  defp value(depth) do
    case :rand.uniform(400) do
      1 -> Enum.random([self(), make_ref(), hd(Port.list())])
      2 -> Map.new(1..40, &{:"key#{&1}", &1})
      3 -> %{1 => 2, "x" => :y}
      _ -> usual(:rand.uniform(12), depth - 1)
    end
  end

  defp usual(1, _), do: :rand.uniform(300) - 30
  defp usual(2, _), do: Enum.random([1, -1]) * Integer.pow(:rand.uniform(1_000), :rand.uniform(200))
  defp usual(3, _), do: (:rand.uniform() - 0.5) * :math.pow(10, :rand.uniform(600) - 300)
  defp usual(4, _), do: :rand.bytes(Enum.random([0, 5, 64, 65, 300]))

  defp usual(5, _),
    do: <<:rand.bytes(Enum.random([0, 5, 64, 65]))::binary, 1::size(:rand.uniform(15))>>

  defp usual(6, _), do: List.duplicate(:rand.uniform(255), :rand.uniform(20))
  defp usual(7, depth), do: [value(depth) | value(0)]
  defp usual(8, depth), do: for(_ <- 1..:rand.uniform(4), do: value(depth))
  defp usual(9, depth), do: List.to_tuple(for(_ <- 1..:rand.uniform(4), do: value(depth)))
  defp usual(10, _), do: Enum.random([[], {}, %{}, "", 0.0])
  defp usual(11, depth), do: Map.new(Enum.take_random(atoms(), 4), &{&1, value(depth)})
  defp usual(12, _), do: Map.new(1..32, &{:"key#{&1}", &1})

  defp way({:indexed, _names, _bytes}), do: :indexed
  defp way(other), do: other
end
