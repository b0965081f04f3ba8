//! A node that has stopped leaves nothing behind. One test alone in its process, so that it can count.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::time::Duration;

use meshx::node::{Backoff, Reconnect};
use meshx_etf::Term;
use node_support::{Epmd, LONG, soon};
use tokio::net::TcpStream;
use tokio::runtime::Handle;

fn sockets() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"))
        .count()
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_task_and_no_socket_is_left_of_a_stopped_node() {
    let epmd = Epmd::start().await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    for round in 0..3 {
        // The test's own EPMD has a task and a socket for each registration, which end a moment after it.
        let (tasks_before, sockets_before) = (tasks(), sockets());
        let keep = Reconnect::Keep(Backoff::default());
        let a = epmd.builder("a@127.0.0.1").reconnect(keep).start().await.unwrap();
        let b = epmd.node("b@127.0.0.1").await;
        a.serve("echo", |request: Term| async move { request }).unwrap();
        let inbox = a.register("inbox").unwrap();
        // Up, being dialled for ever, and in the middle of a handshake.
        a.connect("b@127.0.0.1").await.unwrap();
        a.connect("cart@127.0.0.1").await.unwrap();
        a.connect("absent@127.0.0.1").await.unwrap_err();
        let half_open = TcpStream::connect(("127.0.0.1", epmd.port_of("a")))
            .await
            .unwrap();
        let called = beam.eval("gen_server:call({echo, 'a@127.0.0.1'}, ok).").await;
        assert_eq!(called, "ok");
        soon(b.ping("a@127.0.0.1", LONG)).await.unwrap();
        assert!(tasks() > tasks_before + 8 && sockets() > sockets_before + 8);

        // A mailbox that outlives its node holds no socket of it, and handles in other hands change nothing.
        let (second, call) = (a.clone(), inbox.pid().clone());
        a.stop().await;
        b.stop().await;
        assert!(
            second.send(&call, &Term::Int(1)).await.is_ok(),
            "to a process of its own, lost"
        );
        drop(half_open);
        let settled = async {
            while tasks() > tasks_before || sockets() > sockets_before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let left = tokio::time::timeout(LONG, settled).await;
        assert!(
            left.is_ok(),
            "round {round}: {} tasks, {} sockets too many",
            tasks() - tasks_before,
            sockets() - sockets_before
        );
        drop((inbox, second));
    }
}
