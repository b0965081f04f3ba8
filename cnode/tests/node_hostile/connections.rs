//! Connections: garbage, sizes, handshakes, names.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::node_support::{COOKIE, Epmd, LONG, soon};
use crate::scene::{EVIL, Raw, Scene, TICK_TIME, pid};
use meshx::node::{ConnectError, DownReason, Limits, Node, NodeEvent};
use meshx_dist::control::Control;
use meshx_dist::framing::Frame;
use meshx_dist::link::Sender;
use meshx_etf::Term;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

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
    assert_eq!(scene.end().await, DownReason::Silent(TICK_TIME));
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
        handshake_time: Duration::from_secs(2),
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

/// Of one host that keeps opening handshakes and says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn silent_handshakes_of_one_peer_shut_nobody_out() {
    let scene = Scene::new(Limits::default()).await;
    let slow_but_honest = Raw::dial(&scene.epmd).await;
    let node = SocketAddr::from(([127, 0, 0, 1], scene.epmd.port_of("search")));
    let mut silent = Vec::new();
    let places = Limits::default().handshakes;
    for _ in 0..2 * places {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 2], 0).into()).unwrap();
        silent.push(socket.connect(node).await.unwrap());
    }
    let began = Instant::now();
    assert!(Raw::connect_over(slow_but_honest, COOKIE).await.is_some());
    let late = scene.epmd.node("late@127.0.0.1").await;
    late.ping("search@127.0.0.1", LONG).await.unwrap();
    let setup = Limits::default().handshake_time;
    assert!(began.elapsed() < setup, "they waited for the silent ones");
    // These were one too many of one peer.
    for socket in &mut silent[..2 * places - places * 3 / 4] {
        assert_eq!(soon(socket.read(&mut [0; 1])).await.unwrap_or(0), 0);
    }
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

#[tokio::test(flavor = "multi_thread")]
async fn what_was_queued_reaches_a_peer_that_sends_all_the_time() {
    const MESSAGES: usize = 400;
    let mut scene = Scene::new(Limits::default()).await;
    let mut raw = Raw::connect(&scene.epmd, COOKIE).await.unwrap();
    scene.up().await;
    let mut received = raw.listen();
    let mut noise = Vec::new();
    let to_nobody = Control::RegSend {
        from: pid(1),
        to: "nobody".into(),
        token: None,
    };
    let large = Term::binary(vec![1; 3000]);
    Sender::new(raw.flags)
        .send(to_nobody, Some(&large), &mut noise)
        .unwrap();
    let (mut read, mut write) = raw.socket.into_split();
    let noisy = tokio::spawn(async move { while write.write_all(&noise).await.is_ok() {} });
    let mailbox = scene.node.mailbox();
    let message = Term::binary(vec![2; 2000]);
    for _ in 0..MESSAGES {
        mailbox.send(&pid(1), &message).await.unwrap();
    }
    let stopping = tokio::spawn(scene.node.clone().stop());
    // Time to close too early.
    let closed = async {
        while !matches!(scene.events.recv().await, Ok(NodeEvent::Down { node, .. }) if node == EVIL) {}
    };
    let early = tokio::time::timeout(Duration::from_millis(50), closed).await;
    assert!(early.is_err(), "closed before the peer has read what was sent");
    let mut count = 0;
    loop {
        while let Some(frame) = received.decoder.next_frame().unwrap() {
            let Frame::Data(frame) = frame else { continue };
            count += usize::from(received.receiver.receive(frame).unwrap().is_some());
        }
        match soon(read.read_buf(received.decoder.read_buf())).await {
            Ok(1..) => {}
            end => break assert_eq!((count, end.ok()), (MESSAGES, Some(0))),
        }
    }
    // The peer never closes: it is not waited for any longer than `stop` says.
    soon(stopping).await.unwrap();
    soon(noisy).await.unwrap();
}
