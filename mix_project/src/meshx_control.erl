%% The words of the control socket: requests out, replies and events in (docs/mesh-protocol.md, "Control
%% socket"). Pure: no socket, no process. The frames' 32-bit length is the socket's {packet, 4}.
-module(meshx_control).

-export([request/3, decode/1, max_request/0, max_frame/0]).
-export([pong/0, hello/1, registration/1, session/1, vocabulary/0]).
-export_type([command/0, reply/0, hello/0, registration/0]).

%% A client's frame is at most 64 KiB (docs/mesh-protocol.md).
-define(MAX_REQUEST, 16#10000).
%% The document sets no limit for the agent's frames: lists of links and names grow with the mesh. 16 MiB holds
%% more than 30,000 links.
-define(MAX_FRAME, 16#1000000).

-type command() :: atom().
-type reply() :: {ok, map()} | {error, {meshx_frame:cause() | atom(), binary()}}.
-type hello() :: #{vm_dir := binary(), dist_socket := binary(), _ => _}.
-type registration() :: #{
    creation := 4..16#ffffffff,
    secret := meshx_frame:secret(),
    instance := binary(),
    service := binary(),
    spiffe := binary(),
    _ => _
}.

-spec max_request() -> pos_integer().
max_request() -> ?MAX_REQUEST.

-spec max_frame() -> pos_integer().
max_frame() -> ?MAX_FRAME.

-spec request(integer(), command(), map()) -> {ok, binary()} | {error, {limit, binary()}}.
request(Id, Command, Args) ->
    case term_to_binary({Id, Command, Args}) of
        Frame when byte_size(Frame) > ?MAX_REQUEST ->
            {error, {limit, text("a request of ~b bytes, at most ~b", [byte_size(Frame), ?MAX_REQUEST])}};
        Frame ->
            {ok, Frame}
    end.

%% The answer to the event `ping': the one request without a reply.
-spec pong() -> binary().
pong() -> term_to_binary({0, pong, #{}}).

%% Reads one frame of the agent. A term with atoms that this VM has not is not decoded: when its head can be
%% read, `unknown_words' says whose reply it was, so that one caller fails and not the connection.
-spec decode(binary()) ->
    {reply, integer(), reply()}
    | {event, atom(), map()}
    | {unknown_words, integer() | event}
    | {error, binary()}.
decode(<<131, 80, _/binary>>) ->
    %% A compressed term of 16 MiB inflates to gigabytes.
    {error, <<"a compressed term, which the protocol does not have">>};
decode(Frame) ->
    try binary_to_term(Frame, [safe, used]) of
        {Term, Used} when Used =:= byte_size(Frame) -> checked(Term);
        {_, Used} -> {error, text("~b bytes after the term", [byte_size(Frame) - Used])}
    catch
        error:badarg -> head(Frame)
    end.

checked({reply, Id, {ok, Result}}) when is_integer(Id), is_map(Result) ->
    {reply, Id, {ok, Result}};
checked({reply, Id, {error, Cause, Text}}) when is_integer(Id), is_atom(Cause), is_binary(Text) ->
    {reply, Id, {error, {Cause, Text}}};
checked({event, Event, Args}) when is_atom(Event), is_map(Args) ->
    {event, Event, Args};
checked(_) ->
    {error, <<"neither a reply nor an event">>}.

%% {reply, Id, _} and {event, _, _} by their first bytes: SMALL_TUPLE_EXT of arity 3, an atom in any of its three
%% short encodings, SMALL_INTEGER_EXT or INTEGER_EXT (External Term Format).
head(<<131, 104, 3, Rest/binary>>) ->
    case Rest of
        <<100, 5:16, "reply", Id/binary>> -> head_id(Id);
        <<119, 5, "reply", Id/binary>> -> head_id(Id);
        <<115, 5, "reply", Id/binary>> -> head_id(Id);
        <<100, 5:16, "event", _/binary>> -> {unknown_words, event};
        <<119, 5, "event", _/binary>> -> {unknown_words, event};
        <<115, 5, "event", _/binary>> -> {unknown_words, event};
        _ -> not_a_term()
    end;
head(_) ->
    not_a_term().

head_id(<<97, Id, _/binary>>) -> {unknown_words, Id};
head_id(<<98, Id:32/signed, _/binary>>) -> {unknown_words, Id};
head_id(_) -> not_a_term().

not_a_term() -> {error, <<"a frame that is no external term">>}.

%% Checks what `hello' answered.
-spec hello(reply()) -> {ok, hello()} | {error, {atom(), binary()}}.
hello({ok, #{version := 1, vm_dir := Dir, dist_socket := Socket} = Hello}) when is_binary(Dir), is_binary(Socket) ->
    {ok, Hello};
hello({ok, #{version := Version}}) when Version =/= 1 ->
    {error, {version_mismatch, text("the agent chose version ~tp, wanted 1", [Version])}};
hello({ok, Result}) ->
    {error, {invalid_request, text("hello was answered with ~tp, wanted version, vm_dir and dist_socket", [maps:keys(Result)])}};
hello({error, _} = Error) ->
    Error.

%% Checks what `register_node' answered. A creation below 4 would make pings fail: 0 to 3 are reserved.
-spec registration(reply()) -> {ok, registration()} | {error, {atom(), binary()}}.
registration(
    {ok, #{creation := Creation, secret := <<_:32/binary>>, instance := I, service := S, spiffe := U} = Registration}
) when is_integer(Creation), Creation >= 4, Creation =< 16#ffffffff, is_binary(I), is_binary(S), is_binary(U) ->
    {ok, Registration};
registration({ok, Result}) ->
    %% The keys only: one of the values is the secret.
    {error,
        {invalid_request,
            text("register_node was answered with ~tp, wanted creation (4..2^32-1), secret (32 bytes), "
                 "instance, service and spiffe", [maps:keys(Result)])}};
registration({error, _} = Error) ->
    Error.

%% Checks what `register_session' answered.
-spec session(reply()) -> {ok, meshx_frame:secret()} | {error, {atom(), binary()}}.
session({ok, #{secret := <<_:32/binary>> = Secret}}) ->
    {ok, Secret};
session({ok, Result}) ->
    %% The keys only: one of the values is the secret.
    {error,
        {invalid_request,
            text("register_session was answered with ~tp, wanted secret (32 bytes)", [maps:keys(Result)])}};
session({error, _} = Error) ->
    Error.

%% Every atom that the agent may send. `binary_to_term(_, [safe])' takes only atoms that exist, and in a VM that
%% loads code on demand they exist once this module is loaded.
-spec vocabulary() -> [atom()].
vocabulary() ->
    [reply, event, ok, error, cut, ping, protocol_error, text, link, cause, reason, undefined, none] ++
        [version, features, agent, hosts, mesh, trust_domain, vm_dir, dist_socket] ++
        [creation, secret, service, instance, spiffe, id, name, address, tcp, uds, upstream, existed] ++
        [nodes, node, host, local, links, direction, outbound, inbound, remote, local_spiffe, remote_spiffe] ++
        [verified, remote_agent, purpose, dist, rpc, since, bytes_in, bytes_out, local_not_after, remote_not_after] ++
        [services, protocol, meshx, connect, status, weight, tags, intentions, default, source, destination, action] ++
        [certs, serial, issuer, not_before, not_after, chain, roots, subject] ++
        [steps, what, fix, findings, level, warning] ++
        [proxy_output, proxy_down, stream, stdout, stderr, line, final] ++
        [allowed, at, hidden, ip, port, watch, meta, cluster] ++ meshx_frame:causes().

text(Format, Args) ->
    unicode:characters_to_binary(io_lib:format(Format, Args)).
