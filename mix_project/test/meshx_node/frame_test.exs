defmodule MeshxNode.FrameTest do
  use ExUnit.Case, async: true

  @link <<1::128>>
  @secret <<2::256>>

  test "CONNECT has the documented bytes" do
    assert :meshx_frame.connect(@link, @secret, "cart@h2") ==
             <<1, 1, @link::binary, @secret::binary, 0, 7, "cart@h2">>
  end

  test "OK and REFUSED are read" do
    assert :meshx_frame.answer(<<1, 2, 0, 1, "s", 0, 2, "aa">>) ==
             {:ok, %{spiffe: "s", agent: "aa"}}

    assert :meshx_frame.answer(<<1, 3, 5, "limit", 0, 2, "no">>) == {:refused, :limit, "no"}
  end

  test "ACCEPT is read, and only with the right secret" do
    frame = <<1, 4, @link::binary, @secret::binary, 0, 1, "n", 0, 1, "s", 0, 1, "a">>

    assert :meshx_frame.accept(frame, @secret) ==
             {:ok, @link, %{node: "n", spiffe: "s", agent: "a"}}

    assert :meshx_frame.accept(frame, <<3::256>>) == {:error, :bad_secret}
  end

  test "no cut of a frame and no byte after it is taken for one" do
    accept = <<1, 4, @link::binary, @secret::binary, 0, 1, "n", 0, 1, "s", 0, 1, "a">>
    ok = <<1, 2, 0, 1, "s", 0, 2, "aa">>
    refused = <<1, 3, 5, "limit", 0, 2, "no">>

    for frame <- [ok, refused, accept], size <- 0..(byte_size(frame) - 1) do
      part = binary_part(frame, 0, size)
      assert {:error, text} = :meshx_frame.answer(part)
      assert is_binary(text)
      assert {:error, text} = :meshx_frame.accept(part, @secret)
      assert is_binary(text)
    end

    for frame <- [ok, refused], do: assert({:error, _} = :meshx_frame.answer(frame <> "x"))
    assert {:error, _} = :meshx_frame.accept(accept <> "x", @secret)
  end

  test "secrets are equal only when every bit is, and only at full length" do
    assert :meshx_frame.equal(@secret, @secret)

    for bit <- 0..255 do
      refute :meshx_frame.equal(
               @secret,
               :crypto.exor(@secret, <<0::size(bit), 1::1, 0::size(255 - bit)>>)
             )
    end

    refute :meshx_frame.equal("", "")
    refute :meshx_frame.equal(binary_part(@secret, 0, 31), binary_part(@secret, 0, 31))
  end
end
