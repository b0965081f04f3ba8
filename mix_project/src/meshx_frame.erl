%% The frames around a distribution connection: CONNECT, OK, REFUSED and ACCEPT (docs/mesh-protocol.md, "Dist
%% socket" and "ACCEPT frame"). Pure: bytes in, terms out. Each is one {packet, 2} frame of at most 2 KiB.
-module(meshx_frame).

-export([connect/3, answer/1, accept/2, equal/2, cause/1, causes/0, max_size/0]).
-export_type([link_id/0, secret/0, cause/0, peer/0]).

-define(VERSION, 1).
-define(CONNECT, 1).
-define(OK, 2).
-define(REFUSED, 3).
-define(ACCEPT, 4).
-define(LINK, 16).
-define(SECRET, 32).
-define(MAX_SIZE, 2048).

-type link_id() :: <<_:128>>.
-type secret() :: <<_:256>>.
-type peer() :: #{node => binary(), spiffe := binary(), agent := binary()}.
-type cause() ::
    no_such_node
    | no_such_service
    | unreachable
    | intention_denied
    | identity_mismatch
    | certificate_invalid
    | unknown_authority
    | wrong_trust_domain
    | certificate_expired
    | wrong_service
    | no_certificate
    | not_permitted
    | bad_secret
    | name_taken
    | host_not_owned
    | invalid_name
    | invalid_request
    | version_mismatch
    | limit
    | timeout
    | not_ready
    | unsupported
    | unknown.

%% The largest frame that either side may send, in bytes.
-spec max_size() -> pos_integer().
max_size() -> ?MAX_SIZE.

-spec connect(link_id(), secret(), binary()) -> binary().
connect(<<Link:?LINK/binary>>, <<Secret:?SECRET/binary>>, Target) when byte_size(Target) < 16#10000 ->
    <<?VERSION, ?CONNECT, Link/binary, Secret/binary, (byte_size(Target)):16, Target/binary>>.

%% Reads the agent's answer to CONNECT.
-spec answer(binary()) -> {ok, peer()} | {refused, cause(), binary()} | {error, binary()}.
answer(<<?VERSION, ?OK, S:16, Spiffe:S/binary, A:16, Agent:A/binary>>) ->
    {ok, #{spiffe => Spiffe, agent => Agent}};
answer(<<?VERSION, ?REFUSED, C:8, Cause:C/binary, T:16, Text:T/binary>>) ->
    case cause(Cause) of
        unknown -> {refused, unknown, <<Cause/binary, ": ", Text/binary>>};
        Known -> {refused, Known, Text}
    end;
answer(<<?VERSION, Type, _/binary>> = Frame) when Type =:= ?OK; Type =:= ?REFUSED ->
    {error, text("an answer of ~b bytes whose lengths do not add up", [byte_size(Frame)])};
answer(<<Version, Type, _/binary>>) ->
    {error, text("version ~b, type ~b, wanted version ~b, type ~b or ~b", [Version, Type, ?VERSION, ?OK, ?REFUSED])};
answer(Frame) ->
    {error, text("an answer of ~b bytes, wanted at least 2", [byte_size(Frame)])}.

%% Reads ACCEPT and holds its secret against this node's own.
-spec accept(binary(), secret()) -> {ok, link_id(), peer()} | {error, bad_secret | binary()}.
accept(
    <<?VERSION, ?ACCEPT, Link:?LINK/binary, Secret:?SECRET/binary, N:16, Node:N/binary, S:16, Spiffe:S/binary, A:16,
        Agent:A/binary>>,
    Own
) ->
    case equal(Secret, Own) of
        true -> {ok, Link, #{node => Node, spiffe => Spiffe, agent => Agent}};
        false -> {error, bad_secret}
    end;
accept(<<?VERSION, ?ACCEPT, _/binary>> = Frame, _) ->
    {error, text("an ACCEPT of ~b bytes whose lengths do not add up", [byte_size(Frame)])};
accept(<<Version, Type, _/binary>>, _) ->
    {error, text("version ~b, type ~b, wanted version ~b, type ~b", [Version, Type, ?VERSION, ?ACCEPT])};
accept(Frame, _) ->
    {error, text("a frame of ~b bytes, wanted at least 2", [byte_size(Frame)])}.

%% Whether two secrets are the same, in a time that does not depend on where they differ. (`crypto:hash_equals'
%% would do, but crypto may not be on the path of a booting VM.)
-spec equal(binary(), binary()) -> boolean().
equal(<<A:?SECRET/binary>>, <<B:?SECRET/binary>>) -> differing_bits(A, B, 0) =:= 0;
equal(_, _) -> false.

differing_bits(<<A, As/binary>>, <<B, Bs/binary>>, Acc) -> differing_bits(As, Bs, Acc bor (A bxor B));
differing_bits(<<>>, <<>>, Acc) -> Acc.

%% The atom for a cause on the wire; no atom is made for one that this version does not know.
-spec cause(binary()) -> cause().
cause(Name) ->
    case [Cause || Cause <- causes(), atom_to_binary(Cause, utf8) =:= Name] of
        [Cause] -> Cause;
        [] -> unknown
    end.

-spec causes() -> [cause()].
causes() ->
    [
        no_such_node,
        no_such_service,
        unreachable,
        intention_denied,
        identity_mismatch,
        certificate_invalid,
        unknown_authority,
        wrong_trust_domain,
        certificate_expired,
        wrong_service,
        no_certificate,
        not_permitted,
        bad_secret,
        name_taken,
        host_not_owned,
        invalid_name,
        invalid_request,
        version_mismatch,
        limit,
        timeout,
        not_ready,
        unsupported
    ].

text(Format, Args) ->
    unicode:characters_to_binary(io_lib:format(Format, Args)).
