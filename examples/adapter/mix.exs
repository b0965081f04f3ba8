defmodule AdapterExample.MixProject do
  use Mix.Project

  def project do
    [
      app: :adapter_example,
      version: "0.1.0",
      elixir: "~> 1.14",
      start_permanent: false,
      deps: [{:meshx, path: "../../mix_project"}]
    ]
  end

  def application, do: [extra_applications: [:logger, :crypto]]
end
