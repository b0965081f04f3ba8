//! The node, its honest friend, and a peer whose every byte a test decides.

use std::time::Duration;

use crate::node_support::{Epmd, LONG, soon};
use meshx::node::{DownReason, Limits, Node, NodeEvent};
use meshx_dist::control::{Control, Proc};
use meshx_dist::framing::{DEFAULT_MAX_FRAME, Frame, FrameDecoder, HandshakeDecoder};
use meshx_dist::handshake::{AfterStatus, Cookie, Initiator, LocalNode};
use meshx_dist::link::{LinkLimits, Receiver as LinkReceiver, Sender};
use meshx_etf::{Pid, Reference, Term};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::broadcast::Receiver;

pub(crate) const EVIL: &str = "evil@127.0.0.1";

/// A peer whose every byte a test decides.
pub(crate) struct Raw {
    pub(crate) socket: TcpStream,
    pub(crate) flags: meshx_dist::flags::DistFlags,
    pub(crate) decoder: HandshakeDecoder,
}

impl Raw {
    pub(crate) async fn dial(epmd: &Epmd) -> TcpStream {
        TcpStream::connect(("127.0.0.1", epmd.port_of("search")))
            .await
            .unwrap()
    }

    /// Through the handshake; `None` when the node closed before its end.
    pub(crate) async fn connect(epmd: &Epmd, cookie: &str) -> Option<Self> {
        Self::connect_over(Self::dial(epmd).await, cookie).await
    }

    /// The same over a connection that there is.
    pub(crate) async fn connect_over(socket: TcpStream, cookie: &str) -> Option<Self> {
        let mut raw = Self {
            socket,
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

    pub(crate) async fn exchange(&mut self, out: &mut Vec<u8>) -> Option<Vec<u8>> {
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
    pub(crate) fn listen(&mut self) -> Received {
        let decoder = std::mem::replace(&mut self.decoder, HandshakeDecoder::new());
        Received {
            decoder: decoder.into_connected(DEFAULT_MAX_FRAME),
            receiver: LinkReceiver::new(self.flags, LinkLimits::default()),
        }
    }

    /// Whether the node still took it.
    pub(crate) async fn send(&mut self, control: Control, payload: Option<&Term>) -> bool {
        let mut out = Vec::new();
        Sender::new(self.flags).send(control, payload, &mut out).unwrap();
        self.socket.write_all(&out).await.is_ok()
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }
}

/// What the node sends to a [`Raw`].
pub(crate) struct Received {
    pub(crate) decoder: FrameDecoder,
    pub(crate) receiver: LinkReceiver,
}

impl Received {
    pub(crate) async fn next(&mut self, raw: &mut Raw) -> Control {
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

pub(crate) fn pid(id: u32) -> Pid {
    Pid {
        node: EVIL.into(),
        id,
        serial: 0,
        creation: 7,
    }
}

pub(crate) fn reference(id: u32) -> Reference {
    Reference {
        node: EVIL.into(),
        creation: 7,
        ids: vec![id, 0, 0],
    }
}

pub(crate) fn monitor(id: u32, name: &str) -> Control {
    Control::MonitorP {
        from: pid(1),
        to: Proc::Name(name.into()),
        reference: reference(id),
    }
}

/// Longer than a busy machine keeps anybody from sending: who is held up for as long is silent.
pub(crate) const TICK_TIME: Duration = Duration::from_secs(8);

/// A node with these limits, and a friend that is connected to it all the time.
pub(crate) struct Scene {
    pub(crate) epmd: Epmd,
    pub(crate) node: Node,
    pub(crate) friend: Node,
    pub(crate) events: Receiver<NodeEvent>,
}

impl Scene {
    pub(crate) async fn new(limits: Limits) -> Self {
        let epmd = Epmd::start().await;
        let builder = epmd
            .builder("search@127.0.0.1")
            .limits(limits)
            .net_ticktime(TICK_TIME);
        let node = builder.start().await.unwrap();
        node.serve("echo", |request: Term| async move { request })
            .unwrap();
        let friend = epmd
            .builder("friend@127.0.0.1")
            .net_ticktime(TICK_TIME)
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

    /// Waits until the bad peer's connection stands: it may be a moment behind the peer's view.
    pub(crate) async fn up(&mut self) {
        while !matches!(soon(self.events.recv()).await.unwrap(), NodeEvent::Up { node, .. } if node == EVIL) {
        }
    }

    /// The end of the bad peer's connection; meanwhile the friend's stays up and serves.
    pub(crate) async fn end(&mut self) -> DownReason {
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

    pub(crate) async fn friend_is_served(&self) {
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
