defmodule MeshxRpc.Codec.Elixir.Streams do
  @moduledoc false
  # What arrives on streams: reassembly, byte budget, receive windows.
  #
  # A stream is `:waiting` (client: no response yet), `:receiving`, `:used` (handed over, budget still held until
  # `release/2`; a client's is over at once) or `:dead` (`:used`, and a RESET went or came). One that is not in the map
  # is over when its number is at most `last` and not among the `skipped`, and was never opened otherwise.

  import Bitwise
  import MeshxRpc.Codec.Elixir, only: [event: 2, fatal: 3, out: 2, spend: 1]
  alias MeshxRpc.Codec.{Header, Wire}

  # Ids below `last` that no request has taken yet: callers of one client race for the socket.
  @max_skipped 1_024

  defmodule Stream do
    @moduledoc false
    defstruct state: :waiting, left: 0, pending: 0, head: nil, total: 0, got: 0, next: 1, bytes: ""
  end

  def open(s, stream) do
    %{s | last: max(s.last, stream), streams: Map.put(s.streams, stream, fresh(s))}
  end

  def release(s, stream) do
    case s.streams do
      %{^stream => entry} -> s |> stray_allowance(entry) |> forget(stream, entry)
      _ -> s
    end
  end

  def cancel(s, stream) do
    case taken(s, stream) do
      {true, s} ->
        spend(s)

      {false, s} ->
        known!(s, stream)

        case s.streams do
          %{^stream => %{state: state} = entry} when state != :dead ->
            s |> over(stream, entry) |> event({:cancel, stream})

          _ ->
            spend(s)
        end
    end
  end

  def reset(%{role: :server} = s, stream, cause, text) do
    case taken(s, stream) do
      {true, s} -> spend(s)
      {false, s} -> reset_known(s, stream, cause, text)
    end
  end

  def reset(s, stream, cause, text), do: reset_known(s, stream, cause, text)

  defp reset_known(s, stream, cause, text) do
    known!(s, stream)

    case s.streams do
      %{^stream => %{state: state} = entry} when state != :dead ->
        # To a request of ours it is an answer, and as many may come as we asked for.
        s = if s.role == :client, do: s, else: spend(s)
        s |> over(stream, entry) |> event({:reset, stream, cause, text})

      _ ->
        spend(s)
    end
  end

  def window(s, stream, increment) do
    known!(s, stream)

    case s.streams do
      %{^stream => %{state: state}} when state != :dead -> event(s, {:window, stream, increment})
      _ -> spend(s)
    end
  end

  ## REQUEST, RESPONSE, DATA

  @doc "One block, complete. `check` is what its checksum said."
  def block(s, {_len, 0x10, _flags, _seq, stream}, _payload, _check)
      when stream <= s.last and not is_map_key(s.skipped, stream) do
    fatal(s, :protocol, "request #{stream} after request #{s.last}")
  end

  def block(s, {len, 0x10, flags, seq, stream}, payload, check) do
    {head, data} = request_head(payload, check)
    # The sender did not count the head. When it cannot be read, count what is certainly not head.
    size = if data, do: byte_size(data), else: max(len - Header.max_request_head(), 0)

    if size > s.block,
      do: fatal(s, :too_large, "a block of #{size} bytes, at most #{s.block} wanted")

    {true, s} = taken(s, stream)
    s = receive_bytes(s, size)
    entry = count(s, fresh(s), size)

    cond do
      check != :ok -> fail(s, stream, entry, :invalid_cks, elem(check, 1))
      seq != 0 -> fail(s, stream, entry, :sequence, sequence_text(seq, 0))
      head == nil -> fail(s, stream, entry, :protocol, "the head of a request is malformed")
      map_size(s.streams) >= s.max_streams -> fail(s, stream, entry, :full, "too many streams")
      true -> begin(s, stream, entry, head, data, flags)
    end
  end

  # A server that gives up on work may find that it has answered at the same moment.
  def block(s, {_len, 0x11, flags, _seq, stream}, <<_head::80, data::binary>>, _check)
      when (flags &&& 1) == 1 and not is_map_key(s.streams, stream) do
    known!(s, stream)
    s |> receive_bytes(byte_size(data)) |> spend()
  end

  def block(s, {_len, 0x11, flags, seq, stream}, <<status, term, total::64, data::binary>>, check) do
    arrived(s, stream, byte_size(data), check, fn s, entry ->
      cond do
        entry.state != :waiting -> fail(s, stream, entry, :protocol, "a second response")
        seq != 0 -> fail(s, stream, entry, :sequence, sequence_text(seq, 0))
        status > 2 -> fail(s, stream, entry, :protocol, "response status #{status} is unknown")
        true -> begin(s, stream, entry, {total, response_event(status, term)}, data, flags)
      end
    end)
  end

  def block(s, {_len, 0x12, flags, seq, stream}, data, check) do
    arrived(s, stream, byte_size(data), check, fn s, entry ->
      cond do
        entry.state != :receiving ->
          fail(s, stream, entry, :protocol, "data without an open message")

        seq != entry.next ->
          fail(s, stream, entry, :sequence, sequence_text(seq, entry.next))

        data == "" and (flags &&& 1) == 0 ->
          fail(s, stream, entry, :protocol, "an empty block that ends nothing")

        true ->
          append(s, stream, %{entry | next: entry.next + 1 &&& 0xFFFFFF}, data, flags)
      end
    end)
  end

  defp request_head(<<kind, deadline::32, total::64, term, fun_len, rest::binary>>, :ok)
       when kind in [1, 2] and fun_len > 0 and fun_len <= byte_size(rest) do
    fun = :binary.copy(binary_part(rest, 0, fun_len))
    kind = if kind == 1, do: :call, else: :cast
    deadline = if deadline == 0xFFFFFFFF, do: :infinity, else: deadline
    head = {total, &{:request, &1, kind, deadline, fun, term, &2}}
    {head, binary_part(rest, fun_len, byte_size(rest) - fun_len)}
  end

  defp request_head(_payload, _check), do: {nil, nil}

  defp response_event(status, term) do
    status = elem({:result, :error, :started}, status)
    &{:response, &1, status, term, &2}
  end

  # The part that RESPONSE and DATA share: windows first, so that a block counts whatever is wrong with it.
  defp arrived(s, stream, size, check, continue) do
    known!(s, stream)
    s = receive_bytes(s, size)

    case s.streams do
      %{^stream => %{state: state} = entry} when state != :dead ->
        entry = count(s, entry, size)

        if check == :ok,
          do: continue.(s, entry),
          else: fail(s, stream, entry, :invalid_cks, elem(check, 1))

      _ ->
        stray(s, size)
    end
  end

  defp begin(s, stream, entry, {total, head}, data, flags) do
    cond do
      total > s.max_message ->
        fail(
          s,
          stream,
          entry,
          :too_large,
          "a message of #{total} bytes, at most #{s.max_message} taken"
        )

      s.reserved + total > s.max_bytes or not reserve?(s.budget, total) ->
        fail(s, stream, entry, :full, "the byte budget is used up")

      true ->
        entry = %{entry | state: :receiving, head: head, total: total}
        append(%{s | reserved: s.reserved + total}, stream, entry, data, flags)
    end
  end

  defp append(s, stream, entry, data, flags) do
    got = entry.got + byte_size(data)
    entry = %{entry | got: got, bytes: entry.bytes <> data}
    ended = (flags &&& 1) == 1

    cond do
      got > entry.total ->
        fail(s, stream, entry, :protocol, "#{got} bytes of a message of #{entry.total}")

      ended and got < entry.total ->
        fail(s, stream, entry, :protocol, "a message ended after #{got} of #{entry.total} bytes")

      ended ->
        ended(s, stream, entry) |> event(entry.head.(stream, entry.bytes))

      true ->
        grant(s, stream, entry)
    end
  end

  # The caller has it: nothing of ours will use it any more.
  defp ended(%{role: :client} = s, stream, entry), do: forget(s, stream, entry)

  defp ended(s, stream, entry),
    do: put(s, stream, %{entry | state: :used, bytes: "", head: nil})

  defp reserve?(nil, _total), do: true

  defp reserve?({{used, max}, counter}, total) do
    if :atomics.add_get(used, 1, total) <= max do
      :counters.add(counter, 2, total)
      true
    else
      :atomics.sub(used, 1, total)
      false
    end
  end

  @doc "Bytes of the budget, and of the shared one, that are no longer used."
  def give_back(%{budget: nil} = s, bytes), do: %{s | reserved: s.reserved - bytes}

  def give_back(%{budget: {{used, _max}, counter}} = s, bytes) do
    :atomics.sub(used, 1, bytes)
    :counters.sub(counter, 2, bytes)
    %{s | reserved: s.reserved - bytes}
  end

  # Grants in halves of the window, and no more than the message still needs: so no grant comes late.
  defp grant(s, stream, %{pending: pending} = entry) do
    if pending * 2 >= s.stream_window and entry.left < entry.total - entry.got do
      s
      |> put(stream, %{entry | left: entry.left + pending, pending: 0})
      |> out(Wire.window(stream, pending))
    else
      put(s, stream, entry)
    end
  end

  ## Windows

  defp receive_bytes(%{window_left: left} = s, size) when size > left do
    fatal(s, :protocol, "#{size} bytes sent, the connection's window held #{left}")
  end

  defp receive_bytes(s, size) do
    pending = s.window_pending + size
    left = s.window_left - size

    if size > 0 and pending * 2 >= s.connection_window do
      out(%{s | window_left: left + pending, window_pending: 0}, Wire.window(0, pending))
    else
      %{s | window_left: left, window_pending: pending}
    end
  end

  defp count(s, %{left: left}, size) when size > left do
    fatal(s, :protocol, "#{size} bytes sent, the stream's window held #{left}")
  end

  defp count(_s, entry, size), do: %{entry | left: entry.left - size, pending: entry.pending + size}

  # A peer that has not yet read our RESET or CANCEL may use up the window it had, and no more.
  defp stray(s, 0), do: spend(s)

  defp stray(%{stray_bytes: allowed} = s, size) when size > allowed do
    fatal(s, :protocol, "#{size} bytes on a stream that is over, #{allowed} can be on their way")
  end

  defp stray(s, size), do: %{s | stray_bytes: s.stray_bytes - size}

  # A message that came whole leaves nothing on its way.
  defp stray_allowance(s, %{state: state}) when state in [:used, :dead], do: s
  defp stray_allowance(s, entry), do: %{s | stray_bytes: s.stray_bytes + entry.left}

  ## Ends

  # Takes an id for a request, or for the CANCEL of one that is not sent: false when it was taken before.
  defp taken(%{last: last} = s, stream) when stream <= last do
    {is_map_key(s.skipped, stream), %{s | skipped: Map.delete(s.skipped, stream)}}
  end

  defp taken(%{last: last} = s, stream) do
    skipped = map_size(s.skipped) + stream - last - 1

    if skipped > @max_skipped do
      text = "#{skipped} request ids were left out up to #{stream}, at most #{@max_skipped} wanted"

      fatal(s, :protocol, text)
    end

    new = for id <- (last + 1)..(stream - 1)//1, into: s.skipped, do: {id, []}
    {true, %{s | last: stream, skipped: new}}
  end

  defp known!(%{last: last} = s, stream) when stream > last or is_map_key(s.skipped, stream) do
    fatal(s, :unknown_stream, "stream #{stream} was never opened, the last is #{last}")
  end

  defp known!(_s, _stream), do: :ok

  # `full` and `too_large` happen to honest peers; the rest counts as control frames do.
  defp fail(s, stream, entry, cause, text) do
    s = if cause in [:full, :too_large], do: s, else: spend(s)

    s
    |> stray_allowance(entry)
    |> over(stream, entry)
    |> out(Wire.reset(stream, cause, text))
    |> event({:stream_error, stream, cause, text})
  end

  # Something of the application's is still working with a message that was handed over.
  defp over(s, stream, %{state: :used} = entry), do: put(s, stream, %{entry | state: :dead})
  defp over(s, stream, entry), do: forget(s, stream, entry)

  defp forget(s, stream, entry) do
    s = %{s | streams: Map.delete(s.streams, stream)}
    if entry.state == :waiting, do: s, else: give_back(s, entry.total)
  end

  defp put(s, stream, entry), do: %{s | streams: Map.put(s.streams, stream, entry)}

  defp fresh(s), do: %Stream{left: s.stream_window}

  defp sequence_text(seen, wanted), do: "block #{seen}, block #{wanted} wanted"
end
