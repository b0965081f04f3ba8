use std::collections::HashMap;
use std::ops::Range;

use meshx_etf::{DecodeError, Limits};

use super::common::CommonDecoder;
use super::{CONTINUATION, DIST_HEADER, FIRST_FRAGMENT, PASS_THROUGH, VERSION, with_headers};
use crate::control::{Control, ControlError, Op, Payload};
use crate::flags::DistFlags;
use crate::wire::{Reader, Short};

/// What a peer may make a receiver keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkLimits {
    /// Bytes of one message put together from fragments; 128 MiB. Messages in one frame are bounded by the frame.
    pub max_message: usize,
    /// Messages that are being put together at once; 1024. A BEAM has one for each process that is sending.
    pub max_sequences: usize,
    /// Bytes of all of them; 256 MiB. As buffers double while they grow, up to twice that is allocated.
    pub max_reassembly: usize,
    /// Bounds on the control message's term. `max_bytes` and `allow_compressed` don't apply: the frame bounds the
    /// bytes, and control messages are never compressed.
    pub control: Limits,
}

impl Default for LinkLimits {
    fn default() -> Self {
        Self {
            max_message: 128 * 1024 * 1024,
            max_sequences: 1024,
            max_reassembly: 256 * 1024 * 1024,
            control: Limits::default(),
        }
    }
}

/// A message as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct Message<'a> {
    /// What is to be done.
    pub control: Control,
    /// What [`Control::payload`] says belongs to it: an encoded term, unchecked.
    pub payload: Option<Encoded<'a>>,
}

/// An encoded term without its version byte. Nothing of it has been checked: it is to be decoded or walked by whoever
/// needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoded<'a>(pub(super) &'a [u8]);

impl<'a> Encoded<'a> {
    /// The bytes, without a version byte.
    #[must_use]
    pub fn bare(self) -> &'a [u8] {
        self.0
    }

    /// Where it lies in a buffer, if it does.
    #[must_use]
    pub fn range_in(self, buffer: &[u8]) -> Option<Range<usize>> {
        let start = self.0.as_ptr().addr().checked_sub(buffer.as_ptr().addr())?;
        let end = start.checked_add(self.0.len())?;
        (end <= buffer.len()).then_some(start..end)
    }

    /// A copy with the version byte in front, as [`meshx_etf::decode`] takes it.
    #[must_use]
    pub fn to_vec(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() + 1);
        self.append_to(&mut bytes);
        bytes
    }

    /// Appends what [`Encoded::to_vec`] gives.
    pub fn append_to(self, bytes: &mut Vec<u8>) {
        bytes.push(VERSION);
        bytes.extend_from_slice(self.0);
    }
}

/// Why frames are no messages. The connection is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The frame begins with other bytes than the agreed flags say.
    #[error("frame begins with {got:?}, wanted {wanted}")]
    UnknownFrame {
        /// Its first bytes, at most two.
        got: Vec<u8>,
        /// What begins a frame on this link.
        wanted: &'static str,
    },
    /// The frame ends inside its distribution header.
    #[error("frame of {len} bytes ends inside its distribution header")]
    CutShort {
        /// Bytes of the frame.
        len: usize,
    },
    /// References to an atom cache that this crate never agrees to.
    #[error("frame refers to {refs} entries of an atom cache, which was not agreed")]
    AtomCache {
        /// How many.
        refs: u8,
    },
    /// The control message is no term.
    #[error("control message: {0}")]
    Term(#[from] DecodeError),
    /// The control message is a term, but none of a control message.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A control message without the payload that belongs to it.
    #[error("{op} came without its payload")]
    MissingPayload {
        /// Its operation.
        op: Op,
    },
    /// A control message with a payload that doesn't belong to it.
    #[error("{op} came with {len} bytes behind it, wanted none")]
    UnexpectedPayload {
        /// Its operation.
        op: Op,
        /// Bytes behind it.
        len: usize,
    },
    /// A fragment that doesn't follow the one before it.
    #[error("fragment {got} of sequence {sequence:#x}, wanted {wanted}")]
    FragmentOrder {
        /// The sequence it names.
        sequence: u64,
        /// Its number.
        got: u64,
        /// What should have come.
        wanted: &'static str,
    },
    /// More messages in fragments at once than the limit.
    #[error("a message begins while {max} are being put together from fragments, no more are taken")]
    TooManySequences {
        /// The limit.
        max: usize,
    },
    /// A message in fragments beyond the limit.
    #[error("message of {len} bytes in fragments so far, at most {max} are taken")]
    MessageTooLarge {
        /// Bytes seen.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// All messages in fragments together beyond the limit.
    #[error("fragments of {len} bytes wait for the rest of their messages, at most {max} are kept")]
    ReassemblyFull {
        /// Bytes seen.
        len: usize,
        /// The limit.
        max: usize,
    },
}

/// Makes messages of frames, for one direction of one link.
#[derive(Debug)]
pub struct Receiver {
    headers: bool,
    limits: LinkLimits,
    sequences: HashMap<u64, Sequence>,
    /// Bytes in `sequences`.
    waiting: usize,
    common: CommonDecoder,
    /// The message handed out last, when it came in fragments.
    whole: Vec<u8>,
}

#[derive(Debug)]
struct Sequence {
    /// Number of the last fragment that came; the next one is smaller by 1.
    fragment: u64,
    /// What came so far.
    bytes: Vec<u8>,
}

impl Receiver {
    /// A receiver for a link with these agreed flags ([`crate::handshake::Established::flags`]).
    #[must_use]
    pub fn new(agreed: DistFlags, limits: LinkLimits) -> Self {
        let control = Limits {
            max_bytes: usize::MAX,
            allow_compressed: false,
            ..limits.control
        };
        Self {
            headers: with_headers(agreed),
            limits: LinkLimits { control, ..limits },
            sequences: HashMap::new(),
            waiting: 0,
            common: CommonDecoder::default(),
            whole: Vec::new(),
        }
    }

    /// Takes one frame that is no tick. `Ok(None)`: a fragment, the rest is to come.
    ///
    /// # Errors
    /// Any [`LinkError`]; the link is over then.
    pub fn receive<'a>(&'a mut self, frame: &'a [u8]) -> Result<Option<Message<'a>>, LinkError> {
        let unknown = |wanted| LinkError::UnknownFrame {
            got: frame.iter().take(2).copied().collect(),
            wanted,
        };
        if !self.headers {
            let [PASS_THROUGH, VERSION, terms @ ..] = frame else {
                return Err(unknown("112 131"));
            };
            let (control, behind) = self.common.decode(terms, &self.limits.control)?;
            let payload = match behind {
                [] => None,
                [VERSION, payload @ ..] => Some(payload),
                [got, ..] => return Err(DecodeError::Version { found: Some(*got) }.into()),
            };
            return message(control, payload).map(Some);
        }
        let cut_short = |Short| LinkError::CutShort { len: frame.len() };
        let mut r = Reader::new(frame);
        match r.array().map_err(cut_short)? {
            [VERSION, DIST_HEADER] => {
                no_atom_cache(&mut r).map_err(cut_short)??;
                let (control, behind) = self.common.decode(r.rest(), &self.limits.control)?;
                return message(control, Some(behind).filter(|bytes| !bytes.is_empty())).map(Some);
            }
            [VERSION, FIRST_FRAGMENT] => {
                let (sequence, fragment) = (r.u64().map_err(cut_short)?, r.u64().map_err(cut_short)?);
                no_atom_cache(&mut r).map_err(cut_short)??;
                self.begin(sequence, fragment)?;
                if !self.append(sequence, fragment, r.rest())? {
                    return Ok(None);
                }
            }
            [VERSION, CONTINUATION] => {
                let (sequence, fragment) = (r.u64().map_err(cut_short)?, r.u64().map_err(cut_short)?);
                self.follow(sequence, fragment)?;
                if !self.append(sequence, fragment, r.rest())? {
                    return Ok(None);
                }
            }
            _ => return Err(unknown("131 and then 68, 69 or 70")),
        }
        let (control, behind) = self.common.decode(&self.whole, &self.limits.control)?;
        message(control, Some(behind).filter(|bytes| !bytes.is_empty())).map(Some)
    }

    /// Bytes that wait for the rest of their messages.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    fn begin(&mut self, sequence: u64, fragment: u64) -> Result<(), LinkError> {
        let order = |wanted| LinkError::FragmentOrder {
            sequence,
            got: fragment,
            wanted,
        };
        if fragment == 0 {
            return Err(order("a number above 0"));
        }
        if self.sequences.contains_key(&sequence) {
            return Err(order("the rest of the message that this sequence is in"));
        }
        if self.sequences.len() >= self.limits.max_sequences {
            return Err(LinkError::TooManySequences {
                max: self.limits.max_sequences,
            });
        }
        self.sequences.insert(
            sequence,
            Sequence {
                fragment,
                bytes: Vec::new(),
            },
        );
        Ok(())
    }

    fn follow(&mut self, sequence: u64, fragment: u64) -> Result<(), LinkError> {
        let order = |wanted| LinkError::FragmentOrder {
            sequence,
            got: fragment,
            wanted,
        };
        let state = self
            .sequences
            .get_mut(&sequence)
            .ok_or(order("a first fragment"))?;
        // A sequence ends with fragment 1, so the one waited for is never 0.
        if state.fragment.checked_sub(1) != Some(fragment) {
            return Err(order("the number below that of the fragment before"));
        }
        state.fragment = fragment;
        Ok(())
    }

    /// True when that was the last fragment: the message is in `whole` then.
    fn append(&mut self, sequence: u64, fragment: u64, bytes: &[u8]) -> Result<bool, LinkError> {
        let Some(state) = self.sequences.get_mut(&sequence) else {
            return Ok(false);
        };
        let len = state.bytes.len().saturating_add(bytes.len());
        if len > self.limits.max_message {
            return Err(LinkError::MessageTooLarge {
                len,
                max: self.limits.max_message,
            });
        }
        let waiting = self.waiting.saturating_add(bytes.len());
        if waiting > self.limits.max_reassembly {
            return Err(LinkError::ReassemblyFull {
                len: waiting,
                max: self.limits.max_reassembly,
            });
        }
        state.bytes.extend_from_slice(bytes);
        self.waiting = waiting;
        if fragment > 1 {
            return Ok(false);
        }
        if let Some(done) = self.sequences.remove(&sequence) {
            self.waiting = self.waiting.saturating_sub(done.bytes.len());
            // The one before is freed here, not kept: it may be as large as a message may be.
            self.whole = done.bytes;
        }
        Ok(true)
    }
}

fn message(control: Control, payload: Option<&[u8]>) -> Result<Message<'_>, LinkError> {
    match (control.payload(), payload) {
        (Payload::Required, None) => Err(LinkError::MissingPayload { op: control.op() }),
        (Payload::Forbidden, Some(payload)) => Err(LinkError::UnexpectedPayload {
            op: control.op(),
            len: payload.len(),
        }),
        (_, payload) => Ok(Message {
            control,
            payload: payload.map(Encoded),
        }),
    }
}

fn no_atom_cache(r: &mut Reader<'_>) -> Result<Result<(), LinkError>, Short> {
    Ok(match r.u8()? {
        0 => Ok(()),
        refs => Err(LinkError::AtomCache { refs }),
    })
}
