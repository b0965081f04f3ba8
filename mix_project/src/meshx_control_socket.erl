%% The control connection of a VM, from the socket to the first words on it.
-module(meshx_control_socket).

-export([open/0, greet/1, flags/1]).

-define(CONNECT_TIMEOUT, 1000).
-define(SEND_TIMEOUT, 5000).

-spec open() -> {ok, port()} | {error, {atom(), binary()}}.
open() ->
    case meshx_dir:find() of
        {ok, Dir} ->
            Path = meshx_dir:control_socket(Dir),
            %% The inet backend whatever -kernel inet_backend says: the same as for links.
            Options =
                [{inet_backend, inet}, binary, {packet, 4}, {packet_size, meshx_control:max_frame()}] ++
                    [{active, once}, {send_timeout, ?SEND_TIMEOUT}, {send_timeout_close, true}],
            case gen_tcp:connect({local, Path}, 0, Options, ?CONNECT_TIMEOUT) of
                {ok, Socket} -> {ok, Socket};
                {error, Reason} -> {error, {unreachable, text("no agent at ~ts: ~ts", [Path, inet:format_error(Reason)])}}
            end;
        {error, _} = Error ->
            Error
    end.

%% Says hello, as request 0.
-spec greet(port()) -> ok | {error, term()}.
greet(Socket) ->
    Hello = #{
        versions => {1, 1},
        features => [<<"heartbeat">>],
        client => text("erlang/otp-~ts", [erlang:system_info(otp_release)]),
        os_pid => list_to_integer(os:getpid())
    },
    {ok, Frame} = meshx_control:request(0, hello, maps:merge(heartbeat(), Hello)),
    gen_tcp:send(Socket, Frame).

%% How long this VM may leave the agent's pings unanswered: `-meshx_heartbeat MILLISECONDS', else the agent's default.
heartbeat() ->
    try binary_to_integer(lists:last(flags(meshx_heartbeat))) of
        Milliseconds -> #{heartbeat => Milliseconds}
    catch
        error:_ -> #{}
    end.

%% The values of an emulator flag, in order.
-spec flags(atom()) -> [binary()].
flags(Name) ->
    case init:get_argument(Name) of
        {ok, Values} -> [unicode:characters_to_binary(Value) || Value <- lists:append(Values)];
        error -> []
    end.

text(Format, Args) ->
    unicode:characters_to_binary(io_lib:format(Format, Args)).
