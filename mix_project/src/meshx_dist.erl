%% The distribution carrier of `-proto_dist meshx' (see "How to implement an alternative carrier" in ERTS).
%%
%% A node listens on a Unix socket that only the agent knows; it dials by way of the agent's dist socket. The agent
%% finds the other node, checks identity and permission at both ends and carries the bytes over mutual TLS. What
%% is left here is an ordinary port-driver connection, as fast as `inet_tcp_dist'. Host parts of names are for the
%% agent: no name is resolved, and long and short names are alike.
%%
%% Runs while a VM boots: kernel and stdlib only. It needs no epmd (`-no_epmd').
-module(meshx_dist).

-export([childspecs/0, listen/1, listen/2, accept/1, accept_connection/5, setup/5, close/1, select/1]).
-export([address/0, is_node_name/1, setopts/2, getopts/2]).
-export([accept_loop/2, greet/2, accepted/4, connecting/5]).
-export([tick/1, getstat/1]).
%% For `meshx_adapter_dist'.
-export([hs_data/3, up/0, failed/2, boot_error/3]).
%% For `meshx_epmd'.
-export([patiently/1, hidden/0]).

-include_lib("kernel/include/dist_util.hrl").
-include_lib("kernel/include/net_address.hrl").
-include_lib("kernel/include/logger.hrl").

-define(FAMILY, local).
-define(PROTOCOL, meshx).
-define(BACKLOG, 128).
%% An ACCEPT frame must be whole within this time (docs/mesh-protocol.md), in milliseconds.
-define(ACCEPT_TIMEOUT, 5000).
%% Connections to this node's own socket that have not proven yet that they come from the agent. One more ends the
%% oldest, so that silent ones never keep the agent out.
-define(MAX_UNPROVEN, 64).
-define(CONNECT_TIMEOUT, 1000).
%% A name is free within a second after its VM was killed: a restart waits for that, in milliseconds.
-define(NAME_FREE_WITHIN, 2000).
%% The mesh may come later than this VM; the flag `-meshx_ready_within MILLISECONDS' says otherwise.
-define(READY_WITHIN, 30000).
-define(REGISTER_AGAIN, 100).
-define(BUFFER, 16#40000).
%% The kernel wakes who waits for a Unix socket only when three quarters of its buffer are free: a small one is empty
%% before this VM writes again.
-define(SEND_BUFFER, 16#100000).

%% === What net_kernel and erl_distribution call

%% The agent's client lives as long as the distribution.
childspecs() ->
    {ok, [
        #{
            id => meshx_agent,
            start => {meshx_agent, start_link, []},
            restart => permanent,
            shutdown => 2000,
            type => worker,
            modules => [meshx_agent]
        }
    ]}.

-spec select(node()) -> boolean().
select(Node) -> is_node_name(Node).

%% Exactly one `@' with something before and after it.
-spec is_node_name(node()) -> boolean().
is_node_name(Node) ->
    case string:split(atom_to_list(Node), "@", all) of
        [[_ | _], [_ | _]] -> true;
        _ -> false
    end.

-spec address() -> #net_address{}.
address() ->
    {ok, Host} = inet:gethostname(),
    #net_address{host = Host, protocol = ?PROTOCOL, family = ?FAMILY}.

listen(Name) ->
    {ok, Host} = inet:gethostname(),
    listen(Name, Host).

%% Makes the node's socket in the directory that the agent names, and registers the node.
listen(Name, Host) ->
    Node = unicode:characters_to_binary(atom_to_list(Name) ++ "@" ++ Host),
    Listened =
        case is_session(atom_to_list(Name)) of
            true -> listen_for_nobody();
            false -> listen_and_register(Node)
        end,
    case Listened of
        {ok, Socket, Path, #{creation := Creation}} ->
            Address = #net_address{address = {local, Path}, host = Host, protocol = ?PROTOCOL, family = ?FAMILY},
            {ok, {Socket, Address, Creation}};
        {error, {Cause, Text}} ->
            boot_error(Node, Cause, Text),
            {error, Cause}
    end.

%% A tool comes and goes, and nobody has to find it: the agent hears of it when it dials, and the mesh never does. The
%% names are those that releases and RabbitMQ give their tools; the flag `-meshx_session' makes it one by any name.
is_session(Name) ->
    init:get_argument(meshx_session) =/= error orelse
        lists:any(fun(Prefix) -> lists:prefix(Prefix, Name) end, ["rem-", "rpc-", "rabbitmqcli-"]).

%% net_kernel wants a listening socket: without its path nobody can connect to it.
listen_for_nobody() ->
    case listen_in_agents_dir() of
        {ok, Socket, Path} ->
            _ = prim_file:delete(Path),
            {ok, Socket, Path, #{creation => binary:decode_unsigned(meshx_dir:random(4)) bor 4}};
        {error, _} = Error ->
            Error
    end.

listen_in_agents_dir() ->
    case meshx_agent:await() of
        {ok, #{vm_dir := Dir}} ->
            Name = binary:encode_hex(meshx_dir:random(8)),
            listen_at(filename:join(Dir, <<Name/binary, ".sock">>));
        {error, _} = Error ->
            Error
    end.

listen_and_register(Node) ->
    case listen_in_agents_dir() of
        {ok, Socket, Path} ->
            case patiently(fun() -> meshx_agent:register_node(Node, {Socket, Path}, hidden()) end) of
                {ok, Registration} ->
                    {ok, Socket, Path, Registration};
                {error, _} = Error ->
                    unlisten(Socket, Path),
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

listen_at(Path) ->
    case
        gen_tcp:listen(0, [{inet_backend, inet}, {ifaddr, {local, Path}}, {backlog, ?BACKLOG} | preamble_options()])
    of
        {ok, Socket} -> {ok, Socket, Path};
        {error, Reason} -> {error, {unreachable, text("cannot listen at ~ts: ~ts", [Path, inet:format_error(Reason)])}}
    end.

%% Registers. A refusal that may pass by itself is not taken at once for an answer.
-spec patiently(fun(() -> {ok, map()} | {error, {atom(), binary()}})) -> {ok, map()} | {error, {atom(), binary()}}.
patiently(Register) ->
    patiently(Register, #{
        name_taken => deadline(?NAME_FREE_WITHIN),
        not_ready => deadline(ready_within())
    }).

%% `Patience' says until when a refusal by some cause may pass by itself.
patiently(Register, Patience) ->
    case Register() of
        {error, {Cause, _}} = Error ->
            case Patience of
                #{Cause := Deadline} ->
                    case left(Deadline) of
                        0 ->
                            Error;
                        _ ->
                            receive
                            after ?REGISTER_AGAIN -> patiently(Register, Patience)
                            end
                    end;
                #{} ->
                    Error
            end;
        {ok, _} = Registered ->
            Registered
    end.

ready_within() ->
    case init:get_argument(meshx_ready_within) of
        {ok, Values} ->
            try list_to_integer(lists:last(lists:last(Values))) of
                Milliseconds when Milliseconds >= 0 -> Milliseconds;
                _ -> ?READY_WITHIN
            catch
                error:_ -> ?READY_WITHIN
            end;
        error ->
            ?READY_WITHIN
    end.

%% Only what the agent shows for this node: whether a link is hidden is in its handshake's flags.
hidden() ->
    persistent_term:get({net_kernel, publish_type}, normal) =:= hidden.

unlisten(Socket, Path) ->
    gen_tcp:close(Socket),
    _ = prim_file:delete(Path),
    ok.

-spec close(port() | undefined) -> ok.
close(undefined) ->
    ok;
close(Socket) ->
    meshx_agent:deregister_node(),
    case inet:sockname(Socket) of
        {ok, {local, Path}} -> unlisten(Socket, Path);
        _ -> gen_tcp:close(Socket)
    end.

setopts(Socket, Options) ->
    %% These belong to the carrier.
    case [Option || {Key, _} = Option <- Options, lists:member(Key, [active, deliver, packet, packet_size])] of
        [] -> inet:setopts(Socket, Options);
        Refused -> {error, {badopts, Refused}}
    end.

getopts(Socket, Options) ->
    inet:getopts(Socket, Options).

%% At boot the VM ends after this with net_kernel's own terse line, so the whole story goes to stderr first.
boot_error(Node, Cause, Text) ->
    case init:get_status() of
        {starting, _} ->
            Message = text("meshx: cannot start ~ts: ~ts: ~ts~n~ts", [Node, Cause, Text, remedy(Cause)]),
            Port = open_port({fd, 2, 2}, [out, binary]),
            true = port_command(Port, Message),
            true = port_close(Port);
        _ ->
            ?LOG_ERROR("meshx: cannot start ~ts: ~ts: ~ts", [Node, Cause, Text])
    end.

remedy(unreachable) ->
    [
        "  start the agent (meshx agent), or say where its directory is: erl -meshx_dir DIR, or MESHX_DIR\n",
        shipped_agent()
    ];
remedy(_) ->
    "".

%% A release may have brought the agent's program along (lib/meshx/release.ex).
shipped_agent() ->
    case code:priv_dir(meshx) of
        {error, bad_name} ->
            "";
        Priv ->
            Program = filename:join([Priv, "bin", "meshx"]),
            case prim_file:read_file_info(Program) of
                {ok, _} -> io_lib:format("  the agent of this release: ~ts agent --help~n", [Program]);
                {error, _} -> ""
            end
    end.

%% === Accepting

accept(Listen) ->
    spawn_opt(?MODULE, accept_loop, [self(), Listen], [link, {priority, max}]).

accept_loop(Kernel, Listen) ->
    accept_loop(Kernel, Listen, []).

%% `Unproven': newest first.
accept_loop(Kernel, Listen, Unproven0) ->
    case gen_tcp:accept(Listen) of
        {ok, Socket} ->
            Unproven = make_room(ended(Unproven0)),
            {Pid, Monitor} = spawn_monitor(?MODULE, greet, [Kernel, Socket]),
            case gen_tcp:controlling_process(Socket, Pid) of
                ok -> Pid ! {go, Socket};
                {error, _} -> gen_tcp:close(Socket)
            end,
            accept_loop(Kernel, Listen, [{Pid, Monitor} | Unproven]);
        {error, Reason} when Reason =:= emfile; Reason =:= enfile; Reason =:= econnaborted; Reason =:= enobufs ->
            receive
            after 100 -> accept_loop(Kernel, Listen, Unproven0)
            end;
        {error, Reason} ->
            exit(Reason)
    end.

ended(Unproven) ->
    receive
        {'DOWN', Monitor, process, _, _} -> ended(lists:keydelete(Monitor, 2, Unproven))
    after 0 ->
        Unproven
    end.

make_room(Unproven) when length(Unproven) < ?MAX_UNPROVEN ->
    Unproven;
make_room(Unproven) ->
    {Oldest, Monitor} = lists:last(Unproven),
    demonitor(Monitor, [flush]),
    exit(Oldest, kill),
    ?LOG_WARNING("meshx: more than ~b unproven connections to this node's socket: closed the oldest", [?MAX_UNPROVEN]),
    lists:droplast(Unproven).

%% One process for each connection until it has proven itself: net_kernel hears only of those that come from the
%% agent.
greet(Kernel, Socket) ->
    receive
        {go, Socket} -> ok
    after ?ACCEPT_TIMEOUT -> exit(timeout)
    end,
    case proven(Socket) of
        {ok, Link, Peer} ->
            Kernel ! {accept, self(), Socket, ?FAMILY, ?PROTOCOL},
            receive
                {Kernel, controller, Pid} ->
                    ok = gen_tcp:controlling_process(Socket, Pid),
                    Pid ! {self(), controller, Link, Peer};
                {Kernel, unsupported_protocol} ->
                    exit(unsupported_protocol)
            after ?ACCEPT_TIMEOUT -> exit(timeout)
            end;
        closed ->
            %% The agent wanted to know whether somebody listens (`meshx why', `meshx doctor').
            gen_tcp:close(Socket);
        {error, Text} ->
            gen_tcp:close(Socket),
            ?LOG_WARNING("meshx: closed a connection to this node's socket: ~ts", [Text])
    end.

proven(Socket) ->
    case gen_tcp:recv(Socket, 0, ?ACCEPT_TIMEOUT) of
        {ok, Frame} ->
            case meshx_agent:secret() of
                {ok, Secret} ->
                    case meshx_frame:accept(list_to_binary(Frame), Secret) of
                        {ok, Link, Peer} -> {ok, Link, Peer};
                        {error, bad_secret} -> {error, <<"its secret is not the one of this node's registration">>};
                        {error, Text} -> {error, Text}
                    end;
                {error, {_, Text}} ->
                    {error, Text}
            end;
        {error, closed} ->
            closed;
        {error, timeout} ->
            {error, text("no whole ACCEPT within ~b ms", [?ACCEPT_TIMEOUT])};
        {error, emsgsize} ->
            {error, text("an ACCEPT of more than ~b bytes", [meshx_frame:max_size()])};
        {error, Reason} ->
            {error, text("no ACCEPT: ~tp", [Reason])}
    end.

accept_connection(Greeter, Socket, MyNode, Allowed, SetupTime) ->
    Handshake = #hs_data{kernel_pid = self(), this_node = MyNode, allowed = Allowed},
    spawn_opt(?MODULE, accepted, [Greeter, Socket, Handshake, SetupTime], [link, {priority, max}]).

accepted(Greeter, Socket, Handshake0, SetupTime) ->
    receive
        {Greeter, controller, Link, #{node := Claimed} = Peer} ->
            Timer = dist_util:start_timer(SetupTime),
            meshx_agent:link(Link, Socket, inbound, Peer),
            handshake_options(Socket),
            Handshake = with_socket(Socket, Link, Handshake0#hs_data{timer = Timer}),
            dist_util:handshake_other_started(Handshake#hs_data{f_recv = receive_name(Claimed)})
    after SetupTime ->
        ?shutdown(no_node)
    end.

%% The agent holds the name in the handshake against the peer's certificate. The name must also be the one that
%% the agent spoke of in ACCEPT. It is in the first message (Distribution Protocol, "send_name"), which is
%% checked before `dist_util' makes an atom of it.
receive_name(Claimed) ->
    fun(Socket, Length, Timeout) ->
        case {get(meshx_named), gen_tcp:recv(Socket, Length, Timeout)} of
            {undefined, {ok, Message}} ->
                put(meshx_named, true),
                check_name(Message, Claimed, Socket);
            {_, Result} ->
                Result
        end
    end.

check_name(Message, Claimed, Socket) ->
    case list_to_binary(Message) of
        <<$N, _Flags:8/binary, _Creation:4/binary, Size:16, Claimed:Size/binary, _/binary>> ->
            {ok, Message};
        <<$N, _Flags:8/binary, _Creation:4/binary, Size:16, Name:Size/binary, _/binary>> ->
            refuse_name(Socket, text("the handshake names ~ts, the agent ~ts", [printable(Name), Claimed]));
        _ ->
            refuse_name(Socket, <<"the handshake begins with no name message of version 6">>)
    end.

refuse_name(Socket, Text) ->
    _ = gen_tcp:send(Socket, "snot_allowed"),
    ?LOG_ERROR("meshx: refused a link: ~ts", [Text]),
    ?shutdown2(no_node, {meshx, identity_mismatch}).

printable(Name) ->
    case unicode:characters_to_list(Name) of
        Text when is_list(Text) -> io_lib:write_string(Text);
        _ -> io_lib:format("~w", [Name])
    end.

%% === Dialling

setup(Node, Type, MyNode, _LongOrShortNames, SetupTime) ->
    spawn_opt(?MODULE, connecting, [self(), Node, Type, MyNode, SetupTime], [link, {priority, max}]).

connecting(Kernel, Node, Type, MyNode, SetupTime) ->
    Timer = dist_util:start_timer(SetupTime),
    %% Sooner than the timer, which would end this process before it can say why.
    case dial(Node, self_name(MyNode), deadline(SetupTime - SetupTime div 8)) of
        {ok, Socket, Link, Session} ->
            dist_util:reset_timer(Timer),
            handshake_options(Socket),
            Handshake = #hs_data{
                kernel_pid = Kernel,
                other_node = Node,
                this_node = MyNode,
                timer = Timer,
                request_type = request_type(Type, Session)
            },
            try
                dist_util:handshake_we_started(with_socket(Socket, Link, Handshake))
            catch
                exit:Reason ->
                    failed(Node, Reason),
                    exit(Reason)
            end;
        {error, {Cause, Text}} ->
            Level = meshx_links:refuse(Node, Cause, Text),
            ?LOG(Level, "meshx: cannot reach ~ts: ~ts: ~ts", [Node, Cause, Text]),
            ?shutdown2(Node, {meshx, Cause})
    end.

%% The handshake leaves by `exit'; so does a link that was up.
up() ->
    put(meshx_up, true).

failed(Node, Reason) ->
    case get(meshx_up) of
        true -> ok;
        undefined -> _ = meshx_links:refuse(Node, handshake_failed, text("~tp~ts", [Reason, hint(Reason)]))
    end.

%% The other end closes without a word when our digest is not what its cookie makes.
hint({recv_challenge_ack_failed, _}) -> "; most often the two nodes have different cookies";
hint(_) -> "".

request_type(_, true) -> hidden;
request_type(Type, false) -> Type.

%% `-name undefined': the other end names this node, of which only the host is known.
self_name(MyNode) ->
    case atom_to_binary(MyNode, utf8) of
        <<"undefined@", Host/binary>> -> #{host => Host};
        Node -> #{node => Node}
    end.

dial(Node, Self, Deadline) ->
    case meshx_agent:credentials(Self) of
        {ok, #{dist_socket := Path, secret := Secret, session := Session}} ->
            Target = atom_to_binary(Node, utf8),
            case gen_tcp:connect({local, Path}, 0, [{inet_backend, inet} | preamble_options()], ?CONNECT_TIMEOUT) of
                {ok, Socket} ->
                    Link = meshx_dir:random(16),
                    meshx_agent:link(Link, Socket, outbound, #{node => Target, spiffe => <<>>, agent => <<>>}),
                    case ask(Socket, Link, Secret, Target, Deadline) of
                        ok -> {ok, Socket, Link, Session};
                        {error, _} = Error -> Error
                    end;
                {error, Reason} ->
                    {error, {unreachable, text("no agent at ~ts: ~ts", [Path, inet:format_error(Reason)])}}
            end;
        {error, _} = Error ->
            Error
    end.

ask(Socket, Link, Secret, Target, Deadline) ->
    case gen_tcp:send(Socket, meshx_frame:connect(Link, Secret, Target)) of
        ok ->
            case gen_tcp:recv(Socket, 0, left(Deadline)) of
                {ok, Frame} ->
                    case meshx_frame:answer(list_to_binary(Frame)) of
                        {ok, Peer} ->
                            meshx_agent:link(Link, Socket, outbound, Peer#{node => Target});
                        {refused, Cause, Text} ->
                            {error, {Cause, Text}};
                        {error, Text} ->
                            {error, {invalid_request, <<"the agent sent ", Text/binary>>}}
                    end;
                {error, timeout} ->
                    {error, {timeout, <<"the agent did not answer in time">>}};
                {error, Reason} ->
                    {error, {unreachable, text("the agent gave no answer: ~tp", [Reason])}}
            end;
        {error, Reason} ->
            {error, {unreachable, text("cannot send to the agent: ~tp", [Reason])}}
    end.

%% === The socket

preamble_options() ->
    [{active, false}, {packet, 2}, {packet_size, meshx_frame:max_size()}, {send_timeout, ?ACCEPT_TIMEOUT}].

%% From here on the bytes are the distribution protocol's.
handshake_options(Socket) ->
    ok = inet:setopts(Socket, [{packet_size, 0}, {send_timeout, infinity}]).

with_socket(Socket, Link, Handshake) ->
    Data = hs_data(Socket, fun up/0, Handshake),
    Data#hs_data{
        %% The other node is connected by now, and nobody has been told so yet: who is told finds the link up.
        f_address = fun(_, Node) ->
            meshx_links:named(Link, Node),
            meshx_links:up(Link),
            net_address(Node)
        end
    }.

%% An ordinary port-driver connection; `Up' is called in its process when the nodes' handshake is done.
hs_data(Socket, Up, Handshake) ->
    Handshake#hs_data{
        socket = Socket,
        this_flags = 0,
        f_send = fun gen_tcp:send/2,
        f_recv = fun gen_tcp:recv/3,
        f_setopts_pre_nodeup = fun(S) -> inet:setopts(S, [{active, false}, {packet, 4}]) end,
        f_setopts_post_nodeup = fun(S) ->
            Up(),
            inet:setopts(S, [
                {active, true}, {deliver, port}, {packet, 4}, binary, {sndbuf, ?SEND_BUFFER}, {recbuf, ?BUFFER}, {buffer, ?BUFFER}
            ])
        end,
        f_getll = fun inet:getll/1,
        f_address = fun(_, Node) -> net_address(Node) end,
        mf_tick = fun ?MODULE:tick/1,
        mf_getstat = fun ?MODULE:getstat/1,
        mf_setopts = fun ?MODULE:setopts/2,
        mf_getopts = fun ?MODULE:getopts/2
    }.

net_address(Node) ->
    [_, Host] = string:split(atom_to_list(Node), "@"),
    #net_address{address = {local, <<>>}, host = Host, protocol = ?PROTOCOL, family = ?FAMILY}.

%% `force': also while the port is busy, or a long queue would look like a dead node.
tick(Socket) ->
    case prim_inet:send(Socket, [], [force]) of
        {error, closed} ->
            self() ! {tcp_closed, Socket},
            {error, closed};
        Result ->
            Result
    end.

getstat(Socket) ->
    case inet:getstat(Socket, [recv_cnt, send_cnt, send_pend]) of
        {ok, Stat} ->
            [Received, Sent, Pending] = [proplists:get_value(Key, Stat, 0) || Key <- [recv_cnt, send_cnt, send_pend]],
            {ok, Received, Sent, Pending};
        {error, _} = Error ->
            Error
    end.

deadline(Time) -> erlang:monotonic_time(millisecond) + Time.

left(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond)).

text(Format, Args) ->
    unicode:characters_to_binary(io_lib:format(Format, Args)).
