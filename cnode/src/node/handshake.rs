//! Drives the handshake's states over a socket, under one deadline.

use std::future::Future;
use std::time::Duration;

use meshx_dist::framing::{FrameDecoder, HandshakeDecoder};
use meshx_dist::handshake::{
    Admission, AfterStatus, AwaitName, Cookie, Established, HandshakeError, Initiator, LocalNode, Refusal,
    Status,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::proxy::links::LinkId;

/// The two halves of a socket, and what the road there proved about its other end.
pub(crate) struct Transport {
    pub(crate) read: Box<dyn AsyncRead + Send + Unpin>,
    pub(crate) write: Box<dyn AsyncWrite + Send + Unpin>,
    /// The peer's verified SPIFFE URI, when an agent carries the connection.
    pub(crate) identity: Option<String>,
    /// What the agents at both ends call this connection.
    pub(crate) link: Option<LinkId>,
}

/// A connection whose handshake is done.
pub(crate) struct Ready {
    pub(crate) transport: Transport,
    pub(crate) established: Established,
    /// Holds what arrived right behind the handshake.
    pub(crate) decoder: FrameDecoder,
    /// Both ends agreed that an older connection is dead.
    pub(crate) replaces: bool,
}

/// Why there was no handshake.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the connection failed during the handshake: {0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Frame(#[from] meshx_dist::framing::FrameError),
    #[error("the peer closed the connection{0}")]
    Closed(&'static str),
    #[error("the handshake took longer than {0:?}")]
    Timeout(Duration),
    #[error("the system gave no random numbers: {0}")]
    Random(#[from] getrandom::Error),
    #[error("the peer's name {0:?} is this node's own")]
    OwnName(String),
    #[error("the agent vouched for {wanted:?}, the handshake names {got:?}")]
    OtherName { wanted: String, got: String },
    #[error("{0}")]
    Greeting(String),
    #[error("a connection attempt of our own goes on instead")]
    Simultaneous,
    #[error("a connection that the peer opened is up")]
    AlreadyUp,
}

/// What the node knows of a peer that wants in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Unknown,
    /// We are dialling it at this moment.
    Dialling,
    /// A connection is up.
    Up,
}

/// The dialling side. `is_up` says whether a connection to the peer came up meanwhile; it may wait for a handshake
/// that the peer began and that is about to end, since the peer counts that connection as up already.
pub(crate) async fn initiate<F: Future<Output = bool>>(
    mut transport: Transport,
    local: LocalNode,
    peer: &str,
    cookie: Cookie,
    max_frame: usize,
    limit: Duration,
    is_up: impl Fn() -> F,
) -> Result<Ready, Failure> {
    let mut decoder = HandshakeDecoder::new();
    let mut replaces = false;
    let established = within(limit, async {
        let mut out = Vec::new();
        let state = Initiator::start(local, peer, cookie, &mut out)?;
        flush(&mut transport, &mut out).await?;
        let next = state.on_status(&message(&mut transport, &mut decoder).await?)?;
        let state = match next {
            AfterStatus::Challenge(state) => state,
            AfterStatus::Alive(state) if is_up().await => {
                state.give_up(&mut out)?;
                flush(&mut transport, &mut out).await?;
                return Err(Failure::AlreadyUp);
            }
            // We have no connection: the one that the peer sees is a dead one.
            AfterStatus::Alive(state) => {
                replaces = true;
                let state = state.proceed(&mut out)?;
                flush(&mut transport, &mut out).await?;
                state
            }
        };
        let challenge = random_challenge()?;
        let state = state.on_challenge(&message(&mut transport, &mut decoder).await?, challenge, &mut out)?;
        flush(&mut transport, &mut out).await?;
        // A peer whose cookie is another one says nothing and closes.
        let ack = message(&mut transport, &mut decoder)
            .await
            .map_err(|failure| match failure {
                Failure::Closed(_) => Failure::Closed(" when it saw our proof: the cookies differ"),
                other => other,
            })?;
        Ok(state.on_ack(&ack)?)
    })
    .await?;
    Ok(Ready {
        transport,
        established,
        decoder: decoder.into_connected(max_frame),
        replaces,
    })
}

/// The accepting side. `vouched` is the name that the road there proved, if it proved one; `standing` says what
/// there is with the name that the peer claims.
pub(crate) async fn accept(
    mut transport: Transport,
    local: LocalNode,
    vouched: Option<&str>,
    cookie: Cookie,
    max_frame: usize,
    limit: Duration,
    standing: impl FnOnce(&str) -> Standing,
) -> Result<Ready, Failure> {
    let mut decoder = HandshakeDecoder::new();
    let own = local.name.clone();
    let established = within(limit, async {
        let mut out = Vec::new();
        let given = match AwaitName::new(local).on_name(&message(&mut transport, &mut decoder).await?) {
            Err(error @ (HandshakeError::MissingFlags { .. } | HandshakeError::OldName)) => {
                // As OTP 27 and later do: the peer then knows that it was not the network.
                Status::NotAllowed.encode(&mut out)?;
                flush(&mut transport, &mut out).await?;
                return Err(error.into());
            }
            given => given?,
        };
        let peer = given.peer_name().to_owned();
        if let Some(failure) = refusal(&own, &peer, given.wants_name(), vouched) {
            given.refuse(Refusal::NotAllowed, &mut out)?;
            flush(&mut transport, &mut out).await?;
            return Err(failure);
        }
        let challenge = random_challenge()?;
        let state = match standing(&peer) {
            Standing::Unknown => given.admit(Admission::Ok, cookie, challenge, &mut out)?,
            // Section "Distribution Handshake", step 3: the greater name's attempt is the one that goes on.
            Standing::Dialling if own > peer => {
                given.refuse(Refusal::Nok, &mut out)?;
                flush(&mut transport, &mut out).await?;
                return Err(Failure::Simultaneous);
            }
            Standing::Dialling => given.admit(Admission::OkSimultaneous, cookie, challenge, &mut out)?,
            Standing::Up => {
                let state = given.alive(&mut out)?;
                flush(&mut transport, &mut out).await?;
                state.on_answer(
                    &message(&mut transport, &mut decoder).await?,
                    cookie,
                    challenge,
                    &mut out,
                )?
            }
        };
        flush(&mut transport, &mut out).await?;
        let established = state.on_reply(&message(&mut transport, &mut decoder).await?, &mut out)?;
        flush(&mut transport, &mut out).await?;
        Ok(established)
    })
    .await?;
    // A peer that proves itself has no other connection than this one, whatever we believe.
    Ok(Ready {
        transport,
        established,
        decoder: decoder.into_connected(max_frame),
        replaces: true,
    })
}

/// Why a claimed name gets no further.
fn refusal(own: &str, peer: &str, wants_name: bool, vouched: Option<&str>) -> Option<Failure> {
    if peer == own {
        return Some(Failure::OwnName(peer.to_owned()));
    }
    if wants_name {
        return Some(Failure::Handshake(HandshakeError::WrongAdmission {
            peer: peer.to_owned(),
            given: "not given a name",
        }));
    }
    match vouched {
        Some(wanted) if wanted != peer => Some(Failure::OtherName {
            wanted: wanted.to_owned(),
            got: peer.to_owned(),
        }),
        _ => None,
    }
}

async fn within<T>(limit: Duration, steps: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(limit, steps)
        .await
        .map_err(|_| Failure::Timeout(limit))?
}

/// The next whole handshake message. Copied, since the states and the buffer are used in turn; it is small.
async fn message(transport: &mut Transport, decoder: &mut HandshakeDecoder) -> Result<Vec<u8>, Failure> {
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return Ok(frame.to_vec());
        }
        if transport.read.read_buf(decoder.read_buf()).await? == 0 {
            return Err(Failure::Closed(" during the handshake"));
        }
    }
}

async fn flush(transport: &mut Transport, out: &mut Vec<u8>) -> std::io::Result<()> {
    transport.write.write_all(out).await?;
    transport.write.flush().await?;
    out.clear();
    Ok(())
}

fn random_challenge() -> Result<u32, getrandom::Error> {
    getrandom::u32()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn transport(stream: tokio::io::DuplexStream) -> Transport {
        let (read, write) = tokio::io::split(stream);
        Transport {
            read: Box::new(read),
            write: Box::new(write),
            identity: None,
            link: None,
        }
    }

    /// Both ends, the acceptor `b@h` believing `vouched` and holding `standing` of the dialler.
    async fn meet(
        dialler: &str,
        vouched: Option<&str>,
        standing: Standing,
    ) -> (Result<Ready, Failure>, Result<Ready, Failure>) {
        let (near, far) = tokio::io::duplex(4096);
        let limit = Duration::from_secs(60);
        let dialling = initiate(
            transport(near),
            LocalNode::hidden(dialler, 7),
            "b@h",
            Cookie::new("c"),
            100,
            limit,
            || async { false },
        );
        let local = LocalNode::hidden("b@h", 8);
        let accepting = accept(
            transport(far),
            local,
            vouched,
            Cookie::new("c"),
            100,
            limit,
            |_| standing,
        );
        tokio::join!(dialling, accepting)
    }

    fn status(result: Result<Ready, Failure>) -> Option<&'static str> {
        match result {
            Err(Failure::Handshake(HandshakeError::Refused { status })) => Some(status),
            _ => None,
        }
    }

    #[tokio::test]
    async fn only_the_name_that_the_agent_vouches_for_is_taken() {
        let (near, far) = meet("a@h", Some("a@h"), Standing::Unknown).await;
        assert_eq!(near.unwrap().established.peer_name, "b@h");
        assert_eq!(far.unwrap().established.peer_name, "a@h");
        let (near, far) = meet("a@h", Some("c@h"), Standing::Unknown).await;
        assert_eq!(status(near), Some("not_allowed"));
        assert!(matches!(far, Err(Failure::OtherName { .. })));
        let (near, far) = meet("b@h", None, Standing::Unknown).await;
        assert_eq!(status(near), Some("not_allowed"));
        assert!(matches!(far, Err(Failure::OwnName(_))));
    }

    #[tokio::test]
    async fn of_two_attempts_that_of_the_greater_name_goes_on() {
        let (near, far) = meet("c@h", None, Standing::Dialling).await;
        assert!(near.is_ok() && far.is_ok());
        let (near, far) = meet("a@h", None, Standing::Dialling).await;
        assert_eq!(status(near), Some("nok"));
        assert!(matches!(far, Err(Failure::Simultaneous)));
    }

    #[tokio::test]
    async fn a_dead_connection_is_replaced() {
        let (near, far) = meet("a@h", None, Standing::Up).await;
        assert!(near.unwrap().replaces && far.unwrap().replaces);
    }
}
