%% The BEAM's side of the benchmark of C nodes: a command a line on standard input, "done MICROSECONDS" for each.
%%
%%   blast NODE COUNT SIZE   sends so many binaries to NODE's process bench, and waits for the word of it
%%   send NODE COUNT SIZE    sends so many to NODE's process sink, as a C node does
%%   calls NODE COUNT        so many calls of NODE's server echo, one after the other
-module(bench_peer).
-behaviour(gen_server).
-export([main/0, init/1, handle_call/3, handle_cast/2]).

main() ->
    register(sink, spawn_link(fun sink/0)),
    {ok, _} = gen_server:start_link({local, echo}, ?MODULE, [], []),
    register(acks, self()),
    io:put_chars("ready\n"),
    commands().

commands() ->
    case io:get_line("") of
        eof ->
            halt();
        Line ->
            [Command, Node | Numbers] = string:lexemes(Line, " \n"),
            {Time, done} = timer:tc(fun() ->
                run(Command, list_to_atom(Node), [list_to_integer(N) || N <- Numbers])
            end),
            io:format("done ~b~n", [Time]),
            commands()
    end.

run("blast", Node, [Count, Size]) ->
    Bin = <<0:Size/unit:8>>,
    repeat(fun() -> {bench, Node} ! Bin end, Count),
    receive done -> done end;
run("send", Node, [Count, Size]) ->
    Bin = <<0:Size/unit:8>>,
    {sink, Node} ! {start, self(), Count},
    repeat(fun() -> {sink, Node} ! Bin end, Count),
    receive done -> done end;
run("calls", Node, [Count]) ->
    repeat(fun() -> ok = gen_server:call({echo, Node}, ok) end, Count),
    done.

repeat(_, 0) -> ok;
repeat(Do, Count) -> Do(), repeat(Do, Count - 1).

sink() ->
    receive {start, From, Count} -> take(Count), From ! done end,
    sink().

take(0) -> ok;
take(Count) -> receive Bin when is_binary(Bin) -> take(Count - 1) end.

init([]) -> {ok, nil}.
handle_call(Request, _From, State) -> {reply, Request, State}.
handle_cast(_Request, State) -> {noreply, State}.
