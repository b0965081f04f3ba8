defmodule Meshx.Release do
  @moduledoc """
  Meshx in a release (`mix release`).

      mix meshx.gen.release

  writes the emulator flags, and a step in `mix.exs` brings the agent's program along:

      releases: [shop: [steps: [:assemble, &Meshx.Release.add_agent/1]]]

  The NIF is in the release by itself. Everything that goes over distribution (`remote`, `rpc`, `stop`, `restart`,
  `pid`) then goes over the agent of the host. That agent is no part of the node's life: it is started before, by
  the system (`examples/systemd`) or by hand with the program in the release,

      _build/prod/rel/shop/lib/meshx-VERSION/priv/bin/meshx agent --mesh consul

  and a node that finds none does not boot and says so.
  """

  @doc """
  A step of a release, after `:assemble`: puts the program `meshx` into the release's `lib/meshx-VERSION/priv/bin`.

  It is the file that `$MESHX_PROGRAM` names, or else built from the sources beside the dependency with cargo.
  """
  # The struct is Mix's, which is not there when this runs in a release.
  @spec add_agent(struct()) :: struct()
  def add_agent(%{path: path, applications: %{meshx: meshx}} = release) do
    target = Path.join([path, "lib", "meshx-#{meshx[:vsn]}", "priv", "bin", "meshx"])
    File.mkdir_p!(Path.dirname(target))
    File.cp!(Meshx.Program.for_release!(), target)
    File.chmod!(target, 0o755)
    release
  end
end
