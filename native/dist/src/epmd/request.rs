use super::{EpmdError, MAX_EXTRA_LEN, MAX_NAME_LEN, Node, check_len, checked_name};
use crate::wire::Reader;

const ALIVE2_REQ: u8 = 120;
const PORT_PLEASE2_REQ: u8 = 122;
const NAMES_REQ: u8 = 110;
const DUMP_REQ: u8 = 100;
const KILL_REQ: u8 = 107;
const STOP_REQ: u8 = 115;

/// Longest request body taken, in bytes: an `ALIVE2_REQ` with both variable fields full.
pub const MAX_REQUEST: usize = 13 + MAX_NAME_LEN + MAX_EXTRA_LEN;

/// What a client asks of EPMD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `ALIVE2_REQ`: register for as long as this connection is open.
    Alive2(Node),
    /// `PORT_PLEASE2_REQ`: where is the node of this name?
    PortPlease2(Vec<u8>),
    /// `NAMES_REQ`: list all names.
    Names,
    /// `DUMP_REQ`: list all state. Recognised, so that it can be refused.
    Dump,
    /// `KILL_REQ`: end. Recognised, so that it can be refused.
    Kill,
    /// `STOP_REQ`: unregister someone else's name. Recognised, so that it can be refused.
    Stop(Vec<u8>),
}

impl Request {
    /// Reads a request, given everything that came on the connection. `Ok(None)`: more bytes are needed, at most
    /// [`MAX_REQUEST`] and 2 in all.
    ///
    /// # Errors
    /// Lengths beyond the limits (as soon as they are seen), an unknown tag, missing or trailing bytes, a name
    /// that can be none.
    pub fn decode(received: &[u8]) -> Result<Option<Self>, EpmdError> {
        let Some((header, rest)) = received.split_first_chunk::<2>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes(*header));
        check_len("request", len, MAX_REQUEST)?;
        if let Some(tag) = rest.first().filter(|_| len > 0) {
            name_of(*tag)?;
        }
        let Some((body, behind)) = rest.split_at_checked(len) else {
            return Ok(None);
        };
        let request = Self::decode_body(body)?;
        match behind.len() {
            0 => Ok(Some(request)),
            len => Err(EpmdError::TrailingBytes {
                what: "the request",
                len,
            }),
        }
    }

    fn decode_body(body: &[u8]) -> Result<Self, EpmdError> {
        let Some((tag, fields)) = body.split_first() else {
            return Err(EpmdError::CutShort {
                what: "request",
                len: 0,
            });
        };
        let what = name_of(*tag)?;
        let mut r = Reader::new(fields);
        let request = match *tag {
            ALIVE2_REQ => {
                let node = Node::decode(&mut r)?;
                Self::Alive2(node.map_err(|_| EpmdError::CutShort {
                    what,
                    len: body.len(),
                })?)
            }
            PORT_PLEASE2_REQ => return checked_name(fields).map(|name| Self::PortPlease2(name.to_vec())),
            STOP_REQ => return checked_name(fields).map(|name| Self::Stop(name.to_vec())),
            NAMES_REQ => Self::Names,
            DUMP_REQ => Self::Dump,
            _ => Self::Kill,
        };
        match r.remaining() {
            0 => Ok(request),
            len => Err(EpmdError::TrailingBytes { what, len }),
        }
    }

    /// Appends the framed request.
    ///
    /// # Errors
    /// A name or extra field that [`Self::decode`] would refuse.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EpmdError> {
        let mut body = Vec::new();
        match self {
            Self::Alive2(node) => {
                body.push(ALIVE2_REQ);
                node.encode(&mut body)?;
            }
            Self::PortPlease2(name) => {
                body.push(PORT_PLEASE2_REQ);
                body.extend_from_slice(checked_name(name)?);
            }
            Self::Stop(name) => {
                body.push(STOP_REQ);
                body.extend_from_slice(checked_name(name)?);
            }
            Self::Names => body.push(NAMES_REQ),
            Self::Dump => body.push(DUMP_REQ),
            Self::Kill => body.push(KILL_REQ),
        }
        // At most MAX_REQUEST, since its parts were checked.
        out.extend_from_slice(&(body.len() as u16).to_be_bytes());
        out.append(&mut body);
        Ok(())
    }
}

fn name_of(tag: u8) -> Result<&'static str, EpmdError> {
    Ok(match tag {
        ALIVE2_REQ => "ALIVE2_REQ",
        PORT_PLEASE2_REQ => "PORT_PLEASE2_REQ",
        NAMES_REQ => "NAMES_REQ",
        DUMP_REQ => "DUMP_REQ",
        KILL_REQ => "KILL_REQ",
        STOP_REQ => "STOP_REQ",
        got => {
            return Err(EpmdError::UnknownTag {
                got,
                wanted: "an EPMD request",
            });
        }
    })
}
