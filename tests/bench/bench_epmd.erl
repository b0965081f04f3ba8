%% Where the nodes of a benchmark are, without epmd: -bench_port is where this VM listens, -bench_peer where it finds
%% its peer, which may be a proxy's port, at -bench_address.
-module(bench_epmd).
-export([start_link/0, listen_port_please/2, register_node/2, register_node/3, address_please/3, port_please/2,
         port_please/3, names/1]).

start_link() -> ignore.

listen_port_please(_Name, _Host) -> {ok, port(bench_port)}.

register_node(Name, Port) -> register_node(Name, Port, inet_tcp).
register_node(_Name, _Port, _Driver) -> {ok, 4 + rand:uniform(1 bsl 30)}.

address_please(_Name, _Host, _Family) -> {ok, address(), port(bench_peer), 6}.

port_please(Name, Host) -> port_please(Name, Host, infinity).
port_please(_Name, _Host, _Timeout) -> {port, port(bench_peer), 6}.

names(_Host) -> {error, address}.

address() ->
    {ok, [[Text]]} = init:get_argument(bench_address),
    {ok, Address} = inet:parse_ipv4strict_address(Text),
    Address.

port(Flag) ->
    {ok, [[Text]]} = init:get_argument(Flag),
    list_to_integer(Text).
