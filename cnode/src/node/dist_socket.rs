//! The frames between a node and its agent that come before a link's handshake (docs/mesh-protocol.md).

use subtle::ConstantTimeEq;

/// Bytes of a registration's secret.
pub(crate) const SECRET_LEN: usize = 32;
/// Longest frame, its length field not counted.
pub(crate) const MAX_FRAME: usize = 2048;

const VERSION: u8 = 1;
const CONNECT: u8 = 1;
const OK: u8 = 2;
const REFUSED: u8 = 3;
const ACCEPT: u8 = 4;

/// What a node asks the agent for.
pub(crate) struct ConnectFrame<'a> {
    pub(crate) link: [u8; 16],
    pub(crate) secret: [u8; SECRET_LEN],
    pub(crate) target: &'a str,
}

/// The agent's answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Ok { remote_spiffe: String },
    Refused { cause: String, text: String },
}

/// What the agent says of a connection that it brings.
pub(crate) struct AcceptFrame {
    pub(crate) link: [u8; 16],
    secret: [u8; SECRET_LEN],
    pub(crate) remote_node: String,
    pub(crate) remote_spiffe: String,
}

impl ConnectFrame<'_> {
    /// The whole frame, with its length.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, String> {
        let len = 2 + self.link.len() + SECRET_LEN + 2 + self.target.len();
        let wire_len = u16::try_from(len).ok().filter(|_| len <= MAX_FRAME);
        let name_len = u16::try_from(self.target.len()).ok();
        let (Some(wire_len), Some(name_len)) = (wire_len, name_len) else {
            return Err(format!("a node name of {} bytes does not fit a frame", self.target.len()));
        };
        let mut frame = wire_len.to_be_bytes().to_vec();
        frame.extend_from_slice(&[VERSION, CONNECT]);
        frame.extend_from_slice(&self.link);
        frame.extend_from_slice(&self.secret);
        frame.extend_from_slice(&name_len.to_be_bytes());
        frame.extend_from_slice(self.target.as_bytes());
        Ok(frame)
    }
}

impl Reply {
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, String> {
        let mut fields = Fields(frame);
        fields.version()?;
        let reply = match fields.u8()? {
            OK => {
                let remote_spiffe = fields.str16()?;
                fields.str16()?;
                Self::Ok { remote_spiffe }
            }
            REFUSED => {
                let len = usize::from(fields.u8()?);
                Self::Refused { cause: fields.text(len)?, text: fields.str16()? }
            }
            other => return Err(format!("the agent answered with frame type {other}, wanted 2 or 3")),
        };
        fields.end()?;
        Ok(reply)
    }
}

impl AcceptFrame {
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, String> {
        let mut fields = Fields(frame);
        fields.version()?;
        match fields.u8()? {
            ACCEPT => {}
            other => return Err(format!("a connection begins with frame type {other}, wanted 4")),
        }
        let accept = Self {
            link: fields.array()?,
            secret: fields.array()?,
            remote_node: fields.str16()?,
            remote_spiffe: fields.str16()?,
        };
        fields.str16()?;
        fields.end()?;
        Ok(accept)
    }

    /// Whether it carries this secret; compared in constant time.
    pub(crate) fn proves(&self, secret: &[u8; SECRET_LEN]) -> bool {
        self.secret.ct_eq(secret).into()
    }
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let left = self.0.len();
        let (taken, rest) =
            self.0.split_at_checked(len).ok_or_else(|| format!("the frame ends early: {len} bytes wanted, {left} left"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, String> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn version(&mut self) -> Result<(), String> {
        match self.u8()? {
            VERSION => Ok(()),
            other => Err(format!("the agent speaks version {other} of the dist socket, wanted {VERSION}")),
        }
    }

    fn text(&mut self, len: usize) -> Result<String, String> {
        let bytes = self.take(len)?.to_vec();
        String::from_utf8(bytes).map_err(|_| "a text in the frame is not utf-8".to_owned())
    }

    fn str16(&mut self) -> Result<String, String> {
        let len = usize::from(u16::from_be_bytes(self.array()?));
        self.text(len)
    }

    fn end(&self) -> Result<(), String> {
        match self.0.len() {
            0 => Ok(()),
            left => Err(format!("{left} bytes follow the frame's last field")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn accept(secret: [u8; SECRET_LEN]) -> Vec<u8> {
        let mut frame = vec![VERSION, ACCEPT];
        frame.extend_from_slice(&[7; 16]);
        frame.extend_from_slice(&secret);
        for text in ["shop@h1", "spiffe://t/ns/default/dc/dc1/svc/shop", "127.0.0.2:9"] {
            frame.extend_from_slice(&u16::try_from(text.len()).unwrap().to_be_bytes());
            frame.extend_from_slice(text.as_bytes());
        }
        frame
    }

    #[test]
    fn connect_has_the_documented_layout() {
        let frame = ConnectFrame { link: [1; 16], secret: [2; 32], target: "a@b" }.encode().unwrap();
        let mut wanted = vec![0, 55, 1, 1];
        wanted.extend_from_slice(&[1; 16]);
        wanted.extend_from_slice(&[2; 32]);
        wanted.extend_from_slice(b"\x00\x03a@b");
        assert_eq!(frame, wanted);
        let long = "a".repeat(MAX_FRAME);
        assert!(ConnectFrame { link: [1; 16], secret: [2; 32], target: &long }.encode().is_err());
    }

    #[test]
    fn replies_are_read_and_nothing_else() {
        let ok = b"\x01\x02\x00\x03s:x\x00\x01h";
        assert_eq!(Reply::decode(ok), Ok(Reply::Ok { remote_spiffe: "s:x".into() }));
        let refused = b"\x01\x03\x04deny\x00\x02no";
        let wanted = Reply::Refused { cause: "deny".into(), text: "no".into() };
        assert_eq!(Reply::decode(refused), Ok(wanted));
        for frame in [&ok[..], refused] {
            for end in 0..frame.len() {
                assert!(Reply::decode(&frame[..end]).is_err());
            }
            assert!(Reply::decode(&[frame, b"x"].concat()).is_err());
        }
        assert!(Reply::decode(b"\x02\x02\x00\x00\x00\x00").unwrap_err().contains("version 2"));
    }

    #[test]
    fn only_the_own_secret_is_taken() {
        let frame = AcceptFrame::decode(&accept([9; 32])).unwrap();
        assert_eq!((frame.link, frame.remote_node.as_str()), ([7; 16], "shop@h1"));
        assert!(frame.proves(&[9; 32]));
        let mut other = [9; 32];
        other[31] = 8;
        assert!(!frame.proves(&other));
        let whole = accept([9; 32]);
        for end in 0..whole.len() {
            assert!(AcceptFrame::decode(&whole[..end]).is_err());
        }
    }
}
