//! Functions of a program here, run for a real BEAM: by spawn, `erpc` and `rpc`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use meshx::node::{Limits, Message, Node, NodeBuilder, Raised, RpcError, SpawnOptions};
use meshx_etf::Term;
use node_support::{Beam, Epmd, LONG, soon};

struct Scene {
    epmd: Epmd,
    node: Node,
    beam: Beam,
}

impl Scene {
    async fn new() -> Self {
        Self::with(|builder| builder).await
    }

    async fn with(build: impl FnOnce(NodeBuilder) -> NodeBuilder) -> Self {
        let epmd = Epmd::start().await;
        let node = build(epmd.builder("search@127.0.0.1")).start().await.unwrap();
        node.expose("math", "add", 2, |args: Vec<Term>| async move {
            match (args[0].as_int(), args[1].as_int()) {
                (Some(a), Some(b)) => Ok(Term::Int(a + b)),
                _ => Err(Raised::Error(Term::atom("badarith"))),
            }
        });
        node.expose("bad", "raise", 2, |args: Vec<Term>| async move {
            let reason = args[1].clone();
            Err(match args[0].as_atom() {
                Some("error") => Raised::Error(reason),
                Some("exit") => Raised::Exit(reason),
                _ => Raised::Throw(reason),
            })
        });
        node.expose("bad", "panic", 0, |_| async { panic!("a panic of a test") });
        node.expose_process("proc", "tell", 2, |mailbox, args| async move {
            let told = Term::atom(format!("told_{}", args[1].as_atom().unwrap()));
            mailbox.send(args[0].as_pid().unwrap(), &told).await.unwrap();
            Ok(told)
        });
        // Waits for a message, and returns it.
        node.expose_process("proc", "wait", 0, |mut mailbox, _| async move {
            match mailbox.recv().await {
                Some(Message::Term { term, .. }) => Ok(term),
                other => Err(Raised::Exit(Term::binary(format!("{other:?}")))),
            }
        });
        let mut beam = epmd.beam("cart@127.0.0.1").await;
        beam.eval("N = 'search@127.0.0.1'.").await;
        Self { epmd, node, beam }
    }

    /// What an expression raises.
    async fn caught(&mut self, expression: &str) -> String {
        self.beam
            .eval(&format!(
                "(fun() -> try {expression} catch C:R -> {{C, R}} end end)()."
            ))
            .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn erpc_calls_functions_here() {
    let mut scene = Scene::new().await;
    let cases = [
        ("erpc:call(N, math, add, [40, 2])", "42"),
        ("erpc:call(N, erlang, apply, [fun math:add/2, [1, 2]])", "3"),
        ("erpc:call(N, erlang, apply, [math, add, [1, 2]])", "3"),
        (
            "erpc:multicall([N, node()], erlang, apply, [fun math:pi/0, []])",
            {
                // The other is this BEAM, whose module `math` has what this node does not expose.
                "[{error,{exception,undef,[{math,pi,[],[]}]}},{ok,3.141592653589793}]"
            },
        ),
        (
            "erpc:call(N, math, add, [a, b])",
            "{error,{exception,badarith,[{math,add,2,[]}]}}",
        ),
        (
            "erpc:call(N, math, add, [1])",
            "{error,{exception,undef,[{math,add,[1],[]}]}}",
        ),
        (
            "erpc:call(N, lists, seq, [1, 2])",
            "{error,{exception,undef,[{lists,seq,[1,2],[]}]}}",
        ),
        (
            "erpc:call(N, bad, raise, [exit, {a, 1}])",
            "{exit,{exception,{a,1}}}",
        ),
        ("erpc:call(N, bad, raise, [throw, {a, 1}])", "{throw,{a,1}}"),
        ("erpc:call(N, bad, panic, [])", "{exit,{signal,panic}}"),
        ("erpc:call(N, proc, wait, [], 100)", "{error,{erpc,timeout}}"),
        (
            "erpc:receive_response(erpc:send_request(N, math, add, [2, 3]))",
            "5",
        ),
        // The other ways of OTP to call: by spawn requests, and by the process `rex`.
        ("rpc:call(N, math, add, [40, 2])", "42"),
        ("rpc:call(N, math, add, [40, 2], 10000)", "42"),
        ("rpc:block_call(N, math, add, [40, 2])", "42"),
        ("rpc:multicall([N], math, add, [400, 2])", "{[402],[]}"),
        ("rpc:yield(rpc:async_call(N, math, add, [40, 2]))", "42"),
        (
            "gen_server:call({rex, N}, {call, math, add, [1, 2], self()})",
            "3",
        ),
        (
            "rpc:call(N, lists, seq, [1, 2])",
            "{badrpc,{'EXIT',{undef,[{lists,seq,[1,2],[]}]}}}",
        ),
        (
            "rpc:block_call(N, lists, seq, [1, 2])",
            "{badrpc,{'EXIT',{undef,[{lists,seq,[1,2],[]}]}}}",
        ),
        ("rpc:block_call(N, bad, raise, [exit, x])", "{badrpc,{'EXIT',x}}"),
        ("rpc:block_call(N, bad, raise, [throw, x])", "x"),
        (
            "rpc:block_call(N, bad, raise, [error, x])",
            "{badrpc,{'EXIT',{x,[{bad,raise,2,[]}]}}}",
        ),
        // Casts, which answer in their own way.
        (
            "begin erpc:cast(N, proc, tell, [self(), a]), receive told_a -> ok end end",
            "ok",
        ),
        (
            "begin rpc:cast(N, proc, tell, [self(), b]), receive told_b -> ok end end",
            "ok",
        ),
        (
            "begin gen_server:cast({rex, N}, {cast, proc, tell, [self(), c], self()}), receive told_c -> ok end end",
            "ok",
        ),
        // As `ei_rpc` does it.
        (
            "begin {rex, N} ! {self(), {call, math, add, [1, 2], user}}, receive {rex, V} -> V end end",
            "3",
        ),
    ];
    for (expression, wanted) in cases {
        assert_eq!(scene.caught(expression).await, wanted, "{expression}");
    }
    // Taken back, it is there no more.
    assert!(scene.node.unexpose("math", "add", 2));
    assert!(!scene.node.unexpose("math", "add", 2));
    assert_eq!(
        scene.caught("erpc:call(N, math, add, [1, 2])").await,
        "{error,{exception,undef,[{math,add,[1,2],[]}]}}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_beam_spawns_here() {
    let mut scene = Scene::new().await;
    let down = "receive {'DOWN', M, process, P, R} -> R end";
    let cases = [
        // A process of its own, that can be sent to, linked and monitored like any.
        (
            format!("{{P, M}} = spawn_monitor(N, proc, wait, []), P ! hello, {{node(P), {down}}}"),
            "{'search@127.0.0.1',normal}",
        ),
        (
            format!("{{P, M}} = spawn_monitor(N, proc, wait, []), exit(P, boom), {down}"),
            "boom",
        ),
        (
            format!("{{P, M}} = spawn_monitor(N, proc, wait, []), exit(P, normal), P ! x, {down}"),
            "normal",
        ),
        (
            format!("{{P, M}} = spawn_monitor(N, proc, wait, []), exit(P, kill), {down}"),
            "killed",
        ),
        (
            format!("{{P, M}} = spawn_monitor(N, lists, seq, [1, 2]), {down}"),
            "{undef,[{lists,seq,[1,2],[]}]}",
        ),
        (
            format!("{{P, M}} = spawn_monitor(N, bad, raise, [throw, 1]), {down}"),
            "{{nocatch,1},[{bad,raise,2,[]}]}",
        ),
        (
            format!("{{P, M}} = spawn_monitor(N, bad, raise, [error, 1]), {down}"),
            "{1,[{bad,raise,2,[]}]}",
        ),
        (
            format!("{{P, M}} = spawn_monitor(N, bad, panic, []), {down}"),
            "panic",
        ),
        // Linked: this end's death is told there, and the other way round.
        (
            "process_flag(trap_exit, true), P = spawn_link(N, bad, raise, [exit, bye]), \
             receive {'EXIT', P, R} -> R end"
                .to_owned(),
            "bye",
        ),
        (
            format!(
                "S = self(), spawn(fun() -> P = spawn_link(N, proc, wait, []), S ! P, exit(gone) end), \
                 P = receive X when is_pid(X) -> X end, M = monitor(process, P), \
                 case {down} of gone -> told; noproc -> told end"
            ),
            "told",
        ),
        // A tag of the caller's, and options that only a BEAM understands.
        (
            "{P, M} = spawn_opt(N, bad, raise, [exit, bye], [{priority, high}, {monitor, [{tag, my_tag}]}]), \
             receive {my_tag, M, process, P, R} -> R end"
                .to_owned(),
            "bye",
        ),
        (
            "spawn_request(N, proc, wait, [], [{reply_tag, t}]), \
             receive {t, _, ok, P} -> P ! x, is_pid(P) end"
                .to_owned(),
            "true",
        ),
    ];
    for (expressions, wanted) in cases {
        let value = scene.beam.eval(&format!("(fun() -> {expressions} end)().")).await;
        assert_eq!(value, wanted, "{expressions}");
    }
    // All of them have ended, so their slots are free again: see the next test for what happens otherwise.
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_may_start_is_bounded() {
    let limits = Limits {
        spawned_per_peer: 3,
        spawned_processes: 4,
        ..Limits::default()
    };
    let mut scene = Scene::with(|builder| builder.limits(limits)).await;
    scene
        .beam
        .eval("Ps = [P1, P2, P3] = [spawn(N, proc, wait, []) || _ <- [1, 2, 3]].")
        .await;
    assert_eq!(
        scene.caught("erpc:call(N, math, add, [1, 2])").await,
        "{error,{erpc,system_limit}}"
    );
    assert_eq!(
        scene.caught("rpc:block_call(N, math, add, [1, 2])").await,
        "{badrpc,system_limit}"
    );
    // Another peer has its own; all together have one more.
    let mut other = scene.epmd.beam("other@127.0.0.1").await;
    assert_eq!(
        other
            .eval("erpc:call('search@127.0.0.1', math, add, [1, 2]).")
            .await,
        "3"
    );
    other.eval("P = spawn('search@127.0.0.1', proc, wait, []).").await;
    let error = other
        .try_eval("erpc:call('search@127.0.0.1', math, add, [1, 2]).")
        .await
        .unwrap_err();
    assert_eq!(error, "{error,{erpc,system_limit}}");
    // A new connection is no new peer.
    scene.beam.eval("monitor_node(N, true).").await;
    assert!(scene.node.disconnect("cart@127.0.0.1"));
    // Else the call may still go out by the connection that ends.
    scene.beam.eval("receive {nodedown, N} -> ok end.").await;
    assert_eq!(
        scene.caught("erpc:call(N, math, add, [1, 2])").await,
        "{error,{erpc,system_limit}}"
    );
    // One that ends gives its slot back.
    scene
        .beam
        .eval("M = monitor(process, P1), P1 ! x, receive {'DOWN', M, _, _, _} -> ok end.")
        .await;
    let freed = async { while scene.caught("erpc:call(N, math, add, [1, 2])").await != "3" {} };
    soon(freed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_results_go_through_and_hold_up_nobody() {
    let mut scene = Scene::new().await;
    scene
        .node
        .expose("big", "binary", 1, |args: Vec<Term>| async move {
            let len = usize::try_from(args[0].as_int().unwrap()).unwrap();
            Ok(Term::binary(vec![7; len]))
        });
    // More than all budgets of a connection together.
    let value = scene
        .beam
        .eval(
            "lists:sum([byte_size(erpc:receive_response(R)) || R <- \
             [erpc:send_request(N, big, binary, [4000000]) || _ <- lists:seq(1, 40)]]).",
        )
        .await;
    assert_eq!(value, "160000000");
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_started_at_a_beam_with_links_and_monitors() {
    let mut scene = Scene::new().await;
    let mut main = scene.node.register("main").unwrap();
    let beam = "cart@127.0.0.1";
    let exit = |reason: &str| vec![Term::atom(reason)];
    let both = SpawnOptions::new().link().monitor();

    let (pid, reference) = main
        .spawn(beam, "erlang", "exit", exit("bye"), both, LONG)
        .await
        .unwrap();
    let mut ends = vec![soon(main.recv()).await.unwrap(), soon(main.recv()).await.unwrap()];
    ends.sort_by_key(|end| matches!(end, Message::Down { .. }));
    let wanted = [
        Message::Exit {
            from: pid.clone(),
            reason: Term::atom("bye"),
        },
        Message::Down {
            reference,
            target: pid.into(),
            reason: Term::atom("bye"),
        },
    ];
    assert_eq!(ends, wanted);

    // Linked: it ends with the mailbox.
    let sleep = vec![Term::atom("infinity")];
    let asker = &mut scene.node.mailbox();
    let (pid, _) = asker
        .spawn(
            beam,
            "timer",
            "sleep",
            sleep.clone(),
            SpawnOptions::new().link(),
            LONG,
        )
        .await
        .unwrap();
    main.send((("shell"), beam), &Term::from(pid.clone()))
        .await
        .unwrap();
    let watched = main.monitor(&pid).await;
    std::mem::replace(asker, scene.node.mailbox()).close(Term::atom("gone"));
    let down = soon(main.recv()).await.unwrap();
    assert!(
        matches!(&down, Message::Down { reference, reason, .. } if *reference == watched && *reason == Term::atom("gone")),
        "{down:?}"
    );

    // Other messages stay where they are while the answer is awaited; a plain spawn is not watched.
    scene.beam.eval("{main, N} ! before.").await;
    let (pid, _) = main
        .spawn(beam, "timer", "sleep", sleep, SpawnOptions::new(), LONG)
        .await
        .unwrap();
    main.exit(&pid, &Term::atom("kill")).await.unwrap();
    scene.beam.eval("{main, N} ! 'after'.").await;
    for text in ["before", "after"] {
        let Message::Term { term, .. } = soon(main.recv()).await.unwrap() else {
            panic!("no message")
        };
        assert_eq!(term, Term::atom(text));
    }

    // A node that is not there.
    let away = main.spawn("nobody@127.0.0.1", "m", "f", vec![], both, LONG).await;
    assert!(matches!(away, Err(RpcError::Call(_))), "{away:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_of_this_node_are_called_from_here_too() {
    let scene = Scene::new().await;
    let here = "search@127.0.0.1";
    let three = scene
        .node
        .rpc(here, "math", "add", vec![Term::Int(1), Term::Int(2)], LONG)
        .await;
    assert_eq!(three.unwrap(), Term::Int(3));
    let mut main = scene.node.mailbox();
    let options = SpawnOptions::new().link().monitor();
    let (pid, reference) = main
        .spawn(here, "proc", "wait", vec![], options, LONG)
        .await
        .unwrap();
    main.exit(&pid, &Term::atom("boom")).await.unwrap();
    let mut ends = vec![soon(main.recv()).await.unwrap(), soon(main.recv()).await.unwrap()];
    ends.sort_by_key(|end| matches!(end, Message::Down { .. }));
    let reason = Term::atom("boom");
    let wanted = [
        Message::Exit {
            from: pid.clone(),
            reason: reason.clone(),
        },
        Message::Down {
            reference,
            target: pid.into(),
            reason,
        },
    ];
    assert_eq!(ends, wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn results_and_reasons_that_cannot_be_sent_are_told_as_that() {
    let limits = Limits {
        message_bytes: 1 << 20,
        ..Limits::default()
    };
    let mut scene = Scene::with(|builder| builder.limits(limits)).await;
    let deep = |depth: u32| (0..depth).fold(Term::Int(1), |inner, _| Term::tuple([inner]));
    let unsendable = [
        ("nan", Term::from(f64::NAN)),
        ("atom", Term::atom("x".repeat(300))),
        ("deep", deep(2000)),
        ("large", Term::binary(vec![0; 2 << 20])),
    ];
    for (name, term) in unsendable {
        let result = term.clone();
        scene.node.expose("bad", "result", 0, move |_| {
            let result = result.clone();
            async move { Ok(result) }
        });
        let reason = term.clone();
        scene.node.expose("bad", "reason", 0, move |_| {
            let reason = reason.clone();
            async move { Err(Raised::Exit(reason)) }
        });
        let cases = [
            (
                "erpc:call(N, bad, result, [])",
                "{error,{exception,unsendable_result,[]}}",
            ),
            (
                "erpc:call(N, bad, reason, [])",
                "{error,{exception,unsendable_result,[]}}",
            ),
            (
                "rpc:call(N, bad, result, [])",
                "{badrpc,{'EXIT',{unsendable_result,[]}}}",
            ),
            (
                "rpc:block_call(N, bad, result, [])",
                "{badrpc,{'EXIT',{unsendable_result,[]}}}",
            ),
            (
                "begin {rex, N} ! {self(), {call, bad, result, [], user}}, receive {rex, V} -> V end end",
                "{badrpc,{'EXIT',{unsendable_result,[]}}}",
            ),
            // All who watch a process hear of its end.
            (
                "begin {P, M} = spawn_monitor(N, bad, reason, []), receive {'DOWN', M, _, P, Why} -> Why end end",
                "unsendable_reason",
            ),
        ];
        for (expression, wanted) in cases {
            assert_eq!(scene.caught(expression).await, wanted, "{name}: {expression}");
        }
        let watched = scene.node.register("watched").unwrap();
        scene
            .beam
            .eval(&format!(
                "W_{name} = [monitor(process, {{watched, N}}) || _ <- [1, 2]], erpc:call(N, math, add, [1, 1])."
            ))
            .await;
        watched.close(term);
        let reasons = scene
            .caught(&format!(
                "[receive {{'DOWN', M, _, _, Why}} -> Why end || M <- W_{name}]"
            ))
            .await;
        assert_eq!(reasons, "[unsendable_reason,unsendable_reason]", "{name}");
    }
}
