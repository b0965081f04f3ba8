%% The BEAM's half of tests/node_soak.rs: workers that do random things with a node in Rust and check what comes of
%% each. Whatever does not come, comes twice or comes wrong ends the run with an error that names the operation.
-module(node_soak).
-export([run/4, child/0]).

-define(WAIT, 60000).

run(Node, Seed, Workers, Millis) ->
    Deadline = erlang:monotonic_time(millisecond) + Millis,
    Refs = maps:from_list([{element(2, spawn_monitor(fun() -> worker(Node, Seed, W, Deadline) end)), W}
                           || W <- lists:seq(1, Workers)]),
    collect(Refs, #{}).

collect(Refs, Total) when map_size(Refs) =:= 0 -> lists:sort(maps:to_list(Total));
collect(Refs, Total) ->
    receive
        {'DOWN', Ref, process, _, {done, Counts}} when is_map_key(Ref, Refs) ->
            Sum = maps:fold(fun(K, V, Acc) -> maps:update_with(K, fun(X) -> X + V end, V, Acc) end, Total, Counts),
            collect(maps:remove(Ref, Refs), Sum);
        {'DOWN', Ref, process, _, Reason} when is_map_key(Ref, Refs) ->
            error({worker, maps:get(Ref, Refs), Reason})
    end.

worker(Node, Seed, W, Deadline) ->
    process_flag(trap_exit, true),
    rand:seed(exsss, {Seed, W, 7}),
    loop(#{node => Node, id => W, seq => 0, counts => #{}}, Deadline).

loop(S, Deadline) ->
    case erlang:monotonic_time(millisecond) < Deadline of
        true ->
            Op = element(rand:uniform(11), {messages, messages, they_die, we_die, we_are_watched, taken_back, exit2,
                                            spawn_there, spawn_here, names, aliases}),
            S1 = op(Op, S),
            receive Stray -> exit({stray, Op, Stray}) after 0 -> ok end,
            loop(S1, Deadline);
        false ->
            Seq = maps:get(seq, S),
            Seq = call(S, {seen, maps:get(id, S)}),
            exit({done, maps:get(counts, S)})
    end.

count(Key, N, #{counts := Counts} = S) ->
    S#{counts := maps:update_with(Key, fun(X) -> X + N end, N, Counts)}.

call(#{node := Node}, Request) -> gen_server:call({factory, Node}, Request, ?WAIT).

new(S) -> call(S, {new, self()}).

expect(What, Pattern) ->
    receive Pattern -> ok
    after ?WAIT -> exit({missing, What, Pattern, erlang:process_info(self(), messages)})
    end.

reason() ->
    case rand:uniform(12) of
        1 -> normal;
        2 -> {shutdown, rand:uniform(1000)};
        3 -> binary:copy(<<"why">>, 40000);
        _ -> {reason, rand:uniform(1 bsl 70)}
    end.

op(messages, #{id := Id, node := Node, seq := Seq} = S) ->
    N = rand:uniform(40),
    To = case rand:uniform(2) of 1 -> {sink, Node}; 2 -> call(S, sink) end,
    [To ! {Id, I, payload()} || I <- lists:seq(Seq + 1, Seq + N)],
    S1 = count(messages, N, S#{seq := Seq + N}),
    case rand:uniform(4) of
        1 -> Last = Seq + N, Last = call(S, {seen, Id}), S1;
        _ -> S1
    end;
op(they_die, S) ->
    Pid = new(S),
    {Linked, Reason} = {rand:uniform(2) =:= 1, reason()},
    Refs = [monitor(process, Pid) || _ <- lists:seq(1, rand:uniform(3))],
    Linked andalso link(Pid),
    Pid ! {die, Reason},
    [expect(down, {'DOWN', Ref, process, Pid, Reason}) || Ref <- Refs],
    Linked andalso expect(exit, {'EXIT', Pid, Reason}),
    Late = monitor(process, Pid),
    expect(noproc, {'DOWN', Late, process, Pid, noproc}),
    S1 = count(downs_here, length(Refs) + 1, S),
    case Linked of true -> count(exits_here, 1, S1); false -> S1 end;
op(we_die, S) ->
    {Pid, Child, Reason} = {new(S), spawn(?MODULE, child, []), reason()},
    Child ! {link, Pid, self()},
    expect(linked, {linked, Child}),
    Child ! {die, Reason},
    expect(exited, {exited, Pid, Child, Reason}),
    stop(Pid),
    count(exits_there, 1, S);
op(we_are_watched, S) ->
    {Pid, Child, Reason, N} = {new(S), spawn(?MODULE, child, []), reason(), rand:uniform(5)},
    Pid ! {watch, Child, N},
    expect(watching, {watching, Pid, Child}),
    %% Its answer went another way than the monitors: a question to the child comes behind them.
    Child ! {die, Reason},
    [expect(down_seen, {down, Pid, Child, Reason}) || _ <- lists:seq(1, N)],
    stop(Pid),
    count(downs_there, N, S);
op(taken_back, S) ->
    {Pid, Child} = {new(S), spawn(?MODULE, child, [])},
    Ref = monitor(process, Pid),
    link(Pid),
    Pid ! {watch_and_take_back, Child},
    expect(taken_back, {taken_back, Pid, Child}),
    true = demonitor(Ref),
    true = unlink(Pid),
    Child ! {die, gone},
    Pid ! {die, gone},
    %% Everything that Pid would cause comes before its answer to this monitor.
    Last = monitor(process, Pid),
    receive
        {'DOWN', Last, process, Pid, R} when R =:= gone; R =:= noproc -> ok
    after ?WAIT -> exit({missing, last})
    end,
    count(taken_back, 1, S);
op(exit2, S) ->
    {Pid, Reason} = {new(S), reason()},
    case Reason of
        normal -> ok;
        _ -> exit(Pid, Reason), expect(exit2, {exited, Pid, self(), Reason})
    end,
    stop(Pid),
    case Reason of normal -> S; _ -> count(exits_there, 1, S) end;
op(spawn_there, #{node := Node} = S) ->
    {Reason, Linked} = {reason(), rand:uniform(2) =:= 1},
    Id = spawn_request(Node, soak, leave, [Reason], [monitor, {reply, yes}] ++ [link || Linked]),
    receive
        {spawn_reply, Id, ok, Pid} ->
            expect(spawned_down, {'DOWN', Id, process, Pid, Reason}),
            Linked andalso expect(spawned_exit, {'EXIT', Pid, Reason}),
            count(spawns_here, 1, S)
    after ?WAIT -> exit({missing, spawn_reply})
    end;
op(spawn_here, S) ->
    {Pid, Reason} = {new(S), reason()},
    Pid ! {spawn, Reason},
    expect(spawned, {spawned, Pid}),
    expect(spawned_down, {down, Pid, spawned, Reason}),
    stop(Pid),
    count(spawns_there, 1, S);
op(names, #{node := Node} = S) ->
    Ref = monitor(process, {no_such_name, Node}),
    expect(no_name, {'DOWN', Ref, process, {no_such_name, Node}, noproc}),
    Pid = new(S),
    Name = list_to_atom("worker" ++ integer_to_list(maps:get(id, S))),
    Pid ! {register, Name},
    expect(registered, {registered, Pid}),
    Named = monitor(process, {Name, Node}),
    {Name, Node} ! {die, done},
    expect(named_down, {'DOWN', Named, process, {Name, Node}, done}),
    count(downs_here, 2, S);
op(aliases, S) ->
    {Pid, Alias, N} = {new(S), alias([explicit_unalias]), rand:uniform(20)},
    Pid ! {to_alias, Alias, N},
    [expect(alias, {to_alias, Pid, I}) || I <- lists:seq(1, N)],
    true = unalias(Alias),
    Pid ! {to_alias, Alias, N},
    stop(Pid),
    count(to_alias, 2 * N, S).

stop(Pid) ->
    Ref = monitor(process, Pid),
    Pid ! {die, stopped},
    expect(stopped, {'DOWN', Ref, process, Pid, stopped}).

payload() ->
    case rand:uniform(100) of
        1 -> binary:copy(<<"large">>, 10000 + rand:uniform(90000));
        2 -> binary:copy(<<0>>, rand:uniform(70000));
        _ -> {rand:uniform(1000), small, [1, 2, 3.5]}
    end.

child() ->
    receive
        {link, Pid, To} -> link(Pid), To ! {linked, self()}, child();
        {die, Reason} -> exit(Reason)
    end.
