//! How connections come about, and how they come back: registration, policies, both ends at once, refusals.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use meshx::node::{
    Backoff, ConnectError, DownReason, Limits, Message, Node, NodeEvent, Reconnect, SendError, StartError,
};
use meshx_dist::flags::DistFlags;
use meshx_dist::framing::HandshakeDecoder;
use meshx_dist::handshake::{Challenge, Cookie, HandshakeError, Initiator, LocalNode, SendName, Status};
use meshx_etf::Term;
use node_support::{Beam, COOKIE, Epmd, LONG, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::broadcast::Receiver;

/// Quick, so that tests do not wait for what is slow on purpose.
const QUICK: Backoff = Backoff {
    min: Duration::from_millis(20),
    max: Duration::from_millis(200),
};

/// The next event that is none of ticks.
async fn next(events: &mut Receiver<NodeEvent>) -> NodeEvent {
    loop {
        match soon(events.recv()).await.unwrap() {
            NodeEvent::Tick { .. } => {}
            event => return event,
        }
    }
}

async fn up(events: &mut Receiver<NodeEvent>, name: &str) {
    match next(events).await {
        NodeEvent::Up { node, .. } => assert_eq!(node, name),
        other => panic!("{other:?} instead of an up"),
    }
}

async fn down(events: &mut Receiver<NodeEvent>, name: &str) -> DownReason {
    match next(events).await {
        NodeEvent::Down { node, reason } => {
            assert_eq!(node, name);
            reason
        }
        other => panic!("{other:?} instead of a down"),
    }
}

/// OTP's own daemon, on a port of its own.
async fn real_epmd(addr: SocketAddr) -> Child {
    let child = Command::new("epmd")
        .args(["-port", &addr.port().to_string(), "-address", "127.0.0.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("epmd is needed for these tests");
    soon(async {
        while TcpStream::connect(addr).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    child
}

/// An address that nobody else gets while its daemon is away: the system gives such a port to nobody who asks for
/// any, and no other test takes it while the port before it is held.
fn own_address() -> (std::net::TcpListener, SocketAddr) {
    let bind = |port| std::net::TcpListener::bind(("127.0.0.1", port)).ok();
    (11_000..12_000)
        .step_by(2)
        .find_map(|port| Some((bind(port)?, bind(port + 1)?.local_addr().unwrap())))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_outlives_its_epmd() {
    let (_held, addr) = own_address();
    let mut epmd = real_epmd(addr).await;
    let builder = || Node::builder("search@127.0.0.1").cookie(COOKIE).plain_epmd(addr);
    let node = builder().start().await.unwrap();
    assert!(node.creation() > 3);
    let taken = builder().start().await.unwrap_err();
    assert!(matches!(&taken, StartError::Registration { .. }), "{taken}");
    let mut beam = Beam::start(addr, "cart@127.0.0.1", &[]).await;
    assert_eq!(beam.eval("net_adm:ping('search@127.0.0.1').").await, "pong");

    let mut events = node.events();
    epmd.kill().await.unwrap();
    assert_eq!(next(&mut events).await, NodeEvent::RegistrationLost);
    assert_eq!(
        beam.eval("net_adm:ping('search@127.0.0.1').").await,
        "pong",
        "connections stay"
    );
    let creation = node.creation();
    let _epmd = real_epmd(addr).await;
    assert_eq!(next(&mut events).await, NodeEvent::RegisteredAgain);
    assert_eq!(node.creation(), creation);
    // Found anew: by a node that has never heard of it.
    let mut other = Beam::start(addr, "shop@127.0.0.1", &[]).await;
    assert_eq!(other.eval("net_adm:ping('search@127.0.0.1').").await, "pong");
    node.stop().await;
    builder()
        .start()
        .await
        .expect("the name is free as soon as the node has stopped");
}

#[tokio::test]
async fn plain_distribution_stays_on_loopback() {
    let epmd = Epmd::start().await;
    let started = epmd
        .builder("a@127.0.0.1")
        .plain_listen([0, 0, 0, 0].into())
        .start();
    let refused = started.await.unwrap_err();
    assert!(
        matches!(&refused, StartError::NotLoopback(addr) if addr.port() == 0),
        "{refused}"
    );
    // Told otherwise, it listens there, and looks hosts up by their names.
    let open = |name: &str, ip: [u8; 4]| {
        epmd.builder(name)
            .plain_listen(ip.into())
            .insecure_plain_beyond_loopback()
    };
    let a = open("a@127.0.0.1", [0, 0, 0, 0]).start().await.unwrap();
    let b = open("b@localhost", [127, 0, 0, 1]).start().await.unwrap();
    a.connect("b@localhost").await.unwrap();
    assert_eq!(a.nodes(), ["b@localhost"]);
    let unknown = a.connect("c@no-such-host.invalid").await.unwrap_err();
    assert!(
        matches!(
            &unknown,
            ConnectError::Io {
                step: "looking up the host",
                ..
            }
        ),
        "{unknown}"
    );
    b.stop().await;
}

#[tokio::test]
async fn an_epmd_that_does_not_answer_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let limits = meshx::node::Limits {
        handshake_time: Duration::from_millis(200),
        ..Default::default()
    };
    let builder = Node::builder("a@127.0.0.1").cookie(COOKIE).limits(limits);
    let started = builder.plain_epmd(silent.local_addr().unwrap()).start();
    let error = soon(started).await.unwrap_err();
    assert!(error.to_string().contains("no answer within 200ms"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_never_dials_connects_when_told() {
    let epmd = Epmd::start().await;
    let node = epmd
        .builder("a@127.0.0.1")
        .reconnect(Reconnect::Never)
        .start()
        .await
        .unwrap();
    let other = epmd.node("b@127.0.0.1").await;
    let mut inbox = other.register("inbox").unwrap();
    let sent = node.send(("inbox", "b@127.0.0.1"), &Term::Int(1)).await;
    assert!(
        matches!(&sent, Err(SendError::Connect(ConnectError::NotConnected(node))) if node == "b@127.0.0.1"),
        "{sent:?}"
    );
    node.connect("b@127.0.0.1").await.unwrap();
    node.send(("inbox", "b@127.0.0.1"), &Term::Int(2)).await.unwrap();
    let received = soon(inbox.recv()).await.unwrap();
    assert!(matches!(
        received,
        meshx::node::Message::Term {
            term: Term::Int(2),
            ..
        }
    ));
    // It is found and dialled by others all the same.
    let mut events = other.events();
    assert!(node.disconnect("b@127.0.0.1"));
    assert_eq!(down(&mut events, "a@127.0.0.1").await, DownReason::Closed);
    soon(other.ping("a@127.0.0.1", LONG)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_connection_comes_back_until_it_is_given_up() {
    let epmd = Epmd::start().await;
    let builder = epmd.builder("a@127.0.0.1").reconnect(Reconnect::Keep(QUICK));
    let node = builder.start().await.unwrap();
    let mut events = node.events();
    // Not there yet.
    let absent = node.connect("b@127.0.0.1").await.unwrap_err();
    assert!(matches!(absent, ConnectError::NoSuchNode { .. }), "{absent}");
    for _ in 0..3 {
        let other = epmd.node("b@127.0.0.1").await;
        up(&mut events, "b@127.0.0.1").await;
        other.stop().await;
        assert_eq!(down(&mut events, "b@127.0.0.1").await, DownReason::Closed);
    }
    let other = epmd.node("b@127.0.0.1").await;
    up(&mut events, "b@127.0.0.1").await;
    assert!(node.disconnect("b@127.0.0.1"));
    assert_eq!(down(&mut events, "b@127.0.0.1").await, DownReason::Disconnected);
    // Ten times the longest wait: it does not come back.
    let silence = tokio::time::timeout(QUICK.max * 10, events.recv()).await;
    assert!(silence.is_err(), "{silence:?}");
    // What is sent still dials, and what is not kept does not come back.
    node.send(("nobody", "b@127.0.0.1"), &Term::Int(1)).await.unwrap();
    up(&mut events, "b@127.0.0.1").await;
    other.stop().await;
    assert_eq!(down(&mut events, "b@127.0.0.1").await, DownReason::Closed);
    assert!(tokio::time::timeout(QUICK.max * 5, events.recv()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_kept_also_when_its_first_attempt_is_not_awaited() {
    let epmd = Epmd::start().await;
    let builder = epmd.builder("a@127.0.0.1").reconnect(Reconnect::Keep(QUICK));
    let node = builder.start().await.unwrap();
    // Says nothing until it is closed.
    let peer = TcpListener::bind("127.0.0.1:0").await.unwrap();
    epmd.add("b", peer.local_addr().unwrap().port());
    let attempt = tokio::select! {
        biased;
        connected = node.connect("b@127.0.0.1") => panic!("{connected:?}"),
        attempt = peer.accept() => attempt.unwrap(),
    };
    drop(attempt);
    for _ in 0..2 {
        drop(soon(peer.accept()).await.unwrap());
    }
    // What is no name is not dialled again and again, and one's own is no peer.
    let invalid = node.connect("b").await;
    assert!(
        matches!(invalid, Err(ConnectError::InvalidName(_))),
        "{invalid:?}"
    );
    node.connect("a@127.0.0.1").await.unwrap();
    node.clone().stop().await;
    let down = node.connect("c@127.0.0.1").await;
    assert!(matches!(down, Err(ConnectError::NodeDown)), "{down:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_number_of_handshakes_lets_peers_in() {
    let epmd = Epmd::start().await;
    for handshakes in [0, usize::MAX] {
        let limits = Limits {
            handshakes,
            ..Limits::default()
        };
        let node = epmd.builder("a@127.0.0.1").limits(limits).start().await.unwrap();
        let friend = epmd.node("b@127.0.0.1").await;
        friend.ping("a@127.0.0.1", LONG).await.unwrap();
        friend.stop().await;
        node.stop().await;
        epmd.until_free("a@127.0.0.1").await;
    }
}

/// Both ends dial at the same moment, again and again. There is one connection then, and no message is lost with
/// another: OTP's rule is that of two attempts the one of the greater name goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_beam_and_this_node_that_dial_at_once_get_one_connection() {
    let epmd = Epmd::start().await;
    // The names' order decides who gives in; both orders are met.
    let beam_name = "m@127.0.0.1";
    let mut beam = epmd.beam(beam_name).await;
    let mut met = [0; 2];
    for (side, name) in ["a@127.0.0.1", "z@127.0.0.1"].into_iter().enumerate() {
        let node = epmd.node(name).await;
        node.serve("echo", |request: Term| async move { request })
            .unwrap();
        let mut events = node.events();
        for round in 0..25 {
            let ask = format!("net_kernel:connect_node('{name}').");
            // The start of both is shifted against each other a little more in each round.
            let ours = async {
                tokio::time::sleep(Duration::from_micros(round * 40)).await;
                node.connect(beam_name).await
            };
            let (ours, theirs) = soon(async { tokio::join!(ours, beam.eval(&ask)) }).await;
            ours.unwrap();
            assert_eq!(theirs, "true", "round {round}");
            let NodeEvent::Up { direction, .. } = next(&mut events).await else {
                panic!("no up in round {round}")
            };
            met[usize::from(direction == meshx::node::Direction::Outbound)] += 1;
            let called = beam
                .eval(&format!("gen_server:call({{echo, '{name}'}}, {round})."))
                .await;
            assert_eq!(called, round.to_string());
            node.ping(beam_name, LONG).await.unwrap();
            assert_eq!(node.nodes(), [beam_name]);
            // Both have settled, so nothing else came up or went down.
            assert!(
                matches!(events.try_recv(), Err(_) | Ok(NodeEvent::Tick { .. })),
                "round {round}"
            );
            assert!(node.disconnect(beam_name));
            assert!(matches!(next(&mut events).await, NodeEvent::Down { .. }));
            let gone = format!(
                "(fun G() -> case lists:member('{name}', nodes(connected)) of true -> \
                 timer:sleep(1), G(); false -> gone end end)()."
            );
            assert_eq!(beam.eval(&gone).await, "gone");
        }
        node.stop().await;
        println!("side {side}: inbound and outbound so far {met:?}");
    }
}

/// What an acceptor answers to `first`, until it closes.
async fn answer(port: u16, first: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    socket.write_all(first).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon(socket.read_to_end(&mut answer)).await;
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_handshakes_are_refused_as_a_beam_refuses_them() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    let ports = [epmd.port_of("search"), epmd.port_of("cart")];

    // The name message of OTP 22 and before: tag, version, flags of 32 bits, name.
    let mut old = vec![b'n', 0, 5];
    old.extend_from_slice(&0x0007_499c_u32.to_be_bytes());
    old.extend_from_slice(b"old@127.0.0.1");
    let mut old_name = (old.len() as u16).to_be_bytes().to_vec();
    old_name.extend_from_slice(&old);
    // One mandatory flag less, without the digest that would stand for it.
    let mut without = Vec::new();
    let flags = DistFlags::c_node_default().without(DistFlags::BIG_CREATION | DistFlags::MANDATORY_25_DIGEST);
    let (creation, name) = (9, "old@127.0.0.1");
    SendName {
        flags,
        creation,
        name,
    }
    .encode(&mut without)
    .unwrap();
    let not_allowed = b"\0\x0csnot_allowed";
    for port in ports {
        assert_eq!(answer(port, &without).await, not_allowed);
    }
    assert_eq!(answer(ports[0], &old_name).await, not_allowed);
    // OTP 25 closes without a word.
    let of_beam = answer(ports[1], &old_name).await;
    assert!(of_beam.is_empty() || of_beam == not_allowed, "{of_beam:?}");
    // A node that says it is the acceptor itself.
    let mut own = Vec::new();
    let name = "search@127.0.0.1";
    let flags = DistFlags::c_node_default();
    SendName {
        flags,
        creation,
        name,
    }
    .encode(&mut own)
    .unwrap();
    assert_eq!(answer(ports[0], &own).await, b"\0\x0csnot_allowed");

    // Another cookie: the acceptor says nothing after the proof, and its own proof is not given away.
    for (port, name) in ports.into_iter().zip(["search@127.0.0.1", "cart@127.0.0.1"]) {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let mut decoder = HandshakeDecoder::new();
        let mut out = Vec::new();
        let state = Initiator::start(
            LocalNode::hidden("evil@127.0.0.1", 9),
            name,
            Cookie::new("guess"),
            &mut out,
        );
        socket.write_all(&std::mem::take(&mut out)).await.unwrap();
        let mut message = async || loop {
            if let Some(frame) = decoder.next_frame().unwrap() {
                return Some(frame.to_vec());
            }
            if soon(socket.read_buf(decoder.read_buf())).await.unwrap_or(0) == 0 {
                return None;
            }
        };
        let status = message().await.unwrap();
        assert_eq!(Status::decode(&status), Ok(Status::Ok));
        let meshx_dist::handshake::AfterStatus::Challenge(state) = state.unwrap().on_status(&status).unwrap()
        else {
            panic!("alive")
        };
        let challenge = message().await.unwrap();
        assert_eq!(Challenge::decode(&challenge).unwrap().name, name);
        state.on_challenge(&challenge, 1, &mut out).unwrap();
        let mut rest = Vec::new();
        socket.write_all(&out).await.unwrap();
        let _ = soon(socket.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"", "{name}");
    }

    // From a BEAM and to a BEAM that have another cookie.
    beam.eval("erlang:set_cookie('search@127.0.0.1', other).").await;
    assert_eq!(
        beam.eval("net_kernel:connect_node('search@127.0.0.1').").await,
        "false"
    );
    let refused = node.connect("cart@127.0.0.1").await.unwrap_err();
    assert!(refused.to_string().contains("cookies differ"), "{refused}");
    assert!(node.nodes().is_empty());
    beam.eval(&format!("erlang:set_cookie('search@127.0.0.1', '{COOKIE}')."))
        .await;
    assert_eq!(
        beam.eval("net_kernel:connect_node('search@127.0.0.1').").await,
        "true"
    );
    assert_eq!(node.nodes(), ["cart@127.0.0.1"]);
}

/// A BEAM that lets nobody in says `not_allowed`; one that answers with another name is not believed.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_a_beam_are_told_as_what_they_are() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    beam.eval("net_kernel:allow(['shop@127.0.0.1']).").await;
    let refused = node.connect("cart@127.0.0.1").await.unwrap_err();
    let status = match &refused {
        ConnectError::Handshake {
            error: HandshakeError::Refused { status },
            ..
        } => *status,
        other => panic!("{other}"),
    };
    assert_eq!(status, "not_allowed");
    epmd.add("alias", epmd.port_of("cart"));
    let refused = node.connect("alias@127.0.0.1").await.unwrap_err();
    assert!(
        matches!(
            &refused,
            ConnectError::Handshake { .. } | ConnectError::Protocol { .. }
        ),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_size_of_a_message_is_a_setting() {
    let epmd = Epmd::start().await;
    let node = epmd
        .builder("a@127.0.0.1")
        .max_message(200_000)
        .start()
        .await
        .unwrap();
    let other = epmd.node("b@127.0.0.1").await;
    let mut inbox = other.register("inbox").unwrap();
    let sent = node
        .send(("inbox", "b@127.0.0.1"), &Term::binary(vec![1; 200_001]))
        .await;
    assert!(
        matches!(&sent, Err(SendError::TooLarge { max: 200_000, .. })),
        "{sent:?}"
    );
    node.send(("inbox", "b@127.0.0.1"), &Term::binary(vec![1; 199_000]))
        .await
        .unwrap();
    soon(inbox.recv()).await.unwrap();
    let mut events = node.events();
    other
        .send(("inbox", "a@127.0.0.1"), &Term::binary(vec![1; 200_001]))
        .await
        .unwrap();
    assert_eq!(
        down(&mut events, "b@127.0.0.1").await,
        DownReason::Limit {
            name: "message_bytes",
            value: 200_000
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_is_as_good_as_sending_and_outlives_its_connection() {
    let epmd = Epmd::start().await;
    let (node, other) = (epmd.node("a@127.0.0.1").await, epmd.node("b@127.0.0.1").await);
    let mut inbox = other.register("inbox").unwrap();
    let mailbox = node.mailbox();
    let mut by_name = mailbox.route(("inbox", "b@127.0.0.1"));
    let mut by_pid = mailbox.route(inbox.pid());
    let mut by_alias = mailbox.route(inbox.alias());
    let mut next = 0;
    for _ in 0..2 {
        for _ in 0..20 {
            // Large ones too: what one process sends stays in order, whichever way it goes.
            for large in [300_000, 10] {
                let message = |n: i64| Term::tuple([Term::Int(n), Term::binary(vec![1; large])]);
                by_name.send(&message(next)).await.unwrap();
                mailbox.send(inbox.pid(), &message(next + 1)).await.unwrap();
                by_pid.send(&message(next + 2)).await.unwrap();
                by_alias.send(&message(next + 3)).await.unwrap();
                next += 4;
            }
        }
        for expected in next - 160..next {
            let Some(meshx::node::Message::Term { from, term }) = soon(inbox.recv()).await else {
                panic!("the node is down")
            };
            assert_eq!(from.as_ref(), Some(mailbox.pid()));
            assert_eq!(term.as_tuple().unwrap()[0], Term::Int(expected));
        }
        let mut events = other.events();
        assert!(node.disconnect("b@127.0.0.1"));
        assert_eq!(down(&mut events, "a@127.0.0.1").await, DownReason::Closed);
    }
    let mut own = node.register("own").unwrap();
    mailbox.route(own.pid()).send(&Term::Int(1)).await.unwrap();
    assert!(matches!(
        soon(own.recv()).await,
        Some(meshx::node::Message::Term {
            term: Term::Int(1),
            ..
        })
    ));
}

/// As on a BEAM: what a peer sent is lost from the moment on in which its monitors say that it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_connection_comes_after_its_end() {
    let epmd = Epmd::start().await;
    let node = epmd.node("a@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    beam.eval(
        "Flood = fun() -> T = {inbox, 'a@127.0.0.1'}, T ! self(), receive go -> ok end, \
         (fun F() -> case erlang:send(T, x, [noconnect]) of ok -> F(); noconnect -> over end end)() end.",
    )
    .await;
    let mut inbox = node.register("inbox").unwrap();
    for round in 0..10 {
        beam.eval("spawn(Flood), ok.").await;
        let first = soon(inbox.recv()).await.unwrap();
        let Message::Term {
            term: Term::Pid(pid), ..
        } = first
        else {
            panic!("{first:?}")
        };
        let monitor = inbox.monitor(pid.clone()).await;
        inbox.send(&pid, &Term::atom("go")).await.unwrap();
        for _ in 0..1_000 {
            soon(inbox.recv()).await.unwrap();
        }
        assert!(node.disconnect("cart@127.0.0.1"));
        loop {
            match soon(inbox.recv()).await.unwrap() {
                Message::Down { reference, .. } if reference == monitor => break,
                Message::Term { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let after = inbox.recv_timeout(QUICK.max).await;
        assert!(after.is_err(), "round {round}: {after:?}");
    }
}
