defmodule MeshxConsul.Mustache do
  @moduledoc false
  # Mustache in the strings of maps and lists: variables, sections, inverted sections and comments. Nothing is
  # escaped, since nothing here is HTML; partials and other delimiters are not offered.
  #
  # A string that is `{{$name$}}` and nothing else becomes the value itself, a number for example.

  @tag ~r/\{\{\{[^{}]*\}\}\}|\{\{[^{}]*\}\}/

  @doc "Renders all strings of a term, those that are keys of maps too."
  @spec render(term(), map()) :: {:ok, term()} | {:error, {:invalid_request, String.t()}}
  def render(term, hash) do
    {:ok, render_term(term, hash)}
  catch
    {:mustache, text} -> {:error, {:invalid_request, "template: " <> text}}
  end

  defp render_term(text, hash) when is_binary(text) do
    case Regex.run(~r/\A\{\{\$\s*([^{}$]+?)\s*\$\}\}\z/, text) do
      [_all, name] -> fetch!([hash], name)
      nil -> text |> parse() |> text([hash]) |> IO.iodata_to_binary()
    end
  end

  defp render_term(list, hash) when is_list(list), do: Enum.map(list, &render_term(&1, hash))

  defp render_term(map, hash) when is_map(map) and not is_struct(map),
    do: Map.new(map, fn {key, value} -> {render_term(key, hash), render_term(value, hash)} end)

  defp render_term(other, _hash), do: other

  ## Parsing

  defp parse(text) do
    {nodes, []} = @tag |> Regex.split(text, include_captures: true) |> nodes([], nil)
    nodes
  end

  # `section` is the one that is open.
  defp nodes([], acc, nil), do: {Enum.reverse(acc), []}
  defp nodes([], _acc, section), do: stop("{{##{section}}} has no end")

  defp nodes([token | rest], acc, section) do
    case tag(token) do
      {:text, text} ->
        nodes(rest, [text | acc], section)

      {:comment, _text} ->
        nodes(rest, acc, section)

      {:end, ^section} ->
        {Enum.reverse(acc), rest}

      {:end, name} ->
        stop("{{/#{name}}} ends no section")

      {:variable, _name} = variable ->
        nodes(rest, [variable | acc], section)

      {kind, name} ->
        {inner, rest} = nodes(rest, [], name)
        nodes(rest, [{kind, name, inner} | acc], section)
    end
  end

  defp tag("{{{" <> rest), do: {:variable, rest |> String.trim_trailing("}}}") |> String.trim()}

  defp tag("{{" <> rest = token) do
    if String.ends_with?(rest, "}}") do
      case rest |> String.trim_trailing("}}") |> String.trim() do
        "#" <> name -> {:section, String.trim(name)}
        "^" <> name -> {:inverted, String.trim(name)}
        "/" <> name -> {:end, String.trim(name)}
        "!" <> comment -> {:comment, comment}
        "&" <> name -> {:variable, String.trim(name)}
        ">" <> _name -> stop("#{token}: partials are not offered")
        "=" <> _delimiters -> stop("#{token}: other delimiters are not offered")
        name -> {:variable, name |> String.trim("$") |> String.trim()}
      end
    else
      {:text, token}
    end
  end

  defp tag(text), do: {:text, text}

  ## Rendering. `stack`: what names are looked up in, innermost first.

  defp text(nodes, stack), do: Enum.map(nodes, &node_text(&1, stack))

  defp node_text(text, _stack) when is_binary(text), do: text
  defp node_text({:variable, name}, stack), do: printed(fetch!(stack, name), name)

  defp node_text({:section, name, inner}, stack) do
    case find(stack, name) do
      {:ok, list} when is_list(list) -> Enum.map(list, &text(inner, [&1 | stack]))
      {:ok, value} when value not in [nil, false] -> text(inner, [value | stack])
      _absent -> []
    end
  end

  defp node_text({:inverted, name, inner}, stack) do
    case find(stack, name) do
      {:ok, value} when value not in [nil, false, []] -> []
      _absent -> text(inner, stack)
    end
  end

  defp printed(value, _name) when is_binary(value) or is_number(value) or is_atom(value),
    do: to_string(value)

  defp printed(value, name),
    do: stop("{{#{name}}} is #{inspect(value, limit: 5)}, wanted text or a number")

  defp fetch!(stack, name) do
    case find(stack, name) do
      {:ok, value} -> value
      :error -> stop("{{#{name}}} is not among the parameters")
    end
  end

  defp find([value | _stack], "."), do: {:ok, value}

  defp find(stack, name),
    do: Enum.find_value(stack, :error, &(is_map(&1) and fetch(&1, name)))

  defp fetch(map, name) do
    case map do
      %{^name => value} -> {:ok, value}
      _other -> false
    end
  end

  defp stop(text), do: throw({:mustache, text})
end
