defmodule MeshxNode.ControlTest do
  use ExUnit.Case, async: true

  defp decode(term), do: :meshx_control.decode(:erlang.term_to_binary(term))

  setup do
    # The words of the protocol exist once its module is loaded, as in the agent's client.
    :meshx_control.vocabulary()
    :ok
  end

  test "replies and events are read" do
    assert decode({:reply, 7, {:ok, %{version: 1}}}) == {:reply, 7, {:ok, %{version: 1}}}
    assert decode({:reply, 7, {:error, :limit, "full"}}) == {:reply, 7, {:error, {:limit, "full"}}}
    assert decode({:event, :cut, %{text: "t"}}) == {:event, :cut, %{text: "t"}}
  end

  test "other terms, other bytes and more bytes are errors" do
    for term <- [
          {:reply, 7, :ok},
          {:reply, "7", {:ok, %{}}},
          {:event, "cut", %{}},
          [],
          {:reply, 7, {:ok, []}}
        ] do
      assert decode(term) == {:error, "neither a reply nor an event"}
    end

    assert :meshx_control.decode("") == {:error, "a frame that is no external term"}
    assert :meshx_control.decode("garbage") == {:error, "a frame that is no external term"}
    frame = :erlang.term_to_binary({:reply, 7, {:ok, %{}}})
    assert :meshx_control.decode(frame <> "xy") == {:error, "2 bytes after the term"}

    for size <- 0..(byte_size(frame) - 1) do
      assert :meshx_control.decode(binary_part(frame, 0, size)) in [
               {:error, "a frame that is no external term"},
               # The head of a reply: its caller learns that the answer was not understood.
               {:unknown_words, 7}
             ]
    end
  end

  test "a compressed term is refused before it is inflated" do
    frame =
      :erlang.term_to_binary({:reply, 1, {:ok, %{text: :binary.copy("x", 100_000)}}}, compressed: 9)

    assert {:error, "a compressed term" <> _} = :meshx_control.decode(frame)
  end

  test "words that this version does not know make no atom, and fail only their reply" do
    # SMALL_ATOM_UTF8_EXT, ATOM_EXT and SMALL_ATOM_EXT for `reply`.
    for reply <- [<<119, 5, "reply">>, <<100, 0, 5, "reply">>, <<115, 5, "reply">>],
        {id, bytes} <- [{9, <<97, 9>>}, {70_000, <<98, 70_000::32>>}] do
      frame = <<131, 104, 3, reply::binary, bytes::binary, 119, 22, "a_word_of_the_year_2030">>
      assert :meshx_control.decode(frame) == {:unknown_words, id}
    end

    event =
      <<131, 104, 3, 119, 5, "event", 119, 23, "an_event_of_the_year_2030"::binary, 116, 0::32>>

    assert :meshx_control.decode(event) == {:unknown_words, :event}
    assert_raise ArgumentError, fn -> String.to_existing_atom("a_word_of_the_year_" <> "2030") end
  end

  test "requests have a size limit" do
    assert {:ok, frame} = :meshx_control.request(3, :names, %{})
    assert :erlang.binary_to_term(frame) == {3, :names, %{}}

    assert {:error, {:limit, text}} =
             :meshx_control.request(3, :names, %{x: :binary.copy("x", 70_000)})

    assert text =~ "at most 65536"
  end

  test "hello and registration are checked, and no secret gets into an error" do
    assert {:ok, _} = :meshx_control.hello({:ok, %{version: 1, vm_dir: "d", dist_socket: "s"}})
    assert {:error, {:version_mismatch, _}} = :meshx_control.hello({:ok, %{version: 2}})

    assert {:error, {:invalid_request, _}} =
             :meshx_control.hello({:ok, %{version: 1, vm_dir: 1, dist_socket: "s"}})

    assert {:error, {:limit, "x"}} = :meshx_control.hello({:error, {:limit, "x"}})

    good = %{creation: 4, secret: <<7::256>>, instance: "i", service: "s", spiffe: "u"}
    assert {:ok, ^good} = :meshx_control.registration({:ok, good})

    for bad <- [
          %{good | creation: 3},
          %{good | creation: 0x100000000},
          %{good | secret: "x"},
          %{good | spiffe: 1},
          %{}
        ] do
      assert {:error, {:invalid_request, text}} = :meshx_control.registration({:ok, bad})
      refute text =~ inspect(<<7::256>>)
    end
  end
end
