defmodule Counter.MixProject do
  use Mix.Project

  def project do
    [
      app: :counter,
      version: "0.1.0",
      elixir: "~> 1.14",
      start_permanent: Mix.env() == :prod,
      deps: [{:meshx, path: "../../mix_project"}],
      releases: [counter: [steps: [:assemble, &Meshx.Release.add_agent/1]]]
    ]
  end

  def application do
    [mod: {Counter, []}, extra_applications: [:logger]]
  end
end
