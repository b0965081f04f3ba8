//! Exit signals, links and monitors mean to a process here what they mean to one of a BEAM: each scenario runs
//! against both, and the two accounts must be equal.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use meshx::node::{Address, Limits, Mailbox, Message, Node, Raised, RecvError, SpawnOptions};
use meshx_etf::Term;
use node_support::{Beam, Epmd, LONG, soon};

/// A process that does what it is told, and tells what it receives; it says `ok` when it is there, and to each order.
const ACTOR: &str = "
    Actor = fun(C, Trap) ->
        process_flag(trap_exit, Trap),
        C ! ok,
        (fun L() -> receive
            stop -> stopped;
            {exit, R} -> exit(R);
            {link, P} -> link(P), C ! ok, L();
            {unlink, P} -> unlink(P), C ! ok, L();
            {monitor, P} -> monitor(process, P), C ! ok, L();
            {send_exit, P, R} -> exit(P, R), C ! ok, L();
            {'EXIT', _, R} -> C ! {exit, R}, L();
            {'DOWN', _, process, _, R} -> C ! {down, R}, L()
        end end)()
    end.";

/// `ACTOR`, as a process here.
async fn actor(mut mailbox: Mailbox, args: Vec<Term>) -> Result<Term, Raised> {
    let controller = args[0].as_pid().unwrap().clone();
    mailbox.trap_exit(args[1] == Term::atom("true"));
    mailbox.send(&controller, &Term::atom("ok")).await.unwrap();
    while let Some(message) = mailbox.recv().await {
        let answer = match message {
            Message::Term { term, .. } => {
                let parts = term.as_tuple().unwrap_or_default();
                let subject = |at: usize| match &parts[at] {
                    Term::Pid(pid) => Address::Pid(pid.clone()),
                    name => {
                        let pair = name.as_tuple().unwrap();
                        (pair[0].as_atom().unwrap(), pair[1].as_atom().unwrap()).into()
                    }
                };
                match parts.first().and_then(Term::as_atom) {
                    None => return Ok(term),
                    Some("exit") => return Err(Raised::Exit(parts[1].clone())),
                    Some("link") => mailbox.link(parts[1].as_pid().unwrap()).await,
                    Some("unlink") => mailbox.unlink(parts[1].as_pid().unwrap()),
                    Some("monitor") => drop(mailbox.monitor(subject(1)).await),
                    Some(_) => mailbox.exit(parts[1].as_pid().unwrap(), &parts[2]).await.unwrap(),
                }
                Term::atom("ok")
            }
            Message::Exit { reason, .. } => Term::tuple([Term::atom("exit"), reason]),
            Message::Down { reason, .. } => Term::tuple([Term::atom("down"), reason]),
            other => panic!("{other:?}"),
        };
        mailbox.send(&controller, &answer).await.unwrap();
    }
    Ok(Term::atom("node_down"))
}

struct Scene {
    _node: Node,
    _reference: Beam,
    beam: Beam,
}

impl Scene {
    async fn new() -> Self {
        let epmd = Epmd::start().await;
        let node = epmd.node("search@127.0.0.1").await;
        node.expose_process("test", "actor", 2, actor);
        let mut reference = epmd.beam("reference@127.0.0.1").await;
        let mut beam = epmd.beam("cart@127.0.0.1").await;
        reference.eval("ok.").await;
        beam.eval(ACTOR).await;
        beam.eval(
            "Start = fun(N, Trap) -> C = self(), P = case N of 'search@127.0.0.1' -> spawn(N, test, actor, [C, Trap]); \
             _ -> spawn(N, fun() -> Actor(C, Trap) end) end, receive ok -> P after 60000 -> exit(no_ok) end end.",
        )
        .await;
        // Tells a process something and waits for its `ok`.
        beam.eval("Do = fun(P, Order) -> P ! Order, receive ok -> ok after 60000 -> exit(no_ok) end end.")
            .await;
        // How a process ends, and what it told before: a process here takes its orders in turn, so `stop` is the last.
        beam.eval(
            "End = fun(P, M) -> P ! stop, receive {'DOWN', M, process, _, R} -> \
             {R, (fun F() -> receive X -> [X | F()] after 0 -> [] end end)()} after 60000 -> exit(no_down) end end.",
        )
        .await;
        // A process that is there, and ends as told, in step.
        beam.eval(
            "Helper = fun() -> spawn(fun() -> receive {link, P, S} -> link(P), S ! linked, receive {die, R} -> exit(R) \
             end; {die, R} -> exit(R) end end) end.",
        )
        .await;
        Self {
            _node: node,
            _reference: reference,
            beam,
        }
    }

    async fn compare(&mut self, scenario: &str) -> String {
        let mut on = async |node: &str| {
            self.beam
                .eval(&format!("(fun(N) -> {scenario} end)('{node}@127.0.0.1')."))
                .await
        };
        let (wanted, seen) = (on("reference").await, on("search").await);
        assert_eq!(seen, wanted, "{scenario}");
        seen
    }
}

const REASONS: [&str; 7] = [
    "normal", "kill", "killed", "shutdown", "boom", "noproc", "{a, [1]}",
];

#[tokio::test(flavor = "multi_thread")]
async fn exit_signals_mean_what_they_mean_to_a_beam() {
    let mut scene = Scene::new().await;
    for trap in ["true", "false"] {
        for reason in REASONS {
            let sent = format!("P = Start(N, {trap}), M = monitor(process, P), exit(P, {reason}), End(P, M)");
            let seen = scene.compare(&sent).await;
            // Not only equal: the account is the one that the manual gives.
            match (reason, trap) {
                ("kill", _) => assert_eq!(seen, "{killed,[]}"),
                ("normal", "false") => assert_eq!(seen, "{normal,[]}"),
                ("boom", "false") => assert_eq!(seen, "{boom,[]}"),
                ("boom", "true") => assert_eq!(seen, "{normal,[{exit,boom}]}"),
                _ => {}
            }
            // Over a link, made there or here; and a link taken back.
            let die = format!(
                "MH = monitor(process, H), H ! {{die, {reason}}}, receive {{'DOWN', MH, _, _, _}} -> ok end, End(P, M)"
            );
            let start = format!("P = Start(N, {trap}), M = monitor(process, P), H = Helper()");
            let linked = format!("{start}, H ! {{link, P, self()}}, receive linked -> ok end, {die}");
            scene.compare(&linked).await;
            scene
                .compare(&format!("{start}, Do(P, {{link, H}}), {die}"))
                .await;
            scene
                .compare(&format!(
                    "{start}, Do(P, {{link, H}}), Do(P, {{unlink, H}}), {die}"
                ))
                .await;
            scene
                .compare(&format!(
                    "{start}, Do(P, {{link, H}}), Do(P, {{unlink, H}}), Do(P, {{link, H}}), {die}"
                ))
                .await;
            // Monitored from here.
            scene
                .compare(&format!("{start}, Do(P, {{monitor, H}}), {die}"))
                .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_told_as_a_beam_tells_them() {
    let mut scene = Scene::new().await;
    for reason in REASONS {
        // What links to it and monitors it hears of its end, whichever side asked; an exit signal goes on along links.
        for scenario in [
            "process_flag(trap_exit, true), P = Start(N, false), link(P), M = monitor(process, P), P ! {exit, REASON}, \
             receive {'EXIT', P, R1} -> ok end, receive {'DOWN', M, _, _, R2} -> ok end, process_flag(trap_exit, false), \
             {R1, R2}",
            "P1 = Start(N, false), P2 = Start(N, false), P3 = Start(N, true), Do(P1, {link, P2}), Do(P2, {link, P3}), \
             M1 = monitor(process, P1), M2 = monitor(process, P2), M3 = monitor(process, P3), P1 ! {exit, REASON}, \
             receive {'DOWN', M1, _, _, R1} -> ok end, P2 ! stop, receive {'DOWN', M2, _, _, R2} -> ok end, \
             {R1, R2, End(P3, M3)}",
            "P1 = Start(N, true), P2 = Start(N, true), M1 = monitor(process, P1), M2 = monitor(process, P2), \
             Do(P1, {monitor, P2}), Do(P1, {send_exit, P2, REASON}), \
             P2 ! stop, receive {'DOWN', M2, _, _, R2} -> ok end, \
             receive {exit, _} -> ok after 0 -> ok end, receive {down, D} -> ok end, {R2, D, End(P1, M1)}",
        ] {
            scene.compare(&scenario.replace("REASON", reason)).await;
        }
    }
    let noproc = scene
        .compare(
            "P = Start(N, false), M = monitor(process, P), P ! stop, receive {'DOWN', M, _, _, R1} -> ok end, \
             M2 = monitor(process, P), receive {'DOWN', M2, _, _, R2} -> ok end, \
             M3 = monitor(process, {nobody, N}), receive {'DOWN', M3, _, W, R3} -> ok end, \
             process_flag(trap_exit, true), link(P), receive {'EXIT', P, R4} -> ok end, process_flag(trap_exit, false), \
             {R1, R2, R3, element(1, W), R4}",
        )
        .await;
    assert_eq!(noproc, "{normal,noproc,noproc,nobody,noproc}");
    // Links and monitors to what is not there: dead, no such name, no such node.
    for trap in ["true", "false"] {
        for order in [
            "{link, D}",
            "{monitor, D}",
            "{monitor, {nobody, node()}}",
            "{monitor, {x, 'nobody@127.0.0.1'}}",
        ] {
            let scenario = format!(
                "D = Helper(), MD = monitor(process, D), D ! {{die, x}}, receive {{'DOWN', MD, _, _, _}} -> ok end, \
                 P = Start(N, {trap}), M = monitor(process, P), P ! {order}, \
                 timer:sleep(0), receive ok -> ok; {{'DOWN', M, _, _, _}} = E -> self() ! E, ok end, \
                 A = receive {{down, Z}} -> {{down, Z}}; {{exit, Z}} -> {{exit, Z}}; {{'DOWN', M, _, _, _}} = Y -> self() ! Y, dead \
                 end, {{A, element(1, End(P, M))}}"
            );
            scene.compare(&scenario).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mailbox_can_be_ended_or_trap() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.register("main").unwrap();
    let alias = main.alias();
    assert!(main.trap_exit(false), "new ones trap");
    beam.eval("M = monitor(process, {main, 'search@127.0.0.1'}).")
        .await;
    beam.eval("{main, 'search@127.0.0.1'} ! one.").await;
    node.ping("cart@127.0.0.1", LONG).await.unwrap();
    let pid = main.pid().clone();
    let killer = node.mailbox();
    killer.exit(&pid, &Term::atom("enough")).await.unwrap();
    assert_eq!(soon(main.recv()).await, None);
    assert_eq!(main.ended(), Some(Term::atom("enough")));
    let error = main.recv_timeout(LONG).await.unwrap_err();
    assert!(
        matches!(&error, RecvError::Ended(reason) if *reason == Term::atom("enough")),
        "{error}"
    );
    assert_eq!(
        beam.eval("receive {'DOWN', M, _, _, R} -> R end.").await,
        "enough"
    );
    // Its name is free, and it gets no other; its alias is none.
    assert!(node.whereis("main").is_none());
    assert!(main.register("main").is_err());
    assert!(!main.unalias(&alias));
    drop(node.register("main").unwrap());

    // The node's own processes are not for peers to end.
    for name in ["net_kernel", "rex"] {
        let pid = node.whereis(name).unwrap();
        killer.exit(&pid, &Term::atom("kill")).await.unwrap();
    }
    assert_eq!(beam.eval("net_adm:ping('search@127.0.0.1').").await, "pong");
    assert_eq!(
        beam.eval("element(1, rpc:block_call('search@127.0.0.1', a, b, [])).")
            .await,
        "badrpc"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn normal_ends_who_sends_it_to_itself() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let normal = Term::atom("normal");
    let mut main = node.mailbox();
    main.exit(main.pid(), &normal).await.unwrap();
    let own = Message::Exit {
        from: main.pid().clone(),
        reason: normal.clone(),
    };
    assert_eq!(soon(main.recv()).await, Some(own), "it traps");
    main.trap_exit(false);
    node.mailbox().exit(main.pid(), &normal).await.unwrap();
    assert_eq!(main.ended(), None, "another sent it");

    let watcher = node.mailbox();
    let reference = watcher.monitor(main.pid()).await;
    main.exit(main.pid(), &normal).await.unwrap();
    assert_eq!(main.ended(), Some(normal.clone()));
    assert_eq!(soon(main.recv()).await, None);
    let mut watcher = watcher;
    let down = Message::Down {
        reference,
        target: main.pid().into(),
        reason: normal,
    };
    assert_eq!(soon(watcher.recv()).await, Some(down));
    let there = "(fun() -> {_, M} = spawn_monitor(fun() -> exit(self(), normal), receive after infinity -> ok end end), \
        receive {'DOWN', M, _, _, R} -> R end end)().";
    assert_eq!(beam.eval(there).await, "normal");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_chain_of_links_ends_as_one() {
    const LEN: usize = 20_000;
    let epmd = Epmd::start().await;
    let limits = Limits {
        spawned_per_peer: LEN,
        spawned_processes: LEN,
        ..Limits::default()
    };
    let builder = epmd.builder("search@127.0.0.1").limits(limits);
    let node = builder.start().await.unwrap();
    node.expose_process("test", "link", 2, |mut mailbox, args| async move {
        if let Some(next) = args[0].as_pid() {
            mailbox.link(next).await;
        }
        mailbox
            .send(args[1].as_pid().unwrap(), &Term::atom("linked"))
            .await
            .unwrap();
        mailbox.recv().await;
        Ok(Term::atom("ok"))
    });
    let mut main = node.mailbox();
    let me = main.pid().clone();
    let mut last = Term::atom("none");
    for _ in 0..LEN {
        let options = SpawnOptions::new().monitor();
        let spawned = main
            .spawn(
                "search@127.0.0.1",
                "test",
                "link",
                vec![last, Term::from(me.clone())],
                options,
                LONG,
            )
            .await;
        assert!(matches!(soon(main.recv()).await, Some(Message::Term { .. })));
        last = Term::from(spawned.unwrap().0);
    }
    let head = last.as_pid().unwrap().clone();
    let ends = async {
        main.exit(&head, &Term::atom("boom")).await.unwrap();
        for count in 0..LEN {
            match main.recv().await.unwrap() {
                Message::Down { reason, .. } => assert_eq!(reason, Term::atom("boom"), "{count}"),
                other => panic!("{other:?}"),
            }
        }
    };
    soon(ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_picked_and_waited_for() {
    let epmd = Epmd::start().await;
    let limits = Limits {
        mailbox_messages: 5,
        ..Limits::default()
    };
    let node = epmd
        .builder("search@127.0.0.1")
        .limits(limits)
        .start()
        .await
        .unwrap();
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.register("main").unwrap();
    let number = |message: &Message| match message {
        Message::Term { term, .. } => term.as_int(),
        _ => None,
    };
    beam.eval("[{main, 'search@127.0.0.1'} ! I || I <- [1, 2, 3, 4]].")
        .await;
    let three = main.recv_where(LONG, |message| number(message) == Some(3)).await;
    assert_eq!(number(&three.unwrap()), Some(3));
    let none = main
        .recv_where(std::time::Duration::from_millis(50), |message| {
            number(message) == Some(7)
        })
        .await;
    assert!(matches!(none, Err(RecvError::Timeout(_))), "{none:?}");
    // Three were passed over; they count, so two more find room.
    beam.eval("[{main, 'search@127.0.0.1'} ! I || I <- [5, 6, 7]].")
        .await;
    assert_eq!(beam.eval("net_adm:ping('search@127.0.0.1').").await, "pong");
    assert_eq!(main.dropped(), 1);
    for wanted in [1, 2, 4, 5, 6] {
        assert_eq!(number(&soon(main.recv()).await.unwrap()), Some(wanted));
    }
    // All room is free again.
    beam.eval("[{main, 'search@127.0.0.1'} ! I || I <- [1, 2, 3, 4, 5]].")
        .await;
    assert_eq!(beam.eval("net_adm:ping('search@127.0.0.1').").await, "pong");
    assert_eq!(main.dropped(), 1);

    // A `DOWN` that came before its monitor was taken back is gone with it.
    let mut other = node.mailbox();
    let reference = other.monitor(("nobody", "cart@127.0.0.1")).await;
    let kept = other.monitor(("nobody", "cart@127.0.0.1")).await;
    node.ping("cart@127.0.0.1", LONG).await.unwrap();
    other.demonitor(&reference);
    let down = other.recv_timeout(LONG).await.unwrap();
    assert!(
        matches!(&down, Message::Down { reference, .. } if *reference == kept),
        "{down:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alias_for_one_answer_ends_with_it() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.register("main").unwrap();
    beam.eval("register(shell, self()).").await;
    let alias = main.reply_alias();
    main.send(("shell", "cart@127.0.0.1"), &Term::from(alias.clone()))
        .await
        .unwrap();
    beam.eval("A = receive X -> X end, A ! one, A ! two, {main, 'search@127.0.0.1'} ! three.")
        .await;
    for wanted in ["one", "three"] {
        let Some(Message::Term { term, .. }) = soon(main.recv()).await else {
            panic!("no message")
        };
        assert_eq!(term, Term::atom(wanted));
    }
    assert!(!main.unalias(&alias));
}

/// Whoever reads at the moment in which it ends must not take the node for dead.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_woken_by_the_end_knows_the_reason() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let (main, boom) = (node.mailbox(), Term::atom("boom"));
    for round in 0..2_000 {
        let mut mailbox = node.mailbox();
        mailbox.trap_exit(false);
        let pid = mailbox.pid().clone();
        let (reader, sent) = tokio::join!(
            tokio::spawn(async move { mailbox.recv_timeout(LONG).await }),
            main.exit(&pid, &boom),
        );
        sent.unwrap();
        let ended = reader.unwrap();
        assert!(
            matches!(&ended, Err(RecvError::Ended(reason)) if *reason == boom),
            "round {round}: {ended:?}"
        );
    }
}

/// A peer that links to a process in the moment in which that ends does not have others told of it that it was not there.
#[tokio::test(flavor = "multi_thread")]
async fn who_linked_before_the_end_gets_its_reason() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    beam.eval(
        "Round = fun(P) ->
            S = self(),
            Linked = [spawn(fun() -> process_flag(trap_exit, true), link(P), S ! linked,
                receive {'EXIT', P, R} -> S ! {ended, R} end end) || _ <- lists:seq(1, 20)],
            [receive linked -> ok end || _ <- Linked],
            {main, 'search@127.0.0.1'} ! P,
            [monitor(process, P) || _ <- lists:seq(1, 300)],
            lists:usort([receive {ended, R} -> R end || _ <- Linked])
        end.",
    )
    .await;
    let mut main = node.register("main").unwrap();
    for round in 0..30 {
        let mailbox = node.mailbox();
        mailbox.register("ending").unwrap();
        beam.ask(
            "(fun() -> Q = make_ref(), {ending, 'search@127.0.0.1'} ! {self(), Q}, \
             Round(receive {Q, P} -> P end) end)().",
        )
        .await;
        let mut mailbox = mailbox;
        let asked = mailbox.recv_timeout(LONG).await.unwrap();
        let Message::Term { term, .. } = asked else {
            panic!("{asked:?}")
        };
        let parts = term.as_tuple().unwrap().to_vec();
        let answer = Term::tuple([parts[1].clone(), Term::from(mailbox.pid().clone())]);
        mailbox.send(parts[0].as_pid().unwrap(), &answer).await.unwrap();
        soon(main.recv()).await.unwrap();
        mailbox.close(Term::atom("done"));
        assert_eq!(beam.answer().await.unwrap(), "[done]", "round {round}");
    }
}
