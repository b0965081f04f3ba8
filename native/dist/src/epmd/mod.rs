//! Messages of the port mapper EPMD, both directions (section "EPMD Protocol").
//!
//! ```text
//! request   len:16 body[len]
//!   ALIVE2_REQ        120 port:16 type:8 protocol:8 highest:16 lowest:16 nlen:16 name elen:16 extra
//!   PORT_PLEASE2_REQ  122 name          (to the end of the body)
//!   NAMES_REQ         110
//!   DUMP_REQ          100
//!   KILL_REQ          107
//!   STOP_REQ          115 name
//! response, not framed
//!   ALIVE2_X_RESP     118 result:8 creation:32
//!   ALIVE2_RESP       121 result:8 creation:16
//!   PORT2_RESP        119 0 port:16 type:8 protocol:8 highest:16 lowest:16 nlen:16 name elen:16 extra
//!                     119 result:8      (result > 0)
//!   NAMES_RESP        port:32 text      (to the end of the connection)
//! ```
//!
//! A connection carries one request. Decoders take all bytes received so far; `Ok(None)` asks for more. Names are
//! the part of a node name before `@`.
//!
//! ```
//! use meshx_dist::epmd::{Node, NodeType, Port2Resp, Request, decode_port2_resp};
//!
//! let mut out = Vec::new();
//! Request::PortPlease2("shop".into()).encode(&mut out)?; // in a program: write, and read at the other end
//! assert_eq!(Request::decode(&out)?, Some(Request::PortPlease2("shop".into())));
//!
//! out.clear();
//! Port2Resp::Found(Node::new("shop", 40_001, NodeType::Normal)).encode(&mut out)?;
//! let Some(Port2Resp::Found(shop)) = decode_port2_resp(&out)? else { unreachable!() };
//! assert_eq!(shop.port, 40_001);
//! # Ok::<(), meshx_dist::epmd::EpmdError>(())
//! ```

mod request;
mod response;

pub use request::{MAX_REQUEST, Request};
pub use response::{
    Alive2Resp, MAX_NAMES_RESP, NamesResp, Port2Resp, decode_alive2_resp, decode_names_resp,
    decode_port2_resp, encode_names_resp,
};

use crate::wire::{Reader, Short};

/// Longest name taken, in bytes.
pub const MAX_NAME_LEN: usize = 255;
/// Longest `Extra` field taken, in bytes. No known node fills it.
pub const MAX_EXTRA_LEN: usize = 255;
/// The distribution version that OTP 25 and later speak.
pub const DIST_VERSION: u16 = 6;

/// Why bytes are not an EPMD message. The connection is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EpmdError {
    /// A length beyond its limit.
    #[error("{what} of {len} bytes, at most {max} are taken")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The first byte names no message that fits here.
    #[error("got tag {got}, wanted {wanted}")]
    UnknownTag {
        /// The byte.
        got: u8,
        /// What fits here.
        wanted: &'static str,
    },
    /// The frame ends before its fields do.
    #[error("{what} is cut short: {len} bytes")]
    CutShort {
        /// Name of the message.
        what: &'static str,
        /// Bytes it has.
        len: usize,
    },
    /// Bytes follow where nothing may.
    #[error("{len} bytes follow {what}")]
    TrailingBytes {
        /// Name of the message.
        what: &'static str,
        /// How many.
        len: usize,
    },
    /// A name that would break a listing, or none at all.
    #[error("name {name:?} is empty or holds '@', white space or control characters")]
    BadName {
        /// The name, bytes that are no UTF-8 replaced.
        name: String,
    },
    /// A line of `NAMES_RESP` that isn't `name NAME at port PORT`.
    #[error("line {line:?} of the names is not \"name NAME at port PORT\"")]
    BadLine {
        /// The line, shortened.
        line: String,
    },
}

/// What kind of node registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeType {
    /// 77: a visible node.
    Normal,
    /// 72: a hidden node, a C-node for instance.
    Hidden,
    /// A value that the specification doesn't list.
    Other(u8),
}

impl NodeType {
    fn from_byte(byte: u8) -> Self {
        match byte {
            77 => Self::Normal,
            72 => Self::Hidden,
            other => Self::Other(other),
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Normal => 77,
            Self::Hidden => 72,
            Self::Other(other) => other,
        }
    }
}

/// A node as `ALIVE2_REQ` registers it and `PORT2_RESP` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Port on which it accepts distribution connections.
    pub port: u16,
    /// Visible or hidden.
    pub node_type: NodeType,
    /// 0 for TCP over IPv4, which nodes say for IPv6 too.
    pub protocol: u8,
    /// Highest distribution version it speaks; [`DIST_VERSION`] since OTP 23.
    pub highest_version: u16,
    /// Lowest distribution version it speaks; [`DIST_VERSION`] since OTP 25, 5 before.
    pub lowest_version: u16,
    /// Node name without host, at most [`MAX_NAME_LEN`] bytes.
    pub name: Vec<u8>,
    /// At most [`MAX_EXTRA_LEN`] bytes without meaning.
    pub extra: Vec<u8>,
}

impl Node {
    /// A node that speaks version 6 only over TCP.
    #[must_use]
    pub fn new(name: impl Into<Vec<u8>>, port: u16, node_type: NodeType) -> Self {
        Self {
            port,
            node_type,
            protocol: 0,
            highest_version: DIST_VERSION,
            lowest_version: DIST_VERSION,
            name: name.into(),
            extra: Vec::new(),
        }
    }

    /// Outer error: bytes that are wrong whatever follows. Inner: they end too early.
    fn decode(r: &mut Reader<'_>) -> Result<Result<Self, Short>, EpmdError> {
        let mut head =
            || -> Result<_, Short> { Ok((r.u16()?, r.u8()?, r.u8()?, r.u16()?, r.u16()?, r.u16()?)) };
        let Ok((port, node_type, protocol, highest_version, lowest_version, name_len)) = head() else {
            return Ok(Err(Short));
        };
        check_len("name", usize::from(name_len), MAX_NAME_LEN)?;
        let Ok(name) = r.take(usize::from(name_len)) else {
            return Ok(Err(Short));
        };
        let name = checked_name(name)?.to_vec();
        let Ok(extra_len) = r.u16() else {
            return Ok(Err(Short));
        };
        check_len("extra field", usize::from(extra_len), MAX_EXTRA_LEN)?;
        let Ok(extra) = r.take(usize::from(extra_len)) else {
            return Ok(Err(Short));
        };
        let node_type = NodeType::from_byte(node_type);
        let extra = extra.to_vec();
        Ok(Ok(Self {
            port,
            node_type,
            protocol,
            highest_version,
            lowest_version,
            name,
            extra,
        }))
    }

    fn encode(&self, out: &mut Vec<u8>) -> Result<(), EpmdError> {
        checked_name(&self.name)?;
        check_len("extra field", self.extra.len(), MAX_EXTRA_LEN)?;
        out.extend_from_slice(&self.port.to_be_bytes());
        out.extend_from_slice(&[self.node_type.byte(), self.protocol]);
        out.extend_from_slice(&self.highest_version.to_be_bytes());
        out.extend_from_slice(&self.lowest_version.to_be_bytes());
        // Both lengths were checked: they fit one byte.
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&self.name);
        out.extend_from_slice(&(self.extra.len() as u16).to_be_bytes());
        out.extend_from_slice(&self.extra);
        Ok(())
    }
}

/// Names go into line-oriented listings and node names: nothing may end a line, a word or the part before `@`.
fn checked_name(name: &[u8]) -> Result<&[u8], EpmdError> {
    check_len("name", name.len(), MAX_NAME_LEN)?;
    if name.is_empty() || name.iter().any(|b| *b <= b' ' || *b == 0x7f || *b == b'@') {
        return Err(EpmdError::BadName {
            name: String::from_utf8_lossy(name).into_owned(),
        });
    }
    Ok(name)
}

fn check_len(what: &'static str, len: usize, max: usize) -> Result<(), EpmdError> {
    if len > max {
        Err(EpmdError::TooLong { what, len, max })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
