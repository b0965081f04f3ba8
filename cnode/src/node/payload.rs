//! Encoded terms as they wait in mailboxes.

use std::ops::Range;
use std::sync::Arc;

use meshx_dist::link::Encoded;
use meshx_etf::{DecodeError, Limits, Term, Walk, decode, decode_shared};

use super::buffers::Buffers;

/// What lies in a connection's buffer stays there if it is at least this part of it. The connection bounds how many
/// buffers are kept so.
const LEAST_PART: usize = 16;

/// Binaries of smaller messages are copied.
const SHARED_MIN: usize = 1024;

/// An encoded term whose form has been checked.
#[derive(Debug)]
pub(crate) enum Payload {
    /// With its version byte.
    Own(Vec<u8>),
    /// Without one, where it lies in the buffer that it was read into.
    Shared {
        buffer: Arc<Vec<u8>>,
        range: Range<usize>,
    },
}

impl Payload {
    /// Checks what a peer sent, and takes it out of the way of the next read: `buffer` is what it may stay in.
    ///
    /// # Errors
    /// Any but of keys that a map has twice, which shows when it is decoded.
    pub(crate) fn take(
        encoded: Encoded<'_>,
        buffer: Option<&Arc<Vec<u8>>>,
        buffers: &Buffers,
        limits: &Limits,
    ) -> Result<Self, DecodeError> {
        check(encoded.bare(), limits)?;
        let large = |buffer: &&Arc<Vec<u8>>| encoded.bare().len() >= buffer.capacity() / LEAST_PART;
        let place = buffer
            .filter(large)
            .and_then(|buffer| Some((buffer, encoded.range_in(buffer)?)));
        Ok(match place {
            Some((buffer, range)) => Self::Shared {
                buffer: Arc::clone(buffer),
                range,
            },
            None => {
                let mut bytes = buffers.take(encoded.bare().len() + 1);
                encoded.append_to(&mut bytes);
                Self::Own(bytes)
            }
        })
    }

    /// Its bytes, with or without the version byte.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Own(bytes) => bytes.len(),
            Self::Shared { range, .. } => range.len(),
        }
    }

    /// The term. Its memory is given back, but for what large binaries of it share.
    ///
    /// # Errors
    /// [`DecodeError::DuplicateKey`].
    pub(crate) fn decode(self, buffers: &Buffers, limits: &Limits) -> Result<Term, DecodeError> {
        match self {
            Self::Own(bytes) if bytes.len() < SHARED_MIN => decode(&bytes, limits),
            Self::Own(bytes) => {
                let bytes = Arc::new(bytes);
                let term = decode_shared(&bytes, 1..bytes.len(), limits)?;
                if let Ok(bytes) = Arc::try_unwrap(bytes) {
                    buffers.give(bytes);
                }
                Ok(term)
            }
            Self::Shared { buffer, range } => decode_shared(&buffer, range, limits),
        }
    }

    /// Its bytes, the version byte in front.
    pub(crate) fn into_vec(self) -> Vec<u8> {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared { buffer, range } => {
                let bare = buffer.get(range).unwrap_or_default();
                [&[VERSION], bare].concat()
            }
        }
    }
}

/// First byte of an encoded term.
const VERSION: u8 = 131;

/// Walks a term without a version byte, and nothing behind it.
fn check(bare: &[u8], limits: &Limits) -> Result<(), DecodeError> {
    let (len, limit) = (bare.len() + 1, limits.max_bytes);
    if len > limit {
        return Err(DecodeError::TooLong { len, limit });
    }
    match Walk::bare(bare, limits).for_each(|_| ())? {
        end if end == bare.len() => Ok(()),
        offset => Err(DecodeError::Trailing {
            offset,
            remaining: bare.len() - offset,
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use meshx_dist::control::Control;
    use meshx_dist::flags::DistFlags;
    use meshx_dist::framing::{Frame, FrameDecoder};
    use meshx_dist::link::{LinkLimits, Receiver, Sender};
    use meshx_etf::{Atom, Pid};

    use super::*;

    /// Sends the terms over a connection, and hands what is received of each to `see`.
    fn received(terms: &[Term], limits: &Limits, mut see: impl FnMut(Result<Payload, DecodeError>)) {
        let flags = DistFlags::c_node_default();
        let pid = Pid {
            node: Atom::from("a@h"),
            id: 1,
            serial: 0,
            creation: 2,
        };
        let mut stream = Vec::new();
        for term in terms {
            let control = Control::Send {
                to: pid.clone(),
                token: None,
            };
            Sender::new(flags).send(control, Some(term), &mut stream).unwrap();
        }
        let mut decoder = FrameDecoder::new(usize::MAX);
        let mut receiver = Receiver::new(flags, LinkLimits::default());
        let buffers = Buffers::default();
        for bytes in stream.chunks(100_000) {
            decoder.push(bytes);
            while let Some((frame, buffer)) = decoder.next_shared().unwrap() {
                let Frame::Data(frame) = frame else {
                    panic!("no tick was sent")
                };
                let message = receiver.receive(frame).unwrap().unwrap();
                see(Payload::take(message.payload.unwrap(), buffer, &buffers, limits));
            }
        }
    }

    #[test]
    fn what_is_large_stays_in_its_buffer_and_what_is_small_does_not() {
        let (limits, buffers) = (Limits::default(), Buffers::default());
        let large = Term::tuple([Term::binary(vec![7; 16 * 1024]), Term::binary(vec![8; 100])]);
        let small = Term::binary(vec![9; 4000]);
        let terms: Vec<Term> = (0..200)
            .map(|n| if n % 2 == 0 { large.clone() } else { small.clone() })
            .collect();
        let mut payloads = Vec::new();
        received(&terms, &limits, |payload| payloads.push(payload.unwrap()));
        let shared: Vec<&Arc<Vec<u8>>> = payloads
            .iter()
            .filter_map(|payload| match payload {
                Payload::Shared { buffer, .. } => Some(buffer),
                Payload::Own(_) => None,
            })
            .collect();
        // Of up to two megabytes, in which every second message is too small.
        assert!((30..=80).contains(&shared.len()), "{}", shared.len());
        let mut distinct = shared.clone();
        distinct.dedup_by(|a, b| Arc::ptr_eq(a, b));
        assert_eq!(distinct.len(), 8, "no more buffers are kept");
        for (payload, term) in payloads.into_iter().zip(&terms) {
            assert!(matches!(payload, Payload::Own(_)) || *term == large);
            let count = payload.len();
            assert_eq!(payload.decode(&buffers, &limits).as_ref(), Ok(term));
            assert!(count >= 4000);
        }
        received(&terms, &limits, |payload| {
            let bytes = payload.unwrap().into_vec();
            assert!(decode(&bytes, &limits).is_ok());
        });
    }

    #[test]
    fn what_is_beyond_the_limits_is_refused() {
        let limits = Limits {
            max_bytes: 1000,
            max_depth: 2,
            ..Limits::default()
        };
        let refused = |term: Term| {
            let mut error = None;
            received(&[term], &limits, |payload| error = payload.err());
            error
        };
        assert_eq!(refused(Term::binary(vec![1; 994])), None);
        let too_long = DecodeError::TooLong {
            len: 1001,
            limit: 1000,
        };
        assert_eq!(refused(Term::binary(vec![1; 995])), Some(too_long));
        let deep = Term::tuple([Term::tuple([Term::tuple([Term::Int(1)])])]);
        assert!(matches!(refused(deep), Some(DecodeError::TooDeep { .. })));
        let trailing = DecodeError::Trailing {
            offset: 1,
            remaining: 1,
        };
        assert_eq!(check(&[106, 106], &limits), Err(trailing));
    }
}
