defmodule Meshx.TestAdapter do
  @moduledoc "An adapter that answers what the application environment of `:meshx_test_adapter` says, or raises."
  @behaviour Meshx.ServiceMesh

  @impl true
  def start(params, template, force?, timeout),
    do: answer(:start, [params, template, force?, timeout])

  @impl true
  def stop(id), do: answer(:stop, [id])

  @impl true
  def connect(upstreams, template, proxy), do: answer(:connect, [upstreams, template, proxy])

  @impl true
  def disconnect(_upstreams, _proxy_id, _restart_proxy?), do: {:ok, []}

  defp answer(function, arguments) do
    IO.puts("asked: #{inspect({function, arguments})}")

    case Application.fetch_env!(:meshx_test_adapter, function) do
      :raise -> raise "no answer"
      :exit -> exit(:no_answer)
      answer -> answer
    end
  end
end
