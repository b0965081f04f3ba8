//! Calls to `rex` by a peer that lies about who calls.

use std::time::{Duration, Instant};

use crate::node_support::{COOKIE, LONG, soon};
use crate::scene::{EVIL, Raw, Scene, pid, reference};
use meshx::node::{Limits, Mailbox, Message};
use meshx_dist::control::{Control, SpawnResult};
use meshx_etf::{Atom, Pid, Reference, Term};

const FRIEND: &str = "friend@127.0.0.1";
const HERE: &str = "search@127.0.0.1";

/// A process that is not the sender's.
fn liar(node: &str) -> Pid {
    Pid {
        node: Atom::from(node),
        ..pid(1)
    }
}

/// `{Label, none, Function, [], GroupLeader}`.
fn order(label: &str, function: &str) -> Term {
    Term::tuple([
        Term::atom(label),
        Term::atom("none"),
        Term::atom(function),
        Term::list([]),
        Term::from(pid(1)),
    ])
}

/// A call whose answer goes to an alias, whoever is said to call.
fn call(caller: &Pid, answers: &Reference, order: Term) -> Term {
    let alias = Term::ImproperList(
        [Term::atom("alias")].into(),
        Box::new(Term::from(answers.clone())),
    );
    let caller = Term::tuple([Term::from(caller.clone()), alias]);
    Term::tuple([Term::atom("$gen_call"), caller, order])
}

fn to_rex(from: Pid) -> Control {
    Control::RegSend {
        from,
        to: "rex".into(),
        token: None,
    }
}

/// The answer to a call that comes next.
async fn answer(mailbox: &mut Mailbox) -> Term {
    let Some(Message::Term {
        term: Term::Tuple(mut parts),
        ..
    }) = soon(mailbox.recv()).await
    else {
        panic!("no answer")
    };
    parts.pop().unwrap()
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Call,
    Message,
    Cast,
    /// By pid, which tells no sender.
    Nameless,
}

/// Lets a peer start all that it may and more, each of them in the name of somebody else. The more is refused, and
/// what others may start is not used up.
async fn counts_for_the_peer_that_it_comes_from(way: Way) {
    let limits = Limits {
        spawned_per_peer: 2,
        ..Limits::default()
    };
    let scene = Scene::new(limits).await;
    scene.node.expose("none", "wait", 0, |_| std::future::pending());
    scene
        .node
        .expose("none", "done", 0, |_| async { Ok(Term::atom("done")) });
    let mut victim = scene.friend.mailbox();
    let answers = victim.alias();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for _ in 0..2 {
        let caller = liar(FRIEND);
        let call = |label| call(&caller, &answers, order(label, "wait"));
        let (to, term) = match way {
            Way::Call => (to_rex(caller.clone()), call("call")),
            Way::Message => {
                let term = Term::tuple([Term::from(caller.clone()), order("call", "wait")]);
                (to_rex(caller.clone()), term)
            }
            Way::Cast => {
                let term = Term::tuple([Term::atom("$gen_cast"), order("cast", "wait")]);
                (to_rex(caller.clone()), term)
            }
            Way::Nameless => {
                // The second process of every node.
                let rex = Pid {
                    id: 2,
                    ..scene.node.mailbox().pid().clone()
                };
                (Control::Send { to: rex, token: None }, call("block_call"))
            }
        };
        assert!(raw.send(to, Some(&term)).await);
    }
    // A name that nothing was started for yet, at a peer that has its share already.
    let ghost = liar("ghost@127.0.0.1");
    let more = call(&ghost, &answers, order("call", "done"));
    assert!(raw.send(to_rex(ghost), Some(&more)).await);
    let refused = Term::tuple([Term::atom("badrpc"), Term::atom("system_limit")]);
    assert_eq!(answer(&mut victim).await, refused, "{way:?}");
    // All of the above is through, and the friend has its share.
    let served = scene.friend.gen_call(("rex", HERE), order("call", "done"), LONG);
    assert_eq!(served.await.unwrap(), Term::atom("done"), "{way:?}");
    assert!(scene.node.peers().iter().any(|peer| peer.node == EVIL));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_count_for_the_peer_that_they_come_from() {
    counts_for_the_peer_that_it_comes_from(Way::Call).await;
    counts_for_the_peer_that_it_comes_from(Way::Nameless).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_count_for_the_peer_that_they_come_from() {
    counts_for_the_peer_that_it_comes_from(Way::Message).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn casts_count_for_the_peer_that_they_come_from() {
    counts_for_the_peer_that_it_comes_from(Way::Cast).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_waits_to_be_read_counts_as_running() {
    let limits = Limits {
        spawned_per_peer: 2,
        reply_queue_bytes: 1 << 20,
        ..Limits::default()
    };
    let scene = Scene::new(limits).await;
    scene.node.expose("none", "large", 0, |_| async {
        Ok(Term::binary(vec![0; 256 << 10]))
    });
    scene
        .node
        .expose("none", "done", 0, |_| async { Ok(Term::atom("done")) });
    let mut friend = scene.friend.mailbox();
    let answers = friend.alias();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let from = Term::tuple([Term::from(pid(1)), Term::from(reference(1))]);
    let large = Term::tuple([Term::atom("$gen_call"), from, order("call", "large")]);
    let probe = call(&pid(1), &answers, order("call", "done"));
    let refused = Term::tuple([Term::atom("badrpc"), Term::atom("system_limit")]);
    // The sockets' buffers and the queue take the first of them.
    for _ in 0..500 {
        assert!(raw.send(to_rex(pid(1)), Some(&large)).await);
        // Another call of the peer's, whose answer is read; it is refused for a moment while the large one runs.
        let since = Instant::now();
        while {
            assert!(raw.send(to_rex(pid(1)), Some(&probe)).await);
            answer(&mut friend).await == refused
        } {
            if since.elapsed() > Duration::from_secs(1) {
                return scene.friend_is_served().await;
            }
        }
        // It gives its slot back a moment after its answer.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("any number of results wait");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_a_peer_has_running_are_bounded() {
    let limits = Limits {
        spawned_bytes_per_peer: 100_000,
        ..Limits::default()
    };
    let scene = Scene::new(limits).await;
    for function in ["wait", "done"] {
        scene.node.expose("none", function, 1, move |_| async move {
            match function {
                "wait" => std::future::pending().await,
                _ => Ok(Term::atom("done")),
            }
        });
    }
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut received = raw.listen();
    // Larger than all that one may have, but the first.
    for (id, len) in [(0, 200_000), (1, 1)] {
        let request = Control::SpawnRequest {
            id: reference(id),
            from: pid(1),
            group_leader: pid(1),
            module: "none".into(),
            function: "wait".into(),
            arity: 1,
            options: vec![],
            token: None,
        };
        let args = Term::list([Term::binary(vec![0; len])]);
        assert!(raw.send(request, Some(&args)).await);
        let Control::SpawnReply { result, .. } = received.next(&mut raw).await else {
            panic!("no answer")
        };
        let refused = result == SpawnResult::Error("system_limit".into());
        assert_eq!(refused, id == 1, "{result:?}");
    }
    // Calls to `rex` count with the others.
    let mut victim = scene.friend.mailbox();
    let answers = victim.alias();
    let wanted = call(&pid(1), &answers, order("call", "done"));
    assert!(raw.send(to_rex(pid(1)), Some(&wanted)).await);
    let refused = Term::tuple([Term::atom("badrpc"), Term::atom("system_limit")]);
    assert_eq!(answer(&mut victim).await, refused);
    scene.friend_is_served().await;
}
