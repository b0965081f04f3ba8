%% Links that the agent's end took away come back by themselves.
%%
%% A VM cannot know what another one wants, so it connects again only to whom it was connected when the agent went, the
%% same way, and not to whom it disconnected from by itself. It gives up after a while: then `dist_auto_connect' or the
%% program's own ways do the rest, as after any other loss.
-module(meshx_again).

-export([connect/1]).

%% How long it is tried, and the pause between two tries, in milliseconds: the other node may have to register again,
%% too.
-define(WITHIN, 10000).
-define(PAUSE, 250).

-spec connect([meshx_links:ended()]) -> ok.
connect([]) ->
    ok;
connect(Nodes) ->
    case application:get_env(kernel, dist_auto_connect) of
        %% Links are made by hand alone.
        {ok, never} -> ok;
        {ok, once} -> ok;
        _ ->
            Deadline = erlang:monotonic_time(millisecond) + ?WITHIN,
            _ = spawn(fun() -> connect(Nodes, Deadline) end),
            ok
    end.

connect(Nodes, Deadline) ->
    Left = [Lost || {Node, Hidden} = Lost <- Nodes, not connected(binary_to_atom(Node, utf8), Hidden)],
    case Left =/= [] andalso erlang:monotonic_time(millisecond) < Deadline of
        true ->
            receive
            after ?PAUSE -> connect(Left, Deadline)
            end;
        false ->
            ok
    end.

connected(Node, Hidden) ->
    lists:member(Node, nodes(connected)) orelse
        (case Hidden of
            true -> net_kernel:hidden_connect_node(Node);
            false -> net_kernel:connect_node(Node)
        end) =:= true.
