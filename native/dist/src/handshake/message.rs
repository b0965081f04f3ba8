//! The messages themselves.
//!
//! ```text
//! send_name        'N' flags:64 creation:32 nlen:16 name[nlen] ignored...
//! status           's' text | 's' "named:" nlen:16 name[nlen] creation:32 ignored...
//! challenge        'N' flags:64 challenge:32 creation:32 nlen:16 name[nlen] ignored...
//! challenge_reply  'r' challenge:32 digest[16]
//! challenge_ack    'a' digest[16]
//! ```

use super::{DIGEST_LEN, HandshakeError, name};
use crate::flags::DistFlags;
use crate::wire::{Reader, Short};

pub(crate) const TAG_SEND_NAME: u8 = b'N';
const TAG_OLD_NAME: u8 = b'n';
const TAG_STATUS: u8 = b's';
const TAG_CHALLENGE: u8 = b'N';
const TAG_CHALLENGE_REPLY: u8 = b'r';
const TAG_CHALLENGE_ACK: u8 = b'a';
/// Bytes of an unknown status that an error shows.
const SHOWN_STATUS: usize = 32;

/// `send_name`: the initiator's first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendName<'a> {
    /// The initiator's capabilities.
    pub flags: DistFlags,
    /// Its incarnation.
    pub creation: u32,
    /// Its full node name, or its host when `flags` has `NAME_ME`.
    pub name: &'a str,
}

/// `status`: whether the acceptor goes on; and the initiator's answer to `alive`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status<'a> {
    /// The handshake goes on.
    Ok,
    /// It goes on, and an attempt of the acceptor's own is given up for it.
    OkSimultaneous,
    /// The acceptor's own attempt goes on instead.
    Nok,
    /// Refused for a reason that isn't said.
    NotAllowed,
    /// The acceptor already has a link with a node of this name: the initiator is asked.
    Alive,
    /// Answer to `alive`: the old link is broken, go on.
    True,
    /// Answer to `alive`: the attempt was a mistake.
    False,
    /// It goes on, and the initiator is given a name.
    Named {
        /// The initiator's full node name from now on.
        name: &'a str,
        /// Its creation from now on.
        creation: u32,
    },
}

/// `challenge`: the acceptor's name and what the initiator is to digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Challenge<'a> {
    /// The acceptor's capabilities.
    pub flags: DistFlags,
    /// What to digest.
    pub challenge: u32,
    /// The acceptor's incarnation.
    pub creation: u32,
    /// Its full node name.
    pub name: &'a str,
}

/// `challenge_reply`: the initiator's proof and its own challenge.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ChallengeReply {
    /// What the acceptor is to digest.
    pub challenge: u32,
    /// Digest of the acceptor's challenge.
    pub digest: [u8; DIGEST_LEN],
}

/// `challenge_ack`: the acceptor's proof.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ChallengeAck {
    /// Digest of the initiator's challenge.
    pub digest: [u8; DIGEST_LEN],
}

impl<'a> SendName<'a> {
    /// Reads a message.
    ///
    /// # Errors
    /// Another tag ([`HandshakeError::OldName`] for `'n'`), a wrong length, a name that no node can have.
    pub fn decode(message: &'a [u8]) -> Result<Self, HandshakeError> {
        if message.first() == Some(&TAG_OLD_NAME) {
            return Err(HandshakeError::OldName);
        }
        let (flags, creation, name) = fields(message, TAG_SEND_NAME, "send_name", |r| {
            Ok((DistFlags::from_bits(r.u64()?), r.u32()?, name_field(r)?))
        })?;
        Ok(Self {
            flags,
            creation,
            name: name::check(name, flags)?,
        })
    }

    /// Appends the framed message.
    ///
    /// # Errors
    /// The name is too long.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), HandshakeError> {
        let name = name::check(self.name.as_bytes(), self.flags)?;
        framed(out, TAG_SEND_NAME, |out| {
            out.extend_from_slice(&self.flags.bits().to_be_bytes());
            out.extend_from_slice(&self.creation.to_be_bytes());
            put_name(out, name);
        });
        Ok(())
    }
}

impl<'a> Status<'a> {
    /// Reads a message.
    ///
    /// # Errors
    /// Another tag, an unknown status, a wrong length, a name that no node can have.
    pub fn decode(message: &'a [u8]) -> Result<Self, HandshakeError> {
        let text = fields(message, TAG_STATUS, "status", |r| Ok(r.rest()))?;
        Ok(match text {
            b"ok" => Self::Ok,
            b"ok_simultaneous" => Self::OkSimultaneous,
            b"nok" => Self::Nok,
            b"not_allowed" => Self::NotAllowed,
            b"alive" => Self::Alive,
            b"true" => Self::True,
            b"false" => Self::False,
            _ => {
                let Some(named) = text.strip_prefix(b"named:") else {
                    let shown = text.get(..SHOWN_STATUS).unwrap_or(text);
                    return Err(HandshakeError::BadStatus {
                        status: String::from_utf8_lossy(shown).into_owned(),
                        wanted: "a status of protocol version 6",
                    });
                };
                let mut r = Reader::new(named);
                let wrong_length = |Short| HandshakeError::WrongLength {
                    message: "status",
                    len: message.len(),
                };
                let name = name_field(&mut r).map_err(wrong_length)?;
                let creation = r.u32().map_err(wrong_length)?;
                Self::Named {
                    name: name::check(name, DistFlags::default())?,
                    creation,
                }
            }
        })
    }

    /// Appends the framed message.
    ///
    /// # Errors
    /// The name of `Named` is none or too long.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), HandshakeError> {
        if let Self::Named { name, .. } = self {
            name::check(name.as_bytes(), DistFlags::default())?;
        }
        framed(out, TAG_STATUS, |out| {
            out.extend_from_slice(self.text().as_bytes());
            if let Self::Named { name, creation } = self {
                put_name(out, name);
                out.extend_from_slice(&creation.to_be_bytes());
            }
        });
        Ok(())
    }

    /// The status as the specification writes it.
    #[must_use]
    pub fn text(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::OkSimultaneous => "ok_simultaneous",
            Self::Nok => "nok",
            Self::NotAllowed => "not_allowed",
            Self::Alive => "alive",
            Self::True => "true",
            Self::False => "false",
            Self::Named { .. } => "named:",
        }
    }
}

impl<'a> Challenge<'a> {
    /// Reads a message.
    ///
    /// # Errors
    /// Another tag, a wrong length, a name that no node can have.
    pub fn decode(message: &'a [u8]) -> Result<Self, HandshakeError> {
        let (flags, challenge, creation, name) = fields(message, TAG_CHALLENGE, "challenge", |r| {
            Ok((DistFlags::from_bits(r.u64()?), r.u32()?, r.u32()?, name_field(r)?))
        })?;
        Ok(Self {
            flags,
            challenge,
            creation,
            name: name::check(name, DistFlags::default())?,
        })
    }

    /// Appends the framed message.
    ///
    /// # Errors
    /// The name is none or too long.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), HandshakeError> {
        let name = name::check(self.name.as_bytes(), DistFlags::default())?;
        framed(out, TAG_CHALLENGE, |out| {
            out.extend_from_slice(&self.flags.bits().to_be_bytes());
            out.extend_from_slice(&self.challenge.to_be_bytes());
            out.extend_from_slice(&self.creation.to_be_bytes());
            put_name(out, name);
        });
        Ok(())
    }
}

impl ChallengeReply {
    /// Reads a message.
    ///
    /// # Errors
    /// Another tag, a wrong length.
    pub fn decode(message: &[u8]) -> Result<Self, HandshakeError> {
        let (challenge, digest, rest) = fields(message, TAG_CHALLENGE_REPLY, "challenge_reply", |r| {
            Ok((r.u32()?, r.array()?, r.remaining()))
        })?;
        no_rest(rest, "challenge_reply", message).map(|()| Self { challenge, digest })
    }

    /// Appends the framed message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        framed(out, TAG_CHALLENGE_REPLY, |out| {
            out.extend_from_slice(&self.challenge.to_be_bytes());
            out.extend_from_slice(&self.digest);
        });
    }
}

impl ChallengeAck {
    /// Reads a message.
    ///
    /// # Errors
    /// Another tag, a wrong length.
    pub fn decode(message: &[u8]) -> Result<Self, HandshakeError> {
        let (digest, rest) = fields(message, TAG_CHALLENGE_ACK, "challenge_ack", |r| {
            Ok((r.array()?, r.remaining()))
        })?;
        no_rest(rest, "challenge_ack", message).map(|()| Self { digest })
    }

    /// Appends the framed message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        framed(out, TAG_CHALLENGE_ACK, |out| out.extend_from_slice(&self.digest));
    }
}

fn fields<'a, T>(
    message: &'a [u8],
    tag: u8,
    waiting_for: &'static str,
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, Short>,
) -> Result<T, HandshakeError> {
    let wrong_length = |Short| HandshakeError::WrongLength {
        message: waiting_for,
        len: message.len(),
    };
    let mut r = Reader::new(message);
    match r.u8().map_err(wrong_length)? {
        got if got == tag => read(&mut r).map_err(wrong_length),
        got => Err(HandshakeError::Unexpected { waiting_for, got }),
    }
}

fn no_rest(rest: usize, message: &'static str, bytes: &[u8]) -> Result<(), HandshakeError> {
    if rest == 0 {
        Ok(())
    } else {
        Err(HandshakeError::WrongLength {
            message,
            len: bytes.len(),
        })
    }
}

fn name_field<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], Short> {
    let len = r.u16()?;
    r.take(usize::from(len))
}

/// `name` was checked: its length is far below 16 bits.
fn put_name(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(&(name.len() as u16).to_be_bytes());
    out.extend_from_slice(name.as_bytes());
}

/// Appends length, tag and body. Bodies hold at most a checked name, so 16 bits suffice.
fn framed(out: &mut Vec<u8>, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0, 0, tag]);
    body(out);
    let len = (out.len() - start - 2) as u16;
    if let Some(header) = out.get_mut(start..start + 2) {
        header.copy_from_slice(&len.to_be_bytes());
    }
}
