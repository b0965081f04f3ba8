defmodule Meshx do
  @moduledoc """
  Erlang distribution and RPC over a service mesh, with mutual TLS.
  """
end
