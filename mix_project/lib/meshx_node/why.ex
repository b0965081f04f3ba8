defmodule MeshxNode.Why do
  @moduledoc """
  The decision on a link, step by step: what `MeshxNode.why/1` answers.

    * `:from`, `:to` - the nodes
    * `:allowed` - whether the link would be let through
    * `:cause` - `:ok`, or the cause of the refusal (`MeshxNode`, "Causes")
    * `:text` - the rules that allow it, or the refusal's text: the one that `MeshxNode.connect/1`, the agent's log
      and the `nodedown` reason have
    * `:steps` - in order, up to the first no: whether it holds, what was looked at, what was seen, and what to do
      (`""` when nothing)

  `to_string/1` gives it all as lines for people.
  """

  @enforce_keys [:from, :to, :allowed, :cause, :text, :steps]
  defstruct @enforce_keys

  @type step :: %{ok: boolean, what: String.t(), text: String.t(), fix: String.t()}
  @type t :: %__MODULE__{
          from: node,
          to: node,
          allowed: boolean,
          cause: atom,
          text: String.t(),
          steps: [step]
        }

  @doc false
  # None when the agent's answer is not what the protocol says.
  @spec read(node, node, map) :: t | nil
  def read(from, to, %{allowed: allowed, cause: cause, text: text, steps: steps})
      when is_boolean(allowed) and is_atom(cause) and is_binary(text) and is_list(steps) do
    if Enum.all?(steps, &step?/1) do
      steps = Enum.map(steps, &Map.take(&1, [:ok, :what, :text, :fix]))
      %__MODULE__{from: from, to: to, allowed: allowed, cause: cause, text: text, steps: steps}
    end
  end

  def read(_from, _to, _answer), do: nil

  defp step?(%{ok: ok, what: what, text: text, fix: fix}),
    do: is_boolean(ok) and Enum.all?([what, text, fix], &is_binary/1)

  defp step?(_), do: false

  defimpl String.Chars do
    def to_string(why) do
      width = why.steps |> Enum.map(&String.length(&1.what)) |> Enum.max(fn -> 0 end)
      verdict = if why.allowed, do: "allowed", else: "refused with #{why.cause}"
      lines = Enum.map(why.steps, &line(&1, width))
      Enum.join(lines ++ ["#{why.from} -> #{why.to}: #{verdict}"], "\n")
    end

    defp line(step, width) do
      # What to do is said once, where the text says it already.
      fix = if step.fix == "" or step.text =~ step.fix, do: "", else: " -> " <> step.fix

      level = if step.ok, do: "ok", else: "no"
      "#{level}  #{String.pad_trailing(step.what, width)}  #{step.text}#{fix}"
    end
  end
end
