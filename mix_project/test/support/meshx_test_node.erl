%% The far side of `Meshx.TestNode': runs in a BEAM that a test started, takes calls as lines on stdin and answers
%% on stdout. The BEAM halts when stdin ends, so it never outlives the test run.
-module(meshx_test_node).

-export([start/0, big/1, big_call/2, nodedown_reason/2, monitored_call/2, hold/0, ticked/2, meet/2, agent_events/1, await_nodes/2]).
-export([printed_status/0, kill_client/0]).

start() ->
    spawn(fun() -> loop() end),
    io:put_chars("@ready\n").

loop() ->
    case io:get_line("") of
        Line when is_list(Line); is_binary(Line) ->
            {Id, M, F, A} = binary_to_term(base64:decode(string:trim(unicode:characters_to_binary(Line)))),
            spawn(fun() -> answer(Id, M, F, A) end),
            loop();
        _ ->
            erlang:halt(0, [{flush, false}])
    end.

answer(Id, M, F, A) ->
    Result =
        try
            {ok, apply(M, F, A)}
        catch
            Class:Reason -> {Class, Reason}
        end,
    io:put_chars([<<"@">>, integer_to_binary(Id), <<" ">>, base64:encode(term_to_binary(Result)), <<"\n">>]).

big(Binary) -> erlang:md5(Binary).

%% Sends `Size' bytes in one message to a node and back; true when they came back the same.
big_call(Node, Size) ->
    Bytes = binary:copy(<<0, 1, 2, 3, 4, 5, 6, 7>>, Size div 8),
    erpc:call(Node, ?MODULE, big, [Bytes], 60000) =:= erlang:md5(Bytes) andalso
        erpc:call(Node, binary, copy, [<<7>>, Size], 60000) =:= binary:copy(<<7>>, Size).

%% Connects, tells `Ready' through the returned value of the second call, and waits for the nodedown reason.
nodedown_reason(Node, Timeout) ->
    ok = net_kernel:monitor_nodes(true, [nodedown_reason]),
    case net_kernel:connect_node(Node) of
        true ->
            io:put_chars("@connected\n"),
            receive
                {nodedown, Node, Info} -> proplists:get_value(nodedown_reason, Info)
            after Timeout -> timeout
            end;
        false ->
            not_connected
    end.

hold() ->
    receive
    after infinity -> ok
    end.

%% Monitors a process on another node and kills it.
monitored_call(Node, Timeout) ->
    {Pid, Ref} = spawn_monitor_at(Node),
    exit(Pid, killed_by_test),
    receive
        {'DOWN', Ref, process, Pid, Reason} -> Reason
    after Timeout -> timeout
    end.

spawn_monitor_at(Node) ->
    Pid = spawn(Node, ?MODULE, hold, []),
    {Pid, monitor(process, Pid)}.

%% Waits until `Count' packets came from a node on a link without traffic, which are ticks.
ticked(Node, Count) ->
    {ok, Info} = net_kernel:node_info(Node),
    Owner = proplists:get_value(owner, Info),
    {links, Links} = process_info(Owner, links),
    [Port] = [Port || Port <- Links, is_port(Port)],
    {ok, [{recv_cnt, Start}]} = inet:getstat(Port, [recv_cnt]),
    ticked(Node, Port, Start + Count).

ticked(Node, Port, Wanted) ->
    case inet:getstat(Port, [recv_cnt]) of
        {ok, [{recv_cnt, N}]} when N >= Wanted ->
            lists:member(Node, nodes(connected));
        {ok, _} ->
            receive
            after 50 -> ticked(Node, Port, Wanted)
            end;
        {error, Reason} ->
            Reason
    end.

%% Connects as soon as the other node's name is known, so that both ends dial about at once.
meet(Node, At) ->
    erlang:start_timer(max(0, At - erlang:system_time(millisecond)), self(), go),
    receive
        {timeout, _, go} -> net_kernel:connect_node(Node)
    end.

%% The next `Count' things that the agent's client tells its subscribers.
agent_events(Count) ->
    {ok, #{state := State}} = meshx_agent:subscribe(),
    io:put_chars(["@subscribed ", atom_to_list(State), "\n"]),
    [
        receive
            {meshx_agent, What} -> What
        end
     || _ <- lists:seq(1, Count)
    ].

%% What crash reports and `sys:get_status/1' show of the agent's client, with the raw state.
printed_status() ->
    unicode:characters_to_binary(io_lib:format("~0p ~0p", [sys:get_status(meshx_agent), sys:get_state(meshx_agent)])).

kill_client() -> exit(whereis(meshx_agent), kill).

%% Returns once just these nodes are connected visibly, and those hidden. Makes no link itself.
await_nodes(Visible, Hidden) ->
    net_kernel:monitor_nodes(true, [{node_type, all}]),
    await_nodes(fun() -> {nodes(visible), nodes(hidden)} end, Visible, Hidden).

await_nodes(Connected, Visible, Hidden) ->
    case Connected() of
        {Visible, Hidden} ->
            net_kernel:monitor_nodes(false, [{node_type, all}]),
            ok;
        _ ->
            receive
                {Change, _, _} when Change =:= nodeup; Change =:= nodedown -> await_nodes(Connected, Visible, Hidden)
            end
    end.
