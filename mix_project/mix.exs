# The compiler that builds the NIF must exist before anything is compiled.
Code.require_file("native.exs", __DIR__)

defmodule Meshx.MixProject do
  use Mix.Project

  @version "0.2.0-dev"

  def project do
    [
      app: :meshx,
      version: @version,
      elixir: "~> 1.14",
      start_permanent: Mix.env() == :prod,
      compilers: [:meshx_nif] ++ Mix.compilers(),
      elixirc_paths: elixirc_paths(Mix.env()),
      elixirc_options: [warnings_as_errors: Mix.env() == :test],
      erlc_paths: erlc_paths(Mix.env()),
      erlc_options: erlc_options(Mix.env()),
      test_coverage: [summary: [threshold: 80]],
      deps: [],
      name: "Meshx",
      description: "Erlang distribution and RPC over a service mesh with mutual TLS",
      package: package(),
      docs: [main: "Meshx"]
    ]
  end

  def application do
    [mod: {Meshx.Application, []}, extra_applications: [:logger, :crypto]]
  end

  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]

  defp erlc_paths(:test), do: ["src", "test/support"]
  defp erlc_paths(_env), do: ["src"]

  defp erlc_options(:test), do: [:debug_info, :warnings_as_errors]
  defp erlc_options(_env), do: [:debug_info]

  defp package do
    [
      licenses: ["Apache-2.0"],
      links: %{},
      files: ~w(lib src mix.exs native.exs .formatter.exs)
    ]
  end
end
