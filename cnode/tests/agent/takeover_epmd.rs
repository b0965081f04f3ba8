//! What nodes of plain distribution live by goes over in a takeover: EPMD, its names, and their ports.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::Stdio,
    time::{Duration, Instant},
};

use meshx::agent::{
    control::message::{map, text},
    takeover::TAKEOVER_VERSIONS,
};
use meshx_etf::Term;
use rustix::process::Signal;
use serde_json::json;

use crate::{
    support::{Agent, Client, LONG, PATIENCE, temp, until},
    takeover::{Peer, client},
};

/// An agent that is EPMD.
pub(crate) const EPMD: [&str; 3] = ["--epmd=127.0.0.1:0", "--epmd-nodes", "*"];

pub(crate) fn epmd_port(agent: &Agent) -> u16 {
    let port = agent.ready.rsplit_once("epmd=").unwrap().1;
    port.parse().unwrap()
}

/// A client of EPMD.
pub(crate) mod epmd {
    use std::{
        io::{Read, Write},
        net::TcpStream,
    };

    use meshx_dist::epmd::{Node, NodeType, Request, decode_alive2_resp, decode_names_resp};

    fn ask(port: u16, request: &Request) -> TcpStream {
        let mut bytes = Vec::new();
        request.encode(&mut bytes).unwrap();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(super::LONG)).unwrap();
        stream.write_all(&bytes).unwrap();
        stream
    }

    /// The connection that holds the name, and the node's creation; none when it is refused.
    pub(crate) fn register(port: u16, name: &str) -> Option<(TcpStream, u32)> {
        let mut stream = ask(port, &Request::Alive2(Node::new(name, 9, NodeType::Normal)));
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        let creation = decode_alive2_resp(&answer).unwrap().unwrap().creation()?;
        Some((stream, creation))
    }

    pub(crate) fn names(port: u16) -> Vec<String> {
        let mut answer = Vec::new();
        ask(port, &Request::Names).read_to_end(&mut answer).unwrap();
        let names = decode_names_resp(&answer).unwrap().nodes.into_iter();
        names.map(|(name, _)| String::from_utf8(name).unwrap()).collect()
    }
}

/// The first message of a distribution handshake, of an OTP 23 and later (ERL_DIST protocol, `send_name`).
fn name_message(name: &str) -> Vec<u8> {
    let mut message = vec![b'N'];
    // The flags of OTP 25.
    message.extend_from_slice(&0x0000_000d_07df_7fbd_u64.to_be_bytes());
    message.extend_from_slice(&7_u32.to_be_bytes());
    message.extend_from_slice(&(name.len() as u16).to_be_bytes());
    message.extend_from_slice(name.as_bytes());
    let mut framed = (message.len() as u16).to_be_bytes().to_vec();
    framed.append(&mut message);
    framed
}

/// Reads until these bytes have come.
fn read_to(stream: &mut impl Read, bytes: &[u8]) {
    let mut seen = Vec::new();
    while !seen.ends_with(bytes) {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        seen.extend(byte);
    }
}

#[test]
fn where_nodes_find_epmd_cannot_change_in_a_takeover() {
    let root = temp();
    let hosts = ["h1", "h1.lan"];
    let agent = Agent::start(root.path(), "a", &hosts, &EPMD);
    let epmd = epmd_port(&agent);
    let (_cart, _) = epmd::register(epmd, "cart").unwrap();
    for (options, seen) in [
        (&[][..], format!("--epmd is {epmd} and would be off")),
        (
            &["--epmd=127.0.0.1:1"],
            format!("--epmd is {epmd} and would be 127.0.0.1:1"),
        ),
        (
            &["--epmd=127.0.0.14:0"],
            format!("--epmd is 127.0.0.1:{epmd} and would be 127.0.0.14:0"),
        ),
        (
            &["--epmd=127.0.0.1:0", "--epmd-host", "h1.lan"],
            "--epmd-host is h1 and would be h1.lan".to_owned(),
        ),
    ] {
        let log = root.path().join("refused.log");
        let mut refused = Agent::command(root.path(), &agent.dir, &hosts)
            .arg("--takeover")
            .args(options)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while refused.try_wait().unwrap().is_none() && began.elapsed() < LONG {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Were it one that serves.
        let _ = refused.kill();
        assert_eq!(refused.wait().unwrap().code(), Some(69), "{options:?}");
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.contains(&seen) && text.contains("cannot change"), "{text}");
        agent.wait_log(&[&seen]);
        assert_eq!(epmd::names(epmd), ["cart"]);
    }
}

#[test]
fn what_epmd_holds_goes_over_with_its_connections() {
    let root = temp();
    let mut first = Agent::start(root.path(), "a", &["h1"], &EPMD);
    let epmd = epmd_port(&first);
    let (cart, given) = epmd::register(epmd, "cart").unwrap();
    let (tool, _) = epmd::register(epmd, "rpc-1-cart").unwrap();
    let mut second = Agent::start(root.path(), "a", &["h1"], &[&EPMD[..], &["--takeover"]].concat());
    assert_eq!(second.ready, first.ready, "EPMD has its port");
    assert!(first.wait_exit().success(), "it holds no link");
    assert_eq!(epmd::names(epmd), ["cart", "rpc-1-cart"]);
    assert_eq!(second.names(), ["cart@h1"]);
    // The same registrations as before, not new ones, and each name is its holder's.
    second.wait_log(&["node registered"]);
    let log = second.log();
    assert_eq!(log.matches("node registered").count(), 1, "{log}");
    assert!(epmd::register(epmd, "cart").is_none() && epmd::register(epmd, "rpc-1-cart").is_none());
    let (_other, next) = epmd::register(epmd, "search").unwrap();
    assert!(next > given, "creations are counted on: {given}, {next}");

    // A name ends with its connection, and what ends while nobody serves is not missed.
    drop(cart);
    until(PATIENCE, "the end of a name", || second.names() == ["search@h1"]);
    let mut third = Peer::welcomed(&second, TAKEOVER_VERSIONS).0;
    third.send(&json!("begin"));
    third.receive_until("all");
    drop(tool);
    drop(third);
    until(PATIENCE, "the end of a tool", || epmd::names(epmd) == ["search"]);
    second.signal(Signal::TERM);
    assert!(second.wait_exit().success());
}

#[test]
fn a_port_of_plain_distribution_leads_on_and_its_links_live() {
    let root = temp();
    let first = Agent::start(root.path(), "a", &["h1"], &[]);
    let (mut client, listener) = client(&first);
    let port = |client: &mut Client| {
        let asked = map([("node", text("shop@h1")), ("ip", text("127.0.0.1"))]);
        let answer = client.ask("node_port", asked).unwrap();
        answer.map_get("port").and_then(Term::as_int).unwrap() as u16
    };
    let before = port(&mut client);
    // A session: it is of the same user, and so may reach that node.
    let dial = |name: &str| {
        let mut near = TcpStream::connect(("127.0.0.1", before)).unwrap();
        near.write_all(&name_message(name)).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(LONG)).unwrap();
        read_to(&mut far, name.as_bytes());
        (near, far)
    };
    let (mut near, mut far) = dial("console@h1");
    let second = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    near.write_all(b"still here").unwrap();
    read_to(&mut far, b"still here");
    assert_eq!(port(&mut client), before);
    let (_near, _far) = dial("another@h1");
    // Each process has one of them, and the first tells the second of its own when it is asked to.
    until(LONG, "both links", || {
        let links = client.ask("links", map([])).unwrap().to_string();
        links.contains("console@h1") && links.contains("another@h1")
    });
    assert!(second.names() == ["shop@h1"]);
    // The rules of the new process end the link of the old one.
    // Its end is told beside the answer.
    client.send("deregister", map([("id", text("shop@h1"))]));
    assert_eq!(near.read(&mut [0]).unwrap_or(0), 0);
}
