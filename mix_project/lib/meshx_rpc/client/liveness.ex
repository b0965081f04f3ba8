defmodule MeshxRpc.Client.Liveness do
  @moduledoc false
  # A server that has said nothing since the last look is asked to, and one that was asked is gone.

  alias MeshxRpc.{Frame, Link}

  @doc "The first look comes after `ping_interval`, as `{:timeout, timer, :ping}`."
  @spec start(map()) :: map()
  def start(state), do: next(state, false, 0)

  @doc "Looks, and sets the timer of the next look."
  @spec look(map()) :: {:ok, map()} | {:silent, String.t()}
  def look(%{config: config, link: link} = state) do
    %{bytes: heard} = link.module.stats(link.codec)
    {asked?, before} = state.heard

    cond do
      heard != before ->
        {:ok, next(state, false, heard)}

      asked? ->
        {:silent, "the server has said nothing for #{2 * config.ping_interval} ms"}

      true ->
        ping = Frame.ping(<<System.unique_integer()::64>>)
        {:ok, next(%{state | link: Link.queue(link, ping)}, true, heard)}
    end
  end

  defp next(state, asked?, heard) do
    timer = :erlang.start_timer(state.config.ping_interval, self(), :ping)
    %{state | ping_timer: timer, heard: {asked?, heard}}
  end
end
