%% One VM of `make bench-dist': a node among many, told what to do line by line.
%%
%%   meet NODE...     of all nodes in their order, dials those behind itself, and waits for all  -> done AGAIN
%%   leave            ends all its connections                                                   -> done
%%
%% AGAIN: how many attempts were not the first.
-module(bench_dist).
-export([start/0, boot/0]).

%% Prints `ready', then does what it is told until its standard input ends.
start() ->
    spawn(fun() ->
        ok = net_kernel:monitor_nodes(true, [{node_type, all}]),
        io:format("ready ~s~n", [os:getpid()]),
        loop()
    end).

loop() ->
    case io:get_line("") of
        Line when is_list(Line) ->
            io:put_chars([do(string:lexemes(Line, " \n")), "\n"]),
            loop();
        eof ->
            halt(0)
    end.

do(["meet" | All]) ->
    Nodes = [list_to_atom(Node) || Node <- All],
    [_ | Behind] = lists:dropwhile(fun(Node) -> Node =/= node() end, Nodes),
    Me = self(),
    %% As many at a time as MeshxNode.Cluster has.
    Parts = [[Node || {I, Node} <- lists:enumerate(Behind), I rem 8 =:= Part] || Part <- lists:seq(0, 7)],
    [spawn_link(fun() -> Me ! {again, lists:sum([dial(Node, 0) || Node <- Part])} end) || Part <- Parts],
    Again = lists:sum([receive {again, N} -> N end || _ <- Parts]),
    connected(length(Nodes) - 1),
    io_lib:format("done ~b", [Again]);
do(["leave"]) ->
    [net_kernel:disconnect(Node) || Node <- nodes(connected)],
    connected(0),
    "done".

dial(Node, Again) ->
    case net_kernel:connect_node(Node) of
        true ->
            Again;
        false ->
            %% As MeshxNode.Cluster does it.
            timer:sleep(min(200 bsl min(Again, 10), 5000)),
            dial(Node, Again + 1)
    end.

connected(Count) ->
    case length(nodes(connected)) of
        Count ->
            ok;
        _ ->
            receive
                {nodeup, _, _} -> connected(Count);
                {nodedown, _, _} -> connected(Count)
            end
    end.

%% Says that it is there and ends: what a boot takes.
boot() ->
    io:put_chars("up " ++ atom_to_list(node()) ++ "\n"),
    halt(0).
