//! Calls to `rex` by a peer that lies about who calls.

use crate::node_support::{COOKIE, LONG, soon};
use crate::scene::{EVIL, Raw, Scene, pid};
use meshx::node::{Limits, Message};
use meshx_dist::control::Control;
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
    let Some(Message::Term {
        term: Term::Tuple(mut answer),
        ..
    }) = soon(victim.recv()).await
    else {
        panic!("no answer")
    };
    let refused = Term::tuple([Term::atom("badrpc"), Term::atom("system_limit")]);
    assert_eq!(answer.pop(), Some(refused), "{way:?}");
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
