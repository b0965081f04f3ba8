%% The far side of `Meshx.TestNode': runs in a BEAM that a test started, takes calls as lines on stdin and answers
%% on stdout. The BEAM halts when stdin ends, so it never outlives the test run.
-module(meshx_test_node).

-export([start/0, big/1, big_call/2, nodedown_reason/2, monitored_call/2, hold/0]).

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
