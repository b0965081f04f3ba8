//! Mailboxes and answers that are not read.

use std::time::Duration;

use crate::node_support::{COOKIE, LONG, soon};
use crate::scene::{Raw, Scene, monitor, pid, reference};
use meshx::node::{DownReason, Limits, Message};
use meshx_dist::control::Control;
use meshx_etf::Term;

#[tokio::test(flavor = "multi_thread")]
async fn a_mailbox_that_nobody_reads_holds_up_no_other() {
    let scene = Scene::new(Limits {
        mailbox_bytes: 1 << 20,
        ..Limits::default()
    })
    .await;
    let slow = scene.node.register("slow").unwrap();
    let sender = scene.friend.mailbox();
    let large = Term::binary(vec![0; 100_000]);
    for round in 0..20 {
        // Ten times what the mailbox holds, and each round the same connection serves its calls.
        for _ in 0..5 {
            soon(sender.send(("slow", "search@127.0.0.1"), &large))
                .await
                .unwrap();
        }
        scene.friend_is_served().await;
        assert!(slow.dropped() < 100, "{round}");
    }
    // The answer to a call may overtake the large messages of others that were sent before it: the sender's own
    // message behind them does not, and its arrival is an event.
    let mut last = scene.node.register("last").unwrap();
    soon(sender.send(("last", "search@127.0.0.1"), &Term::Int(1)))
        .await
        .unwrap();
    soon(last.recv()).await.unwrap();
    assert_eq!(slow.dropped(), 90);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_asks_and_never_reads_is_ended() {
    let limits = Limits {
        answer_queue_bytes: 100_000,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut id = 0;
    while raw.send(monitor(id, "nobody"), None).await {
        id += 1;
    }
    let reason = scene.end().await;
    let wanted = DownReason::Limit {
        name: "answer_queue_bytes",
        value: 100_000,
    };
    assert_eq!(reason, wanted, "after {id} monitors");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_never_reads_its_answers_holds_up_no_server() {
    let limits = Limits {
        reply_queue_bytes: 1 << 20,
        reply_wait: Duration::from_millis(100),
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let from = Term::tuple([Term::from(pid(1)), Term::from(reference(1))]);
    let call = Term::tuple([Term::atom("$gen_call"), from, Term::binary(vec![0; 1 << 20])]);
    let to_echo = || Control::RegSend {
        from: pid(1),
        to: "echo".into(),
        token: None,
    };
    while raw.send(to_echo(), Some(&call)).await {}
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "reply_queue_bytes",
            value: 1 << 20
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_mailbox_drops_messages_but_not_the_ends_it_waits_for() {
    let scene = Scene::new(Limits {
        mailbox_messages: 3,
        ..Limits::default()
    })
    .await;
    let mut full = scene.node.register("full").unwrap();
    let sender = scene.friend.mailbox();
    // Its own link and monitor, which count for nothing in the queue until they end.
    let (linked, monitored) = (scene.friend.mailbox(), scene.friend.mailbox());
    full.link(linked.pid()).await;
    let reference = full.monitor(monitored.pid()).await;
    // Behind both, so that they stand.
    scene.node.ping("friend@127.0.0.1", LONG).await.unwrap();
    for number in 0..10 {
        sender
            .send(("full", "search@127.0.0.1"), &Term::Int(number))
            .await
            .unwrap();
    }
    // What a peer sends of its own accord is no better than a message.
    sender.exit(full.pid(), &Term::atom("signal")).await.unwrap();
    sender.link(full.pid()).await;
    sender.close(Term::atom("their_link"));
    let (linked_pid, target) = (linked.pid().clone(), monitored.pid().clone().into());
    linked.close(Term::atom("boom"));
    monitored.close(Term::atom("bang"));
    // Behind all of these on the same connection.
    scene.friend_is_served().await;
    assert_eq!(full.dropped(), 9);
    for number in 0..3 {
        let Some(Message::Term { term, .. }) = soon(full.recv()).await else {
            panic!("no message")
        };
        assert_eq!(term, Term::Int(number));
    }
    let exit = Message::Exit {
        from: linked_pid,
        reason: Term::atom("boom"),
    };
    assert_eq!(soon(full.recv()).await, Some(exit));
    let down = Message::Down {
        reference,
        target,
        reason: Term::atom("bang"),
    };
    assert_eq!(soon(full.recv()).await, Some(down));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mailbox_is_bounded_in_bytes() {
    let scene = Scene::new(Limits {
        mailbox_bytes: 10_000,
        ..Limits::default()
    })
    .await;
    let mut full = scene.node.register("full").unwrap();
    let sender = scene.friend.mailbox();
    // The first is taken although it is larger than the whole mailbox may be.
    for _ in 0..3 {
        sender
            .send(("full", "search@127.0.0.1"), &Term::binary(vec![0; 20_000]))
            .await
            .unwrap();
    }
    scene.friend_is_served().await;
    assert_eq!(full.dropped(), 2);
    assert!(soon(full.recv()).await.is_some());
}
