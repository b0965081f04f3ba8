%% The agent's client: one process and one control connection for a VM.
%%
%% It says hello, registers this VM's node, carries requests and replies, obeys `cut', and comes back by itself
%% when the agent restarts; the node is then registered again under its running creation. It is a child of the
%% supervisor of the distribution (`meshx_dist:childspecs/0'); a VM that uses the mesh without distribution
%% calls `start/0'. It runs while a VM boots: kernel and stdlib only.
%%
%% Whoever may carry a link is tied to this process (`link/4', `register_node/3'): when it crashes, links and
%% listening socket end with it, because nobody would be left to cut them.
%%
%%   disconnected --connect--> greeting --hello answered--> ready
%%        ^------------------------ closed, silent or refused ----'
-module(meshx_agent).
-behaviour(gen_statem).

-export([start/0, start_link/0, call/2, call/3, await/0, subscribe/0]).
-export([register_node/3, register_plain_node/3, deregister_node/0, secret/0, credentials/1, link/4]).
-export([init/1, callback_mode/0, handle_event/4, terminate/3, format_status/1]).
-export_type([result/0, name/0]).

-include_lib("kernel/include/logger.hrl").

-define(CALL_TIMEOUT, 5000).
%% The agent gives a client 5 s for hello (docs/mesh-protocol.md); the client gives as long.
-define(HELLO_TIMEOUT, 5000).
-define(DEREGISTER_TIMEOUT, 1000).
%% Unanswered requests: the agent's limit. This many that nobody waits for any more mean that it is stuck.
-define(MAX_UNANSWERED, 64).
-define(MAX_ABANDONED, 32).
-define(BACKOFF_MIN, 50).
%% A connection to the agent of this host costs next to nothing, and links wait for it.
-define(BACKOFF_MAX, 1000).
%% Links that ended so shortly before the control connection ended for the same reason, in milliseconds.
-define(SAME_END, 1000).
-define(MAX_ENDED, 1024).

-define(NEVER_CONNECTED, {not_ready, <<"not connected to the agent yet">>}).

%% The name of a node that is not registered, or the host of one that has no name yet.
-type name() :: #{node := binary()} | #{host := binary()}.
-type result() :: {ok, map()} | {error, {atom(), binary()}}.

-record(node, {
    name :: binary(),
    %% What `register_node' tells of where it listens.
    listens :: #{socket := binary()} | #{port := inet:port_number(), family := inet | inet6},
    hidden :: boolean(),
    kernel :: pid(),
    monitor :: reference(),
    %% Known once registered, and kept over the agent's restarts.
    creation :: undefined | pos_integer(),
    %% The last registration's secret, by which the next agent knows this node again.
    proof :: undefined | fun(() -> meshx_frame:secret()),
    %% Absent while the agent does not know the node. The secret is inside a fun, so that printing shows none.
    registration :: undefined | #{secret := fun(() -> meshx_frame:secret()), _ => _}
}).

-record(data, {
    socket :: undefined | port(),
    hello = #{} :: map(),
    next_id = 1 :: pos_integer(),
    %% What to do with a reply.
    pending = #{} :: #{integer() => meshx_pending:kind()},
    waiting = [] :: [gen_statem:from()],
    node :: undefined | #node{},
    %% A VM that does not listen: what it called itself, and its secret, inside a fun, while the agent knows it.
    session :: undefined | {name(), fun(() -> meshx_frame:secret())},
    failures = 0 :: non_neg_integer(),
    refusals = 0 :: non_neg_integer(),
    %% Why there is no connection: the last thing that went wrong.
    error = ?NEVER_CONNECTED :: {atom(), binary()},
    subscribers = #{} :: #{pid() => reference()},
    %% Links that have ended lately, newest first, and those to make again.
    ended = [] :: [{integer(), meshx_links:ended()}],
    again = [] :: [meshx_links:ended()]
}).

%% === Public

%% Starts the client in a VM without distribution; does nothing when it runs already.
-spec start() -> {ok, pid()} | {error, term()}.
start() ->
    case whereis(?MODULE) of
        Pid when is_pid(Pid) ->
            {ok, Pid};
        undefined ->
            Child = #{id => ?MODULE, start => {?MODULE, start_link, []}, restart => permanent, shutdown => 2000},
            case supervisor:start_child(kernel_safe_sup, Child) of
                {ok, Pid} when is_pid(Pid) -> {ok, Pid};
                {error, {already_started, Pid}} -> {ok, Pid};
                %% It runs as the distribution's child since a moment ago, or its slot here is empty.
                {ok, undefined} -> {ok, whereis(?MODULE)};
                {error, already_present} -> supervisor:restart_child(kernel_safe_sup, ?MODULE);
                {error, _} = Error -> Error
            end
    end.

-spec start_link() -> {ok, pid()} | ignore | {error, term()}.
start_link() ->
    case gen_statem:start_link({local, ?MODULE}, ?MODULE, [], []) of
        {error, {already_started, _}} -> ignore;
        Started -> Started
    end.

%% Sends a command of docs/mesh-protocol.md and waits for its reply.
-spec call(meshx_control:command(), map()) -> result().
call(Command, Args) ->
    call(Command, Args, ?CALL_TIMEOUT).

-spec call(meshx_control:command(), map(), pos_integer()) -> result().
call(Command, Args, Timeout) ->
    ask({call, Command, Args, Timeout}).

%% Waits until the agent has answered hello, or says why it can't be reached. While the client waits before its
%% next attempt, this makes one at once.
-spec await() -> result().
await() ->
    ask(await).

%% The calling process gets `{meshx_agent, up}' and `{meshx_agent, down}' from now on: what it registered must be
%% registered again after `up'. It also gets the events of watches and about sidecars,
%% `{meshx_agent, {nodes | proxy_output | proxy_down, Args}}'.
-spec subscribe() -> {ok, #{state := up | down}} | {error, {atom(), binary()}}.
subscribe() ->
    ask({subscribe, self()}).

%% Registers the node of this VM, which listens on `Listen' at `Path'. The caller is net_kernel: when it ends, the
%% node is deregistered.
-spec register_node(binary(), {port(), binary()}, boolean()) ->
    {ok, meshx_control:registration()} | {error, {atom(), binary()}}.
register_node(Name, {Listen, Path}, Hidden) ->
    ask({register_node, self(), Name, Listen, #{socket => Path}, Hidden}).

%% Registers the node of this VM, which speaks plain distribution at a port of loopback. The caller is net_kernel.
-spec register_plain_node(binary(), {inet:port_number(), inet | inet6}, boolean()) ->
    {ok, meshx_control:registration()} | {error, {atom(), binary()}}.
register_plain_node(Name, {Port, Family}, Hidden) ->
    ask({register_node, self(), Name, none, #{port => Port, family => Family}, Hidden}).

-spec deregister_node() -> ok.
deregister_node() ->
    _ = ask(deregister_node),
    ok.

%% The secret of this node's registration, by which the agent proves itself.
-spec secret() -> {ok, meshx_frame:secret()} | {error, {atom(), binary()}}.
secret() ->
    ask(secret).

%% What a link needs: the agent's dist socket and this node's secret there. A node that is not registered, because it
%% does not listen or is a tool, is a session to the agent from here on, under the name that `Self' says: its links are
%% hidden.
-spec credentials(name()) ->
    {ok, #{dist_socket := binary(), secret := meshx_frame:secret(), session := boolean()}} | {error, {atom(), binary()}}.
credentials(Self) ->
    ask({credentials, Self}).

%% Ties the calling process, and the port that it owns, to this client as a link that the agent can cut.
-spec link(meshx_frame:link_id(), port(), meshx_links:direction(), meshx_frame:peer()) -> ok.
link(Link, Port, Direction, Peer) ->
    true = link(whereis(?MODULE)),
    meshx_links:add(Link, self(), Port, Direction, Peer).

%% The process sets its own deadlines, so no timeout here: a caller that left early would get a stray reply.
ask(Request) ->
    try
        gen_statem:call(?MODULE, Request, infinity)
    catch
        exit:{noproc, _} -> {error, {not_ready, <<"the agent's client does not run in this VM">>}};
        exit:{Reason, _} -> {error, {not_ready, text("the agent's client ended: ~tp", [reason(Reason)])}}
    end.

reason({Reason, _}) when is_atom(Reason) -> Reason;
reason(Reason) when is_atom(Reason) -> Reason;
reason(_) -> crash.

%% === gen_statem

callback_mode() -> handle_event_function.

init([]) ->
    process_flag(trap_exit, true),
    %% Keeps the registration's secret out of crash dumps.
    process_flag(sensitive, true),
    %% A VM whose schedulers are busy still answers the agent's pings, and is not taken for one that hangs.
    process_flag(priority, high),
    _ = meshx_control:vocabulary(),
    meshx_links:new(),
    {ok, disconnected, #data{}, {next_event, internal, connect}}.

%% Connecting.
handle_event(internal, connect, disconnected, Data) ->
    connect(Data);
handle_event({timeout, reconnect}, _, disconnected, Data) ->
    connect(Data);
handle_event(state_timeout, hello, greeting, Data) ->
    lost({timeout, text("the agent did not answer hello within ~b ms", [?HELLO_TIMEOUT])}, Data);
handle_event(state_timeout, _, _, _) ->
    keep_state_and_data;
handle_event({call, From}, await, disconnected, Data) ->
    connect(Data#data{waiting = [From | Data#data.waiting]});
handle_event({call, From}, await, greeting, Data) ->
    {keep_state, Data#data{waiting = [From | Data#data.waiting]}};
handle_event({call, From}, await, ready, Data) ->
    {keep_state_and_data, {reply, From, {ok, Data#data.hello}}};
%% Requests.
handle_event({call, From}, {subscribe, Pid}, State, Data) ->
    Subscribers = Data#data.subscribers,
    Now =
        case State of
            ready -> up;
            _ -> down
        end,
    case Subscribers of
        #{Pid := _} ->
            {keep_state_and_data, {reply, From, {ok, #{state => Now}}}};
        _ ->
            New = Subscribers#{Pid => monitor(process, Pid)},
            {keep_state, Data#data{subscribers = New}, {reply, From, {ok, #{state => Now}}}}
    end;
handle_event({call, From}, deregister_node, State, #data{node = Node} = Data) ->
    Forgotten = Data#data{node = undefined},
    meshx_links:leave(),
    case Node of
        #node{monitor = Monitor, registration = #{instance := Instance}} when State =:= ready ->
            demonitor(Monitor, [flush]),
            request(deregister, #{id => Instance}, {call, From}, ?DEREGISTER_TIMEOUT, Forgotten);
        #node{monitor = Monitor} ->
            demonitor(Monitor, [flush]),
            {keep_state, Forgotten, {reply, From, {ok, #{}}}};
        undefined ->
            {keep_state_and_data, {reply, From, {ok, #{}}}}
    end;
handle_event({call, From}, secret, State, Data) ->
    {keep_state_and_data, {reply, From, own_secret(State, Data)}};
handle_event({call, From}, {credentials, Self}, ready, #data{node = undefined} = Data) ->
    case Data#data.session of
        {Self, Secret} ->
            {keep_state_and_data, {reply, From, {ok, credentials(Secret(), true, Data)}}};
        %% None yet, or the node has got its name meanwhile.
        _ ->
            request(register_session, Self, {session, Self, From}, ?CALL_TIMEOUT, Data)
    end;
handle_event({call, From}, {credentials, _}, State, #data{node = #node{}} = Data) ->
    Reply =
        case own_secret(State, Data) of
            {ok, Secret} -> {ok, credentials(Secret, false, Data)};
            {error, _} = Error -> Error
        end,
    {keep_state_and_data, {reply, From, Reply}};
handle_event({call, _}, _, greeting, _) ->
    {keep_state_and_data, postpone};
handle_event({call, From}, _, disconnected, #data{error = Error}) ->
    {keep_state_and_data, {reply, From, {error, Error}}};
handle_event({call, From}, {call, Command, Args, Timeout}, ready, Data) ->
    request(Command, Args, {call, From}, Timeout, Data);
handle_event({call, From}, {register_node, Kernel, Name, Listen, Listens, Hidden}, ready, Data) ->
    %% Without this client nobody would cut its links. What the agent cuts itself needs nobody.
    true = Listen =:= none orelse link(Listen),
    Node = #node{name = Name, listens = Listens, hidden = Hidden, kernel = Kernel, monitor = monitor(process, Kernel)},
    register_at_agent({register, From}, forget_node(Data, Node));
handle_event({timeout, register}, _, ready, #data{node = #node{registration = undefined}} = Data) ->
    register_at_agent({register, undefined}, Data);
handle_event({timeout, register}, _, _, _) ->
    keep_state_and_data;
handle_event({timeout, {request, Id}}, Timeout, _, Data) ->
    expired(Id, Timeout, Data);
%% What the agent sends.
handle_event(info, {tcp, Socket, Frame}, State, #data{socket = Socket} = Data) ->
    _ = inet:setopts(Socket, [{active, once}]),
    received(meshx_control:decode(Frame), State, Data);
handle_event(info, {tcp_closed, Socket}, _, #data{socket = Socket} = Data) ->
    lost({unreachable, <<"the agent closed the control connection">>}, Data);
handle_event(info, {tcp_error, Socket, Reason}, _, #data{socket = Socket} = Data) ->
    lost({unreachable, text("the control connection broke: ~tp", [Reason])}, Data);
%% Processes around.
handle_event(info, {'DOWN', Monitor, process, _, _}, State, #data{node = #node{monitor = Monitor} = Node} = Data) ->
    Forgotten = Data#data{node = undefined},
    case Node#node.registration of
        #{instance := Instance} when State =:= ready ->
            request(deregister, #{id => Instance}, abandoned, ?DEREGISTER_TIMEOUT, Forgotten);
        _ ->
            {keep_state, Forgotten}
    end;
handle_event(info, {'DOWN', _, process, Pid, _}, _, Data) ->
    {keep_state, Data#data{subscribers = maps:remove(Pid, Data#data.subscribers)}};
handle_event(info, {'EXIT', Pid, Reason}, _, #data{ended = Ended} = Data) when is_pid(Pid) ->
    case meshx_links:down(Pid) of
        [] ->
            keep_state_and_data;
        %% By `erlang:disconnect_node/1': nobody wants it back.
        Links when Reason =:= disconnect ->
            Nodes = [Node || {Node, _} <- Links],
            {keep_state, Data#data{ended = [Known || {_, {Node, _}} = Known <- Ended, not lists:member(Node, Nodes)]}};
        Links ->
            Now = erlang:monotonic_time(millisecond),
            {keep_state, Data#data{ended = lists:sublist([{Now, Link} || Link <- Links] ++ Ended, ?MAX_ENDED)}}
    end;
handle_event(info, _, _, _) ->
    keep_state_and_data.

terminate(_, _, #data{socket = undefined}) -> ok;
terminate(_, _, #data{socket = Socket}) -> gen_tcp:close(Socket).

%% Crash reports: neither replies of the agent (one holds the secret) nor requests belong into a log.
format_status(Status) ->
    maps:map(
        fun
            (Key, _) when Key =:= queue; Key =:= postponed; Key =:= log -> [];
            (reason, Reason) -> redacted_reason(Reason);
            (data, #data{} = Data) -> Data#data{pending = #{}};
            (_, Value) -> Value
        end,
        Status
    ).

redacted_reason({Class, Reason, Stack}) -> {Class, Reason, [{M, F, arity(A), L} || {M, F, A, L} <- Stack]};
redacted_reason(Reason) -> Reason.

arity(Args) when is_list(Args) -> length(Args);
arity(Arity) -> Arity.

%% === Connection

connect(Data) ->
    case meshx_control_socket:open() of
        {ok, Socket} -> greet(Socket, Data);
        {error, Error} -> lost(Error, Data)
    end.

greet(Socket, Data) ->
    case meshx_control_socket:greet(Socket) of
        ok ->
            {next_state, greeting, Data#data{socket = Socket}, [
                {state_timeout, ?HELLO_TIMEOUT, hello}, {{timeout, reconnect}, cancel}
            ]};
        {error, Reason} ->
            lost({unreachable, text("cannot say hello to the agent: ~tp", [Reason])}, Data#data{socket = Socket})
    end.

greeted(Hello, #data{waiting = Waiting} = Data0) ->
    Data = Data0#data{hello = Hello, waiting = [], failures = 0, refusals = 0, error = ?NEVER_CONNECTED},
    case Data0#data.failures of
        0 -> ok;
        _ -> ?LOG_NOTICE("meshx: connected to the agent")
    end,
    tell(up, Data),
    Replies = [{reply, From, {ok, Hello}} || From <- Waiting],
    case Data#data.node of
        undefined ->
            {next_state, ready, Data, Replies};
        _ ->
            {next_state, ready, Data, [{{timeout, register}, 0, again} | Replies]}
    end.

%% The connection is gone, or was never there: everyone who waits hears why, and a new attempt follows.
lost({Cause, Text} = Error, #data{socket = Socket, pending = Pending, waiting = Waiting} = Data) ->
    case Socket of
        undefined -> ok;
        _ -> gen_tcp:close(Socket)
    end,
    case Data#data.error of
        %% An attempt that fails like the one before it.
        Error -> ok;
        _ -> ?LOG_WARNING("meshx: ~ts: ~ts", [Cause, Text])
    end,
    case map_size(Data#data.hello) of
        0 -> ok;
        _ -> tell(down, Data)
    end,
    Waiters = [meshx_pending:from(Kind) || Kind <- maps:values(maps:filter(fun meshx_pending:is_waited/2, Pending))] ++ Waiting,
    Timers = [{{timeout, {request, Id}}, cancel} || Id <- maps:keys(Pending)],
    Replies = [{reply, From, {error, Error}} || From <- Waiters],
    Failures = Data#data.failures,
    {next_state, disconnected,
        Data#data{
            socket = undefined,
            hello = #{},
            pending = #{},
            waiting = [],
            node = unregistered(Data#data.node),
            session = undefined,
            error = Error,
            failures = Failures + 1,
            ended = [],
            again = lists:usort(lost_links(Data) ++ Data#data.again)
        },
        [{{timeout, reconnect}, backoff(Failures), again} | Timers ++ Replies]}.

%% What ended with the agent, or will.
lost_links(#data{hello = Hello}) when map_size(Hello) =:= 0 ->
    [];
lost_links(#data{ended = Ended}) ->
    Since = erlang:monotonic_time(millisecond) - ?SAME_END,
    [Link || {At, Link} <- Ended, At >= Since] ++ meshx_links:live().

unregistered(undefined) -> undefined;
unregistered(Node) -> Node#node{registration = undefined}.

tell(What, #data{subscribers = Subscribers}) ->
    maps:foreach(fun(Pid, _) -> Pid ! {?MODULE, What} end, Subscribers).

%% Doubles from BACKOFF_MIN to BACKOFF_MAX, in milliseconds; half of it is jitter.
backoff(Failures) ->
    Ceiling = min(?BACKOFF_MAX, ?BACKOFF_MIN bsl min(Failures, 16)),
    Ceiling div 2 + rand:uniform(Ceiling div 2 + 1) - 1.

%% === Requests and replies

request(Command, Args, Kind, Timeout, #data{next_id = Id, pending = Pending} = Data) ->
    case meshx_control:request(Id, Command, Args) of
        {ok, _} when map_size(Pending) >= ?MAX_UNANSWERED ->
            {keep_state, Data,
                meshx_pending:replies(Kind, {error, {limit, text("~b requests to the agent unanswered, at most ~b", [
                    map_size(Pending), ?MAX_UNANSWERED
                ])}})};
        {ok, Frame} ->
            case gen_tcp:send(Data#data.socket, Frame) of
                ok ->
                    {keep_state, Data#data{next_id = meshx_pending:next_id(Id), pending = Pending#{Id => Kind}},
                        {{timeout, {request, Id}}, Timeout, Timeout}};
                {error, Reason} ->
                    lost(
                        {unreachable, text("cannot send to the agent: ~tp", [Reason])},
                        Data#data{pending = Pending#{Id => Kind}}
                    )
            end;
        {error, _} = Error ->
            {keep_state, Data, meshx_pending:replies(Kind, Error)}
    end.

%% The place of a request that timed out stays taken until its answer: the agent counts it too.
expired(Id, Timeout, #data{pending = Pending} = Data) ->
    case Pending of
        #{Id := Kind} when Kind =/= abandoned ->
            Error = {error, {timeout, text("the agent did not answer within ~b ms", [Timeout])}},
            abandon(Kind, Error, Data#data{pending = Pending#{Id := abandoned}});
        _ ->
            keep_state_and_data
    end.

abandon(Kind, Error, #data{pending = Pending} = Data) ->
    Abandoned = map_size(maps:filter(fun(_, K) -> K =:= abandoned end, Pending)),
    case Abandoned >= ?MAX_ABANDONED of
        true ->
            {next_state, State, Lost, Actions} =
                lost({timeout, text("the agent left ~b requests unanswered", [Abandoned])}, Data),
            {next_state, State, Lost, Actions ++ meshx_pending:replies(Kind, Error)};
        false ->
            finish(Kind, Error, Data)
    end.

received({reply, 0, Reply}, greeting, Data) ->
    case meshx_control:hello(Reply) of
        {ok, Hello} -> greeted(Hello, Data);
        {error, Error} -> lost(Error, Data)
    end;
received({reply, Id, Reply}, _, Data) ->
    answered(Id, Reply, Data);
received({unknown_words, Id}, ready, Data) when is_integer(Id) ->
    Error = {version_mismatch, <<"the agent's answer has words that this version does not know">>},
    answered(Id, {error, Error}, Data);
received({unknown_words, event}, ready, _) ->
    ?LOG_WARNING("meshx: the agent sent an event that this version does not know", []),
    keep_state_and_data;
received({unknown_words, _}, _, Data) ->
    lost({version_mismatch, <<"the agent's hello has words that this version does not know">>}, Data);
received({event, cut, #{link := <<_:16/binary>> = Link, cause := Cause, text := Text}}, _, _) when
    is_atom(Cause), is_binary(Text)
->
    meshx_links:cut(Link, Cause, Text),
    keep_state_and_data;
received({event, ping, _}, ready, #data{socket = Socket} = Data) ->
    case gen_tcp:send(Socket, meshx_control:pong()) of
        ok -> keep_state_and_data;
        {error, Reason} -> lost({unreachable, text("cannot send to the agent: ~tp", [Reason])}, Data)
    end;
received({event, Event, #{id := Id} = Args}, ready, Data) when
    Event =:= proxy_output orelse Event =:= proxy_down, is_binary(Id)
->
    tell({Event, Args}, Data),
    keep_state_and_data;
received({event, nodes, #{watch := Watch, nodes := Nodes} = Args}, ready, Data) when is_binary(Watch), is_list(Nodes) ->
    tell({nodes, Args}, Data),
    keep_state_and_data;
received({event, protocol_error, #{text := Text}}, _, Data) when is_binary(Text) ->
    lost({invalid_request, <<"the agent did not understand this client: ", Text/binary>>}, Data);
received({event, Event, _}, _, _) ->
    ?LOG_WARNING("meshx: the agent sent the event ~tp, which is unknown or incomplete", [Event]),
    keep_state_and_data;
received({error, Text}, _, Data) ->
    lost({invalid_request, <<"the agent sent ", Text/binary>>}, Data).

answered(Id, Reply, #data{pending = Pending} = Data) ->
    case maps:take(Id, Pending) of
        {Kind, Rest} ->
            case finish(Kind, Reply, Data#data{pending = Rest}) of
                {keep_state, New, Actions} -> {keep_state, New, [{{timeout, {request, Id}}, cancel} | Actions]};
                Other -> Other
            end;
        error ->
            lost({invalid_request, text("the agent answered request ~b, which was not made", [Id])}, Data)
    end.

finish({register, From}, Reply, Data) -> registered(meshx_control:registration(Reply), From, Data);
finish({session, Self, From}, Reply, Data) -> session(meshx_control:session(Reply), Self, From, Data);
finish(Kind, Reply, Data) -> {keep_state, Data, meshx_pending:replies(Kind, Reply)}.

%% === This VM's node

own_secret(ready, #data{node = #node{registration = #{secret := Secret}}}) ->
    {ok, Secret()};
own_secret(ready, _) ->
    {error, {not_ready, <<"this node is not registered with the agent yet">>}};
own_secret(_, #data{error = Error}) ->
    {error, Error}.

credentials(Secret, Session, #data{hello = Hello}) ->
    #{dist_socket => maps:get(dist_socket, Hello), secret => Secret, session => Session}.

session({ok, Secret}, Self, From, Data) ->
    Known = Data#data{session = {Self, fun() -> Secret end}},
    {keep_state, Known, [{reply, From, {ok, credentials(Secret, true, Known)}}]};
session({error, _} = Error, _, From, Data) ->
    {keep_state, Data, [{reply, From, Error}]}.

register_at_agent(Kind, #data{node = Node} = Data) ->
    #node{name = Name, listens = Listens, hidden = Hidden, creation = Creation, proof = Proof} = Node,
    Args = maps:merge(Listens#{node => Name, hidden => Hidden}, labels()),
    Full =
        case Creation of
            undefined -> Args;
            _ -> Args#{creation => Creation, secret => Proof()}
        end,
    request(register_node, Full, Kind, ?CALL_TIMEOUT, Data).

%% What this VM was started to be called in the catalogue: `-meshx_cluster LABEL', `-meshx_meta KEY=VALUE ...'.
labels() ->
    Meta = maps:from_list([pair(Text) || Text <- meshx_control_socket:flags(meshx_meta)]),
    Labels = [{cluster, lists:last(All)} || [_ | _] = All <- [meshx_control_socket:flags(meshx_cluster)]],
    maps:from_list([{meta, Meta} || map_size(Meta) > 0] ++ Labels).

pair(Text) ->
    case binary:split(Text, <<"=">>) of
        [Key, Value] -> {Key, Value};
        [Key] -> {Key, <<>>}
    end.

forget_node(#data{node = #node{monitor = Monitor}} = Data, Node) ->
    demonitor(Monitor, [flush]),
    Data#data{node = Node};
forget_node(Data, Node) ->
    Data#data{node = Node}.

registered({ok, _}, From, #data{node = undefined} = Data) ->
    %% net_kernel ended meanwhile. The agent still knows the node: end the connection that owns it.
    {next_state, State, Lost, Actions} =
        lost({not_ready, <<"the distribution ended during the node's registration">>}, Data),
    {next_state, State, Lost, Actions ++ meshx_pending:replies({register, From}, {error, Lost#data.error})};
registered({ok, Registration}, From, #data{node = Node} = Data) ->
    #{secret := Secret, creation := Creation} = Registration,
    Proof = fun() -> Secret end,
    Known = Node#node{
        creation = first(Node#node.creation, Creation),
        proof = Proof,
        registration = Registration#{secret := Proof}
    },
    meshx_again:connect(Data#data.again),
    {keep_state, Data#data{node = Known, refusals = 0, again = []}, meshx_pending:replies({register, From}, {ok, Registration})};
registered({error, {Cause, Text} = Error}, undefined, #data{refusals = Refusals} = Data) ->
    %% A node that runs: try for as long as it does.
    ?LOG_ERROR("meshx: the agent refuses this node: ~ts: ~ts", [Cause, Text]),
    {keep_state, Data#data{refusals = Refusals + 1, error = Error}, [
        {{timeout, register}, backoff(Refusals + 4), again}
    ]};
registered({error, _} = Error, From, #data{node = Node} = Data) ->
    %% A node that boots: its caller decides.
    case Node of
        #node{monitor = Monitor} -> demonitor(Monitor, [flush]);
        undefined -> true
    end,
    {keep_state, Data#data{node = undefined}, [{reply, From, Error}]}.

%% The creation that the emulator runs under can't change.
first(undefined, Creation) -> Creation;
first(Running, _) -> Running.

text(Format, Args) ->
    unicode:characters_to_binary(io_lib:format(Format, Args)).
