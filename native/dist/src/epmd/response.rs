use super::{EpmdError, Node, check_len, checked_name};
use crate::wire::{Reader, Short};

const ALIVE2_X_RESP: u8 = 118;
const PORT2_RESP: u8 = 119;
const ALIVE2_RESP: u8 = 121;

/// Longest `NAMES_RESP` taken, in bytes.
pub const MAX_NAMES_RESP: usize = 1024 * 1024;
/// Bytes of a faulty line that an error shows.
const SHOWN_LINE: usize = 80;

/// The answer to `ALIVE2_REQ`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alive2Resp {
    /// `ALIVE2_X_RESP`: registered or not, with a creation of 32 bits. For nodes that speak version 6.
    Creation32 {
        /// 0: registered.
        result: u8,
        /// The node's incarnation.
        creation: u32,
    },
    /// `ALIVE2_RESP`: the same with 16 bits, for older nodes or from an older EPMD.
    Creation16 {
        /// 0: registered.
        result: u8,
        /// The node's incarnation.
        creation: u16,
    },
}

impl Alive2Resp {
    /// The creation, if the name was registered.
    #[must_use]
    pub fn creation(self) -> Option<u32> {
        match self {
            Self::Creation32 { result: 0, creation } => Some(creation),
            Self::Creation16 { result: 0, creation } => Some(u32::from(creation)),
            _ => None,
        }
    }

    /// Appends the response.
    pub fn encode(self, out: &mut Vec<u8>) {
        match self {
            Self::Creation32 { result, creation } => {
                out.extend_from_slice(&[ALIVE2_X_RESP, result]);
                out.extend_from_slice(&creation.to_be_bytes());
            }
            Self::Creation16 { result, creation } => {
                out.extend_from_slice(&[ALIVE2_RESP, result]);
                out.extend_from_slice(&creation.to_be_bytes());
            }
        }
    }
}

/// Reads the answer to `ALIVE2_REQ`. `Ok(None)`: more bytes are needed.
///
/// # Errors
/// Another tag, trailing bytes.
pub fn decode_alive2_resp(received: &[u8]) -> Result<Option<Alive2Resp>, EpmdError> {
    let mut r = Reader::new(received);
    let mut read = || -> Result<Result<Alive2Resp, EpmdError>, Short> {
        Ok(Ok(match r.u8()? {
            ALIVE2_X_RESP => Alive2Resp::Creation32 {
                result: r.u8()?,
                creation: r.u32()?,
            },
            ALIVE2_RESP => Alive2Resp::Creation16 {
                result: r.u8()?,
                creation: r.u16()?,
            },
            got => {
                return Ok(Err(EpmdError::UnknownTag {
                    got,
                    wanted: "ALIVE2_X_RESP (118) or ALIVE2_RESP (121)",
                }));
            }
        }))
    };
    match read() {
        Ok(response) => whole("ALIVE2_RESP", response?, &r).map(Some),
        Err(Short) => Ok(None),
    }
}

/// The answer to `PORT_PLEASE2_REQ`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Port2Resp {
    /// The node is registered.
    Found(Node),
    /// It is not; the code is greater than 0 (EPMD says 1).
    NotFound(u8),
}

impl Port2Resp {
    /// Appends the response.
    ///
    /// # Errors
    /// A name or extra field beyond the limits.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EpmdError> {
        match self {
            Self::Found(node) => {
                let mut fields = vec![PORT2_RESP, 0];
                node.encode(&mut fields)?;
                out.append(&mut fields);
            }
            // 0 would announce fields.
            Self::NotFound(result) => out.extend_from_slice(&[PORT2_RESP, (*result).max(1)]),
        }
        Ok(())
    }
}

/// Reads the answer to `PORT_PLEASE2_REQ`. `Ok(None)`: more bytes are needed.
///
/// # Errors
/// Another tag, lengths beyond the limits (as soon as they are seen), trailing bytes.
pub fn decode_port2_resp(received: &[u8]) -> Result<Option<Port2Resp>, EpmdError> {
    let mut r = Reader::new(received);
    match r.u8() {
        Ok(PORT2_RESP) => {}
        Ok(got) => {
            return Err(EpmdError::UnknownTag {
                got,
                wanted: "PORT2_RESP (119)",
            });
        }
        Err(Short) => return Ok(None),
    }
    let response = match r.u8() {
        Ok(0) => match Node::decode(&mut r)? {
            Ok(node) => Port2Resp::Found(node),
            Err(Short) => return Ok(None),
        },
        Ok(result) => Port2Resp::NotFound(result),
        Err(Short) => return Ok(None),
    };
    whole("PORT2_RESP", response, &r).map(Some)
}

/// The answer to `NAMES_REQ`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamesResp {
    /// The port EPMD listens on.
    pub epmd_port: u32,
    /// Name without host, and distribution port, of each node.
    pub nodes: Vec<(Vec<u8>, u16)>,
}

/// Appends the answer to `NAMES_REQ`; the connection is to be closed behind it.
///
/// # Errors
/// A name beyond the limits or one that would break the listing.
pub fn encode_names_resp<'a>(
    epmd_port: u32,
    nodes: impl IntoIterator<Item = (&'a [u8], u16)>,
    out: &mut Vec<u8>,
) -> Result<(), EpmdError> {
    let start = out.len();
    out.extend_from_slice(&epmd_port.to_be_bytes());
    for (name, port) in nodes {
        if let Err(error) = checked_name(name) {
            out.truncate(start);
            return Err(error);
        }
        out.extend_from_slice(b"name ");
        out.extend_from_slice(name);
        out.extend_from_slice(format!(" at port {port}\n").as_bytes());
    }
    Ok(())
}

/// Reads a whole answer to `NAMES_REQ`: everything up to the end of the connection. Stop reading, and call this,
/// when more than [`MAX_NAMES_RESP`] bytes have come.
///
/// # Errors
/// Too long, cut short, or a line of another form.
pub fn decode_names_resp(received: &[u8]) -> Result<NamesResp, EpmdError> {
    check_len("NAMES_RESP", received.len(), MAX_NAMES_RESP)?;
    let mut r = Reader::new(received);
    let epmd_port = r.u32().map_err(|Short| EpmdError::CutShort {
        what: "NAMES_RESP",
        len: received.len(),
    })?;
    let mut nodes = Vec::new();
    for line in r.rest().split_inclusive(|byte| *byte == b'\n') {
        nodes.push(decode_line(line).ok_or_else(|| EpmdError::BadLine {
            line: String::from_utf8_lossy(line.get(..SHOWN_LINE).unwrap_or(line)).into_owned(),
        })?);
    }
    Ok(NamesResp { epmd_port, nodes })
}

fn decode_line(line: &[u8]) -> Option<(Vec<u8>, u16)> {
    const BETWEEN: &[u8] = b" at port ";
    let line = line.strip_suffix(b"\n")?.strip_prefix(b"name ")?;
    let at = line.windows(BETWEEN.len()).position(|window| window == BETWEEN)?;
    let (name, rest) = line.split_at_checked(at)?;
    let digits = rest.strip_prefix(BETWEEN)?;
    // `parse` alone would take a sign.
    let port = digits
        .iter()
        .all(u8::is_ascii_digit)
        .then(|| std::str::from_utf8(digits).ok()?.parse().ok())??;
    checked_name(name).ok().map(|name| (name.to_vec(), port))
}

fn whole<T>(what: &'static str, value: T, r: &Reader<'_>) -> Result<T, EpmdError> {
    match r.remaining() {
        0 => Ok(value),
        len => Err(EpmdError::TrailingBytes { what, len }),
    }
}
