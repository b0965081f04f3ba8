defmodule MeshxRpc.Client.ByCaller do
  @moduledoc false
  # The calls of a connection by who made them. It is asked when a caller gives up or goes, and few do: so there is
  # none until it is asked, what begins after that is only noted, and what ends stays in it. Who asks holds what it
  # says against what he knows.
  #
  # It goes when it has been noted in much more often than there are calls: so no call costs more than a note, and what
  # it takes to make one is spread over as many.

  @slack 1_024

  @enforce_keys [:calls, :size]
  # calls: caller => %{key => stream, nil without one}. noted: calls that are not yet there, last first. size: of both.
  defstruct [:calls, :size, noted: []]

  @type call :: {caller :: pid(), key :: reference()}
  @type t :: %__MODULE__{}

  @doc "Of these calls, each with its stream."
  @spec new([{call(), nil | pos_integer()}]) :: t()
  def new(calls), do: ready(%__MODULE__{calls: %{}, size: length(calls), noted: calls})

  @doc "A call has begun, or has its stream now; there are `live` of them."
  @spec note(nil | t(), call(), nil | pos_integer(), non_neg_integer()) :: nil | t()
  def note(nil, _call, _stream, _live), do: nil

  def note(%{size: size}, _call, _stream, live) when size >= 2 * live + @slack, do: nil

  def note(%{size: size, noted: noted} = known, call, stream, _live),
    do: %{known | size: size + 1, noted: [{call, stream} | noted]}

  @doc "What was noted is found from now on."
  @spec ready(t()) :: t()
  def ready(%{noted: []} = known), do: known

  def ready(%{calls: calls, noted: noted} = known) do
    calls =
      for {{caller, key}, stream} <- Enum.reverse(noted), reduce: calls do
        %{^caller => keys} = calls -> %{calls | caller => Map.put(keys, key, stream)}
        calls -> Map.put(calls, caller, %{key => stream})
      end

    %{known | calls: calls, noted: []}
  end

  @doc "What was the stream of a call: nil also when it is not known."
  @spec stream(t(), call()) :: nil | pos_integer()
  def stream(%{calls: calls, noted: []}, {caller, key}) do
    case calls do
      %{^caller => %{^key => stream}} -> stream
      _never -> nil
    end
  end

  @doc "What were the calls of a caller."
  @spec of(t(), pid()) :: [{call(), nil | pos_integer()}]
  def of(%{calls: calls, noted: []}, caller),
    do: for({key, stream} <- Map.get(calls, caller, %{}), do: {{caller, key}, stream})
end
