defmodule MeshxRpc.CodecIndexedTest do
  # One test says of the whole VM that it does not decode such terms.
  use ExUnit.Case, async: false

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

  test "a VM that does not decode such terms gets them as they are" do
    term = List.duplicate(%{id: 1, ok: true}, 2_000)
    binary = :erlang.term_to_binary(term)
    key = {Indexed, :works}
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

  defp written(binary, policy \\ %{}) do
    {prepared, _policy} = Codec.Nif.policy(policy)

    case Native.guard(prepared, binary, true) do
      {:more, guard} -> written_step(guard, binary)
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
    [:a, :b, :id, :name, :ok, :error, nil, true, false, :é, :日本, :"", Enum, :"with space"] ++
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
