//! One end of a link over TCP.

use meshx_dist::control::Control;
use meshx_dist::framing::{DEFAULT_MAX_FRAME, Frame, FrameDecoder, HandshakeDecoder};
use meshx_dist::handshake::{
    Admission, AfterStatus, AwaitName, Cookie, Established, HandshakeError, Initiator, LocalNode, Refusal,
};
use meshx_dist::link::{LinkLimits, Receiver, Sender};
use meshx_etf::{Atom, Limits, Pid, Reference, Term, decode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::soon;

const CHALLENGE: u32 = 0x9abc_def0;

/// Why there is no link.
#[derive(Debug, PartialEq)]
pub enum Failed {
    Handshake(HandshakeError),
    /// The other side closed without a word.
    Closed,
}

impl From<HandshakeError> for Failed {
    fn from(error: HandshakeError) -> Self {
        Self::Handshake(error)
    }
}

pub struct Peer {
    stream: TcpStream,
    frames: FrameDecoder,
    receiver: Receiver,
    sender: Sender,
    pub established: Established,
    /// Frames that were not the last of their message.
    pub fragments: usize,
    /// What a peer that thinks it already has a link was told.
    pub was_alive: bool,
    ids: u32,
}

impl Peer {
    pub async fn dial(port: u16, local: LocalNode, peer: &str, cookie: &str) -> Result<Self, Failed> {
        let mut wire = Handshaking::new(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        let status = Initiator::start(local, peer, Cookie::new(cookie), &mut wire.out)?;
        let (awaits, was_alive) = match status.on_status(&wire.turn().await?)? {
            AfterStatus::Challenge(awaits) => (awaits, false),
            AfterStatus::Alive(decide) => (decide.proceed(&mut wire.out)?, true),
        };
        let challenge = wire.turn().await?;
        let awaits = awaits.on_challenge(&challenge, CHALLENGE, &mut wire.out)?;
        let established = awaits.on_ack(&wire.turn().await?)?;
        Ok(wire.established(established, was_alive))
    }

    pub async fn accept(stream: TcpStream, local: LocalNode, cookie: &str) -> Result<Self, Failed> {
        Self::accept_as(stream, local, cookie, Admission::Ok).await
    }

    pub async fn accept_as(
        stream: TcpStream,
        local: LocalNode,
        cookie: &str,
        admission: Admission<'_>,
    ) -> Result<Self, Failed> {
        let mut wire = Handshaking::new(stream);
        let given = AwaitName::new(local).on_name(&wire.turn().await?)?;
        let reply = given.admit(admission, Cookie::new(cookie), CHALLENGE, &mut wire.out)?;
        let message = wire.turn().await?;
        let established = reply.on_reply(&message, &mut wire.out);
        wire.flush().await;
        Ok(wire.established(established?, false))
    }

    /// Reads the name and refuses it.
    pub async fn refuse(stream: TcpStream, local: LocalNode) -> Result<String, Failed> {
        let mut wire = Handshaking::new(stream);
        let given = AwaitName::new(local).on_name(&wire.turn().await?)?;
        let name = given.peer_name().to_owned();
        given.refuse(Refusal::NotAllowed, &mut wire.out)?;
        wire.flush().await;
        Ok(name)
    }

    pub fn pid(&mut self) -> Pid {
        self.ids += 1;
        let node = Atom::from(&self.established.local_name[..]);
        Pid {
            node,
            id: self.ids,
            serial: 0,
            creation: self.established.local_creation,
        }
    }

    pub fn reference(&mut self) -> Reference {
        self.ids += 1;
        let node = Atom::from(&self.established.local_name[..]);
        Reference {
            node,
            creation: self.established.local_creation,
            ids: vec![self.ids, 0, 0],
        }
    }

    pub async fn send(&mut self, control: Control, payload: Option<&Term>) {
        let mut out = Vec::new();
        self.sender.send(control, payload, &mut out).unwrap();
        soon("writing", self.stream.write_all(&out)).await.unwrap();
    }

    pub async fn send_to(&mut self, name: &str, from: Pid, payload: Term) {
        self.send(
            Control::RegSend {
                from,
                to: Atom::from(name),
                token: None,
            },
            Some(&payload),
        )
        .await;
    }

    /// The next message that is no tick.
    pub async fn receive(&mut self) -> (Control, Option<Term>) {
        self.receive_or_end()
            .await
            .unwrap_or_else(|| panic!("the link was closed"))
    }

    pub async fn receive_or_end(&mut self) -> Option<(Control, Option<Term>)> {
        loop {
            while let Some(frame) = self.frames.next_frame().unwrap() {
                let Frame::Data(frame) = frame else { continue };
                let Some(message) = self.receiver.receive(frame).unwrap() else {
                    self.fragments += 1;
                    continue;
                };
                let payload = message
                    .payload
                    .map(|bytes| decode(&bytes.to_vec(), &Limits::default()).unwrap());
                return Some((message.control, payload));
            }
            let read = soon("a message", self.stream.read_buf(self.frames.read_buf())).await;
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }
}

struct Handshaking {
    stream: TcpStream,
    frames: HandshakeDecoder,
    out: Vec<u8>,
}

impl Handshaking {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            frames: HandshakeDecoder::new(),
            out: Vec::new(),
        }
    }

    async fn flush(&mut self) {
        let _ = self.stream.write_all(&std::mem::take(&mut self.out)).await;
    }

    /// Sends what there is to send, then waits for one message.
    async fn turn(&mut self) -> Result<Vec<u8>, Failed> {
        self.flush().await;
        loop {
            if let Some(message) = self.frames.next_frame().unwrap() {
                return Ok(message.to_vec());
            }
            let read = soon(
                "a handshake message",
                self.stream.read_buf(self.frames.read_buf()),
            )
            .await;
            if read.unwrap_or(0) == 0 {
                return Err(Failed::Closed);
            }
        }
    }

    fn established(self, established: Established, was_alive: bool) -> Peer {
        Peer {
            stream: self.stream,
            frames: self.frames.into_connected(DEFAULT_MAX_FRAME),
            receiver: Receiver::new(established.flags, LinkLimits::default()),
            sender: Sender::new(established.flags),
            established,
            fragments: 0,
            was_alive,
            ids: 0,
        }
    }
}
