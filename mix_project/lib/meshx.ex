defmodule Meshx do
  @moduledoc """
  Erlang distribution and RPC over a service mesh, with mutual TLS.

  Meshx takes the place of three things:

    * **EPMD** (who is where): the mesh's catalogue knows the nodes;
    * **`inet_tls_dist`** (who may talk, encrypted): the agent carries distribution over mutual TLS, and the mesh's
      rules say which service may talk to which;
    * **`:erpc`** (run this there): `MeshxRpc` calls functions of one module, without distribution between the nodes.

  An agent runs on each host (`meshx agent`). It holds the certificates and the rules; a BEAM talks to it over Unix
  sockets and never opens a connection to the mesh itself.

  ## Nodes

  Start a node with its environment set:

      meshx run shop@h1 -- iex -S mix

  or by hand, with this application's `ebin` on the code path (`ERL_LIBS`, or `-pa` inside `--erl`: the carrier must
  be there before Elixir is):

      erl -proto_dist meshx -no_epmd -name shop@h1

  Then `Node.connect(:"cart@h2")` and all that follows from it work as ever. `MeshxNode` says why a link was
  refused and whose certificate is at its other end.

  ## Finding the agent

  A node looks in one directory: emulator flag `-meshx_dir DIR`, else `$MESHX_DIR`, else `$XDG_RUNTIME_DIR/meshx`, else
  `/tmp/meshx-UID`. It must belong to the node's own user or to root, and others must not be able to write it. A
  missing agent ends a node's boot, with the reason on stderr.

  The agent may restart at any time: nodes come back to it by themselves under their running names. Links end with
  the agent that carried them and are made again by the next message, like any lost link.

  ## Identity

  A node `shop@h1` is an instance of the service `shop`: the part before `@` is what a certificate names and what
  rules are about, the host part belongs to the agent that owns it. Host parts are not resolved, so they need neither
  DNS nor a dot, and `-name` and `-sname` nodes meet.
  """
end
