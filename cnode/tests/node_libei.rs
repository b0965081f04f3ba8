//! A C node of libei, C's erl_interface, as the other node: it dials, sends and receives. Needs `cc` and libei.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../native/etf/tests/common/libei.rs"]
mod libei;
mod node_support;

use std::process::Stdio;

use meshx::node::{Message, Node, NodeEvent};
use meshx_etf::{Pid, Term};
use node_support::{COOKIE, Epmd, soon};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

const EI_NODE: &str = include_str!("../../tests/libei/ei_node.c");
const THEIRS: &str = "ei@127.0.0.1";
const COUNT: i64 = 300;

/// The process, which takes commands.
struct CNode {
    process: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl CNode {
    /// Starts it: it connects to the node `ours@127.0.0.1`, and says "ready".
    fn start(epmd: &Epmd, cookie: &str) -> Self {
        let program = libei::compile(EI_NODE);
        let mut process = Command::new(&program)
            .args([THEIRS, cookie, "ours@127.0.0.1"])
            .env("ERL_EPMD_PORT", epmd.addr.port().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        std::fs::remove_file(program).unwrap();
        let commands = process.stdin.take().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap()).lines();
        Self {
            process,
            commands,
            answers,
        }
    }

    async fn ask(&mut self, command: &str) {
        self.commands.write_all(command.as_bytes()).await.unwrap();
    }

    async fn answer(&mut self) -> Option<String> {
        soon(self.answers.next_line()).await.unwrap()
    }
}

async fn node(epmd: &Epmd) -> Node {
    epmd.node("ours@127.0.0.1").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_c_node_sends_and_receives() {
    let epmd = Epmd::start().await;
    let node = node(&epmd).await;
    let mut sink = node.register("sink").unwrap();
    let mut acks = node.register("acks").unwrap();
    let mut theirs = CNode::start(&epmd, COOKIE);
    assert_eq!(theirs.answer().await.as_deref(), Some("ready"));
    assert_eq!(node.nodes(), [THEIRS]);
    let mut pid: Option<Pid> = None;
    // Each in one frame: libei knows no fragments.
    for size in [0, 64, 16_384, 200_000] {
        theirs.ask(&format!("send {COUNT} {size}\n")).await;
        let start = received(sink.recv_timeout(node_support::LONG).await.unwrap());
        let [label, Term::Pid(from), Term::Int(COUNT)] = start.as_tuple().unwrap() else {
            panic!("{start:?}")
        };
        assert_eq!((label.as_atom(), from.node.as_str()), (Some("start"), THEIRS));
        for _ in 0..COUNT {
            let message = received(sink.recv_timeout(node_support::LONG).await.unwrap());
            assert_eq!(message.as_binary(), Some(vec![0; size].as_slice()));
        }
        sink.send(from, &Term::atom("done")).await.unwrap();
        assert_eq!(theirs.answer().await.as_deref(), Some("done"));
        pid = Some(from.clone());
    }
    for size in [0, 64, 16_384, 200_000] {
        theirs.ask(&format!("receive {COUNT}\n")).await;
        for _ in 0..COUNT {
            sink.send(pid.as_ref().unwrap(), &Term::binary(vec![7; size]))
                .await
                .unwrap();
        }
        let done = received(acks.recv_timeout(node_support::LONG).await.unwrap());
        assert_eq!(done.as_atom(), Some("done"));
        assert_eq!(theirs.answer().await.as_deref(), Some("done"));
    }
    let mut events = node.events();
    theirs.process.kill().await.unwrap();
    loop {
        if let NodeEvent::Down { node, .. } = soon(events.recv()).await.unwrap() {
            assert_eq!(node, THEIRS);
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_c_node_with_another_cookie_gets_nowhere() {
    let epmd = Epmd::start().await;
    let node = node(&epmd).await;
    let mut theirs = CNode::start(&epmd, "another");
    assert_eq!(theirs.answer().await, None);
    assert!(!soon(theirs.process.wait()).await.unwrap().success());
    assert!(node.nodes().is_empty());
}

fn received(message: Message) -> Term {
    match message {
        Message::Term { term, .. } => term,
        other => panic!("{other:?}"),
    }
}
