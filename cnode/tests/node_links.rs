//! Links and monitors between processes of a node here and those of a real BEAM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use meshx::node::{Address, Mailbox, Message, SpawnOptions};
use meshx_etf::{Pid, Term};
use node_support::{Beam, Epmd, soon};

/// A process on the BEAM that ends with whatever it is sent, and its pid as it arrives here.
async fn spawn(beam: &mut Beam, mailbox: &mut Mailbox) -> Pid {
    // In a fun, so that the variables are new ones each time.
    let start = "P = spawn(fun() -> receive R -> exit(R) end end), {main, 'search@127.0.0.1'} ! {pid, P}";
    beam.eval(&format!("(fun() -> {start} end)().")).await;
    let Some(Message::Term { term, .. }) = soon(mailbox.recv()).await else {
        panic!("no message")
    };
    term.as_tuple().unwrap()[1].as_pid().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_of_a_beam_are_monitored() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.register("main").unwrap();
    let pid = spawn(&mut beam, &mut main).await;

    let reference = main.monitor(&pid).await;
    let taken_back = main.monitor(&pid).await;
    main.demonitor(&taken_back);
    main.send(&pid, &Term::atom("boom")).await.unwrap();
    let down = |reference, target: Address, reason| Message::Down {
        reference,
        target,
        reason: Term::atom(reason),
    };
    assert_eq!(
        soon(main.recv()).await,
        Some(down(reference, (&pid).into(), "boom"))
    );

    // It is gone now; a name that nobody has; a node that is not there.
    let late = main.monitor(&pid).await;
    assert_eq!(soon(main.recv()).await, Some(down(late, (&pid).into(), "noproc")));
    let named: Address = ("nobody", "cart@127.0.0.1").into();
    let reference = main.monitor(named.clone()).await;
    assert_eq!(soon(main.recv()).await, Some(down(reference, named, "noproc")));
    let away: Address = ("x", "nobody@127.0.0.1").into();
    let reference = main.monitor(away.clone()).await;
    assert_eq!(
        soon(main.recv()).await,
        Some(down(reference, away, "noconnection"))
    );

    // A name that somebody has, and then the whole node dies.
    let rex: Address = ("rex", "cart@127.0.0.1").into();
    let reference = main.monitor(rex.clone()).await;
    let other = spawn(&mut beam, &mut main).await;
    main.link(&other).await;
    beam.kill().await;
    let mut ends = vec![soon(main.recv()).await.unwrap(), soon(main.recv()).await.unwrap()];
    ends.sort_by_key(|end| matches!(end, Message::Down { .. }));
    let exit = Message::Exit {
        from: other,
        reason: Term::atom("noconnection"),
    };
    assert_eq!(ends, [exit, down(reference, rex, "noconnection")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn mailboxes_are_monitored_by_a_beam() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let worker = node.register("worker").unwrap();
    let down = "(fun() -> receive {'DOWN', _, process, What, Why} -> {What, Why} end end)().";

    beam.eval("monitor(process, {nobody, 'search@127.0.0.1'}).").await;
    assert_eq!(beam.eval(down).await, "{{nobody,'search@127.0.0.1'},noproc}");

    beam.eval("M = monitor(process, {worker, 'search@127.0.0.1'}).")
        .await;
    assert_eq!(beam.eval("demonitor(M, [flush]).").await, "true");
    beam.eval("monitor(process, {worker, 'search@127.0.0.1'}).").await;
    // In order behind the monitor, so that it has been seen when the mailbox goes.
    node.ping(&beam.name.clone(), node_support::LONG).await.unwrap();
    worker.close(Term::tuple([Term::atom("shutdown"), Term::Int(7)]));
    assert_eq!(
        beam.eval(down).await,
        "{{worker,'search@127.0.0.1'},{shutdown,7}}"
    );
    assert!(node.whereis("worker").is_none());

    // The name is free again, and this node goes away as a whole.
    let _worker = node.register("worker").unwrap();
    beam.eval("monitor(process, {worker, 'search@127.0.0.1'}).").await;
    beam.eval("monitor_node('search@127.0.0.1', true).").await;
    node.stop().await;
    assert_eq!(
        beam.eval(down).await,
        "{{worker,'search@127.0.0.1'},noconnection}"
    );
    assert_eq!(
        beam.eval("receive {nodedown, N} -> N end.").await,
        "'search@127.0.0.1'"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn links_work_both_ways() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.register("main").unwrap();

    // Made here, broken there.
    let pid = spawn(&mut beam, &mut main).await;
    main.link(&pid).await;
    main.send(&pid, &Term::atom("boom")).await.unwrap();
    let exit = |from: &Pid, reason| {
        Some(Message::Exit {
            from: from.clone(),
            reason: Term::atom(reason),
        })
    };
    assert_eq!(soon(main.recv()).await, exit(&pid, "boom"));
    main.link(&pid).await;
    assert_eq!(soon(main.recv()).await, exit(&pid, "noproc"));

    // Made here and taken back: nothing comes.
    let pid = spawn(&mut beam, &mut main).await;
    main.link(&pid).await;
    main.unlink(&pid);
    main.send(&pid, &Term::atom("boom")).await.unwrap();
    let other = spawn(&mut beam, &mut main).await;

    // exit/2 in both directions.
    main.link(&other).await;
    main.exit(&other, &Term::atom("go")).await.unwrap();
    assert_eq!(soon(main.recv()).await, exit(&other, "go"));
    main.send(("rex", "cart@127.0.0.1"), &Term::atom("ignored"))
        .await
        .unwrap();

    // Made there, broken here; and taken back there.
    let worker = node.mailbox();
    beam.eval("process_flag(trap_exit, true).").await;
    beam.eval("register(shell, self()).").await;
    let introduce = Term::tuple([Term::atom("worker"), Term::from(worker.pid().clone())]);
    main.send(("shell", "cart@127.0.0.1"), &introduce).await.unwrap();
    beam.eval("W = receive {worker, P0} -> P0 end.").await;
    assert_eq!(beam.eval("link(W), unlink(W), link(W).").await, "true");
    beam.eval("exit(W, hello).").await;
    let mut worker = worker;
    let Some(Message::Exit { reason, .. }) = soon(worker.recv()).await else {
        panic!("no exit signal")
    };
    assert_eq!(reason, Term::atom("hello"));
    worker.close(Term::atom("finished"));
    assert_eq!(
        beam.eval("receive {'EXIT', W, Why} -> Why end.").await,
        "finished"
    );
    assert_eq!(
        beam.eval("link(W), receive {'EXIT', W, Why2} -> Why2 end.").await,
        "noproc"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_started_on_a_beam() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let _beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.mailbox();
    let args = vec![Term::tuple([Term::atom("some"), Term::atom("reason")])];
    let reference = main
        .spawn_request(
            "cart@127.0.0.1",
            "erlang",
            "exit",
            args,
            SpawnOptions::new().monitor(),
        )
        .await
        .unwrap();
    let Some(Message::Spawned {
        reference: spawned,
        result: Ok(pid),
    }) = soon(main.recv()).await
    else {
        panic!("not spawned")
    };
    assert_eq!(
        (spawned, pid.node.as_str()),
        (reference.clone(), "cart@127.0.0.1")
    );
    let reason = Term::tuple([Term::atom("some"), Term::atom("reason")]);
    assert_eq!(
        soon(main.recv()).await,
        Some(Message::Down {
            reference,
            target: pid.into(),
            reason
        })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn aliases_reach_their_mailbox_until_they_end() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.mailbox();
    beam.eval("register(shell, self()).").await;
    let alias = main.alias();
    main.send(("shell", "cart@127.0.0.1"), &Term::from(alias.clone()))
        .await
        .unwrap();
    beam.eval("A = receive X -> X end.").await;
    beam.eval("A ! one.").await;
    let Some(Message::Term { term, .. }) = soon(main.recv()).await else {
        panic!("no message")
    };
    assert_eq!(term, Term::atom("one"));
    assert!(main.unalias(&alias));
    assert!(!main.unalias(&alias));
    beam.eval("A ! two.").await;
    main.register("main").unwrap();
    beam.eval("{main, 'search@127.0.0.1'} ! three.").await;
    let Some(Message::Term { term, .. }) = soon(main.recv()).await else {
        panic!("no message")
    };
    assert_eq!(term, Term::atom("three"));
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_of_one_node_watch_each_other() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut main = node.mailbox();
    let (linked, monitored) = (node.mailbox(), node.register("monitored").unwrap());
    main.link(linked.pid()).await;
    let reference = main.monitor(("monitored", "search@127.0.0.1")).await;
    let from = linked.pid().clone();
    linked.close(Term::atom("bye"));
    assert_eq!(
        soon(main.recv()).await,
        Some(Message::Exit {
            from: from.clone(),
            reason: Term::atom("bye")
        })
    );
    drop(monitored);
    let target = ("monitored", "search@127.0.0.1").into();
    assert_eq!(
        soon(main.recv()).await,
        Some(Message::Down {
            reference,
            target,
            reason: Term::atom("normal")
        })
    );
    main.link(&from).await;
    assert_eq!(
        soon(main.recv()).await,
        Some(Message::Exit {
            from,
            reason: Term::atom("noproc")
        })
    );
}
