//! What EPMD's stand-in does not take, and whom its ports do not believe.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use meshx_dist::flags::DistFlags;
use meshx_dist::name_frame::{peek_name_frame, refusal_status};
use meshx_tests::epmd::{
    Alive, STRANGER, alive2, dial, dial_as, exchange_as_stranger, names, port_please, send_name,
};
use meshx_tests::{Agent, Mesh, wait_until};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// For what happens at once.
const SOON: Duration = Duration::from_secs(10);

fn agent(mesh: &Mesh, name: &str, ip: &str, host: &str, more: &[&str]) -> Agent {
    let options = [
        &[
            "--epmd=127.0.0.1:0",
            "--epmd-nodes",
            "shop",
            "--epmd-nodes",
            "cart",
        ],
        more,
    ]
    .concat();
    mesh.agent_with(name, ip, &[host], &options).unwrap()
}

fn pair() -> (Mesh, Agent, Agent) {
    let mesh = Mesh::new().unwrap();
    let h1 = agent(&mesh, "a", "127.0.0.2", "h1", &["--http", "127.0.0.1:0"]);
    let h2 = agent(&mesh, "b", "127.0.0.3", "h2", &[]);
    (mesh, h1, h2)
}

/// The loopback address of h2 at h1.
fn address_of(h1: &Agent, host: &str) -> IpAddr {
    let inetrc = h1.meshx_ok(&["inetrc", host]).unwrap();
    let line = inetrc
        .lines()
        .find(|line| line.contains(&format!("[\"{host}\"]")))
        .unwrap();
    let numbers = line.trim_start_matches("{host, {").split('}').next().unwrap();
    let address = numbers.replace(',', ".").parse().unwrap();
    // The listener follows the file.
    wait_until(SOON, || dial((address, h1.epmd().unwrap()).into()).is_ok()).unwrap();
    address
}

/// The name of the next link that reaches this node, and whether it is a visible node's.
fn next_name(node: &Alive) -> (String, bool) {
    let (mut stream, _) = node.listener.accept().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut bytes = Vec::new();
    loop {
        if let Some(frame) = peek_name_frame(&bytes).unwrap() {
            let seen = (frame.name.to_owned(), frame.flags.contains(DistFlags::PUBLISHED));
            stream.write_all(b"\x00\x03sok").unwrap();
            return seen;
        }
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        bytes.extend_from_slice(&byte);
    }
}

/// A link that is taken: the far end's status comes back. Who is not registered is hidden, whatever it says.
fn reaches(ip: IpAddr, port: u16, as_name: &str, node: &Alive) {
    let mut stream = dial((ip, port).into()).unwrap();
    stream.write_all(&send_name(as_name)).unwrap();
    let registered = as_name != "tool@h1";
    assert_eq!(next_name(node), (as_name.to_owned(), registered));
    let mut status = [0; 5];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"\x00\x03sok");
}

fn refuses(agent: &Agent, (ip, port): (IpAddr, u16), name: &str, cause: &str) {
    let before = agent.process.log().matches(cause).count();
    assert_eq!(dial_as(ip, port, name).unwrap(), refusal_status(), "{name}");
    agent.process.wait_log_count(cause, before + 1, SOON).unwrap();
}

#[test]
fn names_come_and_go_with_their_connections() {
    let (_mesh, h1, h2) = pair();
    let (p1, p2) = (h1.epmd().unwrap(), h2.epmd().unwrap());
    let shop = Alive::register(p1, "shop").unwrap();
    let cart = Alive::register(p2, "cart").unwrap();
    assert!(shop.creation >= 4 && cart.creation >= 4);
    h1.wait_name("cart@h2", true, SOON).unwrap();
    assert_eq!(names(p1).unwrap(), ["shop"]);
    assert_eq!(
        port_please(HERE, p1, "cart").unwrap(),
        None,
        "it is on the other host"
    );

    let h2_at_h1 = address_of(&h1, "h2");
    let port = port_please(h2_at_h1, p1, "cart").unwrap().unwrap();
    assert_eq!(
        port_please(h2_at_h1, p1, "cart").unwrap(),
        Some(port),
        "the same port again"
    );
    assert_eq!(port_please(h2_at_h1, p1, "shop").unwrap(), None);
    reaches(h2_at_h1, port, "shop@h1", &cart);

    // A second one of the name is refused, and the first is not disturbed.
    let (_, answer) = alive2(p1, "shop", 9).unwrap();
    assert_eq!(answer.creation(), None, "{answer:?}");
    h1.process.wait_log("name_taken", SOON).unwrap();

    // A killed node's name is free at once, and its successor is another incarnation.
    let creation = shop.creation;
    drop(shop);
    let shop = Alive::register(p1, "shop").unwrap();
    assert_ne!(shop.creation, creation);
    drop(cart);
    h1.wait_name("cart@h2", false, Duration::from_secs(3)).unwrap();
    assert_eq!(port_please(h2_at_h1, p1, "cart").unwrap(), None);
}

#[test]
fn only_listed_names_and_none_with_a_secret() {
    let (_mesh, h1, _h2) = pair();
    let epmd = h1.epmd().unwrap();
    let (_, answer) = alive2(epmd, "evil", 9).unwrap();
    assert_eq!(answer.creation(), None);
    h1.process.wait_log("--epmd-nodes evil", SOON).unwrap();
    let _shop = meshx_tests::Beam::start(&h1, "shop@h1").unwrap();
    let (_, answer) = alive2(epmd, "shop", 9).unwrap();
    assert_eq!(answer.creation(), None, "it is registered with a secret");
    h1.process.wait_log("name_taken", SOON).unwrap();
    // It is reached, but nobody dials in its name.
    let port = port_please(HERE, epmd, "shop").unwrap().unwrap();
    refuses(&h1, (HERE, port), "shop@h1", "proven itself by a secret");
    let metrics = h1.metrics().unwrap();
    for counted in [
        "meshx_refusals_total{listener=\"epmd\",cause=\"name_taken\"} 1",
        "meshx_refusals_total{listener=\"epmd\",cause=\"not_permitted\"} 1",
        "meshx_refusals_total{listener=\"plain\",cause=\"identity_mismatch\"} 1",
    ] {
        assert!(metrics.contains(counted), "{counted} not in {metrics}");
    }
}

#[test]
fn a_name_is_believed_only_from_who_has_it() {
    let (_mesh, h1, h2) = pair();
    let (p1, p2) = (h1.epmd().unwrap(), h2.epmd().unwrap());
    let shop = Alive::register(p1, "shop").unwrap();
    let cart = Alive::register(p2, "cart").unwrap();
    let far = address_of(&h1, "h2");
    let port = port_please(far, p1, "cart").unwrap().unwrap();
    // Names of nobody, of a node elsewhere, and of the target itself: to other hosts, none of them.
    for name in ["nobody@h1", "cart@h2", "shop@h2"] {
        refuses(
            &h1,
            (far, port),
            name,
            "is not registered as a node of plain distribution here",
        );
    }
    // On this host they are sessions, which are their own user's, unless the name is another's.
    let near = port_please(HERE, p1, "shop").unwrap().unwrap();
    refuses(&h1, (HERE, near), "cart@h2", "is a node of another agent");
    reaches(HERE, near, "tool@h1", &shop);
    // What is no name message is answered and closed.
    let mut stream = dial((HERE, near).into()).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(answer, refusal_status());
    drop((shop, cart));
    // What is deregistered has no links, whatever port somebody still knows.
    h1.wait_name("shop@h1", false, SOON).unwrap();
    refuses(&h1, (HERE, near), "tool@h1", "reaches nodes of this agent only");
}

#[test]
fn both_directions_are_asked_for_and_a_denial_cuts() {
    let (_mesh, h1, h2) = pair();
    let (p1, p2) = (h1.epmd().unwrap(), h2.epmd().unwrap());
    let _shop = Alive::register(p1, "shop").unwrap();
    let cart = Alive::register(p2, "cart").unwrap();
    let far = address_of(&h1, "h2");
    let port = port_please(far, p1, "cart").unwrap().unwrap();
    for (source, destination) in [("shop", "cart"), ("cart", "shop")] {
        h1.meshx_ok(&["deny", source, destination]).unwrap();
        refuses(&h1, (far, port), "shop@h1", "intention_denied");
        h1.meshx_ok(&["allow", source, destination]).unwrap();
    }
    let mut live = dial((far, port).into()).unwrap();
    live.write_all(&send_name("shop@h1")).unwrap();
    assert_eq!(next_name(&cart), ("shop@h1".to_owned(), true));
    h1.meshx_ok(&["deny", "cart", "shop"]).unwrap();
    let at = Instant::now();
    let mut rest = Vec::new();
    let _ = live.read_to_end(&mut rest);
    println!("a live link was cut after {:?}", at.elapsed());
    // Promised within 2 s, and the end that is told by nothing but the close has a second more.
    assert!(at.elapsed() < Duration::from_secs(9), "{:?}", at.elapsed());
}

/// All that comes back to another user.
fn as_stranger(port: u16, bytes: &[u8]) -> Vec<u8> {
    exchange_as_stranger(port, bytes, 1024, 30).unwrap()
}

#[test]
fn another_user_has_neither_our_names_nor_our_nodes() {
    let (_mesh, h1, _h2) = pair();
    let epmd = h1.epmd().unwrap();
    let request = |request: meshx_dist::epmd::Request| {
        let mut bytes = Vec::new();
        request.encode(&mut bytes).unwrap();
        bytes
    };
    let node = |name: &str| meshx_dist::epmd::Node::new(name, 9, meshx_dist::epmd::NodeType::Normal);
    // Not the service that the name stands for: no rule lets that user be it.
    let refused = as_stranger(epmd, &request(meshx_dist::epmd::Request::Alive2(node("shop"))));
    assert_eq!(refused, [118, 1, 0, 0, 0, 0]);
    h1.process
        .wait_log("uid 4711 (gid 4294967295) may not be service shop", SOON)
        .unwrap();

    let shop = Alive::register(epmd, "shop").unwrap();
    let port = port_please(HERE, epmd, "shop").unwrap().unwrap();
    reaches(HERE, port, "tool@h1", &shop);
    for (name, why) in [
        ("shop@h1", "uid 4711 dials as shop@h1, wanted uid 0"),
        ("tool@h1", "reaches nodes of its own user only"),
    ] {
        assert_eq!(as_stranger(port, &send_name(name)), refusal_status(), "{name}");
        h1.process.wait_log(why, SOON).unwrap();
    }
    // Of a tool they may know the name, not the port.
    let _tool = Alive::register(epmd, "rpc-7-shop").unwrap();
    let asked = request(meshx_dist::epmd::Request::PortPlease2(b"rpc-7-shop".to_vec()));
    assert_eq!(as_stranger(epmd, &asked), [119, 1]);
    assert!(port_please(HERE, epmd, "rpc-7-shop").unwrap().is_some());
}

/// A program that has the port of a node that ended is not the node.
#[test]
fn a_port_that_another_user_has_is_not_the_nodes() {
    let (_mesh, h1, _h2) = pair();
    let epmd = h1.epmd().unwrap();
    let script = "use IO::Socket::INET; $| = 1; my $s = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 1); \
                  print $s->sockport, \"\n\"; my $c = $s->accept; print sysread($c, my $b, 1), \" bytes\n\";";
    assert!(rustix::process::geteuid().is_root(), "run this as root");
    let uid = STRANGER.to_string();
    let arguments = [
        "--reuid",
        &uid,
        "--regid",
        &uid,
        "--clear-groups",
        "perl",
        "-e",
        script,
    ];
    let mut stranger = meshx_tests::Process::start("stranger", "setpriv", arguments, |_| ()).unwrap();
    let port: u16 = stranger.wait_for(SOON, |line| line.parse().ok()).unwrap();
    let own = TcpListener::bind((HERE, 0)).unwrap();
    let _shop = Alive::register_at(epmd, "shop", port, own).unwrap();
    let port = port_please(HERE, epmd, "shop").unwrap().unwrap();
    refuses(
        &h1,
        (HERE, port),
        "tool@h1",
        "uid 4711 listens for shop@h1, wanted 0",
    );
    // It saw a connection, and not a byte of it.
    stranger
        .wait_for(SOON, |line| (line == "0 bytes").then_some(()))
        .unwrap();
}
