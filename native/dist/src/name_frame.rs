//! The first frames of a link, read by whoever relays it.
//!
//! A relay that knows who is at the other end (from a certificate, say) reads the claimed node name before it
//! lets the handshake through. No digest covers the name message, so its flags may be rewritten.
//!
//! ```text
//! offset  0   2   3      11        15    17
//!         len 'N' flags  creation  nlen  name[nlen] ignored...
//! ```
//!
//! ```
//! use meshx_dist::handshake::{Cookie, Initiator, LocalNode};
//! use meshx_dist::name_frame::{PeekError, peek_name_frame};
//!
//! let mut out = Vec::new();
//! Initiator::start(LocalNode::hidden("a@h1", 11), "b@h2", Cookie::new("monster"), &mut out)?;
//! assert_eq!(peek_name_frame(&out)?.map(|frame| frame.name), Some("a@h1"));
//! # Ok::<(), PeekError>(())
//! ```

use crate::flags::DistFlags;
use crate::framing::{FrameError, MAX_HANDSHAKE_FRAME};
use crate::handshake::{Challenge, HandshakeError, SendName, Status, TAG_SEND_NAME};

/// `send_name` at the front of a byte stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameFrame<'a> {
    /// Bytes of the frame, its length included. What follows is not part of it.
    pub consumed: usize,
    /// The initiator's capabilities.
    pub flags: DistFlags,
    /// Its incarnation.
    pub creation: u32,
    /// The node name that it claims; the host alone when `flags` has `NAME_ME`.
    pub name: &'a str,
}

/// `status` at the front of a byte stream: it holds the name that a node with `NAME_ME` gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusFrame<'a> {
    /// Bytes of the frame, its length included.
    pub consumed: usize,
    /// The status.
    pub status: Status<'a>,
}

/// Why a stream doesn't begin with the frame that was looked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeekError {
    /// The announced length is beyond [`MAX_HANDSHAKE_FRAME`].
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The message is none, or not the right one.
    #[error(transparent)]
    Message(#[from] HandshakeError),
}

/// Reads `send_name` from the front of `stream`; `Ok(None)`: more bytes are needed, at most
/// [`MAX_HANDSHAKE_FRAME`] and 2 in all.
///
/// # Errors
/// As soon as the bytes can't become a name frame: its length, its first byte, its content.
pub fn peek_name_frame(stream: &[u8]) -> Result<Option<NameFrame<'_>>, PeekError> {
    let Some((consumed, message)) = peek(stream, TAG_SEND_NAME)? else {
        return Ok(None);
    };
    let SendName {
        flags,
        creation,
        name,
    } = SendName::decode(message)?;
    Ok(Some(NameFrame {
        consumed,
        flags,
        creation,
        name,
    }))
}

/// Reads `status` from the front of `stream`; `Ok(None)`: more bytes are needed.
///
/// # Errors
/// As soon as the bytes can't become a status frame.
pub fn peek_status_frame(stream: &[u8]) -> Result<Option<StatusFrame<'_>>, PeekError> {
    let Some((consumed, message)) = peek(stream, b's')? else {
        return Ok(None);
    };
    Ok(Some(StatusFrame {
        consumed,
        status: Status::decode(message)?,
    }))
}

/// Takes `PUBLISHED` out of the name frame at the front of `stream`, so that the link is a hidden one.
///
/// # Errors
/// As [`peek_name_frame`]; an incomplete frame counts as a wrong length.
pub fn clear_published(stream: &mut [u8]) -> Result<(), PeekError> {
    let len = stream.len();
    let incomplete = HandshakeError::WrongLength {
        message: "send_name",
        len,
    };
    let flags = peek_name_frame(stream)?
        .map(|frame| frame.flags)
        .ok_or(incomplete.clone())?;
    let field = stream.get_mut(3..11).ok_or(incomplete)?;
    field.copy_from_slice(&flags.without(DistFlags::PUBLISHED).bits().to_be_bytes());
    Ok(())
}

/// `challenge` at the front of `stream`: the bytes of its frame, its length included; `Ok(None)`: more are needed.
///
/// # Errors
/// As soon as the bytes can't become a challenge frame.
pub fn peek_challenge_frame(stream: &[u8]) -> Result<Option<usize>, PeekError> {
    let Some((consumed, message)) = peek(stream, TAG_SEND_NAME)? else {
        return Ok(None);
    };
    Challenge::decode(message)?;
    Ok(Some(consumed))
}

/// Takes `PUBLISHED` out of the challenge frame at the front of `stream`: an initiator believes the acceptor's flags,
/// which say what that is and not what it has made of the initiator's.
///
/// # Errors
/// As [`peek_challenge_frame`]; an incomplete frame counts as a wrong length.
pub fn clear_published_of_challenge(stream: &mut [u8]) -> Result<(), PeekError> {
    let len = stream.len();
    let incomplete = HandshakeError::WrongLength {
        message: "challenge",
        len,
    };
    peek_challenge_frame(stream)?.ok_or(incomplete.clone())?;
    let field = stream
        .get_mut(3..11)
        .and_then(|field| field.first_chunk_mut::<8>());
    let field = field.ok_or(incomplete)?;
    let flags = DistFlags::from_bits(u64::from_be_bytes(*field));
    *field = flags.without(DistFlags::PUBLISHED).bits().to_be_bytes();
    Ok(())
}

/// The frame with status `not_allowed`: what a relay answers, before it closes, in the acceptor's place.
#[must_use]
pub fn refusal_status() -> &'static [u8] {
    b"\x00\x0csnot_allowed"
}

/// The message at the front of `stream` without its length, and the bytes of the whole frame. Length and tag are
/// judged as soon as they are there, so that nobody waits for bytes that can't help.
fn peek(stream: &[u8], tag: u8) -> Result<Option<(usize, &[u8])>, PeekError> {
    let Some((header, rest)) = stream.split_first_chunk::<2>() else {
        return Ok(None);
    };
    let len = usize::from(u16::from_be_bytes(*header));
    if len > MAX_HANDSHAKE_FRAME {
        return Err(FrameError::TooLarge {
            len,
            max: MAX_HANDSHAKE_FRAME,
        }
        .into());
    }
    match rest.first() {
        // Decoding what there is names the fault: an old name message, another message, no message at all.
        Some(first) if *first != tag => {
            let seen = rest.get(..len).unwrap_or(rest);
            match tag {
                TAG_SEND_NAME => SendName::decode(seen).map(|_| None).map_err(PeekError::from),
                _ => Status::decode(seen).map(|_| None).map_err(PeekError::from),
            }
        }
        _ => Ok(rest.get(..len).map(|message| (2 + len, message))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const FRAME: &[u8] = b"\x00\x14N\x00\x00\x00\x0d\x07\xdf\x7f\xbd\x65\x00\x00\x01\x00\x05shop\x40";

    fn frame(name: &str, flags: DistFlags) -> Vec<u8> {
        let mut out = Vec::new();
        SendName {
            flags,
            creation: 77,
            name,
        }
        .encode(&mut out)
        .unwrap();
        out
    }

    #[test]
    fn a_challenge_loses_one_flag_and_nothing_else() {
        let mut out = Vec::new();
        Challenge {
            flags: DistFlags::from_bits(0xD_07DF_7FBD),
            challenge: 9,
            creation: 77,
            name: "cart@h2",
        }
        .encode(&mut out)
        .unwrap();
        let whole = out.len();
        for cut in 0..whole {
            assert_eq!(peek_challenge_frame(&out[..cut]), Ok(None), "{cut}");
            assert!(clear_published_of_challenge(&mut out[..cut].to_vec()).is_err());
        }
        out.extend_from_slice(b"rest");
        let before = out.clone();
        assert_eq!(peek_challenge_frame(&out), Ok(Some(whole)));
        clear_published_of_challenge(&mut out).unwrap();
        let changed: Vec<usize> = (0..out.len()).filter(|at| out[*at] != before[*at]).collect();
        assert_eq!((changed, out[10], before[10]), (vec![10], 0xBC, 0xBD));
        assert!(peek_challenge_frame(b"\x00\x03sok").is_err());
    }

    #[test]
    fn exact_bytes() {
        let bytes = b"\x00\x16N\x00\x00\x00\x0d\x07\xdf\x7f\xbd\x65\x00\x00\x01\x00\x07shop@h1rest";
        let seen = peek_name_frame(bytes).unwrap().unwrap();
        assert_eq!(
            (seen.consumed, seen.creation, seen.name),
            (24, 0x6500_0001, "shop@h1")
        );
        assert_eq!(seen.flags.bits(), 0xD_07DF_7FBD);
        assert!(matches!(
            peek_name_frame(FRAME),
            Err(PeekError::Message(HandshakeError::BadName { .. }))
        ));
    }

    #[test]
    fn published_is_cleared_in_place_and_nothing_else_changes() {
        let mut bytes = frame("a@b", DistFlags::c_node_default().with(DistFlags::PUBLISHED));
        bytes.extend_from_slice(b"behind");
        let mut expected = frame("a@b", DistFlags::c_node_default());
        expected.extend_from_slice(b"behind");
        clear_published(&mut bytes).unwrap();
        assert_eq!(bytes, expected);
        clear_published(&mut bytes).unwrap();
        assert_eq!(bytes, expected);
        assert!(clear_published(&mut bytes[..10]).is_err());
    }

    #[test]
    fn the_refusal_is_a_status_frame() {
        let seen = peek_status_frame(refusal_status()).unwrap().unwrap();
        assert_eq!(
            seen,
            StatusFrame {
                consumed: refusal_status().len(),
                status: Status::NotAllowed
            }
        );
    }

    #[test]
    fn the_name_given_by_an_acceptor_is_read() {
        let mut out = Vec::new();
        let status = Status::Named {
            name: "x1@h1",
            creation: 5,
        };
        status.encode(&mut out).unwrap();
        assert_eq!(
            peek_status_frame(&out),
            Ok(Some(StatusFrame {
                consumed: out.len(),
                status
            }))
        );
        assert!(matches!(
            peek_status_frame(&frame("a@b", DistFlags::default())),
            Err(PeekError::Message(HandshakeError::Unexpected {
                waiting_for: "status",
                got: b'N'
            }))
        ));
    }

    #[test]
    fn every_truncation_needs_more() {
        let whole = frame("shop@h1", DistFlags::MANDATORY_26);
        for end in 0..whole.len() {
            assert_eq!(peek_name_frame(&whole[..end]), Ok(None));
        }
        assert!(peek_name_frame(&whole).unwrap().is_some());
    }

    #[test]
    fn what_can_never_become_a_name_frame_is_refused_early() {
        let too_large = FrameError::TooLarge { len: 4097, max: 4096 };
        assert_eq!(peek_name_frame(&[0x10, 0x01]), Err(too_large.into()));
        assert_eq!(peek_name_frame(b"\x00\x15n"), Err(HandshakeError::OldName.into()));
        assert_eq!(
            peek_name_frame(b"GET"),
            Err(FrameError::TooLarge {
                len: 0x4745,
                max: 4096
            }
            .into())
        );
        let unexpected = HandshakeError::Unexpected {
            waiting_for: "send_name",
            got: b's',
        };
        assert_eq!(peek_name_frame(refusal_status()), Err(unexpected.into()));
        let empty = HandshakeError::WrongLength {
            message: "send_name",
            len: 0,
        };
        assert_eq!(peek_name_frame(&[0, 0]), Err(empty.into()));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = peek_name_frame(&bytes);
            let _ = peek_status_frame(&bytes);
            let _ = clear_published(&mut bytes);
        }

        #[test]
        fn a_name_goes_round(name in "[a-z\u{e4}]{1,20}@[a-z.]{1,20}", bits: u64, behind: Vec<u8>) {
            let flags = DistFlags::from_bits(bits).without(DistFlags::NAME_ME);
            let mut bytes = frame(&name, flags);
            let consumed = bytes.len();
            bytes.extend_from_slice(&behind);
            let expected = NameFrame { consumed, flags, creation: 77, name: &name };
            prop_assert_eq!(peek_name_frame(&bytes), Ok(Some(expected)));
        }
    }
}
