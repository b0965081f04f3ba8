defmodule MeshxRpc.Codec.Elixir.Token do
  @moduledoc false
  # One token of the external term format ("External Term Format" in the ERTS user's guide), without what it contains.

  import MeshxRpc.Codec.Elixir.Guard, only: [refuse: 2]

  @type t ::
          {:open, :list | :tuple | :map | :fun, parts :: non_neg_integer(),
           words :: non_neg_integer()}
          | {:string, len :: pos_integer()}
          | {kind :: atom(), atom_bytes :: nil | non_neg_integer(), words :: non_neg_integer()}
          | {:pid | :port | :reference, atom_bytes :: non_neg_integer(), words :: non_neg_integer(),
             node :: {name :: String.t(), creation :: non_neg_integer()}}

  # Integers of up to 60 bits are part of the word that holds them.
  @max_small 0x0800_0000_0000_0000

  @doc "The bytes after the token, and the token with an upper estimate of its heap words."
  @spec read(binary(), non_neg_integer()) :: {binary(), t()}
  def read(<<97, _, rest::binary>>, _), do: {rest, {:int, nil, 0}}
  def read(<<98, _::32, rest::binary>>, _), do: {rest, {:int, nil, 0}}
  def read(<<70, _::float-64, rest::binary>>, _), do: {rest, {:float, nil, 2}}
  def read(<<99, text::binary-size(31), rest::binary>>, _), do: {rest, float_text(text)}
  def read(<<110, len, sign, rest::binary>>, max), do: integer(len, sign, rest, max)
  def read(<<111, len::32, sign, rest::binary>>, max), do: integer(len, sign, rest, max)
  def read(<<106, rest::binary>>, _), do: {rest, {nil, nil, 0}}
  def read(<<107, 0::16, rest::binary>>, _), do: {rest, {nil, nil, 0}}
  def read(<<107, len::16, _::binary-size(len), rest::binary>>, _), do: {rest, {:string, len}}
  def read(<<109, len::32, _::binary-size(len), rest::binary>>, _), do: {rest, binary(len, 2)}

  # By its source, OTP 27.3.4.1 would allocate 2^61 bytes for an empty one, and end. None writes it.
  def read(<<77, len::32, bits, _::binary-size(len), rest::binary>>, _)
      when bits in 1..8 and len > 0,
      do: {rest, binary(len, if(bits == 8, do: 2, else: 8))}

  def read(<<108, len::32, rest::binary>>, _), do: {rest, {:open, :list, len + 1, 2 * len}}
  def read(<<104, arity, rest::binary>>, _), do: {rest, {:open, :tuple, arity, arity + 1}}
  def read(<<105, arity::32, rest::binary>>, _), do: {rest, {:open, :tuple, arity, arity + 1}}

  def read(<<116, pairs::32, rest::binary>>, _) do
    # Larger maps are trees.
    words = if pairs <= 32, do: 5 + 2 * pairs, else: 5 * pairs
    {rest, {:open, :map, 2 * pairs, words}}
  end

  def read(<<tag, _::binary>> = bytes, _) when tag in [100, 115, 118, 119] do
    {rest, len} = atom(bytes)
    {rest, {:atom, len, 0}}
  end

  def read(<<103, rest::binary>>, _), do: identifier(rest, 8, 1, 0, :pid, 5)
  def read(<<88, rest::binary>>, _), do: identifier(rest, 8, 4, 0, :pid, 5)
  def read(<<102, rest::binary>>, _), do: identifier(rest, 4, 1, 0, :port, 5)
  def read(<<89, rest::binary>>, _), do: identifier(rest, 4, 4, 0, :port, 5)
  def read(<<120, rest::binary>>, _), do: identifier(rest, 8, 4, 0, :port, 5)
  def read(<<101, rest::binary>>, _), do: identifier(rest, 4, 1, 0, :reference, 8)

  def read(<<114, words::16, rest::binary>>, _) when words in 1..5,
    do: identifier(rest, 0, 1, 4 * words, :reference, 8)

  def read(<<90, words::16, rest::binary>>, _) when words in 1..5,
    do: identifier(rest, 0, 4, 4 * words, :reference, 8)

  def read(<<112, size::32, _arity, _uniq::128, _index::32, free::32, rest::binary>>, _)
      when size >= 29 and size - 29 <= byte_size(rest) and free + 4 <= size - 29,
      do: {rest, {:open, :fun, free + 4, free + 10}}

  def read(<<113, rest::binary>>, _) do
    {rest, module} = atom(rest)
    {rest, function} = atom(rest)

    case rest do
      <<97, _arity, rest::binary>> -> {rest, {:export, module + function, 2}}
      _ -> malformed(113)
    end
  end

  def read(<<80, _::binary>>, _),
    do: refuse(:compressed_not_allowed, "compressed terms are not allowed here")

  def read(<<tag, _::binary>>, _), do: malformed(tag)
  def read("", _), do: refuse(:malformed, "the term is cut short")

  defp integer(len, _sign, _rest, max) when len > max,
    do:
      refuse(
        :integer_too_long,
        "an integer of #{len} bytes, the limit is #{max} (max_integer_bytes)"
      )

  defp integer(len, sign, rest, _max) when byte_size(rest) >= len do
    magnitude = binary_part(rest, 0, len)

    words =
      if len <= 8, do: small(magnitude, sign), else: 1 + div(significant(magnitude, len) + 7, 8)

    {binary_part(rest, len, byte_size(rest) - len), {:int, nil, words}}
  end

  defp integer(_len, _sign, _rest, _max), do: malformed(110)

  defp small(magnitude, sign) do
    value = :binary.decode_unsigned(magnitude, :little)
    value = if sign == 0, do: value, else: -value
    if value >= -@max_small and value < @max_small, do: 0, else: 2
  end

  defp significant(magnitude, len) when len > 0 do
    if :binary.at(magnitude, len - 1) == 0, do: significant(magnitude, len - 1), else: len
  end

  defp significant(_magnitude, 0), do: 0

  defp binary(len, head) when len <= 64, do: {:binary, nil, head + div(len + 7, 8)}
  defp binary(_len, _head), do: {:binary, nil, 12}

  # Of a text without a zero byte `binary_to_term` would read on behind it, and behind the message.
  defp float_text(text) do
    with [digits, _fill] <- :binary.split(text, <<0>>),
         {_, ""} <- Float.parse(String.trim(digits)) do
      {:float, nil, 2}
    else
      _ -> malformed(99)
    end
  end

  # A pid, port or reference: the atom of its node, then its creation with so many bytes before and after it.
  defp identifier(bytes, before, size, behind, kind, words) do
    {rest, len} = atom(bytes)

    if byte_size(rest) >= before + size + behind do
      creation = rest |> binary_part(before, size) |> :binary.decode_unsigned()
      {_, rest} = :erlang.split_binary(rest, before + size + behind)
      {rest, {kind, len, words, {name(bytes, len), creation}}}
    else
      malformed(kind)
    end
  end

  defp name(<<tag, _, text::binary>>, len) when tag in [119, 115], do: name(tag, text, len)
  defp name(<<tag, _::16, text::binary>>, len), do: name(tag, text, len)

  defp name(tag, text, len) when tag in [118, 119], do: binary_part(text, 0, len)

  defp name(_tag, text, len),
    do: :unicode.characters_to_binary(binary_part(text, 0, len), :latin1)

  defp atom(<<119, len, text::binary-size(len), rest::binary>>), do: utf8(text, rest)
  defp atom(<<118, len::16, text::binary-size(len), rest::binary>>), do: utf8(text, rest)
  defp atom(<<115, len, _::binary-size(len), rest::binary>>), do: {rest, len}

  defp atom(<<100, len::16, _::binary-size(len), rest::binary>>) when len <= 255, do: {rest, len}
  defp atom(<<tag, _::binary>>), do: malformed(tag)
  defp atom(""), do: malformed(:atom)

  defp utf8(text, rest) do
    if String.valid?(text) and (byte_size(text) <= 255 or length(String.to_charlist(text)) <= 255),
      do: {rest, byte_size(text)},
      else: malformed(:atom)
  end

  defp malformed(what), do: refuse(:malformed, "tag #{what} is unknown, refused, or cut short")
end
