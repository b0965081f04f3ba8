%% What this VM knows of its own links: which port carries which link and who was verified at its other end, and
%% why the last attempts failed. One public table, so that a connecting process leaves its reason before it ends
%% and the caller of `Node.connect/1' finds it at once.
-module(meshx_links).

-export([new/0, add/5, named/2, up/1, down/1, leave/0, live/0, cut/3, list/0, refuse/3, refusal/1, patiently/2]).
-export_type([direction/0, refusal/0, ended/0]).

-include_lib("kernel/include/logger.hrl").

-define(TABLE, meshx_links).
%% Refusals kept, one per node name. Names come from this VM's own calls, so this is only a bound on memory.
-define(MAX_REFUSALS, 1024).
%% How long the same refusal of a node that is tried again and again is no error in the log any more.
-define(TELL_AGAIN, 60).

-type direction() :: outbound | inbound.
%% A node, and whether it was connected hidden.
-type ended() :: {Node :: binary(), Hidden :: boolean()}.
%% `told': when it was an error in the log.
-type refusal() :: #{cause := atom(), text := binary(), at := integer(), monotonic := integer(), told := integer()}.

-spec new() -> ok.
new() ->
    case ets:whereis(?TABLE) of
        undefined -> ?TABLE = ets:new(?TABLE, [named_table, public, set, {read_concurrency, true}]);
        %% Nodes over a mesh adapter have it without the agent's client.
        _ -> ?TABLE
    end,
    ok.

%% Notes a link before its handshake: from here on it can be cut.
-spec add(meshx_frame:link_id(), pid(), port(), direction(), meshx_frame:peer()) -> ok.
add(Link, Owner, Port, Direction, Peer) ->
    true = ets:insert(?TABLE, {{link, Link}, Port, Owner, Peer#{direction => Direction, up => false}}),
    ok.

%% Notes what the other end is called: a node that boots without a name gets one in the handshake.
-spec named(meshx_frame:link_id(), node()) -> ok.
named(Link, Node) ->
    [{Key, Port, Owner, Peer}] = ets:lookup(?TABLE, {link, Link}),
    true = ets:insert(?TABLE, {Key, Port, Owner, Peer#{node => atom_to_binary(Node, utf8)}}),
    ok.

%% Notes that the nodes' handshake is done; the other node is connected when this is called.
-spec up(meshx_frame:link_id()) -> ok.
up(Link) ->
    [{Key, Port, Owner, #{node := Node} = Peer}] = ets:lookup(?TABLE, {link, Link}),
    Hidden = [Name || Name <- nodes(hidden), atom_to_binary(Name, utf8) =:= Node],
    true = ets:insert(?TABLE, {Key, Port, Owner, Peer#{up := true, hidden => Hidden =/= []}}),
    ok.

%% Forgets the links of a process that ended, and says to whom they were up.
-spec down(pid()) -> [ended()].
down(Owner) ->
    Pattern = {{link, '_'}, '_', Owner, '$1'},
    try
        Peers = ets:match(?TABLE, Pattern),
        ets:match_delete(?TABLE, Pattern),
        ended([Peer || [Peer] <- Peers])
    catch
        error:badarg -> []
    end.

%% Forgets the links that are up: net_kernel takes them along as it ends, and for that reason, whatever the agent says
%% of them meanwhile.
-spec leave() -> ok.
leave() ->
    true = ets:match_delete(?TABLE, {{link, '_'}, '_', '_', #{up => true}}),
    ok.

%% To whom links are up.
-spec live() -> [ended()].
live() ->
    ended([Peer || {_, Peer} <- list()]).

ended(Peers) ->
    [{Node, Hidden} || #{up := true, node := Node, hidden := Hidden} <- Peers].

%% Ends a link that the agent has cut.
-spec cut(meshx_frame:link_id(), atom(), binary()) -> ok.
cut(Link, Cause, Text) ->
    case ets:lookup(?TABLE, {link, Link}) of
        [{_, Port, _, _}] ->
            ?LOG(severity(Cause), "meshx: a link was cut: ~ts: ~ts", [Cause, Text]),
            %% The reason that `net_kernel:monitor_nodes/2' tells.
            exit(Port, {meshx, Cause}),
            ok;
        [] ->
            %% It ended meanwhile.
            ok
    end.

%% Nodes come and go.
severity(no_such_node) -> info;
severity(_) -> warning.

-spec list() -> [{meshx_frame:link_id(), map()}].
list() ->
    try ets:match(?TABLE, {{link, '$1'}, '_', '_', '$2'}) of
        Links -> [{Link, Peer} || [Link, Peer] <- Links]
    catch
        error:badarg -> []
    end.

%% Notes why the last link to a node was refused, and says how loud the log is to be about it.
-spec refuse(node(), atom(), binary()) -> error | debug.
refuse(Node, Cause, Text) ->
    Now = erlang:monotonic_time(),
    Refusal = #{cause => Cause, text => Text, at => erlang:system_time(second), monotonic => Now},
    try
        {Level, Told} = level(Node, Cause, Text, Now),
        bound(Node),
        ets:insert(?TABLE, {{refusal, Node}, Refusal#{told => Told}}),
        Level
    catch
        %% The table goes with the distribution.
        error:badarg -> error
    end.

level(Node, Cause, Text, Now) ->
    case ets:member(?TABLE, {patient, Node}) andalso refusal(Node) of
        {ok, #{cause := Cause, text := Text, told := Told}} ->
            case erlang:convert_time_unit(Now - Told, native, second) < ?TELL_AGAIN of
                true -> {debug, Told};
                false -> {error, Now}
            end;
        _ ->
            {error, Now}
    end.

%% Runs an attempt to reach a node by somebody who will not give up: as long as it fails for the same reason that is an
%% error in the log once a minute.
-spec patiently(node(), fun(() -> Result)) -> Result.
patiently(Node, Attempt) ->
    mark(fun() -> ets:insert(?TABLE, {{patient, Node}}) end),
    try
        Attempt()
    after
        mark(fun() -> ets:delete(?TABLE, {patient, Node}) end)
    end.

mark(Change) ->
    try
        Change()
    catch
        error:badarg -> true
    end.

bound(Node) ->
    case ets:member(?TABLE, {refusal, Node}) of
        true ->
            ok;
        false ->
            Kept = ets:select(?TABLE, [{{{refusal, '$1'}, #{monotonic => '$2'}}, [], [{{'$2', '$1'}}]}]),
            case length(Kept) >= ?MAX_REFUSALS of
                true ->
                    {_, Oldest} = lists:min(Kept),
                    ets:delete(?TABLE, {refusal, Oldest});
                false ->
                    ok
            end
    end.

-spec refusal(node()) -> {ok, refusal()} | error.
refusal(Node) ->
    try ets:lookup(?TABLE, {refusal, Node}) of
        [{_, Refusal}] -> {ok, Refusal};
        [] -> error
    catch
        error:badarg -> error
    end.
