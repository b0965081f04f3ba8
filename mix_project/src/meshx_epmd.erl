%% The port mapper of `-epmd_module meshx_epmd': plain distribution (`inet_tcp_dist', `inet6_tcp_dist') through the agent.
%%
%% The node listens on loopback and registers its port over the agent's control socket, with a secret. Whom it dials, it
%% dials at a loopback port of the agent (docs/mesh-protocol.md, "Plain distribution"). Host parts of names are for the
%% agent: no name is resolved.
%%
%% Runs while a VM boots: kernel and stdlib only, no `file'. The VM must not start an epmd (`-start_epmd false'), and its
%% port is to be open on loopback alone (`-kernel inet_dist_use_interface').
-module(meshx_epmd).

%% What OTP calls of `erl_epmd'.
-export([start/0, start_link/0, stop/0]).
-export([register_node/2, register_node/3, listen_port_please/2, address_please/3]).
-export([port_please/2, port_please/3, names/0, names/1]).

-include_lib("kernel/include/logger.hrl").

%% The version of the distribution protocol, as EPMD tells it.
-define(DIST_VERSION, 6).
-define(HOST, {?MODULE, host}).
%% Below the 7 s that a connection may take as a whole.
-define(LOOK_UP_TIMEOUT, 3000).

-type family() :: inet | inet6.

start() -> start_link().

%% The agent's client lives as long as the distribution.
-spec start_link() -> {ok, pid()} | ignore | {error, term()}.
start_link() -> meshx_agent:start_link().

stop() -> ok.

%% Any port will do. This is the only call that is told the host part of this node's own name, and comes before
%% `register_node/3'.
-spec listen_port_please(atom(), string()) -> {ok, 0}.
listen_port_please(_Name, Host) ->
    persistent_term:put(?HOST, Host),
    {ok, 0}.

register_node(Name, Port) -> register_node(Name, Port, inet).

%% The third argument is a family, or a driver: `inet_tcp' on OTP 25, `inet' later.
-spec register_node(atom() | string(), inet:port_number(), atom()) -> {ok, pos_integer()} | {error, atom()}.
register_node(Name, Port, Driver) ->
    Node = text("~ts@~ts", [Name, persistent_term:get(?HOST)]),
    Register = fun() -> meshx_agent:register_plain_node(Node, {Port, family(Driver)}, meshx_dist:hidden()) end,
    Registered =
        case meshx_agent:await() of
            {ok, _} -> meshx_dist:patiently(Register);
            {error, _} = Unreachable -> Unreachable
        end,
    case Registered of
        {ok, #{creation := Creation}} ->
            {ok, Creation};
        {error, {Cause, Text}} ->
            meshx_dist:boot_error(Node, Cause, Text),
            {error, reason(Cause)}
    end.

reason(name_taken) -> duplicate_name;
reason(Cause) -> Cause.

family(inet6_tcp) -> inet6;
family(inet6) -> inet6;
family(_) -> inet.

%% net_kernel itself only wants to know whether such a host can be: it must not wait for the mesh.
-spec address_please(string(), string() | inet:ip_address(), family()) ->
    {ok, inet:ip_address()} | {ok, inet:ip_address(), inet:port_number(), ?DIST_VERSION} | {error, atom()}.
address_please(Name, Host, Family) ->
    case self() =:= whereis(net_kernel) of
        true ->
            {ok, loopback(Family)};
        false ->
            Node = text("~ts@~ts", [Name, host(Host)]),
            case node_port(Node, Family) of
                {ok, Port} ->
                    {ok, loopback(Family), Port, ?DIST_VERSION};
                {error, {Cause, Text}} ->
                    %% The caller has this name as an atom: it dials it.
                    Level = meshx_links:refuse(binary_to_atom(Node, utf8), Cause, Text),
                    ?LOG(Level, "meshx: cannot reach ~ts: ~ts: ~ts", [Node, Cause, Text]),
                    {error, Cause}
            end
    end.

port_please(Name, Host) -> port_please(Name, Host, infinity).

-spec port_please(string() | atom(), string() | atom() | inet:ip_address(), timeout()) ->
    {port, inet:port_number(), ?DIST_VERSION} | noport.
port_please(Name, Host, _Timeout) ->
    case node_port(text("~ts@~ts", [Name, host(Host)]), inet) of
        {ok, Port} -> {port, Port, ?DIST_VERSION};
        {error, _} -> noport
    end.

names() ->
    {ok, Host} = inet:gethostname(),
    names(Host).

%% Ports are the agent's, as everywhere here.
-spec names(string() | atom() | inet:ip_address()) -> {ok, [{string(), inet:port_number()}]} | {error, address}.
names(Host) ->
    Part = text("~ts", [host(Host)]),
    case meshx_agent:call(names, #{}) of
        {ok, #{nodes := Nodes}} ->
            Found = [{name(Node), node_port(Node, inet)} || #{host := H, node := Node} <- Nodes, H =:= Part],
            {ok, [{Name, Port} || {Name, {ok, Port}} <- Found]};
        {error, _} ->
            {error, address}
    end.

node_port(Node, Family) ->
    case meshx_agent:call(node_port, #{node => Node, family => Family}, ?LOOK_UP_TIMEOUT) of
        {ok, #{port := Port}} when is_integer(Port), Port > 0, Port < 65536 -> {ok, Port};
        {ok, _} -> {error, {invalid_request, <<"the agent named no port">>}};
        {error, _} = Error -> Error
    end.

name(Node) ->
    [Name, _] = string:split(unicode:characters_to_list(Node), "@"),
    Name.

host(Address) when is_tuple(Address) -> inet:ntoa(Address);
host(Host) -> Host.

loopback(inet6) -> {0, 0, 0, 0, 0, 0, 0, 1};
loopback(_) -> {127, 0, 0, 1}.

text(Format, Args) ->
    unicode:characters_to_binary(io_lib:format(Format, Args)).
