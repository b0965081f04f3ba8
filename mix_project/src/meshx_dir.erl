%% Finds the agent's directory, and refuses one that somebody else could have made.
%%
%% Runs while a VM boots: kernel and stdlib only, and no `file' (its server is not there yet).
-module(meshx_dir).

-export([find/0, check/1, uid/0, control_socket/1, random/1]).
-export_type([error/0]).

-include_lib("kernel/include/file.hrl").

%% sockaddr_un.sun_path holds 108 bytes with its terminating zero (unix(7)).
-define(MAX_SOCKET_PATH, 107).

%% Symbolic links that are followed, as many as the kernel does.
-define(MAX_LINKS, 40).

-type error() :: {meshx_frame:cause(), unicode:chardata()}.

%% The agent's directory: `-meshx_dir', `MESHX_DIR', `XDG_RUNTIME_DIR'/meshx, /tmp/meshx-UID; the first that is
%% set counts, whether or not an agent is there.
-spec find() -> {ok, file:filename()} | {error, error()}.
find() ->
    case uid() of
        {ok, Uid} ->
            Dir = candidate(Uid),
            case check(Dir, Uid) of
                ok -> {ok, Dir};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

candidate(Uid) ->
    case init:get_argument(meshx_dir) of
        {ok, Values} when Values =/= [] ->
            case lists:last(Values) of
                [Dir] when Dir =/= "" -> Dir;
                _ -> from_environment(Uid)
            end;
        _ ->
            from_environment(Uid)
    end.

from_environment(Uid) ->
    case {os:getenv("MESHX_DIR", ""), os:getenv("XDG_RUNTIME_DIR", "")} of
        {"", ""} -> "/tmp/meshx-" ++ integer_to_list(Uid);
        {"", Runtime} -> filename:join(Runtime, "meshx");
        {Dir, _} -> Dir
    end.

%% Whoever can write into the directory can put another control socket there and so be the agent. Therefore it
%% belongs to this uid or to root, and others cannot write it; a group may when root decided so.
-spec check(file:filename()) -> ok | {error, error()}.
check(Dir) ->
    case uid() of
        {ok, Uid} -> check(Dir, Uid);
        {error, _} = Error -> Error
    end.

check(Dir, Uid) ->
    case prim_file:read_file_info(Dir) of
        {ok, #file_info{type = directory, uid = Owner, mode = Mode}} ->
            case writable_by_others(Owner, Mode) of
                _ when Owner =/= Uid, Owner =/= 0 ->
                    refuse("~ts belongs to uid ~b, wanted ~b or 0", [Dir, Owner, Uid]);
                true ->
                    refuse("~ts has mode ~.8b, so that others can write it; wanted 0700", [Dir, Mode band 8#7777]);
                false ->
                    case check_length(control_socket(Dir)) of
                        ok -> check_way(Dir, Uid);
                        {error, _} = Error -> Error
                    end
            end;
        {ok, #file_info{type = Type}} ->
            refuse("~ts is a ~ts, wanted a directory", [Dir, atom_to_list(Type)]);
        {error, enoent} ->
            {error, {unreachable, format("no agent: ~ts does not exist", [Dir])}};
        {error, Reason} ->
            unreadable(Dir, Reason)
    end.

writable_by_others(0, Mode) -> Mode band 8#002 =/= 0;
writable_by_others(_, Mode) -> Mode band 8#022 =/= 0.

%% Whoever can change a directory on the way can put another one in the next one's place. So each directory in which
%% a name of the path is looked up, through symbolic links too, is written by its owner alone, or it has the sticky bit
%% and the name belongs to this uid or to root. (The agent checks the same: cnode/src/agent/way.rs.)
check_way(Dir, Uid) ->
    case prim_file:get_cwd() of
        {ok, Cwd} ->
            ["/" | Names] = filename:split(filename:join(Cwd, Dir)),
            check_way(Names, "/", Uid, ?MAX_LINKS);
        {error, Reason} ->
            unreadable(Dir, Reason)
    end.

check_way([], _At, _Uid, _Links) ->
    ok;
check_way(["." | Names], At, Uid, Links) ->
    check_way(Names, At, Uid, Links);
check_way([".." | Names], At, Uid, Links) ->
    check_way(Names, filename:dirname(At), Uid, Links);
check_way([Name | Names], At, Uid, Links) ->
    Next = filename:join(At, Name),
    case {prim_file:read_link_info(At), prim_file:read_link_info(Next)} of
        {{ok, #file_info{mode = Mode}}, {ok, #file_info{type = Type, uid = Owner}}} ->
            case Mode band 8#022 =/= 0 of
                true when Mode band 8#1000 =:= 0 ->
                    refuse("~ts has mode ~.8b, so that others can put another directory in the place of ~ts", [
                        At, Mode band 8#7777, Next
                    ]);
                true when Owner =/= Uid, Owner =/= 0 ->
                    refuse("~ts belongs to uid ~b, wanted ~b or 0", [Next, Owner, Uid]);
                _ when Type =:= symlink ->
                    follow(Names, At, Next, Uid, Links);
                _ ->
                    check_way(Names, Next, Uid, Links)
            end;
        {{error, Reason}, _} ->
            unreadable(At, Reason);
        {_, {error, Reason}} ->
            unreadable(Next, Reason)
    end.

follow(_Names, _At, Next, _Uid, 0) ->
    refuse("~ts leads through more than ~b symbolic links", [Next, ?MAX_LINKS]);
follow(Names, At, Next, Uid, Links) ->
    case prim_file:read_link(Next) of
        {ok, Target} ->
            case filename:split(Target) of
                ["/" | More] -> check_way(More ++ Names, "/", Uid, Links - 1);
                More -> check_way(More ++ Names, At, Uid, Links - 1)
            end;
        {error, Reason} ->
            unreadable(Next, Reason)
    end.

unreadable(Path, Reason) ->
    {error, {unreachable, format("~ts: ~ts", [Path, atom_to_list(Reason)])}}.

check_length(Path) ->
    case byte_size(unicode:characters_to_binary(Path)) of
        Size when Size > ?MAX_SOCKET_PATH ->
            refuse("~ts has ~b bytes, a socket's path at most ~b; choose a shorter directory", [
                Path, Size, ?MAX_SOCKET_PATH
            ]);
        _ ->
            ok
    end.

refuse(Format, Args) ->
    {error, {not_permitted, format(Format, Args)}}.

format(Format, Args) ->
    unicode:characters_to_binary(io_lib:format(Format, Args)).

-spec control_socket(file:filename()) -> file:filename().
control_socket(Dir) ->
    filename:join(Dir, "control.sock").

%% The effective uid of this VM.
-spec uid() -> {ok, non_neg_integer()} | {error, error()}.
uid() ->
    case prim_file:read_file_info("/proc/self") of
        {ok, #file_info{uid = Uid}} when is_integer(Uid) -> {ok, Uid};
        _ -> {error, {not_permitted, <<"cannot learn this process's uid: /proc is not mounted">>}}
    end.

%% Random bytes without the application crypto, which a booting VM may not have on its path.
-spec random(pos_integer()) -> binary().
random(Size) ->
    {ok, Fd} = prim_file:open("/dev/urandom", [read, raw, binary]),
    try
        {ok, <<Bytes:Size/binary>>} = prim_file:read(Fd, Size),
        Bytes
    after
        prim_file:close(Fd)
    end.
