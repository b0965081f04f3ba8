//! Garbage, half messages, oversized lengths and silence on every listening socket: refused within bounded time,
//! and a link and an RPC connection that were there before notice nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use meshx::agent::control::message::text;
use meshx_etf::Term;
use meshx_tests::control::Control;
use meshx_tests::{Agent, Beam, BeamBuilder, Mesh};

/// Every handshake, hello and request has to be whole within 5 s (docs/mesh-protocol.md); three times that here.
const BOUND: Duration = Duration::from_secs(15);

trait Peer: Read + Write + Send {
    fn patience(&self, timeout: Duration);
}

impl Peer for TcpStream {
    fn patience(&self, timeout: Duration) {
        self.set_read_timeout(Some(timeout)).unwrap();
    }
}

impl Peer for UnixStream {
    fn patience(&self, timeout: Duration) {
        self.set_read_timeout(Some(timeout)).unwrap();
    }
}

/// How one door is knocked on.
type Knock = Box<dyn Fn() -> Box<dyn Peer>>;

/// The sockets of an agent and of the nodes and services behind it, and what `plain` has for nodes of plain distribution.
fn doors(agent: &Agent, plain: &Control) -> Vec<(String, Knock)> {
    let mut doors: Vec<(String, Knock)> = Vec::new();
    let mut paths: Vec<PathBuf> = ["control.sock", "dist.sock", "takeover.sock"]
        .map(|name| agent.dir().join(name))
        .into();
    for directory in ["vm", "up"] {
        let listed = std::fs::read_dir(agent.dir().join(directory)).unwrap();
        paths.extend(listed.map(|entry| entry.unwrap().path()));
    }
    assert!(
        paths.len() >= 5,
        "a node's and a service's socket should be there: {paths:?}"
    );
    for path in paths {
        let name = path.strip_prefix(agent.dir()).unwrap().display().to_string();
        doors.push((
            name,
            Box::new(move || Box::new(UnixStream::connect(&path).unwrap())),
        ));
    }
    let node_port = plain
        .request("node_port", vec![("node", text("shop@h1"))])
        .unwrap();
    let node_port = node_port.map_get("port").and_then(Term::as_int).unwrap();
    for (name, address) in [
        ("inbound", agent.inbound().to_owned()),
        ("http", agent.http().unwrap().to_owned()),
        ("epmd", format!("127.0.0.1:{}", agent.epmd().unwrap())),
        ("a node's port", format!("127.0.0.1:{node_port}")),
    ] {
        doors.push((
            name.into(),
            Box::new(move || Box::new(TcpStream::connect(&address).unwrap())),
        ));
    }
    doors
}

/// Reads until the other side closes. How long that took.
fn closed(mut peer: Box<dyn Peer>, door: &str, what: &str) -> Duration {
    let at = Instant::now();
    peer.patience(BOUND);
    let mut buffer = [0; 4096];
    let mut total = 0;
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return at.elapsed(),
            Ok(n) => total += n,
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                return at.elapsed();
            }
            Err(e) => panic!("{door}: {what}: still open after {BOUND:?}: {e}"),
        }
        assert!(total < 65_536, "{door}: {what}: a refusal should be short");
    }
}

fn messages() -> Vec<(&'static str, Vec<u8>)> {
    let mut noise = vec![0; 4096];
    getrandom::fill(&mut noise).unwrap();
    vec![
        ("silence", Vec::new()),
        ("one byte", vec![0]),
        ("an HTTP request", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("the largest length", vec![0xff; 64]),
        ("noise", noise),
        ("half a term", vec![0, 0, 0, 9, 131, 104, 3]),
        (
            "deep tuples",
            [&60_000_u32.to_be_bytes()[..], &[131], &[104, 1].repeat(29_999)].concat(),
        ),
        ("a TLS record that never ends", vec![22, 3, 1, 64, 0, 1]),
    ]
}

#[test]
fn every_door_refuses_and_nobody_else_notices() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let open = ["--http", "127.0.0.1:0", "--epmd=127.0.0.1:0", "--epmd-nodes", "*"];
    let h2 = mesh.agent_with("b", "127.0.0.3", &["h2"], &open).unwrap();
    let plain = Control::connect(&h2).unwrap();
    let mut cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect("Shop.CartClient.call(:echo, 1, 5_000, 100, 100)", "1")
        .unwrap();
    for node in [&mut shop, &mut cart] {
        node.eval(":net_kernel.monitor_nodes(true)").unwrap();
    }

    let mut open = Vec::new();
    for (door, connect) in doors(&h2, &plain) {
        for (what, bytes) in messages() {
            let mut peer = connect();
            // The other side may close before everything is written.
            let _ = peer.write_all(&bytes);
            open.push((door.clone(), what, peer));
        }
    }
    // With all of them open: the others work, over the links that were there and over new ones.
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();
    shop.expect("Shop.CartClient.call(:echo, 2)", "2").unwrap();
    let mut late = Beam::start(&h1, "late@h1").unwrap();
    late.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();

    let mut slowest = Duration::ZERO;
    for (door, what, peer) in open {
        slowest = slowest.max(closed(peer, &door, what));
    }
    println!("the slowest door closed after {slowest:?}");

    shop.expect(
        "receive do {:nodedown, node} -> node after 0 -> :none end",
        ":none",
    )
    .unwrap();
    cart.expect(
        "receive do {:nodedown, node} -> node after 0 -> :none end",
        ":none",
    )
    .unwrap();
    shop.expect("Shop.CartClient.call(:echo, 3)", "3").unwrap();
    shop.expect("Node.ping(:cart@h2)", ":pong").unwrap();
}

#[test]
fn hundreds_of_half_open_connections_do_not_keep_a_good_one_out() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let silent: Vec<TcpStream> = (0..400)
        .map(|_| TcpStream::connect(h2.inbound()).unwrap())
        .collect();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    drop(silent);
    cart.expect_soon("Node.list()", "[:shop@h1]").unwrap();
}
