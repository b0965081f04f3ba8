//! The crate `erl_dist` as an independent peer: its handshake, its control messages, its EPMD client.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use erl_dist::epmd::{EpmdClient, NodeEntry};
use erl_dist::handshake::{
    ClientSideHandshake, HandshakeError as TheirError, HandshakeStatus, ServerSideHandshake,
};
use erl_dist::message::{RecvError, channel};
use erl_dist::node::{Creation, LocalNode as TheirNode, NodeName, PeerNode};
use erl_dist::{DistributionFlags, LOWEST_DISTRIBUTION_PROTOCOL_VERSION};
use futures::io::{AsyncRead, AsyncWrite};
use meshx_dist::control::{Control, Op, Payload, Proc, SpawnResult};
use meshx_dist::flags::DistFlags;
use meshx_dist::handshake::{Admission, HandshakeError, LocalNode};
use meshx_etf::{Atom, Term};
use support::epmd::{CREATION, Epmd, ask};
use support::peer::{Failed, Peer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

const COOKIE: &str = "monster";

/// A socket that can be cloned, as `erl_dist::channel` wants it.
#[derive(Clone)]
struct Shared(Arc<Mutex<Compat<TcpStream>>>);

impl Shared {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self(Arc::new(Mutex::new(stream.compat())))
    }

    fn with<T>(&self, f: impl FnOnce(Pin<&mut Compat<TcpStream>>) -> T) -> T {
        f(Pin::new(&mut *self.0.lock().unwrap()))
    }
}

impl AsyncRead for Shared {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_close(cx))
    }
}

fn ours() -> LocalNode {
    LocalNode::hidden("ours@127.0.0.1", 11)
}

fn theirs() -> TheirNode {
    TheirNode::new(NodeName::new("theirs", "127.0.0.1").unwrap(), Creation::new(22))
}

type Theirs = Result<(Shared, PeerNode), TheirError>;

/// `erl_dist` dials, we accept.
async fn they_dial(
    node: TheirNode,
    cookie: &'static str,
    admission: Admission<'_>,
) -> (Result<Peer, Failed>, Theirs) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dialling = tokio::spawn(async move {
        let stream = Shared::new(TcpStream::connect(address).await.unwrap());
        let mut handshake = ClientSideHandshake::new(stream, node, cookie);
        handshake
            .execute_send_name(LOWEST_DISTRIBUTION_PROTOCOL_VERSION)
            .await?;
        handshake.execute_rest(true).await
    });
    let (stream, _) = listener.accept().await.unwrap();
    let accepted = Peer::accept_as(stream, ours(), COOKIE, admission).await;
    (accepted, dialling.await.unwrap())
}

/// We dial, `erl_dist` accepts.
async fn we_dial(cookie: &str, status: HandshakeStatus) -> (Result<Peer, Failed>, Theirs) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepting = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut handshake = ServerSideHandshake::new(Shared::new(stream), theirs(), COOKIE);
        assert_eq!(
            handshake.execute_recv_name().await?.unwrap().to_string(),
            "ours@127.0.0.1"
        );
        handshake.execute_rest(status).await
    });
    let dialled = Peer::dial(port, ours(), "theirs@127.0.0.1", cookie).await;
    (dialled, accepting.await.unwrap())
}

#[tokio::test]
async fn they_dial_us() {
    for admission in [Admission::Ok, Admission::OkSimultaneous] {
        let (ours, theirs_up) = they_dial(theirs(), COOKIE, admission).await;
        let (stream, peer_node) = theirs_up.unwrap();
        assert_eq!(peer_node.name.to_string(), "ours@127.0.0.1");
        assert_eq!(peer_node.creation.unwrap().get(), 11);
        assert_eq!(peer_node.flags.bits(), DistFlags::c_node_default().bits());
        let ours = ours.unwrap();
        let up = &ours.established;
        assert_eq!((&up.peer_name[..], up.peer_creation), ("theirs@127.0.0.1", 22));
        every_operation(ours, stream).await;
    }
}

#[tokio::test]
async fn we_dial_them() {
    for status in [HandshakeStatus::Ok, HandshakeStatus::OkSimultaneous] {
        let (ours, theirs_up) = we_dial(COOKIE, status).await;
        let (stream, peer_node) = theirs_up.unwrap();
        assert_eq!(peer_node.name.to_string(), "ours@127.0.0.1");
        every_operation(ours.unwrap(), stream).await;
    }
}

#[tokio::test]
async fn another_cookie_is_refused_in_both_roles() {
    let (ours, theirs_up) = they_dial(theirs(), "other", Admission::Ok).await;
    let mismatch = HandshakeError::CookieMismatch {
        peer: "theirs@127.0.0.1".into(),
    };
    assert_eq!(ours.err(), Some(Failed::Handshake(mismatch)));
    assert!(theirs_up.is_err());
    let (ours, theirs_up) = we_dial("other", HandshakeStatus::Ok).await;
    assert_eq!(ours.err(), Some(Failed::Closed));
    assert!(matches!(theirs_up, Err(TheirError::CookieMismatch)));
}

#[tokio::test]
async fn their_refusals_are_understood() {
    for (status, text) in [
        (HandshakeStatus::Nok, "nok"),
        (HandshakeStatus::NotAllowed, "not_allowed"),
    ] {
        let (ours, _) = we_dial(COOKIE, status).await;
        assert_eq!(
            ours.err(),
            Some(Failed::Handshake(HandshakeError::Refused { status: text }))
        );
    }
}

#[tokio::test]
async fn they_lack_a_mandatory_flag() {
    let mut node = theirs();
    // `mandatory() - BIG_CREATION`, which that crate has no operator for.
    node.flags = DistributionFlags::from_bits_truncate(node.flags.bits() & !DistFlags::BIG_CREATION.bits());
    let (ours, theirs_up) = they_dial(node, COOKIE, Admission::Ok).await;
    let missing = DistFlags::BIG_CREATION;
    assert_eq!(
        ours.err(),
        Some(Failed::Handshake(HandshakeError::MissingFlags { missing }))
    );
    assert!(theirs_up.is_err());
}

/// They read what we write, write it again, and we read the same: every operation that they know.
async fn every_operation(mut peer: Peer, stream: Shared) {
    let (mut sender, mut receiver) = channel(stream, DistributionFlags::new());
    let echo = tokio::spawn(async move {
        loop {
            match receiver.recv().await {
                Ok(message) => sender.send(message).await.unwrap(),
                Err(RecvError::Closed) => break,
                Err(error) => panic!("erl_dist can't read a message: {error}"),
            }
        }
    });
    let token = Term::tuple([Term::Int(1), Term::atom("token")]);
    // Its reader takes the token of SEND_TT for the pid; tests/beam.rs has that operation from a real peer.
    let traced = operations(&mut peer, Some(token))
        .into_iter()
        .filter(|control| control.op() != Op::SEND_TT);
    for control in operations(&mut peer, None).into_iter().chain(traced) {
        let payload = match (&control, control.payload()) {
            (Control::SpawnRequest { .. }, _) => Some(Term::list([Term::atom("a"), Term::Int(70_000)])),
            (_, Payload::Required) => Some(Term::tuple([Term::atom("hello"), Term::binary(*b"bytes")])),
            _ => None,
        };
        peer.send(control.clone(), payload.as_ref()).await;
        assert_eq!(peer.receive().await, (control, payload));
    }
    drop(peer);
    echo.await.unwrap();
}

fn operations(peer: &mut Peer, token: Option<Term>) -> Vec<Control> {
    let (from, to, reference) = (peer.pid(), peer.pid(), peer.reference());
    let (from, to, reference) = (|| from.clone(), || to.clone(), || reference.clone());
    let token = || token.clone();
    let name = || Proc::Name(Atom::from("name"));
    let reason = || Term::atom("boom");
    let (module, function) = (Atom::from("m"), Atom::from("f"));
    let options = vec![Term::atom("link")];
    vec![
        Control::Link {
            from: from(),
            to: to(),
        },
        Control::Send {
            to: to(),
            token: token(),
        },
        Control::Exit {
            from: from(),
            to: to(),
            reason: reason(),
            token: token(),
        },
        Control::Unlink {
            from: from(),
            to: to(),
        },
        Control::NodeLink,
        Control::RegSend {
            from: from(),
            to: Atom::from("name"),
            token: token(),
        },
        Control::GroupLeader {
            from: from(),
            to: to(),
        },
        Control::Exit2 {
            from: from(),
            to: to(),
            reason: reason(),
            token: token(),
        },
        Control::MonitorP {
            from: from(),
            to: name(),
            reference: reference(),
        },
        Control::DemonitorP {
            from: from(),
            to: Proc::Pid(to()),
            reference: reference(),
        },
        Control::MonitorPExit {
            from: name(),
            to: to(),
            reference: reference(),
            reason: reason(),
        },
        Control::SendSender {
            from: from(),
            to: to(),
            token: token(),
        },
        Control::PayloadExit {
            from: from(),
            to: to(),
            token: token(),
        },
        Control::PayloadExit2 {
            from: from(),
            to: to(),
            token: token(),
        },
        Control::PayloadMonitorPExit {
            from: name(),
            to: to(),
            reference: reference(),
        },
        Control::SpawnRequest {
            id: reference(),
            from: from(),
            group_leader: to(),
            module,
            function,
            arity: 2,
            options,
            token: token(),
        },
        Control::SpawnReply {
            id: reference(),
            to: to(),
            flags: 3,
            result: SpawnResult::Error(Atom::from("notsup")),
            token: token(),
        },
        Control::AliasSend {
            from: from(),
            alias: reference(),
            token: token(),
        },
        Control::UnlinkId {
            id: 77,
            from: from(),
            to: to(),
        },
        Control::UnlinkIdAck {
            id: 77,
            from: from(),
            to: to(),
        },
    ]
}

#[tokio::test]
async fn their_epmd_client_speaks_with_our_epmd() {
    let epmd = Epmd::start().await;
    let client = async || {
        let stream = TcpStream::connect(("127.0.0.1", epmd.port)).await.unwrap();
        EpmdClient::new(stream.compat())
    };
    assert_eq!(client().await.get_names().await.unwrap(), []);
    let entry = NodeEntry::new_hidden("theirs", 4321);
    let (alive, creation) = client().await.register(entry.clone()).await.unwrap();
    assert_eq!(creation.get(), CREATION);
    assert_eq!(epmd.registered("theirs").await.port, 4321);
    let found = client().await.get_node("theirs").await.unwrap().unwrap();
    assert_eq!(
        (found.name, found.port, found.node_type),
        (entry.name, 4321, entry.node_type)
    );
    assert_eq!(
        client().await.get_names().await.unwrap(),
        [("theirs".to_owned(), 4321)]
    );
    assert!(client().await.get_node("nobody").await.unwrap().is_none());
    assert_eq!(ask(epmd.port, "theirs").await.unwrap().unwrap().port, 4321);
    assert_eq!(ask(epmd.port, "nobody").await, Ok(None));
    drop(alive);
    epmd.unregistered("theirs").await;
    assert_eq!(ask(epmd.port, "theirs").await, Ok(None));
}
