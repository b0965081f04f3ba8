%% The distribution carrier over any adapter of `Meshx.ServiceMesh' (`config :meshx_node, mesh_adapter: Module'), by
%% way of `-proto_dist Elixir.MeshxNode' (lib/meshx_node_dist.ex).
%%
%% A node listens where the adapter's start/4 says, and dials where its connect/3 says; from there it is ordinary
%% distribution. Adapters are Elixir, which does not run while a VM boots: this is for nodes that are started later.
%% Who is at the other end only the cookie proves: an adapter tells no identities.
-module(meshx_adapter_dist).

-export([childspecs/0, listen/1, listen/2, accept/1, accept_connection/5, setup/5, close/1, select/1]).
-export([address/0, setopts/2, getopts/2]).
-export([accept_loop/3, accepted/4, connecting/5]).

-include_lib("kernel/include/dist_util.hrl").
-include_lib("kernel/include/net_address.hrl").
-include_lib("kernel/include/logger.hrl").

-define(FAMILY, local).
-define(PROTOCOL, meshx).
%% Connections whose handshake is not done. One more ends the oldest, so that silent ones never keep nodes out.
-define(MAX_HANDSHAKES, 64).
-define(CONTROLLER_TIMEOUT, 5000).
%% How long the end of the distribution waits for the adapter, in milliseconds.
-define(STOP_TIMEOUT, 1000).

childspecs() -> {ok, []}.

-spec select(node()) -> boolean().
select(Node) -> meshx_dist:is_node_name(Node).

-spec address() -> #net_address{}.
address() ->
    {ok, Host} = inet:gethostname(),
    #net_address{host = Host, protocol = ?PROTOCOL, family = ?FAMILY}.

listen(Name) ->
    {ok, Host} = inet:gethostname(),
    listen(Name, Host).

%% Runs in net_kernel, which so owns the service, and lives as long as the node.
listen(Name, Host) ->
    Listened =
        case whereis(elixir_sup) of
            undefined ->
                {error,
                    {unsupported,
                        <<"a mesh adapter does not run while the VM boots: start the node later, with MeshxNode.start/4 "
                            "or Node.start/3, or use -proto_dist meshx">>}};
            _ ->
                'Elixir.MeshxNode.Adapter':listen(Name, Host)
        end,
    case Listened of
        {ok, Socket, Address, Service} ->
            meshx_links:new(),
            Creation = binary:decode_unsigned(crypto:strong_rand_bytes(4)) bor 4,
            NetAddress = #net_address{address = net(Address), host = Host, protocol = ?PROTOCOL, family = ?FAMILY},
            {ok, {{Socket, Address, Service}, NetAddress, Creation}};
        {error, {Cause, Text}} ->
            meshx_dist:boot_error(unicode:characters_to_binary([atom_to_list(Name), "@", Host]), Cause, Text),
            {error, Cause}
    end.

net({tcp, Ip, Port}) -> {Ip, Port};
net({uds, Path}) -> {local, Path}.

%% The adapter may be slow, or gone.
close({Socket, Address, Service}) ->
    gen_tcp:close(Socket),
    {Pid, Monitor} = spawn_monitor('Elixir.MeshxNode.Adapter', close, [Address, Service]),
    receive
        {'DOWN', Monitor, process, Pid, _} -> ok
    after ?STOP_TIMEOUT ->
        demonitor(Monitor, [flush]),
        ok
    end.

setopts({Listen, _, _}, Options) -> meshx_dist:setopts(Listen, Options);
setopts(Socket, Options) -> meshx_dist:setopts(Socket, Options).

getopts({Listen, _, _}, Options) -> meshx_dist:getopts(Listen, Options);
getopts(Socket, Options) -> meshx_dist:getopts(Socket, Options).

%% === Accepting

accept({Listen, _, _}) ->
    spawn_opt(?MODULE, accept_loop, [self(), Listen, []], [link, {priority, max}]).

%% `Handshakes': newest first.
accept_loop(Kernel, Listen, Handshakes) ->
    case gen_tcp:accept(Listen) of
        {ok, Socket} ->
            accept_loop(Kernel, Listen, [hand_over(Kernel, Socket) | make_room(ended(Handshakes))]);
        {error, Reason} when Reason =:= emfile; Reason =:= enfile; Reason =:= econnaborted; Reason =:= enobufs ->
            receive
            after 100 -> accept_loop(Kernel, Listen, Handshakes)
            end;
        {error, Reason} ->
            exit(Reason)
    end.

hand_over(Kernel, Socket) ->
    Kernel ! {accept, self(), Socket, ?FAMILY, ?PROTOCOL},
    receive
        {Kernel, controller, Pid} ->
            Monitor = monitor(process, Pid),
            _ = gen_tcp:controlling_process(Socket, Pid),
            Pid ! {self(), controller},
            {Pid, Monitor};
        {Kernel, unsupported_protocol} ->
            exit(unsupported_protocol)
    end.

ended(Handshakes) ->
    receive
        {'DOWN', Monitor, process, _, _} ->
            ended(lists:keydelete(Monitor, 2, Handshakes));
        {up, Pid} ->
            case lists:keytake(Pid, 1, Handshakes) of
                {value, {_, Monitor}, Others} ->
                    demonitor(Monitor, [flush]),
                    ended(Others);
                false ->
                    ended(Handshakes)
            end
    after 0 ->
        Handshakes
    end.

make_room(Handshakes) when length(Handshakes) < ?MAX_HANDSHAKES ->
    Handshakes;
make_room(Handshakes) ->
    {Oldest, Monitor} = lists:last(Handshakes),
    demonitor(Monitor, [flush]),
    exit(Oldest, kill),
    ?LOG_WARNING("meshx: more than ~b handshakes at once: ended the oldest", [?MAX_HANDSHAKES]),
    lists:droplast(Handshakes).

accept_connection(Acceptor, Socket, MyNode, Allowed, SetupTime) ->
    Handshake = #hs_data{kernel_pid = self(), this_node = MyNode, allowed = Allowed},
    spawn_opt(?MODULE, accepted, [Acceptor, Socket, Handshake, SetupTime], [link, {priority, max}]).

accepted(Acceptor, Socket, Handshake, SetupTime) ->
    receive
        {Acceptor, controller} ->
            _ = handshake_options(Socket),
            Timer = dist_util:start_timer(SetupTime),
            Up = fun() -> Acceptor ! {up, self()} end,
            dist_util:handshake_other_started(meshx_dist:hs_data(Socket, Up, Handshake#hs_data{timer = Timer}))
    after ?CONTROLLER_TIMEOUT ->
        ?shutdown(no_node)
    end.

%% === Dialling

setup(Node, Type, MyNode, _LongOrShortNames, SetupTime) ->
    spawn_opt(?MODULE, connecting, [self(), Node, Type, MyNode, SetupTime], [link, {priority, max}]).

%% This process owns the upstream, which so ends with the link.
connecting(Kernel, Node, Type, MyNode, SetupTime) ->
    Timer = dist_util:start_timer(SetupTime),
    case 'Elixir.MeshxNode.Adapter':dial(Node, MyNode, SetupTime) of
        {ok, Socket} ->
            _ = handshake_options(Socket),
            dist_util:reset_timer(Timer),
            Handshake = #hs_data{
                kernel_pid = Kernel,
                other_node = Node,
                this_node = MyNode,
                timer = Timer,
                request_type = Type
            },
            try
                dist_util:handshake_we_started(meshx_dist:hs_data(Socket, fun meshx_dist:up/0, Handshake))
            catch
                exit:Reason ->
                    meshx_dist:failed(Node, Reason),
                    exit(Reason)
            end;
        {error, {Cause, Text}} ->
            Level = meshx_links:refuse(Node, Cause, Text),
            ?LOG(Level, "meshx: cannot reach ~ts: ~ts: ~ts", [Node, Cause, Text]),
            ?shutdown2(Node, {meshx, Cause})
    end.

%% Packets and strings, as `dist_util' wants them.
handshake_options(Socket) ->
    inet:setopts(Socket, [list, {active, false}, {packet, 2}, {packet_size, 0}]).
