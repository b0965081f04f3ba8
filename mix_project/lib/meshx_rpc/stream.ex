defmodule MeshxRpc.Stream do
  @moduledoc """
  Arguments and results that are larger than memory: they move piece by piece.

      # The client sends a file. The server's function gets an Enumerable.
      file = MeshxRpc.Stream.new(File.stream!("big", [], 65_536))
      MyApp.ApiClient.call(:store, {"big", file})

      def store({name, pieces}), do: pieces |> Stream.into(File.stream!(path(name))) |> Stream.run()

      # The client takes one. The server's function gives any Enumerable.
      MyApp.ApiClient.stream(:read, "big") |> Enum.into(File.stream!("copy"))

      def read(name), do: File.stream!(path(name), [], 65_536)

  ## Arguments

  The argument of `call` and `stream` may be `MeshxRpc.Stream.new(enumerable)`, or a tuple with some of them as elements
  (of at most 255 elements). The function gets an Enumerable in the place of each. It can be enumerated once, by the process that runs
  the function. The client enumerates it in a process of its own, which ends with the call; that process reads at most
  `:window` bytes (1 MiB) further than the function has taken.

  Such a call is made again only when there was no connection for it.

  ## Results

  `stream` gives a lazy Enumerable. Each enumeration calls the function anew, which must return an Enumerable; its process runs
  on and enumerates that, at most `:window` bytes further than the client has taken. Where nobody takes, nobody reads: a
  piece is asked for when there is room for it. Neither side holds more than a window and one batch, which is an eighth of a window
  or one piece that is larger. A piece may be as long as any other message (`:max_message`).

  ## Ends and errors

  - A consumer that stops early or dies ends the producer, on the other side too: its process is killed.
  - An exception in the function, or in the Enumerable that it returned, is raised by the client's enumeration, after the pieces that came
    before it. Other failures raise `MeshxRpc.Error` with the reasons of `MeshxRpc.Client`.
  - An exception in an argument's Enumerable is raised inside the server's function, where it takes the next piece. So the call
    answers with it, unless the function rescues it.
  - `:timeout` counts from the first moment to the last, time in which the consumer does something else included.
    A server's `:timeout_execute` counts likewise.
  - A stream does not outlive its connection: `:tcp_closed`, and pieces that have come are not taken back.

  A stream counts as one running request on the server. Requests for its pieces have room of their own.
  """

  @enforce_keys [:enumerable]
  defstruct [:enumerable]

  @typedoc "An Enumerable that is to be moved piece by piece."
  @type t :: %__MODULE__{enumerable: Enumerable.t()}

  @doc "Marks an Enumerable as one that moves piece by piece when it is an argument."
  @spec new(Enumerable.t()) :: t()
  def new(enumerable), do: %__MODULE__{enumerable: enumerable}

  @doc false
  # Whether an argument has streams: asked for every call, so it looks no deeper than a tuple's elements.
  def in?(%__MODULE__{}), do: true
  def in?(tuple) when is_tuple(tuple), do: in?(tuple, tuple_size(tuple))
  def in?(_other), do: false

  defp in?(_tuple, 0), do: false
  defp in?(tuple, size) when size > 255 or not is_tuple(tuple), do: false

  defp in?(tuple, n) do
    case :erlang.element(n, tuple) do
      %__MODULE__{} -> true
      _other -> in?(tuple, n - 1)
    end
  end

  @doc false
  # The argument without its streams, where they were (nil: the argument itself), and what they enumerate.
  def take_out(%__MODULE__{enumerable: enumerable}), do: {[], [0], [enumerable]}

  def take_out(tuple) when is_tuple(tuple) do
    places = for {%__MODULE__{}, n} <- Enum.with_index(Tuple.to_list(tuple), 1), do: n
    plain = Enum.reduce(places, tuple, &put_elem(&2, &1 - 1, nil))
    {plain, places, for(n <- places, do: elem(tuple, n - 1).enumerable)}
  end

  def take_out(argument), do: {argument, [], []}

  @doc false
  # The other way round; `:misplaced` when the peer's places are not in the argument.
  def put_in(_plain, [0], [enumerable]), do: {:ok, enumerable}

  def put_in(plain, places, enumerables) do
    size = if is_tuple(plain), do: tuple_size(plain), else: 0

    if Enum.all?(places, &(&1 in 1..size//1)) do
      pairs = Enum.zip(places, enumerables)
      {:ok, Enum.reduce(pairs, plain, fn {n, stream}, acc -> put_elem(acc, n - 1, stream) end)}
    else
      :misplaced
    end
  end
end
