//! A frame's header, and all that can be said against it before its payload is there.

use crate::decoder::Phase;
use crate::{Cause, Failure, MAX_HELLO, MAX_PAYLOAD, MAX_TEXT, Role};

/// Frame types of `docs/rpc-protocol.md`.
#[allow(missing_docs)]
pub mod frame_type {
    pub const HELLO: u8 = 0x01;
    pub const HELLO_ACK: u8 = 0x02;
    pub const AUTH: u8 = 0x03;
    pub const READY: u8 = 0x04;
    pub const REFUSED: u8 = 0x05;
    pub const REQUEST: u8 = 0x10;
    pub const RESPONSE: u8 = 0x11;
    pub const DATA: u8 = 0x12;
    pub const CANCEL: u8 = 0x13;
    pub const RESET: u8 = 0x14;
    pub const WINDOW: u8 = 0x20;
    pub const PING: u8 = 0x21;
    pub const PONG: u8 = 0x22;
    pub const GOAWAY: u8 = 0x23;
    /// From here on a type that is not known is skipped.
    pub const EXTENSION: u8 = 0x80;
}
use frame_type::*;

/// The message is complete with this frame.
pub const FLAG_END: u8 = 0x01;
/// A checksum follows the payload.
pub const FLAG_CKS: u8 = 0x80;

pub(crate) const HEADER_LEN: usize = 12;
pub(crate) const CHECKSUM_LEN: usize = 4;
/// kind, deadline, total, term, fun_len.
pub(crate) const REQUEST_HEAD_FIXED: usize = 15;
/// With the longest name.
pub(crate) const REQUEST_HEAD_MAX: usize = REQUEST_HEAD_FIXED + 255;
/// status, term, total.
pub(crate) const RESPONSE_HEAD: usize = 10;

/// ```text
/// 0       3      4       5        8             12
/// | len:24 | type:8 | flags:8 | seq:24 | stream:32 |   big-endian
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the payload.
    pub len: u32,
    /// One of [`frame_type`].
    pub frame_type: u8,
    /// [`FLAG_END`], [`FLAG_CKS`].
    pub flags: u8,
    /// Number of the frame in its message, modulo 2^24.
    pub seq: u32,
    /// 0 is the connection.
    pub stream: u32,
}

impl Header {
    /// Reads a header, when its bytes are there.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let &[l0, l1, l2, frame_type, flags, q0, q1, q2, s0, s1, s2, s3] =
            bytes.first_chunk::<HEADER_LEN>()?;
        Some(Self {
            len: u32::from_be_bytes([0, l0, l1, l2]),
            frame_type,
            flags,
            seq: u32::from_be_bytes([0, q0, q1, q2]),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
        })
    }

    /// Appends it. `len` and `seq` keep their low 24 bits.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.len.to_be_bytes()[1..]);
        out.extend_from_slice(&[self.frame_type, self.flags]);
        out.extend_from_slice(&self.seq.to_be_bytes()[1..]);
        out.extend_from_slice(&self.stream.to_be_bytes());
    }

    pub(crate) fn end(&self) -> bool {
        self.flags & FLAG_END != 0
    }

    /// Bytes of header and payload.
    pub(crate) fn body_end(&self) -> usize {
        HEADER_LEN + self.len as usize
    }

    /// Bytes of the whole frame.
    pub(crate) fn frame_len(&self) -> usize {
        self.body_end()
            + if self.flags & FLAG_CKS != 0 {
                CHECKSUM_LEN
            } else {
                0
            }
    }

    /// Whether the frame carries bytes of a message.
    pub(crate) fn is_block(&self) -> bool {
        matches!(self.frame_type, REQUEST | RESPONSE | DATA)
    }

    /// Refuses what needs no payload to be refused. `block` is the agreed block size.
    pub(crate) fn check(&self, role: Role, phase: Phase, block: usize) -> Result<(), Failure> {
        self.check_type()?;
        self.check_flags()?;
        if self.len as usize > MAX_PAYLOAD {
            let text = format!("a frame of {} bytes, at most {MAX_PAYLOAD} wanted", self.len);
            return Err(Failure {
                cause: Cause::TooLarge,
                text,
            });
        }
        self.check_direction(role)?;
        self.check_phase(role, phase)?;
        self.check_len(block)?;
        self.check_stream()?;
        if !self.is_block() && self.frame_type < EXTENSION && self.seq != 0 {
            return protocol(format!(
                "sequence number {} on frame type {}, 0 wanted",
                self.seq, self.frame_type
            ));
        }
        Ok(())
    }

    fn check_type(&self) -> Result<(), Failure> {
        match self.frame_type {
            HELLO..=REFUSED | REQUEST..=RESET | WINDOW..=GOAWAY | EXTENSION.. => Ok(()),
            other => protocol(format!("frame type {other} is unknown")),
        }
    }

    fn check_flags(&self) -> Result<(), Failure> {
        let allowed = if self.is_block() || self.frame_type >= EXTENSION {
            FLAG_END | FLAG_CKS
        } else {
            0
        };
        if self.flags & !allowed == 0 {
            return Ok(());
        }
        protocol(format!(
            "flags {} on frame type {}, at most {allowed} wanted",
            self.flags, self.frame_type
        ))
    }

    fn check_direction(&self, role: Role) -> Result<(), Failure> {
        let peer = match (role, self.frame_type) {
            (Role::Server, HELLO_ACK | READY | RESPONSE) => "client",
            (Role::Client, HELLO | AUTH | REQUEST | CANCEL) => "server",
            _ => return Ok(()),
        };
        protocol(format!(
            "frame type {} is not for a {peer} to send",
            self.frame_type
        ))
    }

    fn check_phase(&self, role: Role, phase: Phase) -> Result<(), Failure> {
        match (self.frame_type, role, phase) {
            (REFUSED, _, _)
            | (HELLO, Role::Server, Phase::Hello)
            | (HELLO_ACK, Role::Client, Phase::Hello)
            | (AUTH, Role::Server, Phase::Auth)
            | (READY, Role::Client, Phase::Auth)
            | (REQUEST.., _, Phase::Up) => Ok(()),
            _ => protocol(format!("frame type {} at the wrong time", self.frame_type)),
        }
    }

    fn check_len(&self, block: usize) -> Result<(), Failure> {
        let len = self.len as usize;
        let head = match self.frame_type {
            DATA => Some(0),
            REQUEST => Some(REQUEST_HEAD_MAX),
            RESPONSE => Some(RESPONSE_HEAD),
            _ => None,
        };
        if head.is_some_and(|head| len > block + head) {
            return Err(block_too_large(len, block));
        }
        let (min, max) = match self.frame_type {
            HELLO | HELLO_ACK => (0, MAX_HELLO),
            AUTH => (32, 32),
            READY | CANCEL => (0, 0),
            REFUSED | RESET => (2, 2 + MAX_TEXT),
            REQUEST => (REQUEST_HEAD_FIXED + 1, MAX_PAYLOAD),
            RESPONSE => (RESPONSE_HEAD, MAX_PAYLOAD),
            WINDOW => (4, 4),
            PING | PONG => (8, 8),
            GOAWAY => (6, 6 + MAX_TEXT),
            _ => (0, MAX_PAYLOAD),
        };
        if (min..=max).contains(&len) {
            return Ok(());
        }
        protocol(format!(
            "frame type {} of {len} bytes, {min} to {max} wanted",
            self.frame_type
        ))
    }

    fn check_stream(&self) -> Result<(), Failure> {
        match (self.frame_type, self.stream) {
            (WINDOW | EXTENSION.., _) => Ok(()),
            (REQUEST..=RESET, 1..) => Ok(()),
            (HELLO..=REFUSED | PING..=GOAWAY, 0) => Ok(()),
            (frame_type, stream) => protocol(format!("frame type {frame_type} on stream {stream}")),
        }
    }
}

pub(crate) fn block_too_large(len: usize, block: usize) -> Failure {
    Failure {
        cause: Cause::TooLarge,
        text: format!("a block of {len} bytes, at most {block} wanted"),
    }
}

fn protocol(text: String) -> Result<(), Failure> {
    Err(Failure {
        cause: Cause::Protocol,
        text,
    })
}
