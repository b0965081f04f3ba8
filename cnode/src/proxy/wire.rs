//! The frames that come before a link's bytes: on the dist socket, to a node, and between agents.
//!
//! Each is a 16-bit length and that many bytes; integers are big-endian. `str8` and `str16` are a
//! length of one or two bytes and UTF-8 text.
//!
//! ```text
//! CONNECT   version:8=1  1  link:16 bytes  secret:32 bytes  str16 target node
//! OK        version:8=1  2  str16 remote SPIFFE  str16 remote agent
//! REFUSED   version:8=1  3  str8 cause  str16 text
//! ACCEPT    version:8=1  4  link:16 bytes  secret:32 bytes  str16 remote node  str16 remote SPIFFE  str16 remote agent
//! request   version:8=1  purpose:8 (that of a link, or 4: a re-proof)  link:16 bytes  str16 service  str16 instance  str16 claimed node
//! reply     version:8=1  status:8 (0 ok, 1 refused)  str8 cause  str16 text
//! ```

use super::cause::{Cause, Refusal};
use super::links::{LinkId, Purpose};
use super::local::{SECRET_LEN, Secret};

/// The version of every frame here.
pub const VERSION: u8 = 1;
/// Longest CONNECT, OK, REFUSED and ACCEPT in bytes, without the length.
pub const MAX_DIST_FRAME: usize = 2048;
/// Longest request and reply between agents in bytes, without the length.
pub const MAX_MESH_FRAME: usize = 4096;
/// Longest text of a refusal in bytes; a longer one is cut.
pub const MAX_TEXT: usize = 1024;

/// A frame that does not hold what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The sender speaks another version.
    #[error(
        "the sender speaks version {seen}, this agent {VERSION} to {VERSION}: upgrade the older of the two"
    )]
    Version {
        /// What it said.
        seen: u8,
    },
    /// The frame ends inside a field.
    #[error("the frame ends inside its {field}")]
    Short {
        /// Which field.
        field: &'static str,
    },
    /// The frame goes on after its last field.
    #[error("{bytes} bytes follow the last field")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// A field holds what it must not.
    #[error("the {field} is not understood")]
    Field {
        /// Which field.
        field: &'static str,
    },
    /// The length is beyond the limit.
    #[error("a frame of {len} bytes, at most {max} are taken")]
    TooLong {
        /// Announced bytes.
        len: usize,
        /// The limit.
        max: usize,
    },
}

impl From<WireError> for Refusal {
    fn from(error: WireError) -> Self {
        let cause = match error {
            WireError::Version { .. } => Cause::VersionMismatch,
            WireError::TooLong { .. } => Cause::Limit,
            _ => Cause::InvalidRequest,
        };
        cause.because(error.to_string())
    }
}

/// A node asks for a link to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// Its name for the link.
    pub link: LinkId,
    /// Says which registration dials.
    pub secret: Secret,
    /// The node to reach.
    pub target: String,
}

impl Connect {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame(out, |out| {
            out.extend_from_slice(&[VERSION, 1]);
            out.extend_from_slice(&self.link.0);
            out.extend_from_slice(self.secret.expose());
            str16(out, &self.target);
        });
    }

    /// Reads the frame, its length already taken off.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::versioned(payload)?;
        r.tag(1)?;
        let (link, secret) = (
            LinkId(r.array("link id")?),
            Secret::from_bytes(r.array::<SECRET_LEN>("secret")?),
        );
        let target = r.str16("target node")?;
        r.end(Self { link, secret, target })
    }
}

/// The agent's answer to [`Connect`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectReply {
    /// The distribution handshake follows.
    Ok {
        /// What the other end has proven to be; empty when nothing proves it to this agent.
        remote_spiffe: String,
        /// Where the other agent is.
        remote_agent: String,
    },
    /// There is no link.
    Refused(Refusal),
}

impl ConnectReply {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame(out, |out| match self {
            Self::Ok {
                remote_spiffe,
                remote_agent,
            } => {
                out.extend_from_slice(&[VERSION, 2]);
                str16(out, remote_spiffe);
                str16(out, remote_agent);
            }
            Self::Refused(refusal) => {
                out.extend_from_slice(&[VERSION, 3]);
                put_refusal(out, refusal);
            }
        });
    }

    /// Reads the frame, its length already taken off.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::versioned(payload)?;
        let reply = match r.byte("type")? {
            2 => Self::Ok {
                remote_spiffe: r.str16("SPIFFE id")?,
                remote_agent: r.str16("remote agent")?,
            },
            3 => Self::Refused(r.refusal()?),
            _ => return Err(WireError::Field { field: "type" }),
        };
        r.end(reply)
    }
}

/// What the agent says first on a node's own socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The dialler's name for the link.
    pub link: LinkId,
    /// The node's own secret: proves the agent.
    pub secret: Secret,
    /// The node that dials.
    pub remote_node: String,
    /// What it has proven to be; empty when nothing proves it to this agent.
    pub remote_spiffe: String,
    /// Where its agent is.
    pub remote_agent: String,
}

impl Accept {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame(out, |out| {
            out.extend_from_slice(&[VERSION, 4]);
            out.extend_from_slice(&self.link.0);
            out.extend_from_slice(self.secret.expose());
            for text in [&self.remote_node, &self.remote_spiffe, &self.remote_agent] {
                str16(out, text);
            }
        });
    }

    /// Reads the frame, its length already taken off.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::versioned(payload)?;
        r.tag(4)?;
        let (link, secret) = (
            LinkId(r.array("link id")?),
            Secret::from_bytes(r.array::<SECRET_LEN>("secret")?),
        );
        let remote_node = r.str16("remote node")?;
        let remote_spiffe = r.str16("SPIFFE id")?;
        let remote_agent = r.str16("remote agent")?;
        r.end(Self {
            link,
            secret,
            remote_node,
            remote_spiffe,
            remote_agent,
        })
    }
}

/// The purpose of a request that asks for no link.
const REPROOF: u8 = 4;

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A link that will carry this.
    Link(Purpose),
    /// A live link of this name is to be believed by this handshake from now on.
    Reproof,
}

impl Asked {
    fn from_wire(number: u8) -> Option<Self> {
        match number {
            REPROOF => Some(Self::Reproof),
            number => Purpose::from_wire(number).map(Self::Link),
        }
    }

    fn to_wire(self) -> u8 {
        match self {
            Self::Link(purpose) => purpose as u8,
            Self::Reproof => REPROOF,
        }
    }
}

/// What one agent asks of another, first thing inside TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What it is for.
    pub asked: Asked,
    /// The link's name.
    pub link: LinkId,
    /// The service that the server's certificate must name.
    pub service: String,
    /// The instance: a node name for dist; empty for any.
    pub instance: String,
    /// The node that dials; may be empty but for dist.
    pub node: String,
}

impl Request {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        frame(out, |out| {
            out.extend_from_slice(&[VERSION, self.asked.to_wire()]);
            out.extend_from_slice(&self.link.0);
            for text in [&self.service, &self.instance, &self.node] {
                str16(out, text);
            }
        });
    }

    /// Reads the frame, its length already taken off.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::versioned(payload)?;
        let asked = Asked::from_wire(r.byte("purpose")?).ok_or(WireError::Field { field: "purpose" })?;
        let link = LinkId(r.array("link id")?);
        let (service, instance, node) = (
            r.str16("service")?,
            r.str16("instance")?,
            r.str16("claimed node")?,
        );
        r.end(Self {
            asked,
            link,
            service,
            instance,
            node,
        })
    }
}

/// Appends the answer to a [`Request`].
pub fn encode_reply(reply: &Result<(), Refusal>, out: &mut Vec<u8>) {
    frame(out, |out| match reply {
        Ok(()) => {
            out.extend_from_slice(&[VERSION, 0, 0]);
            str16(out, "");
        }
        Err(refusal) => {
            out.extend_from_slice(&[VERSION, 1]);
            put_refusal(out, refusal);
        }
    });
}

/// Reads the answer to a [`Request`], its length already taken off.
///
/// # Errors
/// [`WireError`].
pub fn decode_reply(payload: &[u8]) -> Result<Result<(), Refusal>, WireError> {
    let mut r = Reader::versioned(payload)?;
    let reply = match r.byte("status")? {
        0 => {
            r.str8("cause")?;
            r.str16("text")?;
            Ok(())
        }
        1 => Err(r.refusal()?),
        _ => return Err(WireError::Field { field: "status" }),
    };
    r.end(reply)
}

fn frame(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0, 0]);
    body(out);
    let len = u16::try_from(out.len() - start - 2).unwrap_or(u16::MAX);
    if let Some(head) = out.get_mut(start..start + 2) {
        head.copy_from_slice(&len.to_be_bytes());
    }
}

fn str16(out: &mut Vec<u8>, text: &str) {
    let text = cut(text, MAX_TEXT);
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_refusal(out: &mut Vec<u8>, refusal: &Refusal) {
    let cause = refusal.cause.as_str();
    out.push(cause.len() as u8);
    out.extend_from_slice(cause.as_bytes());
    str16(out, &refusal.text);
}

/// The front of a text, at most so many bytes, no character broken.
fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn versioned(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Self(payload);
        match reader.byte("version")? {
            VERSION => Ok(reader),
            seen => Err(WireError::Version { seen }),
        }
    }

    fn take(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(WireError::Short { field })?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        self.take(N, field)?
            .try_into()
            .map_err(|_| WireError::Short { field })
    }

    fn byte(&mut self, field: &'static str) -> Result<u8, WireError> {
        Ok(u8::from_be_bytes(self.array(field)?))
    }

    fn tag(&mut self, wanted: u8) -> Result<(), WireError> {
        if self.byte("type")? == wanted {
            Ok(())
        } else {
            Err(WireError::Field { field: "type" })
        }
    }

    fn str8(&mut self, field: &'static str) -> Result<String, WireError> {
        let len = self.byte(field)?.into();
        self.text(len, field)
    }

    fn str16(&mut self, field: &'static str) -> Result<String, WireError> {
        let len = u16::from_be_bytes(self.array(field)?).into();
        self.text(len, field)
    }

    fn text(&mut self, len: usize, field: &'static str) -> Result<String, WireError> {
        let text = std::str::from_utf8(self.take(len, field)?).map_err(|_| WireError::Field { field })?;
        Ok(text.to_owned())
    }

    /// A cause that a newer agent knows is kept in the text; control characters would garble a log.
    fn refusal(&mut self) -> Result<Refusal, WireError> {
        let (name, text) = (self.str8("cause")?, self.str16("text")?);
        let text: String = text
            .chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect();
        let text = cut(&text, MAX_TEXT);
        Ok(match Cause::parse(&name) {
            Some(cause) => cause.because(text),
            None => Cause::InvalidRequest.because(format!("{name:?}: {text}")),
        })
    }

    fn end<T>(self, value: T) -> Result<T, WireError> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(WireError::Trailing { bytes: self.0.len() })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn payload(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        encode(&mut out);
        let len = usize::from(u16::from_be_bytes([out[0], out[1]]));
        assert_eq!(len, out.len() - 2);
        out.split_off(2)
    }

    fn text() -> impl Strategy<Value = String> {
        "[^\\p{Cc}]{0,80}"
    }

    fn refusal() -> impl Strategy<Value = Refusal> {
        (0..Cause::ALL.len(), text()).prop_map(|(i, text)| Cause::ALL[i].because(text))
    }

    /// Every shorter and every longer frame is an error, never a panic.
    fn only_whole<T: PartialEq + std::fmt::Debug>(
        bytes: &[u8],
        decode: impl Fn(&[u8]) -> Result<T, WireError>,
        value: &T,
    ) {
        assert_eq!(decode(bytes).as_ref(), Ok(value));
        for end in 0..bytes.len() {
            assert!(
                matches!(decode(&bytes[..end]), Err(WireError::Short { .. })),
                "cut at {end}"
            );
        }
        let longer = [bytes, &[0]].concat();
        assert_eq!(decode(&longer), Err(WireError::Trailing { bytes: 1 }));
        let mut newer = bytes.to_vec();
        newer[0] = 2;
        assert_eq!(decode(&newer), Err(WireError::Version { seen: 2 }));
    }

    proptest! {
        #[test]
        fn frames_round_trip(link: [u8; 16], secret: [u8; 32], a in text(), b in text(), c in text(),
                             n in 1u8..5, refusal in refusal()) {
            let (link, secret) = (LinkId(link), Secret::from_bytes(secret));
            let connect = Connect { link, secret: secret.clone(), target: a.clone() };
            only_whole(&payload(|o| connect.encode(o)), Connect::decode, &connect);
            let accept = Accept { link, secret, remote_node: a.clone(), remote_spiffe: b.clone(), remote_agent: c.clone() };
            only_whole(&payload(|o| accept.encode(o)), Accept::decode, &accept);
            let ok = ConnectReply::Ok { remote_spiffe: a.clone(), remote_agent: b.clone() };
            only_whole(&payload(|o| ok.encode(o)), ConnectReply::decode, &ok);
            let no = ConnectReply::Refused(refusal.clone());
            only_whole(&payload(|o| no.encode(o)), ConnectReply::decode, &no);
            let request = Request { asked: Asked::from_wire(n).unwrap(), link, service: a, instance: b, node: c };
            only_whole(&payload(|o| request.encode(o)), Request::decode, &request);
            for reply in [Ok(()), Err(refusal)] {
                only_whole(&payload(|o| encode_reply(&reply, o)), decode_reply, &reply);
            }
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = (Connect::decode(&bytes), Accept::decode(&bytes), ConnectReply::decode(&bytes));
            let _ = (Request::decode(&bytes), decode_reply(&bytes));
        }
    }

    #[test]
    fn exact_bytes() {
        let request = Request {
            asked: Asked::Link(Purpose::Dist),
            link: LinkId([7; 16]),
            service: "cart".into(),
            instance: "cart@h2".into(),
            node: "a@h1".into(),
        };
        let mut out = Vec::new();
        request.encode(&mut out);
        let mut wanted = vec![0, 39, 1, 1];
        wanted.extend([7; 16]);
        wanted.extend(b"\x00\x04cart\x00\x07cart@h2\x00\x04a@h1");
        assert_eq!(out, wanted);
        let mut out = Vec::new();
        encode_reply(&Err(Cause::Limit.because("x")), &mut out);
        assert_eq!(out, b"\x00\x0b\x01\x01\x05limit\x00\x01x");
    }

    #[test]
    fn texts_are_cut_and_cleaned() {
        let long = Cause::Timeout.because("ä".repeat(MAX_TEXT));
        let bytes = payload(|o| encode_reply(&Err(long), o));
        assert!(bytes.len() <= MAX_MESH_FRAME);
        let Err(back) = decode_reply(&bytes).unwrap() else {
            panic!("a refusal")
        };
        assert_eq!(back.text.len(), MAX_TEXT);
        let bytes = payload(|o| ConnectReply::Refused(Cause::Limit.because("a\n\u{1b}[2Jb")).encode(o));
        let clean = ConnectReply::Refused(Cause::Limit.because("a??[2Jb"));
        assert_eq!(ConnectReply::decode(&bytes), Ok(clean));
        let bytes = b"\x01\x01\x05novel\x00\x01x";
        assert_eq!(
            decode_reply(bytes),
            Ok(Err(Cause::InvalidRequest.because("\"novel\": x")))
        );
    }

    #[test]
    fn unknown_numbers_and_bad_text_are_named() {
        assert_eq!(
            Request::decode(&[1, 9]),
            Err(WireError::Field { field: "purpose" })
        );
        assert_eq!(
            Request::decode(&[1, 0]),
            Err(WireError::Field { field: "purpose" })
        );
        assert_eq!(
            Request::decode(&[1, 4]),
            Err(WireError::Short { field: "link id" })
        );
        assert_eq!(Connect::decode(&[1, 4]), Err(WireError::Field { field: "type" }));
        assert_eq!(
            ConnectReply::decode(&[1, 7]),
            Err(WireError::Field { field: "type" })
        );
        assert_eq!(decode_reply(&[1, 2]), Err(WireError::Field { field: "status" }));
        let bad = ConnectReply::decode(b"\x01\x02\x00\x01\xff\x00\x00");
        assert_eq!(bad, Err(WireError::Field { field: "SPIFFE id" }));
        assert_eq!(
            Refusal::from(WireError::Version { seen: 2 }).cause,
            Cause::VersionMismatch
        );
        assert_eq!(
            Refusal::from(WireError::TooLong { len: 9, max: 1 }).cause,
            Cause::Limit
        );
    }
}
