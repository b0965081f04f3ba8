use super::{
    Challenge, ChallengeAck, ChallengeReply, Cookie, Established, HandshakeError, LocalNode, SendName, Status,
};
use crate::flags::DistFlags;

/// The accepting role: the initiator's name is to come.
#[derive(Debug)]
pub struct AwaitName {
    local: LocalNode,
}

impl AwaitName {
    /// A new acceptor for one connection.
    #[must_use]
    pub fn new(local: LocalNode) -> Self {
        Self { local }
    }

    /// Takes `send_name`. What to answer is the caller's decision.
    ///
    /// # Errors
    /// The old name message, missing mandatory flags, a malformed message or name.
    pub fn on_name(self, message: &[u8]) -> Result<NameGiven, HandshakeError> {
        let theirs = SendName::decode(message)?;
        let flags = self.local.agree(theirs.flags)?;
        let established = Established {
            local_name: self.local.name.clone(),
            local_creation: self.local.creation,
            peer_name: theirs.name.to_owned(),
            peer_creation: theirs.creation,
            peer_flags: theirs.flags,
            flags,
        };
        Ok(NameGiven {
            local: self.local,
            established,
        })
    }
}

/// How a node is let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission<'a> {
    /// Status `ok`.
    Ok,
    /// Status `ok_simultaneous`: our own attempt is given up, because the initiator's name is the greater one.
    OkSimultaneous,
    /// Status `named:`, the answer to a name message with `NAME_ME`.
    Named {
        /// The full name that the initiator gets.
        name: &'a str,
        /// The creation that it gets.
        creation: u32,
    },
}

/// How a node is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Status `nok`: our own attempt goes on, because our name is the greater one.
    Nok,
    /// Status `not_allowed`.
    NotAllowed,
}

/// The initiator has said who it wants to be. Nothing of it is proven yet.
#[derive(Debug)]
pub struct NameGiven {
    local: LocalNode,
    established: Established,
}

impl NameGiven {
    /// The name in its message: the host alone when [`Self::wants_name`].
    #[must_use]
    pub fn peer_name(&self) -> &str {
        &self.established.peer_name
    }

    /// The flags in its message.
    #[must_use]
    pub fn peer_flags(&self) -> DistFlags {
        self.established.peer_flags
    }

    /// Whether it asks to be given a name.
    #[must_use]
    pub fn wants_name(&self) -> bool {
        self.established.peer_flags.contains(DistFlags::NAME_ME)
    }

    /// Lets it go on: status and challenge in one write. `challenge` is random, from the caller.
    ///
    /// # Errors
    /// [`HandshakeError::WrongAdmission`] when a name is given unasked or asked for and not given.
    pub fn admit(
        mut self,
        admission: Admission<'_>,
        cookie: Cookie,
        challenge: u32,
        out: &mut Vec<u8>,
    ) -> Result<AwaitReply, HandshakeError> {
        let named = matches!(admission, Admission::Named { .. });
        if named != self.wants_name() {
            let given = if named { "given a name" } else { "not given a name" };
            return Err(HandshakeError::WrongAdmission {
                peer: self.established.peer_name,
                given,
            });
        }
        match admission {
            Admission::Ok => Status::Ok.encode(out)?,
            Admission::OkSimultaneous => Status::OkSimultaneous.encode(out)?,
            Admission::Named { name, creation } => {
                Status::Named { name, creation }.encode(out)?;
                name.clone_into(&mut self.established.peer_name);
                self.established.peer_creation = creation;
            }
        }
        self.challenge(cookie, challenge, out)
    }

    /// Asks whether the link that we have with this name is broken.
    ///
    /// # Errors
    /// [`HandshakeError::WrongAdmission`] for a node that asks for a name: it can't have a link yet.
    pub fn alive(self, out: &mut Vec<u8>) -> Result<AwaitAliveAnswer, HandshakeError> {
        if self.wants_name() {
            let given = "not given a name";
            return Err(HandshakeError::WrongAdmission {
                peer: self.established.peer_name,
                given,
            });
        }
        Status::Alive.encode(out)?;
        Ok(AwaitAliveAnswer(self))
    }

    /// Turns it away: send `out`, then close.
    ///
    /// # Errors
    /// None in practice; the message holds no name.
    pub fn refuse(self, refusal: Refusal, out: &mut Vec<u8>) -> Result<(), HandshakeError> {
        match refusal {
            Refusal::Nok => Status::Nok.encode(out),
            Refusal::NotAllowed => Status::NotAllowed.encode(out),
        }
    }

    fn challenge(
        self,
        cookie: Cookie,
        challenge: u32,
        out: &mut Vec<u8>,
    ) -> Result<AwaitReply, HandshakeError> {
        let Self { local, established } = self;
        // A BEAM takes the name that it asked for only from an acceptor that has the flag as well: `dist_util` does
        // so, the specification doesn't say it.
        let flags = local.flags | (established.peer_flags & DistFlags::NAME_ME);
        Challenge {
            flags,
            challenge,
            creation: local.creation,
            name: &local.name,
        }
        .encode(out)?;
        Ok(AwaitReply {
            established,
            cookie,
            challenge,
        })
    }
}

/// `alive` is sent; the initiator's answer is to come.
#[derive(Debug)]
pub struct AwaitAliveAnswer(NameGiven);

impl AwaitAliveAnswer {
    /// Takes the answer; after `true` the old link is to be dropped once the new one stands.
    ///
    /// # Errors
    /// [`HandshakeError::Refused`] on `false`; any other status.
    pub fn on_answer(
        self,
        message: &[u8],
        cookie: Cookie,
        challenge: u32,
        out: &mut Vec<u8>,
    ) -> Result<AwaitReply, HandshakeError> {
        match Status::decode(message)? {
            Status::True => self.0.challenge(cookie, challenge, out),
            Status::False => Err(HandshakeError::Refused { status: "false" }),
            other => Err(HandshakeError::BadStatus {
                status: other.text().into(),
                wanted: "true or false",
            }),
        }
    }
}

/// Our challenge is sent; the initiator's proof is to come.
#[derive(Debug)]
pub struct AwaitReply {
    established: Established,
    cookie: Cookie,
    challenge: u32,
}

impl AwaitReply {
    /// Takes the proof and answers with ours.
    ///
    /// # Errors
    /// [`HandshakeError::CookieMismatch`] when the digest is not ours (nothing is answered then: our digest goes
    /// only to who knows the cookie); a malformed message.
    pub fn on_reply(self, message: &[u8], out: &mut Vec<u8>) -> Result<Established, HandshakeError> {
        let reply = ChallengeReply::decode(message)?;
        if !self.cookie.proves(self.challenge, &reply.digest) {
            return Err(HandshakeError::CookieMismatch {
                peer: self.established.peer_name,
            });
        }
        ChallengeAck {
            digest: self.cookie.digest(reply.challenge),
        }
        .encode(out);
        Ok(self.established)
    }
}
