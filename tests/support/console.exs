# Reads Elixir expressions from standard input, one a line, and answers each with one line:
#   "ok " or "error ", then the value or the failure as inspect prints it.
# Ends the VM when its standard input ends, so that no node outlives the test that started it.

inspect_opts = [limit: :infinity, printable_limit: :infinity, width: :infinity]

answer = fn kind, value ->
  line = value |> inspect(inspect_opts) |> String.replace("\n", " ")
  IO.puts("#{kind} #{line}")
end

loop = fn loop, binding ->
  case IO.read(:stdio, :line) do
    line when is_binary(line) ->
      binding =
        try do
          {value, binding} = Code.eval_string(line, binding)
          answer.("ok", value)
          binding
        catch
          kind, reason ->
            answer.("error", {kind, reason})
            binding
        end

      loop.(loop, binding)

    _closed ->
      System.halt(0)
  end
end

case System.argv() do
  [] -> :ok
  apps -> Enum.each(apps, &({:ok, _} = Application.ensure_all_started(String.to_atom(&1))))
end

answer.("ready", node())
loop.(loop, [])
