defmodule MeshxConsul.Json do
  @moduledoc false
  # Writes JSON (RFC 8259): Elixir has it from 1.18 on, OTP from 27.

  @doc "JSON of maps, lists, text, numbers, atoms; raises `ArgumentError` for anything else."
  @spec encode!(term()) :: String.t()
  def encode!(term), do: term |> write() |> IO.iodata_to_binary()

  defp write(nil), do: "null"
  defp write(atom) when is_boolean(atom), do: Atom.to_string(atom)
  defp write(atom) when is_atom(atom), do: atom |> Atom.to_string() |> write()
  defp write(number) when is_integer(number), do: Integer.to_string(number)
  defp write(number) when is_float(number), do: Float.to_string(number)
  defp write(list) when is_list(list), do: [?[, Enum.map_intersperse(list, ?,, &write/1), ?]]

  defp write(map) when is_map(map) and not is_struct(map) do
    pairs = Enum.map_intersperse(map, ?,, fn {key, value} -> [key(key), ?:, write(value)] end)
    [?{, pairs, ?}]
  end

  defp write(text) when is_binary(text) do
    if String.valid?(text),
      do: [?", escape(text, 0, 0, text), ?"],
      else: raise(ArgumentError, "#{inspect(text, limit: 20)} is not UTF-8")
  end

  defp write(other), do: raise(ArgumentError, "#{inspect(other, limit: 5)} has no form in JSON")

  defp key(key) when is_binary(key) or is_atom(key), do: key |> to_string() |> write()

  defp key(other),
    do: raise(ArgumentError, "#{inspect(other, limit: 5)} is no key of a JSON object")

  # `from` and `length`: what of `text` needs no escape and is not written yet.
  defp escape(<<byte, rest::binary>>, from, length, text) when byte < 0x20 or byte in [?", ?\\] do
    [
      binary_part(text, from, length),
      escaped(byte) | escape(rest, from + length + 1, 0, text)
    ]
  end

  defp escape(<<_byte, rest::binary>>, from, length, text),
    do: escape(rest, from, length + 1, text)

  defp escape(<<>>, from, length, text), do: [binary_part(text, from, length)]

  defp escaped(byte) when byte in [?", ?\\], do: [?\\, byte]
  defp escaped(byte), do: :io_lib.format("\\u~4.16.0b", [byte])
end
