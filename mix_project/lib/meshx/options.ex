defmodule Meshx.Options do
  @moduledoc """
  Checks options once, at start, against a schema, and says what is wrong with the first one that is.

  A schema is a keyword list of `name: spec`; a spec has

    * `:type` - one of `t:type/0`
    * `:default` - the value when the option is absent; without it an absent option is `nil`
    * `:required` - `true` when it must be given
    * `:secret` - `true` when its value must not be shown in an error
    * `:doc` - a sentence for `docs/1`: unit, effect

  `validate!/3` answers with a map that has every option of the schema.
  """

  @typedoc """
  - `{:range, min, max}` - an integer in that range, both ends included
  - `:timeout` - a positive number of milliseconds (below 2^32 - 1), or `:infinity`
  - `{:one_of, values}` - one of these values
  - `{:custom, fun, wanted}` - `fun.(value)` is `{:ok, value}` or `:error`; `wanted` is text
  """
  @type type ::
          :any
          | :boolean
          | :atom
          | :keyword
          | :timeout
          | {:range, integer(), integer()}
          | {:one_of, [term()]}
          | {:custom, (term() -> {:ok, term()} | :error), String.t()}

  @type schema :: [{atom(), keyword()}]

  @doc "Checks `options`; raises `ArgumentError` that names `what`, the option, its value and what is allowed."
  @spec validate!(schema(), keyword(), String.t()) :: map()
  def validate!(schema, options, what) do
    unless Keyword.keyword?(options) do
      # Some of them may be secret: they are not shown.
      raise ArgumentError, "#{what}: options are #{kind(options)}, wanted a keyword list"
    end

    case Enum.find(options, fn {name, _value} -> not Keyword.has_key?(schema, name) end) do
      nil ->
        :ok

      {name, _value} ->
        raise ArgumentError, "#{what}: option #{inspect(name)} is not known, #{names(schema)}"
    end

    Map.new(schema, fn {name, spec} -> {name, value!(name, spec, options, what)} end)
  end

  @doc "The schema as a Markdown list, for a `@moduledoc`."
  @spec docs(schema()) :: String.t()
  def docs(schema) do
    Enum.map_join(schema, "\n", fn {name, spec} ->
      default =
        cond do
          spec[:required] -> " (required)"
          Keyword.has_key?(spec, :default) -> " (default `#{inspect(spec[:default])}`)"
          true -> ""
        end

      "  * `#{inspect(name)}` - #{spec[:doc]}; #{wanted(spec[:type])}#{default}"
    end)
  end

  defp value!(name, spec, options, what) do
    case Keyword.fetch(options, name) do
      {:ok, value} ->
        case check(spec[:type], value) do
          {:ok, value} ->
            value

          :error ->
            raise ArgumentError,
                  "#{what}: option #{inspect(name)} is #{seen(spec, value)}, wanted #{wanted(spec[:type])}"
        end

      :error ->
        if spec[:required] do
          raise ArgumentError,
                "#{what}: option #{inspect(name)} is missing, wanted #{wanted(spec[:type])}"
        end

        spec[:default]
    end
  end

  defp check(:any, value), do: {:ok, value}
  defp check(:boolean, value) when is_boolean(value), do: {:ok, value}
  defp check(:atom, value) when is_atom(value), do: {:ok, value}
  defp check(:timeout, :infinity), do: {:ok, :infinity}

  defp check(:timeout, value) when is_integer(value) and value > 0 and value < 0xFFFF_FFFF,
    do: {:ok, value}

  defp check({:range, min, max}, value) when is_integer(value) and value >= min and value <= max,
    do: {:ok, value}

  defp check({:one_of, values}, value), do: if(value in values, do: {:ok, value}, else: :error)
  defp check({:custom, fun, _wanted}, value), do: fun.(value)
  defp check(:keyword, value), do: if(Keyword.keyword?(value), do: {:ok, value}, else: :error)
  defp check(_type, _value), do: :error

  defp wanted(:any), do: "any term"
  defp wanted(:boolean), do: "true or false"
  defp wanted(:atom), do: "an atom"
  defp wanted(:keyword), do: "a keyword list"
  defp wanted(:timeout), do: "milliseconds (at least 1) or :infinity"
  defp wanted({:range, min, max}), do: "an integer from #{min} to #{max}"
  defp wanted({:one_of, values}), do: "one of " <> Enum.map_join(values, ", ", &inspect/1)
  defp wanted({:custom, _fun, wanted}), do: wanted

  defp names(schema),
    do: "known are " <> Enum.map_join(schema, ", ", fn {name, _spec} -> inspect(name) end)

  defp seen(spec, value), do: if(spec[:secret], do: "not of the right form", else: show(value))

  defp kind(options) when is_list(options),
    do: "a list with something else than pairs of a name and a value"

  defp kind(options) when is_map(options), do: "a map"
  defp kind(options) when is_atom(options) or is_number(options), do: show(options)
  defp kind(_options), do: "of another form"

  defp show(value), do: inspect(value, limit: 8, printable_limit: 80)
end
