defmodule MeshxRpc.Server.Alarm do
  @moduledoc false
  # One timer for all requests of a connection, at the first moment in which one of them is to end: setting and
  # cancelling one for each costs more than looking through them now and then.

  @typedoc "The timer of the first deadline, and when it is. It comes as `{:timeout, timer, :alarm}`."
  @type t :: nil | {reference(), integer()}

  @doc "It is to ring at `until`, by the VM's monotonic clock in milliseconds, or before."
  @spec set(t(), integer() | :infinity) :: t()
  def set(alarm, :infinity), do: alarm
  def set(nil, until), do: start(until)
  def set({_timer, at} = alarm, until) when until >= at, do: alarm

  def set({timer, _at}, until) do
    :erlang.cancel_timer(timer, async: true, info: false)
    start(until)
  end

  @doc "It rang: the streams whose time is over."
  @spec late(%{pos_integer() => %{until: integer() | :infinity}}) :: [pos_integer()]
  def late(streams) do
    now = System.monotonic_time(:millisecond)
    for {stream, %{until: until}} <- streams, until <= now, do: stream
  end

  @doc "The alarm for the streams that are left."
  @spec next(%{pos_integer() => %{until: integer() | :infinity}}) :: t()
  def next(streams) do
    next = for {_stream, %{until: until}} <- streams, reduce: :infinity, do: (at -> min(at, until))
    set(nil, next)
  end

  defp start(until), do: {:erlang.start_timer(until, self(), :alarm, abs: true), until}
end
