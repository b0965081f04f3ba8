//! What a hostile peer costs an honest one: `--nocapture` prints it.
//!
//! An honest peer calls a server in rounds, with and without a neighbour that does its worst, the rounds interleaved so
//! that both see the same machine. Every call is answered, in a time of the same order, and the neighbour is ended or
//! bounded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use meshx::node::{Limits, Node};
use meshx_dist::control::{Control, Proc};
use meshx_dist::framing::HandshakeDecoder;
use meshx_dist::handshake::{AfterStatus, Cookie, Initiator, LocalNode};
use meshx_dist::link::Sender;
use meshx_etf::{Pid, Reference, Term};
use node_support::{COOKIE, Epmd, LONG, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Beside a hostile peer a call may take so many times as long, and `NOISE` more: the peer is in this process, and on a
/// busy machine the two wait for each other's turns. Who is really held up waits for seconds.
const SLOWER: u32 = 5;
const NOISE: Duration = Duration::from_millis(100);

const EVIL: &str = "evil@127.0.0.1";

/// Bytes that a peer which knows the cookie sends again and again.
fn attacks() -> Vec<(&'static str, Vec<u8>)> {
    let flags = meshx_dist::flags::DistFlags::c_node_default();
    let from = |id| Pid {
        node: EVIL.into(),
        id,
        serial: 0,
        creation: 7,
    };
    let frames = |messages: &mut dyn Iterator<Item = (Control, Option<Term>)>| {
        let (mut sender, mut out) = (Sender::new(flags), Vec::new());
        for (control, payload) in messages {
            sender.send(control, payload.as_ref(), &mut out).unwrap();
        }
        out
    };
    let send = |name: &str| Control::RegSend {
        from: from(1),
        to: name.into(),
        token: None,
    };
    let reference = |id| Reference {
        node: EVIL.into(),
        creation: 7,
        ids: vec![id, 0, 0],
    };
    let monitor = |id| Control::MonitorP {
        from: from(1),
        to: Proc::Name("absent".into()),
        reference: reference(id),
    };
    let nested = (0..400).fold(Term::Int(1), |term, _| Term::list([term]));
    vec![
        (
            "a flood of small messages",
            frames(&mut (0..5000).map(|_| (send("flooded"), Some(Term::Int(1))))),
        ),
        (
            "messages of 1 MiB",
            frames(&mut (0..4).map(|_| (send("flooded"), Some(Term::binary(vec![0; 1 << 20]))))),
        ),
        (
            "deep terms",
            frames(&mut (0..200).map(|_| (send("flooded"), Some(nested.clone())))),
        ),
        (
            "questions whose answers it does not read",
            frames(&mut (0..5000).map(|id| (monitor(id), None))),
        ),
        ("frames of garbage", b"\0\0\0\x08\x83\x44\0garbage".to_vec()),
    ]
}

/// Connects, and writes an attack until it is ended; then again.
async fn attack(epmd: Arc<Epmd>, bytes: Vec<u8>, stop: Arc<AtomicBool>, written: Arc<AtomicU64>) {
    while !stop.load(Ordering::Relaxed) {
        let Some(mut socket) = connect(&epmd).await else {
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            let wrote = tokio::time::timeout(Duration::from_millis(100), socket.write_all(&bytes)).await;
            match wrote {
                Ok(Ok(())) => written.fetch_add(bytes.len() as u64, Ordering::Relaxed),
                // Cut in the middle of a message: it begins anew.
                Ok(Err(_)) | Err(_) => break,
            };
        }
    }
}

async fn connect(epmd: &Epmd) -> Option<TcpStream> {
    let mut socket = TcpStream::connect(("127.0.0.1", epmd.port_of("search")))
        .await
        .ok()?;
    let (mut decoder, mut out) = (HandshakeDecoder::new(), Vec::new());
    let mut exchange = async |out: &mut Vec<u8>| {
        socket.write_all(&std::mem::take(out)).await.ok()?;
        loop {
            if let Some(frame) = decoder.next_frame().unwrap() {
                return Some(frame.to_vec());
            }
            if socket.read_buf(decoder.read_buf()).await.ok()? == 0 {
                return None;
            }
        }
    };
    let state = Initiator::start(
        LocalNode::hidden(EVIL, 7),
        "search@127.0.0.1",
        Cookie::new(COOKIE),
        &mut out,
    );
    let state = match state.unwrap().on_status(&exchange(&mut out).await?).ok()? {
        AfterStatus::Challenge(state) => state,
        AfterStatus::Alive(state) => state.proceed(&mut out).ok()?,
    };
    let state = state.on_challenge(&exchange(&mut out).await?, 1, &mut out).ok()?;
    state.on_ack(&exchange(&mut out).await?).ok()?;
    Some(socket)
}

/// The median of calls one after the other.
async fn calls(friend: &Node) -> Duration {
    let mut took = Vec::new();
    for i in 0..200 {
        let started = Instant::now();
        let answer = friend
            .gen_call(("echo", "search@127.0.0.1"), Term::Int(i), LONG)
            .await;
        assert_eq!(answer.unwrap(), Term::Int(i));
        took.push(started.elapsed());
    }
    took.sort_unstable();
    took[took.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_peer_is_served_beside_a_hostile_one() {
    let epmd = Arc::new(Epmd::start().await);
    let limits = Limits {
        mailbox_messages: 1000,
        ..Limits::default()
    };
    let node = epmd
        .builder("search@127.0.0.1")
        .limits(limits)
        .start()
        .await
        .unwrap();
    node.serve("echo", |request: Term| async move { request })
        .unwrap();
    // Nobody reads it: it fills up, and what comes then is dropped.
    let flooded = node.register("flooded").unwrap();
    let friend = epmd.node("friend@127.0.0.1").await;
    soon(friend.ping("search@127.0.0.1", LONG)).await.unwrap();
    for (what, bytes) in attacks() {
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        let written = Arc::new(AtomicU64::new(0));
        for _ in 0..3 {
            alone.push(soon(calls(&friend)).await);
            let stop = Arc::new(AtomicBool::new(false));
            let attacker = attack(
                Arc::clone(&epmd),
                bytes.clone(),
                Arc::clone(&stop),
                Arc::clone(&written),
            );
            let attacker = tokio::spawn(attacker);
            // Not before it is at it.
            let before = written.load(Ordering::Relaxed);
            soon(async {
                while written.load(Ordering::Relaxed) == before {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
            .await;
            beside.push(soon(calls(&friend)).await);
            stop.store(true, Ordering::Relaxed);
            soon(attacker).await.unwrap();
        }
        println!(
            "{what}: median call alone {alone:?}, beside it {beside:?}, {} MB came",
            written.load(Ordering::Relaxed) / 1_000_000
        );
        // Of the rounds that which the machine disturbed least.
        let least = |times: Vec<Duration>| times.into_iter().min().unwrap();
        let (alone, beside) = (least(alone), least(beside));
        assert!(
            beside < alone * SLOWER + NOISE,
            "{what}: a call takes {beside:?}, alone {alone:?}"
        );
    }
    assert!(flooded.dropped() > 0, "its mailbox is bounded");
    assert_eq!(
        node.nodes()
            .iter()
            .filter(|name| *name == "friend@127.0.0.1")
            .count(),
        1
    );
}
