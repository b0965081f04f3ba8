%% Answers questions about terms and their encodings: the BEAM's side of beam.rs.
-module(oracle).
-export([main/1]).

main(Port) ->
    Options = [binary, {packet, 4}, {active, false}, {nodelay, true}],
    {ok, Socket} = gen_tcp:connect({127, 0, 0, 1}, Port, Options),
    %% Something to name in terms of this node's own.
    register(oracle, self()),
    loop(Socket).

loop(Socket) ->
    case gen_tcp:recv(Socket, 0) of
        {ok, Request} ->
            ok = gen_tcp:send(Socket, reply(Request)),
            loop(Socket);
        {error, closed} ->
            halt(0)
    end.

%% The term in every encoding that term_to_binary has, then how much heap it takes.
reply(<<"echo", Bytes/binary>>) ->
    case decode(Bytes) of
        {ok, Term} -> [<<1, (erts_debug:flat_size(Term)):64>> | encodings(Term)];
        error -> <<0>>
    end;
%% Whether both are the same term.
reply(<<"same", Len:32, A:Len/binary, B/binary>>) ->
    case {decode(A), decode(B)} of
        {{ok, Term}, {ok, Term}} -> <<1>>;
        _ -> <<0>>
    end;
%% Whether the bytes are a term, and the whole of one.
reply(<<"take", Bytes/binary>>) ->
    case decode(Bytes) of
        {ok, _} -> <<1>>;
        error -> <<0>>
    end;
%% Whether the text reads back as the term.
reply(<<"read", Len:32, Bytes:Len/binary, Text/binary>>) ->
    {ok, Term} = decode(Bytes),
    case read(unicode:characters_to_list(Text)) of
        Term -> <<1>>;
        Other -> [<<0>>, unicode:characters_to_binary(io_lib:format("~0tp", [Other]))]
    end;
%% The term as text, on one line.
reply(<<"show", Bytes/binary>>) ->
    {ok, Term} = decode(Bytes),
    unicode:characters_to_binary(io_lib:format("~0tp", [Term]));
%% Terms that only a node can make.
reply(<<"own">>) ->
    Captured = {self(), make_ref(), "text", 1.5},
    Terms = [
        self(),
        make_ref(),
        monitor(process, spawn(fun() -> ok end), [{alias, explicit_unalias}]),
        hd(erlang:ports()),
        fun lists:map/2,
        fun(X) -> {X, Captured} end,
        fun() -> ok end,
        [alias | make_ref()],
        maps:from_list([{N, self()} || N <- lists:seq(1, 100)])
    ],
    [<<1, 0:64>> | lists:append([encodings(Term) || Term <- [Terms | Terms]])].

decode(Bytes) ->
    try binary_to_term(Bytes, [used]) of
        {Term, Used} when Used =:= byte_size(Bytes) -> {ok, Term};
        _ -> error
    catch
        error:badarg -> error
    end.

encodings(Term) ->
    Options = [[], [compressed], [{compressed, 9}], [{minor_version, 0}], [{minor_version, 1}], [{minor_version, 2}]],
    [<<(byte_size(B)):32, B/binary>> || O <- Options, B <- [term_to_binary(Term, O)]].

read(Text) ->
    try
        {ok, Tokens, _} = erl_scan:string(Text ++ "\n."),
        {ok, Term} = erl_parse:parse_term(Tokens),
        Term
    catch
        _:Reason -> {unreadable, Reason}
    end.
