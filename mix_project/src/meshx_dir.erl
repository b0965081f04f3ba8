%% Finds the agent's directory, and refuses one that somebody else could have made.
%%
%% Runs while a VM boots: kernel and stdlib only, and no `file' (its server is not there yet).
-module(meshx_dir).

-export([find/0, check/1, uid/0, control_socket/1, random/1]).
-export_type([error/0]).

-include_lib("kernel/include/file.hrl").

%% sockaddr_un.sun_path holds 108 bytes with its terminating zero (unix(7)).
-define(MAX_SOCKET_PATH, 107).

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
                    check_length(control_socket(Dir))
            end;
        {ok, #file_info{type = Type}} ->
            refuse("~ts is a ~ts, wanted a directory", [Dir, atom_to_list(Type)]);
        {error, enoent} ->
            {error, {unreachable, format("no agent: ~ts does not exist", [Dir])}};
        {error, Reason} ->
            {error, {unreachable, format("~ts: ~ts", [Dir, atom_to_list(Reason)])}}
    end.

writable_by_others(0, Mode) -> Mode band 8#002 =/= 0;
writable_by_others(_, Mode) -> Mode band 8#022 =/= 0.

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
