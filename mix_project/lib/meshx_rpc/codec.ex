defmodule MeshxRpc.Codec do
  @moduledoc """
  Turns what a socket delivers into RPC messages: the receiving half of `docs/rpc-protocol.md`.

  Two implementations do the same: `MeshxRpc.Codec.Nif` (Rust, `native/frame`) and `MeshxRpc.Codec.Elixir`,
  which is used when the NIF cannot be loaded. `impl/0` says which one this VM uses.

  A codec belongs to one connection and one process. What a call returns replaces what was passed in, which must
  not be used again (the NIF's decoder changes in place). It does no I/O: `feed/2` takes a whole read
  and answers with events and with bytes that must be written to the peer (WINDOW, RESET, PONG).
  """

  require Logger

  @chosen {__MODULE__, :impl}

  @typedoc "A connection's decoder: a NIF resource or a struct."
  @type t :: term()

  @typedoc """
  - `:role` - `:client` or `:server`: which frame types the peer may send
  - `:max_message` - largest message in bytes
  - `:max_bytes` - byte budget for messages that are being reassembled or used
  - `:max_streams` - messages that may be open at once
  - `:stream_window`, `:connection_window` - what our hello grants, in bytes
  - `:budget` - nil, or what `c:budget/1` made and a counter whose second slot says how much of it is taken
  """
  @type options :: %{
          role: :client | :server,
          max_message: pos_integer(),
          max_bytes: pos_integer(),
          max_streams: pos_integer(),
          stream_window: pos_integer(),
          connection_window: pos_integer(),
          budget: nil | {term(), :counters.counters_ref()}
        }

  @typedoc "Names of causes on the wire; an unknown number stays a number."
  @type cause :: atom() | non_neg_integer()

  @type event ::
          {:hello, payload :: binary()}
          | {:hello_ack, payload :: binary()}
          | {:auth, proof :: binary()}
          | :ready
          | {:refused, cause(), text :: binary()}
          | {:request, stream :: pos_integer(), :call | :cast,
             deadline :: non_neg_integer() | :infinity, fun :: binary(), term_flag :: byte(),
             argument :: binary()}
          | {:response, stream :: pos_integer(), :result | :error | :started, term_flag :: byte(),
             result :: binary()}
          | {:cancel, stream :: pos_integer()}
          | {:reset, stream :: pos_integer(), cause(), text :: binary()}
          | {:stream_error, stream :: pos_integer(), cause(), text :: binary()}
          | {:window, stream :: non_neg_integer(), increment :: pos_integer()}
          | {:pong, binary()}
          | {:goaway, last :: non_neg_integer(), cause(), text :: binary()}

  @doc "A byte budget that several connections share."
  @callback budget(max :: pos_integer()) :: term()

  @doc "The bytes of a budget that are taken."
  @callback budget_used(budget :: term()) :: non_neg_integer()

  @doc "What a connection that died had taken of a budget, by its counter."
  @callback give_back(budget :: term(), bytes :: non_neg_integer()) :: :ok

  @doc "Request ids up to the largest that no request has taken: a GOAWAY's `last` says nothing of them."
  @callback skipped(t()) :: [pos_integer()]

  @doc "A policy of `MeshxRpc.Guard` in the form that `c:guard/2` takes fastest."
  @callback policy(map()) :: term()

  @doc "A codec for a fresh connection. Before `agree/2` it takes hello frames only."
  @callback new(options()) :: t()

  @doc """
  Sets what the hello agreed on: checksum id (0 none, 1 crc32, 2 crc32c) and block size in bytes.

  A server takes requests from here on: call it when the client has proven itself and not before. A client takes
  responses from READY on, and calls this before its first `open/3`.
  """
  @callback agree(t(), %{checksum: 0..2, blk_max_size: pos_integer()}) :: t()

  @doc """
  Takes one read. `{:error, ...}` means the connection is over: handle the events, write the bytes
  (a GOAWAY or REFUSED is among them), close.
  """
  @callback feed(t(), binary()) ::
              {:ok, t(), [event()], iodata()}
              | {:error, t(), [event()], iodata(), cause(), text :: binary()}

  @doc "The client opened these streams: their responses are expected (and may be at most `max_message`)."
  @callback open(t(), first :: pos_integer(), last :: pos_integer()) :: t()

  @doc """
  These streams are over for us (answered, cancelled, timed out): drops what was reassembled, gives the
  budget of their messages back, and ignores frames that can still be on their way for them.

  Due for every stream of a `:request`, and of `open/3`. After a `:stream_error` or `:reset` for a message that was not
  handed over yet it does nothing.
  """
  @callback release(t(), [stream :: pos_integer()]) :: t()

  @doc "Counters: `frames` received and parsed, `bytes` received, `open` messages, `reserved` bytes of the budget."
  @callback stats(t()) :: %{
              frames: non_neg_integer(),
              bytes: non_neg_integer(),
              open: non_neg_integer(),
              reserved: non_neg_integer()
            }

  @doc "The checksum of header and payload of one outgoing block, without joining them."
  @callback crc32(iodata()) :: non_neg_integer()

  @doc "The same by CRC-32C."
  @callback crc32c(iodata()) :: non_neg_integer()

  @doc """
  Looks through an external term of a peer before it may be decoded: depth, counts, size when decoded,
  no functions unless allowed, no compression. Runs in slices that do not block a scheduler.
  `MeshxRpc.Guard` has the keys of `policy` and their defaults.
  """
  @callback guard(binary(), policy :: map() | term()) ::
              :ok | {:error, {name :: atom(), text :: String.t()}}

  @doc """
  The term, when its guard lets it pass. Raises `ArgumentError` when it has atoms that this VM does not have.

  `:erlang.binary_to_term/2` holds its scheduler for milliseconds when a term has some thousand atoms or pairs of maps:
  the NIF decodes such terms, and all that are as large, on a dirty scheduler, or has the VM decode them another way that
  takes less (`MeshxRpc.Guard`). It decodes the others, too: `:erlang.binary_to_term/2` of most VMs before August 2026
  can end its VM when a process decodes many terms one after the other (erlang/otp issue 11404). The codec in plain
  Elixir has nothing else.
  """
  @callback decode(binary(), policy :: map() | term()) ::
              {:ok, term()} | {:error, {name :: atom(), text :: String.t()}}

  @doc """
  The codec that this VM uses: `config :meshx, rpc_codec: module` when that is set, else the NIF, else plain
  Elixir. That the NIF is not there is logged once, with the reason.
  """
  @spec impl() :: module()
  def impl do
    case Application.get_env(:meshx, :rpc_codec) do
      nil -> :persistent_term.get(@chosen, nil) || choose()
      module -> module
    end
  end

  # Under a lock of this node: callers that start at once log once.
  defp choose do
    load = fn -> :persistent_term.get(@chosen, nil) || load() end
    :global.trans({@chosen, self()}, load, [node()])
  end

  defp load do
    module =
      case MeshxRpc.Codec.Nif.load() do
        :ok ->
          MeshxRpc.Codec.Nif

        {:error, reason} ->
          Logger.warning(
            "meshx: RPC runs on its Elixir codec, which is slower: the NIF could not be loaded (#{reason}). " <>
              "Install cargo and compile meshx again (as a dependency: mix deps.compile meshx --force)"
          )

          MeshxRpc.Codec.Elixir
      end

    :persistent_term.put(@chosen, module)
    module
  end
end
