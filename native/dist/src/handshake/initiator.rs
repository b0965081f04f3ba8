use super::{
    Challenge, ChallengeAck, ChallengeReply, Cookie, Established, HandshakeError, LocalNode, SendName, Status,
};
use crate::flags::DistFlags;

/// The dialling role.
#[derive(Debug)]
pub struct Initiator {
    local: LocalNode,
    /// The name that was dialled.
    peer: String,
    cookie: Cookie,
}

impl Initiator {
    /// Appends `send_name` to `out` and waits for the status.
    ///
    /// # Errors
    /// The local name is none or too long.
    pub fn start(
        local: LocalNode,
        peer: impl Into<String>,
        cookie: Cookie,
        out: &mut Vec<u8>,
    ) -> Result<AwaitStatus, HandshakeError> {
        SendName {
            flags: local.flags,
            creation: local.creation,
            name: &local.name,
        }
        .encode(out)?;
        Ok(AwaitStatus(Self {
            local,
            peer: peer.into(),
            cookie,
        }))
    }
}

/// The name is sent; the acceptor's status is to come.
#[derive(Debug)]
pub struct AwaitStatus(Initiator);

/// Where a status leads.
#[derive(Debug)]
pub enum AfterStatus {
    /// The acceptor goes on.
    Challenge(AwaitChallenge),
    /// The acceptor says that a link with this name is up: decide.
    Alive(DecideAlive),
}

impl AwaitStatus {
    /// Takes the status.
    ///
    /// # Errors
    /// [`HandshakeError::Refused`] on `nok` and `not_allowed`; anything that is no status for this state.
    pub fn on_status(mut self, message: &[u8]) -> Result<AfterStatus, HandshakeError> {
        let wants_name = self.0.local.flags.contains(DistFlags::NAME_ME);
        let status = Status::decode(message)?;
        match status {
            Status::Nok | Status::NotAllowed => {
                return Err(HandshakeError::Refused {
                    status: status.text(),
                });
            }
            Status::Ok | Status::OkSimultaneous if !wants_name => {}
            Status::Alive if !wants_name => return Ok(AfterStatus::Alive(DecideAlive(self.0))),
            Status::Named { name, creation } if wants_name => {
                name.clone_into(&mut self.0.local.name);
                self.0.local.creation = creation;
            }
            _ => {
                let wanted = if wants_name {
                    "named:"
                } else {
                    "ok, ok_simultaneous, nok, not_allowed or alive"
                };
                return Err(HandshakeError::BadStatus {
                    status: status.text().into(),
                    wanted,
                });
            }
        }
        Ok(AfterStatus::Challenge(AwaitChallenge(self.0)))
    }
}

/// The acceptor believes that it has a link with us.
#[derive(Debug)]
pub struct DecideAlive(Initiator);

impl DecideAlive {
    /// That link is broken as far as we know: go on.
    ///
    /// # Errors
    /// None in practice; the message holds no name.
    pub fn proceed(self, out: &mut Vec<u8>) -> Result<AwaitChallenge, HandshakeError> {
        Status::True.encode(out)?;
        Ok(AwaitChallenge(self.0))
    }

    /// This attempt was a mistake: send `out`, then close.
    ///
    /// # Errors
    /// None in practice; the message holds no name.
    pub fn give_up(self, out: &mut Vec<u8>) -> Result<(), HandshakeError> {
        Status::False.encode(out)
    }
}

/// The acceptor goes on; its challenge is to come.
#[derive(Debug)]
pub struct AwaitChallenge(Initiator);

impl AwaitChallenge {
    /// Takes the challenge, answers it, and puts `challenge` (random, from the caller) to the acceptor.
    ///
    /// # Errors
    /// Another node than was dialled, missing mandatory flags, a malformed message. Nothing is answered then:
    /// the digest is made for nobody but the node that was dialled.
    pub fn on_challenge(
        self,
        message: &[u8],
        challenge: u32,
        out: &mut Vec<u8>,
    ) -> Result<AwaitAck, HandshakeError> {
        let Self(Initiator { local, peer, cookie }) = self;
        let theirs = Challenge::decode(message)?;
        if theirs.name != peer {
            return Err(HandshakeError::WrongName {
                wanted: peer,
                got: theirs.name.to_owned(),
            });
        }
        let flags = local.agree(theirs.flags)?;
        ChallengeReply {
            challenge,
            digest: cookie.digest(theirs.challenge),
        }
        .encode(out);
        let established = Established {
            local_name: local.name,
            local_creation: local.creation,
            peer_name: peer,
            peer_creation: theirs.creation,
            peer_flags: theirs.flags,
            flags,
        };
        Ok(AwaitAck {
            established,
            cookie,
            challenge,
        })
    }
}

/// Our proof is sent; the acceptor's is to come.
#[derive(Debug)]
pub struct AwaitAck {
    established: Established,
    cookie: Cookie,
    challenge: u32,
}

impl AwaitAck {
    /// Takes the acceptor's proof.
    ///
    /// # Errors
    /// [`HandshakeError::CookieMismatch`] when the digest is not ours; a malformed message.
    pub fn on_ack(self, message: &[u8]) -> Result<Established, HandshakeError> {
        if self
            .cookie
            .proves(self.challenge, &ChallengeAck::decode(message)?.digest)
        {
            Ok(self.established)
        } else {
            Err(HandshakeError::CookieMismatch {
                peer: self.established.peer_name,
            })
        }
    }
}
