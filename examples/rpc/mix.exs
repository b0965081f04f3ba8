defmodule RpcExamples.MixProject do
  use Mix.Project

  def project do
    [
      app: :rpc_examples,
      version: "0.1.0",
      elixir: "~> 1.14",
      start_permanent: false,
      deps: [{:meshx, path: "../../mix_project"}]
    ]
  end

  def application, do: [extra_applications: [:logger, :crypto]]
end
