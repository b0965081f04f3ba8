//! Nodes of the library through real agents and mutual TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use meshx::agent::client::ControlClient;
use meshx::agent::control::message::{map, text};
use meshx::node::{ConnectError, DownReason, Node, NodeEvent};
use meshx::proxy::links::LinkId;
use meshx::proxy::local::Secret;
use meshx::proxy::wire::Accept;
use meshx_dist::handshake::{Cookie, Initiator, LocalNode};
use meshx_etf::Term;
use node_support::{COOKIE, LONG, soon};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::broadcast::Receiver;

struct Agent {
    dir: PathBuf,
    child: Child,
}

fn meshx(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshx"));
    command
        .args(arguments)
        .arg("--mesh-dir")
        .arg(root.join("mesh"))
        .kill_on_drop(true);
    command
}

impl Agent {
    async fn start(root: &Path, name: &str, ip: &str, host: &str) -> Self {
        let dir = root.join(name);
        let mut child = meshx(
            root,
            &[
                "agent",
                "--mesh",
                "embedded",
                "--bind",
                &format!("{ip}:0"),
                "--host",
                host,
            ],
        )
        .arg("--dir")
        .arg(&dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = soon(lines.next_line()).await.unwrap().unwrap();
        assert!(line.starts_with("meshx agent ready"), "{line}");
        Self { dir, child }
    }

    async fn node(&self, name: &str) -> Node {
        Node::builder(name)
            .cookie(COOKIE)
            .agent_dir(&self.dir)
            .start()
            .await
            .unwrap()
    }
}

fn root() -> TempDir {
    // Short: a socket's path has at most 107 bytes.
    tempfile::Builder::new().prefix("mxn").tempdir_in("/tmp").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_meet_over_mutual_tls_and_know_who_the_other_is() {
    let root = root();
    let a = Agent::start(root.path(), "a", "127.0.0.2", "h1").await;
    let b = Agent::start(root.path(), "b", "127.0.0.3", "h3").await;
    let (shop, search) = (a.node("shop@h1").await, b.node("search@h3").await);
    let mut events = search.events();
    search
        .serve("echo", |request: Term| async move { request })
        .unwrap();
    let large = Term::binary(vec![7; 8 << 20]);
    let answer = shop
        .gen_call(("echo", "search@h3"), large.clone(), LONG)
        .await
        .unwrap();
    assert!(answer == large);
    let NodeEvent::Up { identity, .. } = soon(events.recv()).await.unwrap() else {
        panic!("not up")
    };
    assert!(identity.unwrap().ends_with("/ns/default/dc/dc1/svc/shop"));

    let nobody = shop.connect("nobody@h3").await.unwrap_err();
    assert!(
        matches!(&nobody, ConnectError::Refused { cause, .. } if cause == "no_such_node"),
        "{nobody}"
    );
    shop.disconnect("search@h3");
    let denied = meshx(root.path(), &["deny", "shop", "search"])
        .status()
        .await
        .unwrap();
    assert!(denied.success());
    let denied = shop.connect("search@h3").await.unwrap_err();
    assert!(
        matches!(&denied, ConnectError::Refused { cause, .. } if cause == "intention_denied"),
        "{denied}"
    );

    // Stopped, a name is free at once, and nothing of the node is left.
    search.stop().await;
    let again = soon(async {
        loop {
            let builder = Node::builder("search@h3").cookie(COOKIE).agent_dir(&b.dir);
            if let Ok(node) = builder.start().await {
                break node;
            }
        }
    });
    let again = again.await;
    assert_eq!(std::fs::read_dir(b.dir.join("vm")).unwrap().count(), 1);
    assert!(again.creation() >= 4);
}

async fn down(events: &mut Receiver<NodeEvent>) -> DownReason {
    loop {
        match soon(events.recv()).await.unwrap() {
            NodeEvent::Down { reason, .. } => return reason,
            // It may be told a moment after the first answer came.
            NodeEvent::Up { .. } => {}
            other => panic!("{other:?} instead of the end"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_cut_when_the_agent_says_so() {
    let root = root();
    let a = Agent::start(root.path(), "a", "127.0.0.2", "h1").await;
    let (shop, search) = (a.node("shop@h1").await, a.node("search@h1").await);
    shop.ping("search@h1", LONG).await.unwrap();
    let (mut events, mut there) = (shop.events(), search.events());
    let control = ControlClient::connect(Some(&a.dir)).await.unwrap();
    let links = control.request("links", map([])).await.unwrap();
    let id = links.map_get("links").unwrap().as_list().unwrap()[0]
        .map_get("id")
        .unwrap()
        .as_str()
        .unwrap();
    let id = u128::from_str_radix(id, 16).unwrap().to_be_bytes();
    control
        .request(
            "cut",
            map([("link", Term::binary(id)), ("reason", text("enough"))]),
        )
        .await
        .unwrap();
    let reason = down(&mut events).await;
    // The agent closes the socket as well: whichever comes first ends the link.
    match reason {
        DownReason::Cut { text, .. } => assert!(text.contains("enough"), "{text}"),
        DownReason::Closed | DownReason::Io(_) => {}
        other => panic!("{other}"),
    }
    // The other end has seen it, too, before it dials anew.
    assert!(matches!(
        soon(there.recv()).await.unwrap(),
        NodeEvent::Down { .. }
    ));
    search.ping("shop@h1", LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_survives_its_agent() {
    let root = root();
    let mut a = Agent::start(root.path(), "a", "127.0.0.2", "h1").await;
    let search = a.node("search@h1").await;
    let creation = search.creation();
    a.child.kill().await.unwrap();
    let a = Agent::start(root.path(), "a", "127.0.0.2", "h1").await;
    let shop = a.node("shop@h1").await;
    // Registered again by itself, with the pids that are known of it still good.
    soon(async { while shop.connect("search@h1").await.is_err() {} }).await;
    let peer = shop.rpc("search@h1", "erlang", "node", vec![], LONG).await;
    assert!(peer.unwrap_err().is_undef());
    assert_eq!(search.creation(), creation);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_agent_gets_in() {
    let root = root();
    let a = Agent::start(root.path(), "a", "127.0.0.2", "h1").await;
    let search = a.node("search@h1").await;
    let socket = std::fs::read_dir(a.dir.join("vm"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&socket.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let accept = Accept {
        link: LinkId([1; 16]),
        secret: Secret::from_bytes([0; 32]),
        remote_node: "shop@h1".into(),
        remote_spiffe: String::new(),
        remote_agent: String::new(),
    };
    let mut frame = Vec::new();
    accept.encode(&mut frame);
    // With the name that would follow: a node that took the secret would answer it.
    let (local, cookie) = (LocalNode::hidden("shop@h1", 7), Cookie::new(COOKIE));
    Initiator::start(local, "search@h1", cookie, &mut frame).unwrap();
    for bytes in [frame.as_slice(), b"\xFF\xFF", b"\0\x02\x09\x09", b"\0\x15N"] {
        let mut stream = UnixStream::connect(socket.path()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap_or(0), 0, "{bytes:?}");
    }
    let tool = a.node("tool@h1").await;
    tool.ping("search@h1", Duration::from_secs(10)).await.unwrap();
    drop(search);
}
