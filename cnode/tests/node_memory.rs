//! What mailboxes, monitors and links cost in memory: growth of this process's resident set, printed.
//!
//! `cargo test -p meshx --test node_memory -- --nocapture` prints the table. The bounds asserted are loose:
//! they are there to notice a cost of another order, not to measure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use meshx::node::{Mailbox, Message};
use meshx_etf::{Pid, Term};
use node_support::{Epmd, LONG, soon};

const MAILBOXES: usize = 10_000;
const WATCHES: usize = 1_000;
/// The whole of it is done this often, and what each further round adds is averaged: buffers and arenas that are
/// there once are so left out.
const ROUNDS: usize = 10;

/// Resident bytes of this process.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<usize>().unwrap() * 1024
}

/// Prints what `count` of them cost, the first time and on average later; bytes of one.
async fn measure(what: &str, count: usize, mut make: impl AsyncFnMut()) -> usize {
    let before = resident();
    make().await;
    let first = resident();
    for _ in 1..ROUNDS {
        make().await;
    }
    let grown = resident().saturating_sub(first);
    let each = grown / (count * (ROUNDS - 1));
    println!(
        "{count:>6} {what:<34} {:>8.1} KiB first, {:>8.1} KiB on average later: {each:>5} B each",
        first.saturating_sub(before) as f64 / 1024.0,
        grown as f64 / 1024.0 / (ROUNDS - 1) as f64,
    );
    each
}

async fn received_pid(mailbox: &mut Mailbox) -> Pid {
    let Some(Message::Term { term, .. }) = soon(mailbox.recv()).await else {
        panic!("no message")
    };
    term.as_pid().unwrap().clone()
}

#[tokio::test]
async fn memory_of_mailboxes_monitors_and_links() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let mut main = node.register("main").unwrap();
    beam.eval("N = 'search@127.0.0.1', M = {main, N}.").await;
    beam.eval(
        "P = spawn(fun L() -> receive {monitor, C} -> [monitor(process, M) || _ <- lists:seq(1, C)], M ! self(), L() \
         end end), M ! P.",
    )
    .await;
    let target = received_pid(&mut main).await;

    let mut boxes = Vec::new();
    let mailbox = measure("mailboxes", MAILBOXES, async || {
        boxes.extend((0..MAILBOXES).map(|_| node.mailbox()));
    })
    .await;
    let mut named = 0;
    let name = measure("mailboxes with a name", MAILBOXES, async || {
        for _ in 0..MAILBOXES {
            named += 1;
            boxes.push(node.register(&format!("name{named}")).unwrap());
        }
    })
    .await;
    let outgoing = measure("monitors of a BEAM's process", WATCHES, async || {
        for _ in 0..WATCHES {
            main.monitor(&target).await;
        }
        node.ping("cart@127.0.0.1", LONG).await.unwrap();
    })
    .await;
    let incoming = measure("monitors that a BEAM holds here", WATCHES, async || {
        let order = Term::tuple([Term::atom("monitor"), Term::Int(WATCHES as i64)]);
        main.send(&target, &order).await.unwrap();
        // Behind all of them.
        assert_eq!(received_pid(&mut main).await, target);
    })
    .await;
    let mut at = 0;
    let links = measure("links to a BEAM's process", WATCHES, async || {
        for mailbox in &boxes[at..at + WATCHES] {
            mailbox.link(&target).await;
        }
        at += WATCHES;
        node.ping("cart@127.0.0.1", LONG).await.unwrap();
    })
    .await;
    // These are too many for what was freed before to hold them: else nothing was measured.
    assert!(mailbox > 0);
    for (what, each, bound) in [
        ("mailbox", mailbox, 2048),
        ("named mailbox", name, 2048),
        ("outgoing monitor", outgoing, 2048),
        ("incoming monitor", incoming, 2048),
        ("link", links, 2048),
    ] {
        assert!(each < bound, "{what}: {each} B");
    }
}
