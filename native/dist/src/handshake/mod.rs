//! The handshake of protocol version 6, both roles (section "Distribution Handshake").
//!
//! States take whole messages as [`crate::framing::HandshakeDecoder`] gives them, without the 16-bit length, and
//! append framed messages to the caller's `out`, which is to be sent whether or not the step succeeded. Time
//! limits are the caller's: each state waits for exactly one message. After an error the connection is over.
//!
//! The cookie's digest is MD5 over guessable input: it keeps clusters apart, it doesn't keep attackers out.

mod acceptor;
mod digest;
mod error;
mod initiator;
mod message;
mod name;

pub use acceptor::{Admission, AwaitAliveAnswer, AwaitName, AwaitReply, NameGiven, Refusal};
pub use digest::{Cookie, DIGEST_LEN};
pub use error::HandshakeError;
pub use initiator::{AfterStatus, AwaitAck, AwaitChallenge, AwaitStatus, DecideAlive, Initiator};
pub use message::{Challenge, ChallengeAck, ChallengeReply, SendName, Status};
pub use name::MAX_NAME_LEN;

pub(crate) use message::TAG_SEND_NAME;

use crate::flags::DistFlags;

/// What a node says of itself, and what it wants of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalNode {
    /// Full node name (`name@host`), or the host alone when `flags` has `NAME_ME`.
    pub name: String,
    /// Capabilities; [`DistFlags::c_node_default`] suits a node made with this crate.
    pub flags: DistFlags,
    /// Incarnation that is part of this node's pids, ports and references. Greater than 3 for a node that is up.
    pub creation: u32,
    /// Capabilities that a peer must have.
    pub required_flags: DistFlags,
}

impl LocalNode {
    /// A hidden node that requires what OTP 26 does; every OTP from 25 on has it.
    #[must_use]
    pub fn hidden(name: impl Into<String>, creation: u32) -> Self {
        Self {
            name: name.into(),
            flags: DistFlags::c_node_default(),
            creation,
            required_flags: DistFlags::MANDATORY_26,
        }
    }

    fn agree(&self, peer: DistFlags) -> Result<DistFlags, HandshakeError> {
        let missing = peer.missing(self.required_flags);
        if missing != DistFlags::default() {
            return Err(HandshakeError::MissingFlags { missing });
        }
        // `NAME_ME` is a request, nothing that is used on the link.
        Ok((self.flags.expand_digest() & peer.expand_digest()).without(DistFlags::NAME_ME))
    }
}

/// The end of a handshake that both digests proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Established {
    /// Our name on this link: the one given by the peer when `NAME_ME` asked for it.
    pub local_name: String,
    /// Our creation on this link.
    pub local_creation: u32,
    /// The peer's full node name.
    pub peer_name: String,
    /// The peer's incarnation.
    pub peer_creation: u32,
    /// All flags that the peer sent.
    pub peer_flags: DistFlags,
    /// What is used on this link: what both have, digest bits written out.
    pub flags: DistFlags,
}

#[cfg(test)]
mod tests;
