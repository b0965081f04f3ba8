//! Links, monitors and processes that a peer asks for.

use std::time::Duration;

use futures::FutureExt;

use crate::node_support::{COOKIE, LONG, soon};
use crate::scene::{EVIL, Raw, Scene, monitor, pid, reference};
use meshx::node::{CallError, DownReason, Limits, Mailbox, Message, RecvError, RpcError, SpawnOptions};
use meshx_dist::control::{Control, Proc, SpawnResult};
use meshx_etf::{Pid, Term};

#[tokio::test(flavor = "multi_thread")]
async fn links_and_monitors_of_one_peer_are_bounded() {
    let limits = Limits {
        watches_per_connection: 10,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for id in 0..11 {
        raw.send(monitor(id, "echo"), None).await;
    }
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "watches_per_connection",
            value: 10
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn links_count_as_monitors_do() {
    let limits = Limits {
        watches_per_connection: 10,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let target = scene.node.mailbox();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for id in 0..5 {
        raw.send(monitor(id, "echo"), None).await;
    }
    // Taken back, they count no more; made twice, they count once.
    for id in 0..5 {
        let demonitor = Control::DemonitorP {
            from: pid(1),
            to: Proc::Name("echo".into()),
            reference: reference(id),
        };
        raw.send(demonitor, None).await;
    }
    let link = |id| Control::Link {
        from: pid(id),
        to: target.pid().clone(),
    };
    for id in [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10] {
        raw.send(link(id), None).await;
    }
    raw.send(link(11), None).await;
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "watches_per_connection",
            value: 10
        }
    );
}

fn spawn_request(id: u32, options: Vec<Term>) -> Control {
    Control::SpawnRequest {
        id: reference(id),
        from: pid(1),
        group_leader: pid(1),
        module: "none".into(),
        function: "none".into(),
        arity: 0,
        options,
        token: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_spawns_and_never_reads_is_ended() {
    let limits = Limits {
        answer_queue_bytes: 100_000,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut id = 0;
    while raw
        .send(spawn_request(id, vec![]), Some(&Term::List(vec![])))
        .await
    {
        id += 1;
    }
    let wanted = DownReason::Limit {
        name: "answer_queue_bytes",
        value: 100_000,
    };
    assert_eq!(scene.end().await, wanted, "after {id} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_a_peer_spawns_and_watches_count_as_its_watches() {
    let limits = Limits {
        watches_per_connection: 10,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    scene.node.expose("none", "none", 0, |_| std::future::pending());
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let both = || vec![Term::atom("monitor"), Term::atom("link")];
    for id in 0..6 {
        raw.send(spawn_request(id, both()), Some(&Term::List(vec![])))
            .await;
    }
    let wanted = DownReason::Limit {
        name: "watches_per_connection",
        value: 10,
    };
    assert_eq!(scene.end().await, wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_reads_none_of_the_ends_it_waits_for_is_ended() {
    let limits = Limits {
        notice_queue_bytes: 1 << 20,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let watched = scene.node.register("watched").unwrap();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for id in 0..1000 {
        assert!(raw.send(monitor(id, "watched"), None).await);
    }
    // Behind them: the answer to a spawn request, the first bytes that come.
    raw.send(spawn_request(0, vec![]), Some(&Term::List(vec![])))
        .await;
    soon(raw.socket.readable()).await.unwrap();
    // One reason, encoded a thousand times.
    watched.close(Term::binary(vec![0; 1 << 20]));
    let wanted = DownReason::Limit {
        name: "notice_queue_bytes",
        value: 1 << 20,
    };
    assert_eq!(scene.end().await, wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_started_too_late_is_let_go() {
    let scene = Scene::new(Limits::default()).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut asker = scene.node.mailbox();
    let options = SpawnOptions::new().link().monitor();
    let short = Duration::from_millis(50);
    let silent = asker.spawn(EVIL, "m", "f", vec![], options, short).await;
    assert!(
        matches!(silent, Err(RpcError::Call(CallError::Timeout(_)))),
        "{silent:?}"
    );
    let mut received = raw.listen();
    let Control::SpawnRequest { id, .. } = received.next(&mut raw).await else {
        panic!("no request")
    };
    let reply = Control::SpawnReply {
        id: id.clone(),
        to: asker.pid().clone(),
        flags: 3,
        result: SpawnResult::Pid(pid(9)),
        token: None,
    };
    raw.send(reply, None).await;
    let demonitor = Control::DemonitorP {
        from: asker.pid().clone(),
        to: Proc::Pid(pid(9)),
        reference: id,
    };
    assert_eq!(received.next(&mut raw).await, demonitor);
    let exit = Control::PayloadExit {
        from: asker.pid().clone(),
        to: pid(9),
        token: None,
    };
    assert_eq!(received.next(&mut raw).await, exit);
    // The connection's end is of no interest to it either.
    drop(raw);
    let nothing = asker.recv_timeout(short).await;
    assert!(matches!(nothing, Err(RecvError::Timeout(_))), "{nothing:?}");
}

/// A bad peer that does not read, and no room on its connection.
async fn full() -> (Scene, Raw) {
    let limits = Limits {
        send_queue_bytes: 4,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    scene.up().await;
    // Several of which the sockets between the two do not hold one.
    let filler = scene.node.mailbox();
    let large = Term::binary(vec![0; 16 << 20]);
    while filler.send(("nobody", EVIL), &large).now_or_never().is_some() {}
    (scene, raw)
}

/// Reads on until the signals of these processes of the node have come, and gives them.
async fn signals(raw: &mut Raw, of: [&Pid; 2], count: usize) -> [Vec<Control>; 2] {
    let mut received = raw.listen();
    let mut signals = [vec![], vec![]];
    while signals.iter().any(|signals| signals.len() < count) {
        let control = received.next(raw).await;
        let (Control::Link { from, .. }
        | Control::PayloadExit { from, .. }
        | Control::MonitorP { from, .. }
        | Control::DemonitorP { from, .. }) = &control
        else {
            continue;
        };
        let at = of.iter().position(|pid| *pid == from).unwrap();
        signals[at].push(control);
    }
    signals
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_given_up_before_it_is_sent_is_made_by_the_next() {
    let (scene, mut raw) = full().await;
    let [given_up, twice] = [(); 2].map(|()| scene.node.mailbox());
    let target = pid(9);
    assert_eq!(given_up.link(&target).now_or_never(), None);
    let again = given_up.link(&target);
    // Two at once, of which the first is given up.
    let mut first = Box::pin(twice.link(&target));
    let mut second = Box::pin(twice.link(&target));
    assert!(futures::poll!(first.as_mut()).is_pending());
    assert!(futures::poll!(second.as_mut()).is_pending(), "not linked yet");
    drop(first);
    let read = signals(&mut raw, [given_up.pid(), twice.pid()], 1);
    let (seen, (), ()) = soon(async { tokio::join!(read, again, second) }).await;
    let link = |mailbox: &Mailbox| {
        vec![Control::Link {
            from: mailbox.pid().clone(),
            to: target.clone(),
        }]
    };
    assert_eq!(seen, [link(&given_up), link(&twice)]);
    // It is there: nothing is sent, and nothing waited for.
    assert_eq!(twice.link(&target).now_or_never(), Some(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_process_comes_behind_what_it_had_asked_for() {
    let (scene, mut raw) = full().await;
    let [linking, monitoring, killer] = [(); 3].map(|()| scene.node.mailbox());
    let target = pid(9);
    let mut link = Box::pin(linking.link(&target));
    let mut monitor = Box::pin(monitoring.monitor(&target));
    assert!(futures::poll!(link.as_mut()).is_pending());
    assert!(futures::poll!(monitor.as_mut()).is_pending());
    for mailbox in [&linking, &monitoring] {
        killer.exit(mailbox.pid(), &Term::atom("kill")).await.unwrap();
        assert_eq!(mailbox.ended(), Some(Term::atom("killed")));
    }
    let read = signals(&mut raw, [linking.pid(), monitoring.pid()], 2);
    let ([links, monitors], (), _) = soon(async { tokio::join!(read, link, monitor) }).await;
    assert!(
        matches!(links[..], [Control::Link { .. }, Control::PayloadExit { .. }]),
        "{links:?}"
    );
    assert!(
        matches!(
            monitors[..],
            [Control::MonitorP { .. }, Control::DemonitorP { .. }]
        ),
        "{monitors:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_given_up_before_they_are_sent_leave_nothing_behind() {
    let (mut scene, raw) = full().await;
    let target = || ("nobody", EVIL);
    let options = SpawnOptions::new().link().monitor();
    let [mut monitoring, mut calling, mut spawning] = [(); 3].map(|()| scene.node.mailbox());
    assert_eq!(monitoring.monitor(target()).now_or_never(), None);
    let call = calling.gen_call(target(), Term::Int(1), LONG).now_or_never();
    assert!(call.is_none(), "{call:?}");
    let spawn = spawning
        .spawn(EVIL, "m", "f", vec![], options, LONG)
        .now_or_never();
    assert!(spawn.is_none(), "{spawn:?}");

    // The connection's end is of no interest to them.
    drop(raw);
    scene.end().await;
    for mailbox in [&mut monitoring, &mut calling, &mut spawning] {
        assert_eq!(mailbox.recv().now_or_never(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spawn_that_is_given_up_before_it_is_answered_leaves_nothing_behind() {
    let mut scene = Scene::new(Limits::default()).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut asker = scene.node.mailbox();
    let options = SpawnOptions::new().link().monitor();
    let mut received = raw.listen();
    scene.up().await;
    let spawn = asker.spawn(EVIL, "m", "f", vec![], options, LONG).now_or_never();
    assert!(spawn.is_none(), "{spawn:?}");
    assert!(matches!(
        received.next(&mut raw).await,
        Control::SpawnRequest { .. }
    ));
    drop(raw);
    scene.end().await;
    assert_eq!(asker.recv().now_or_never(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_asked_for_reach_nobody() {
    let scene = Scene::new(Limits::default()).await;
    let mut target = scene.node.register("target").unwrap();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let to = target.pid().clone();
    for id in 0..100 {
        let reply = Control::SpawnReply {
            id: reference(id),
            to: to.clone(),
            flags: 3,
            result: SpawnResult::Pid(pid(id)),
            token: None,
        };
        raw.send(reply, None).await;
        let exit = Control::PayloadExit {
            from: pid(id),
            to: to.clone(),
            token: None,
        };
        raw.send(exit, Some(&Term::atom("not_linked"))).await;
        let down = Control::PayloadMonitorPExit {
            from: Proc::Pid(pid(id)),
            to: to.clone(),
            reference: reference(id),
        };
        raw.send(down, Some(&Term::atom("not_monitored"))).await;
    }
    let to_target = Control::RegSend {
        from: pid(1),
        to: "target".into(),
        token: None,
    };
    raw.send(to_target, Some(&Term::atom("last"))).await;
    let Some(Message::Term { term, .. }) = soon(target.recv()).await else {
        panic!("something else came first")
    };
    assert_eq!(term, Term::atom("last"));
}
