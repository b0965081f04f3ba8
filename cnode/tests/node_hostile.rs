//! Peers that misbehave: each gets a clear end, within its limit, and nobody else notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::time::Duration;

use meshx::node::{
    CallError, ConnectError, DownReason, Limits, Message, Node, NodeEvent, RecvError, RpcError, SpawnOptions,
};
use meshx_dist::control::{Control, Proc, SpawnResult};
use meshx_dist::framing::{DEFAULT_MAX_FRAME, Frame, FrameDecoder, HandshakeDecoder};
use meshx_dist::handshake::{AfterStatus, Cookie, Initiator, LocalNode};
use meshx_dist::link::{LinkLimits, Receiver as LinkReceiver, Sender};
use meshx_etf::{Pid, Reference, Term};
use node_support::{COOKIE, Epmd, LONG, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::broadcast::Receiver;

const EVIL: &str = "evil@127.0.0.1";

/// A peer whose every byte a test decides.
struct Raw {
    socket: TcpStream,
    flags: meshx_dist::flags::DistFlags,
    decoder: HandshakeDecoder,
}

impl Raw {
    async fn dial(epmd: &Epmd) -> TcpStream {
        TcpStream::connect(("127.0.0.1", epmd.port_of("search")))
            .await
            .unwrap()
    }

    /// Through the handshake; `None` when the node closed before its end.
    async fn connect(epmd: &Epmd, cookie: &str) -> Option<Self> {
        let mut raw = Self {
            socket: Self::dial(epmd).await,
            flags: meshx_dist::flags::DistFlags::default(),
            decoder: HandshakeDecoder::new(),
        };
        let mut out = Vec::new();
        let local = LocalNode::hidden(EVIL, 7);
        let state = Initiator::start(local, "search@127.0.0.1", Cookie::new(cookie), &mut out).unwrap();
        let status = raw.exchange(&mut out).await?;
        let AfterStatus::Challenge(state) = state.on_status(&status).unwrap() else {
            panic!("alive")
        };
        let challenge = raw.exchange(&mut out).await?;
        let state = state.on_challenge(&challenge, 1, &mut out).unwrap();
        let ack = raw.exchange(&mut out).await?;
        raw.flags = state.on_ack(&ack).unwrap().flags;
        Some(raw)
    }

    async fn exchange(&mut self, out: &mut Vec<u8>) -> Option<Vec<u8>> {
        self.socket.write_all(out).await.unwrap();
        out.clear();
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame.to_vec());
            }
            if soon(self.socket.read_buf(self.decoder.read_buf()))
                .await
                .unwrap_or(0)
                == 0
            {
                return None;
            }
        }
    }

    /// Reads what comes from here on.
    fn listen(&mut self) -> Received {
        let decoder = std::mem::replace(&mut self.decoder, HandshakeDecoder::new());
        Received {
            decoder: decoder.into_connected(DEFAULT_MAX_FRAME),
            receiver: LinkReceiver::new(self.flags, LinkLimits::default()),
        }
    }

    /// Whether the node still took it.
    async fn send(&mut self, control: Control, payload: Option<&Term>) -> bool {
        let mut out = Vec::new();
        Sender::new(self.flags).send(control, payload, &mut out).unwrap();
        self.socket.write_all(&out).await.is_ok()
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }
}

/// What the node sends to a [`Raw`].
struct Received {
    decoder: FrameDecoder,
    receiver: LinkReceiver,
}

impl Received {
    async fn next(&mut self, raw: &mut Raw) -> Control {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                let Frame::Data(frame) = frame else { continue };
                if let Some(message) = self.receiver.receive(frame).unwrap() {
                    return message.control;
                }
                continue;
            }
            let count = soon(raw.socket.read_buf(self.decoder.read_buf())).await.unwrap();
            assert_ne!(count, 0, "closed by the node");
        }
    }
}

fn pid(id: u32) -> Pid {
    Pid {
        node: EVIL.into(),
        id,
        serial: 0,
        creation: 7,
    }
}

fn reference(id: u32) -> Reference {
    Reference {
        node: EVIL.into(),
        creation: 7,
        ids: vec![id, 0, 0],
    }
}

fn monitor(id: u32, name: &str) -> Control {
    Control::MonitorP {
        from: pid(1),
        to: Proc::Name(name.into()),
        reference: reference(id),
    }
}

/// A node with these limits, and a friend that is connected to it all the time.
struct Scene {
    epmd: Epmd,
    node: Node,
    friend: Node,
    events: Receiver<NodeEvent>,
}

impl Scene {
    async fn new(limits: Limits) -> Self {
        let epmd = Epmd::start().await;
        let builder = epmd
            .builder("search@127.0.0.1")
            .limits(limits)
            .net_ticktime(Duration::from_secs(2));
        let node = builder.start().await.unwrap();
        node.serve("echo", |request: Term| async move { request })
            .unwrap();
        let friend = epmd
            .builder("friend@127.0.0.1")
            .net_ticktime(Duration::from_secs(2))
            .start()
            .await
            .unwrap();
        friend.ping("search@127.0.0.1", LONG).await.unwrap();
        let events = node.events();
        Self {
            epmd,
            node,
            friend,
            events,
        }
    }

    /// The end of the bad peer's connection; meanwhile the friend's stays up and serves.
    async fn end(&mut self) -> DownReason {
        let reason = loop {
            match soon(self.events.recv()).await.unwrap() {
                NodeEvent::Down { node, reason } => {
                    assert_eq!(node, EVIL);
                    break reason;
                }
                NodeEvent::Up { node, .. } => assert_eq!(node, EVIL),
                _ => {}
            }
        };
        self.friend_is_served().await;
        reason
    }

    async fn friend_is_served(&self) {
        let answer = self
            .friend
            .gen_call(("echo", "search@127.0.0.1"), Term::Int(7), LONG)
            .await;
        assert_eq!(answer.unwrap(), Term::Int(7));
        assert!(
            self.node
                .peers()
                .iter()
                .any(|peer| peer.node == "friend@127.0.0.1")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_after_the_handshake_ends_only_its_own_connection() {
    let mut scene = Scene::new(Limits::default()).await;
    let frames: [&[u8]; 6] = [
        b"\0\0\0\x05hello",
        // A distribution header, and nothing behind it.
        b"\0\0\0\x03\x83\x44\0",
        // A control message that is an atom, and one that nobody knows.
        b"\0\0\0\x06\x83\x44\0w\x01a",
        b"\0\0\0\x07\x83\x44\0h\x01ac",
        // A SEND without a message, and one whose message is cut short.
        b"\0\0\0\x08\x83\x44\0h\x03a\x02j",
        b"\0\0\0\x05\x83\x45\0\0\0",
    ];
    for frame in frames {
        let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
        raw.write(frame).await;
        let reason = scene.end().await;
        assert!(matches!(reason, DownReason::Protocol(_)), "{frame:?}: {reason:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn terms_beyond_the_limits_end_their_connection() {
    let mut limits = Limits::default();
    limits.terms.max_depth = 10;
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let deep = (0..20).fold(Term::Int(1), |inner, _| Term::list([inner]));
    raw.send(
        Control::RegSend {
            from: pid(1),
            to: "echo".into(),
            token: None,
        },
        Some(&deep),
    )
    .await;
    let DownReason::Protocol(text) = scene.end().await else {
        panic!("another reason")
    };
    assert!(text.contains("max_depth"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_are_refused_from_their_header_or_first_fragments() {
    let limits = Limits {
        message_bytes: 200_000,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    raw.write(&[0xFF; 4]).await;
    let DownReason::Protocol(text) = scene.end().await else {
        panic!("another reason")
    };
    assert!(text.contains("4294967295"), "{text}");

    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let large = Term::binary(vec![0; 300_000]);
    raw.send(
        Control::RegSend {
            from: pid(1),
            to: "echo".into(),
            token: None,
        },
        Some(&large),
    )
    .await;
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "message_bytes",
            value: 200_000
        }
    );
}

/// The first fragment of a message that never ends.
fn first_fragment(sequence: u64, bytes: usize) -> Vec<u8> {
    let mut whole = Vec::new();
    let control = Control::RegSend {
        from: pid(1),
        to: "echo".into(),
        token: None,
    };
    Sender::new(meshx_dist::flags::DistFlags::FRAGMENTS)
        .send(
            control,
            Some(&Term::binary(vec![0; 200_000.max(bytes)])),
            &mut whole,
        )
        .unwrap();
    let len = u32::from_be_bytes(whole[..4].try_into().unwrap()) as usize;
    whole.truncate(4 + len);
    whole[6..14].copy_from_slice(&sequence.to_be_bytes());
    whole
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_messages_are_bounded_in_number_and_bytes() {
    let limits = Limits {
        fragmented_messages: 3,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for sequence in 1..=4 {
        raw.write(&first_fragment(sequence, 0)).await;
    }
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "fragmented_messages",
            value: 3
        }
    );

    let limits = Limits {
        reassembly_bytes: 150_000,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for sequence in 1..=3 {
        raw.write(&first_fragment(sequence, 0)).await;
    }
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "reassembly_bytes",
            value: 150_000
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_never_ends_is_no_sign_of_life() {
    let mut scene = Scene::new(Limits::default()).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    raw.write(b"\0\0\x10\0\x83").await;
    assert_eq!(scene.end().await, DownReason::Silent(Duration::from_secs(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_cookie_gets_nowhere() {
    let scene = Scene::new(Limits::default()).await;
    assert!(Raw::connect(&scene.epmd, "guess").await.is_none());
    scene.friend_is_served().await;
    assert!(scene.node.peers().iter().all(|peer| peer.node != EVIL));
    let stranger = Node::builder("stranger@127.0.0.1")
        .cookie("guess")
        .plain_epmd(scene.epmd.addr)
        .start()
        .await;
    let refused = stranger.unwrap().connect("search@127.0.0.1").await.unwrap_err();
    assert!(refused.to_string().contains("cookie"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_handshakes_are_ended_and_hold_up_nobody_for_long() {
    let limits = Limits {
        handshakes: 2,
        handshake_time: Duration::from_millis(300),
        ..Limits::default()
    };
    let scene = Scene::new(limits).await;
    let mut slow = Vec::new();
    for _ in 0..4 {
        let mut socket = Raw::dial(&scene.epmd).await;
        socket.write_all(b"\0").await.unwrap();
        slow.push(socket);
    }
    let late = scene.epmd.node("late@127.0.0.1").await;
    late.ping("search@127.0.0.1", LONG).await.unwrap();
    for socket in &mut slow {
        assert_eq!(
            soon(socket.read(&mut [0; 1])).await.unwrap_or(0),
            0,
            "closed by the node"
        );
    }
    scene.friend_is_served().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded() {
    let scene = Scene::new(Limits {
        connections: 1,
        ..Limits::default()
    })
    .await;
    assert!(Raw::connect(&scene.epmd, COOKIE).await.is_none());
    let _other = scene.epmd.node("other@127.0.0.1").await;
    let refused = scene.node.connect("other@127.0.0.1").await.unwrap_err();
    assert!(
        matches!(refused, ConnectError::TooManyConnections { max: 1, .. }),
        "{refused}"
    );
    scene.friend_is_served().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn links_and_monitors_of_one_peer_are_bounded() {
    let limits = Limits {
        watches_per_connection: 10,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for id in 0..11 {
        raw.send(monitor(id, "echo"), None).await;
    }
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "watches_per_connection",
            value: 10
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn links_count_as_monitors_do() {
    let limits = Limits {
        watches_per_connection: 10,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let target = scene.node.mailbox();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for id in 0..5 {
        raw.send(monitor(id, "echo"), None).await;
    }
    // Taken back, they count no more; made twice, they count once.
    for id in 0..5 {
        let demonitor = Control::DemonitorP {
            from: pid(1),
            to: Proc::Name("echo".into()),
            reference: reference(id),
        };
        raw.send(demonitor, None).await;
    }
    let link = |id| Control::Link {
        from: pid(id),
        to: target.pid().clone(),
    };
    for id in [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10] {
        raw.send(link(id), None).await;
    }
    raw.send(link(11), None).await;
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "watches_per_connection",
            value: 10
        }
    );
}

fn spawn_request(id: u32, options: Vec<Term>) -> Control {
    Control::SpawnRequest {
        id: reference(id),
        from: pid(1),
        group_leader: pid(1),
        module: "none".into(),
        function: "none".into(),
        arity: 0,
        options,
        token: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_spawns_and_never_reads_is_ended() {
    let limits = Limits {
        answer_queue_bytes: 100_000,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut id = 0;
    while raw
        .send(spawn_request(id, vec![]), Some(&Term::List(vec![])))
        .await
    {
        id += 1;
    }
    let wanted = DownReason::Limit {
        name: "answer_queue_bytes",
        value: 100_000,
    };
    assert_eq!(scene.end().await, wanted, "after {id} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_a_peer_spawns_and_watches_count_as_its_watches() {
    let limits = Limits {
        watches_per_connection: 10,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    scene.node.expose("none", "none", 0, |_| std::future::pending());
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let both = || vec![Term::atom("monitor"), Term::atom("link")];
    for id in 0..6 {
        raw.send(spawn_request(id, both()), Some(&Term::List(vec![])))
            .await;
    }
    let wanted = DownReason::Limit {
        name: "watches_per_connection",
        value: 10,
    };
    assert_eq!(scene.end().await, wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_reads_none_of_the_ends_it_waits_for_is_ended() {
    let limits = Limits {
        notice_queue_bytes: 1 << 20,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let watched = scene.node.register("watched").unwrap();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    for id in 0..1000 {
        assert!(raw.send(monitor(id, "watched"), None).await);
    }
    // Behind them: the answer to a spawn request, the first bytes that come.
    raw.send(spawn_request(0, vec![]), Some(&Term::List(vec![])))
        .await;
    soon(raw.socket.readable()).await.unwrap();
    // One reason, encoded a thousand times.
    watched.close(Term::binary(vec![0; 1 << 20]));
    let wanted = DownReason::Limit {
        name: "notice_queue_bytes",
        value: 1 << 20,
    };
    assert_eq!(scene.end().await, wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_started_too_late_is_let_go() {
    let scene = Scene::new(Limits::default()).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut asker = scene.node.mailbox();
    let options = SpawnOptions::new().link().monitor();
    let short = Duration::from_millis(50);
    let silent = asker.spawn(EVIL, "m", "f", vec![], options, short).await;
    assert!(
        matches!(silent, Err(RpcError::Call(CallError::Timeout(_)))),
        "{silent:?}"
    );
    let mut received = raw.listen();
    let Control::SpawnRequest { id, .. } = received.next(&mut raw).await else {
        panic!("no request")
    };
    let reply = Control::SpawnReply {
        id: id.clone(),
        to: asker.pid().clone(),
        flags: 3,
        result: SpawnResult::Pid(pid(9)),
        token: None,
    };
    raw.send(reply, None).await;
    let demonitor = Control::DemonitorP {
        from: asker.pid().clone(),
        to: Proc::Pid(pid(9)),
        reference: id,
    };
    assert_eq!(received.next(&mut raw).await, demonitor);
    let exit = Control::PayloadExit {
        from: asker.pid().clone(),
        to: pid(9),
        token: None,
    };
    assert_eq!(received.next(&mut raw).await, exit);
    // The connection's end is of no interest to it either.
    drop(raw);
    let nothing = asker.recv_timeout(short).await;
    assert!(matches!(nothing, Err(RecvError::Timeout(_))), "{nothing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_asked_for_reach_nobody() {
    let scene = Scene::new(Limits::default()).await;
    let mut target = scene.node.register("target").unwrap();
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let to = target.pid().clone();
    for id in 0..100 {
        let reply = Control::SpawnReply {
            id: reference(id),
            to: to.clone(),
            flags: 3,
            result: SpawnResult::Pid(pid(id)),
            token: None,
        };
        raw.send(reply, None).await;
        let exit = Control::PayloadExit {
            from: pid(id),
            to: to.clone(),
            token: None,
        };
        raw.send(exit, Some(&Term::atom("not_linked"))).await;
        let down = Control::PayloadMonitorPExit {
            from: Proc::Pid(pid(id)),
            to: to.clone(),
            reference: reference(id),
        };
        raw.send(down, Some(&Term::atom("not_monitored"))).await;
    }
    let to_target = Control::RegSend {
        from: pid(1),
        to: "target".into(),
        token: None,
    };
    raw.send(to_target, Some(&Term::atom("last"))).await;
    let Some(Message::Term { term, .. }) = soon(target.recv()).await else {
        panic!("something else came first")
    };
    assert_eq!(term, Term::atom("last"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mailbox_that_nobody_reads_holds_up_no_other() {
    let scene = Scene::new(Limits {
        mailbox_bytes: 1 << 20,
        ..Limits::default()
    })
    .await;
    let slow = scene.node.register("slow").unwrap();
    let sender = scene.friend.mailbox();
    let large = Term::binary(vec![0; 100_000]);
    for round in 0..20 {
        // Ten times what the mailbox holds, and each round the same connection serves its calls.
        for _ in 0..5 {
            soon(sender.send(("slow", "search@127.0.0.1"), &large))
                .await
                .unwrap();
        }
        scene.friend_is_served().await;
        assert!(slow.dropped() < 100, "{round}");
    }
    // The answer to a call may overtake the large messages of others that were sent before it: the sender's own
    // message behind them does not, and its arrival is an event.
    let mut last = scene.node.register("last").unwrap();
    soon(sender.send(("last", "search@127.0.0.1"), &Term::Int(1)))
        .await
        .unwrap();
    soon(last.recv()).await.unwrap();
    assert_eq!(slow.dropped(), 90);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_asks_and_never_reads_is_ended() {
    let limits = Limits {
        answer_queue_bytes: 100_000,
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let mut id = 0;
    while raw.send(monitor(id, "nobody"), None).await {
        id += 1;
    }
    let reason = scene.end().await;
    let wanted = DownReason::Limit {
        name: "answer_queue_bytes",
        value: 100_000,
    };
    assert_eq!(reason, wanted, "after {id} monitors");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_never_reads_its_answers_holds_up_no_server() {
    let limits = Limits {
        reply_queue_bytes: 1 << 20,
        reply_wait: Duration::from_millis(100),
        ..Limits::default()
    };
    let mut scene = Scene::new(limits).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    let from = Term::tuple([Term::from(pid(1)), Term::from(reference(1))]);
    let call = Term::tuple([Term::atom("$gen_call"), from, Term::binary(vec![0; 1 << 20])]);
    let to_echo = || Control::RegSend {
        from: pid(1),
        to: "echo".into(),
        token: None,
    };
    while raw.send(to_echo(), Some(&call)).await {}
    assert_eq!(
        scene.end().await,
        DownReason::Limit {
            name: "reply_queue_bytes",
            value: 1 << 20
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_mailbox_drops_messages_but_not_the_ends_it_waits_for() {
    let scene = Scene::new(Limits {
        mailbox_messages: 3,
        ..Limits::default()
    })
    .await;
    let mut full = scene.node.register("full").unwrap();
    let sender = scene.friend.mailbox();
    // Its own link and monitor, which count for nothing in the queue until they end.
    let (linked, monitored) = (scene.friend.mailbox(), scene.friend.mailbox());
    full.link(linked.pid()).await;
    let reference = full.monitor(monitored.pid()).await;
    // Behind both, so that they stand.
    scene.node.ping("friend@127.0.0.1", LONG).await.unwrap();
    for number in 0..10 {
        sender
            .send(("full", "search@127.0.0.1"), &Term::Int(number))
            .await
            .unwrap();
    }
    // What a peer sends of its own accord is no better than a message.
    sender.exit(full.pid(), &Term::atom("signal")).await.unwrap();
    sender.link(full.pid()).await;
    sender.close(Term::atom("their_link"));
    let (linked_pid, target) = (linked.pid().clone(), monitored.pid().clone().into());
    linked.close(Term::atom("boom"));
    monitored.close(Term::atom("bang"));
    // Behind all of these on the same connection.
    scene.friend_is_served().await;
    assert_eq!(full.dropped(), 9);
    for number in 0..3 {
        let Some(Message::Term { term, .. }) = soon(full.recv()).await else {
            panic!("no message")
        };
        assert_eq!(term, Term::Int(number));
    }
    let exit = Message::Exit {
        from: linked_pid,
        reason: Term::atom("boom"),
    };
    assert_eq!(soon(full.recv()).await, Some(exit));
    let down = Message::Down {
        reference,
        target,
        reason: Term::atom("bang"),
    };
    assert_eq!(soon(full.recv()).await, Some(down));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mailbox_is_bounded_in_bytes() {
    let scene = Scene::new(Limits {
        mailbox_bytes: 10_000,
        ..Limits::default()
    })
    .await;
    let mut full = scene.node.register("full").unwrap();
    let sender = scene.friend.mailbox();
    // The first is taken although it is larger than the whole mailbox may be.
    for _ in 0..3 {
        sender
            .send(("full", "search@127.0.0.1"), &Term::binary(vec![0; 20_000]))
            .await
            .unwrap();
    }
    scene.friend_is_served().await;
    assert_eq!(full.dropped(), 2);
    assert!(soon(full.recv()).await.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_this_nodes_name_is_refused() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    epmd.add("twin", epmd.port_of("search"));
    // It dials a port where another node answers than the one it wants.
    let other = epmd.node("other@127.0.0.1").await;
    let refused = other.connect("twin@127.0.0.1").await.unwrap_err();
    assert!(refused.to_string().contains("search@127.0.0.1"), "{refused}");
    assert!(
        node.connect("search@127.0.0.1").await.is_ok(),
        "a node is connected to itself"
    );
    let taken = epmd.builder("search@127.0.0.1").start().await.unwrap_err();
    assert!(
        taken.to_string().contains("registering search@127.0.0.1"),
        "{taken}"
    );
}
