defmodule MeshxRpc.Codec.Nif.Indexed do
  @moduledoc false
  # Terms whose atoms are indexes into a table, as distribution sends them and `native/etf` writes them.
  #
  # `:erlang.binary_to_term/2` looks up each occurrence of an atom by its text. `:erts_debug.dist_ext_to_term/2` takes
  # the table, and decodes 10,000 small maps in a seventh of the time. It is there for OTP's own tests and documented
  # nowhere: so it is used only on a VM where it has been seen to work, and what it does not take goes the usual way.

  # A plain atom: it is looked up for each term.
  @works __MODULE__

  @doc "Whether this VM decodes such terms. Tried once."
  @spec works?() :: boolean()
  def works? do
    case :persistent_term.get(@works, nil) do
      nil ->
        works = try_it()
        :persistent_term.put(@works, works)
        works

      works ->
        works
    end
  end

  @doc """
  The term, if the VM takes it. Raises `ArgumentError` when the VM does not have one of the atoms.

  Does not yield. `names` are the atoms' texts, as `native/etf` gives them with `bytes`, and nothing else may be handed
  in: other bytes might have atoms in them, which would be made. What is decoded shares no memory with `bytes`.
  """
  @spec decode([String.t()], binary()) :: {:ok, term()} | :error
  def decode(names, bytes) do
    atoms = for name <- names, do: :erlang.binary_to_existing_atom(name, :utf8)
    result = to_term(List.to_tuple(atoms), bytes)
    # What the VM counts for `binary_to_term`; it counts nothing for this.
    true = :erlang.bump_reductions(1 + div(byte_size(bytes), 128))
    result
  end

  # By `apply`: to compilers and xref it need not exist.
  defp to_term(atoms, bytes) do
    {:ok, apply(:erts_debug, :dist_ext_to_term, [atoms, bytes])}
  rescue
    # Also of a key that a map has twice.
    _error -> :error
  end

  # All kinds of terms that are decoded this way.
  defp try_it do
    Code.ensure_loaded?(:erts_debug) and function_exported?(:erts_debug, :dist_ext_to_term, 2) and
      tried?()
  end

  defp tried? do
    binary = :binary.copy("more than 64 bytes, ", 5)

    plain = [
      [
        0,
        255,
        256,
        -1,
        Integer.pow(2, 31),
        -Integer.pow(2, 63),
        Integer.pow(7, 900),
        1.5,
        -2.5e-300
      ],
      [
        "",
        "short",
        binary,
        <<5::3>>,
        <<binary::binary, 1::1>>,
        ~c"bytes",
        [1 | 2],
        [[]],
        {},
        {{1}},
        %{}
      ]
    ]

    # Behind their version bytes.
    parts = for term <- plain, <<131, part::binary>> = :erlang.term_to_binary(term), do: part
    # %{a: true, é: plain}, its keys once in this and once in the other order.
    maps = [
      [<<116, 2::32, 82, 0, 82, 2, 82, 1, 108, 2::32>>, parts, 106],
      [<<116, 2::32, 82, 1, 108, 2::32>>, parts, <<106, 82, 0, 82, 2>>]
    ]

    map = %{:a => true, :é => plain}
    atoms = {:a, :é, true}

    # A VM that takes an index beyond the table, or an atom as text, is not what this was written for.
    to_term(atoms, IO.iodata_to_binary([<<131, 104, 3, 82, 2>>, maps])) == {:ok, {true, map, map}} and
      to_term(atoms, <<131, 82, 3>>) == :error and
      to_term(atoms, <<131, 116, 2::32, 82, 0, 106, 82, 0, 106>>) == :error
  end
end
