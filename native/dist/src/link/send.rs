use meshx_etf::{EncodeError, Term, encode, encode_bare};

use super::{CONTINUATION, DIST_HEADER, FIRST_FRAGMENT, PASS_THROUGH, VERSION, with_headers};
use crate::control::{Control, Op, Payload};
use crate::flags::DistFlags;
use crate::framing::{FrameError, encode_frame};

/// Bytes of a payload in one fragment, as in a BEAM. Larger messages are cut when `FRAGMENTS` is agreed.
pub const FRAGMENT_SIZE: usize = 64 * 1024;

/// Bytes that each fragment adds, at most.
const FRAGMENT_OVERHEAD: usize = 23;
/// Bytes of a frame before the control message: length, and a distribution header without atom cache references.
const HEADER: usize = 7;
/// What the 32 bits of a frame's length can say.
const MAX_FRAME: usize = u32::MAX as usize;

/// Why a message can't be sent. Nothing was appended; the link may go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// A term that the external format can't hold.
    #[error(transparent)]
    Term(#[from] EncodeError),
    /// Beyond what a frame's length can say.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A payload belongs to this message, or doesn't; sent otherwise it would end the link.
    #[error("{op} with{} a payload", if *.given { "" } else { "out" })]
    WrongPayload {
        /// The operation.
        op: Op,
        /// Whether one was given.
        given: bool,
    },
}

/// A control message that is encoded once and sent many times, each time with another payload.
#[derive(Debug, Clone)]
pub struct Prepared(Vec<u8>);

impl Prepared {
    /// Encodes a control message that needs a payload.
    ///
    /// # Errors
    /// [`SendError::WrongPayload`] for one that has none, [`SendError::Term`].
    pub fn new(control: Control) -> Result<Self, SendError> {
        let op = control.op();
        if control.payload() != Payload::Required {
            return Err(SendError::WrongPayload { op, given: true });
        }
        let mut bytes = Vec::new();
        control.encode(&mut bytes)?;
        Ok(Self(bytes))
    }
}

/// Makes frames of messages, for one direction of one link.
#[derive(Debug)]
pub struct Sender {
    headers: bool,
    fragments: bool,
    next_sequence: u64,
}

impl Sender {
    /// A sender for a link with these agreed flags ([`crate::handshake::Established::flags`]).
    #[must_use]
    pub fn new(agreed: DistFlags) -> Self {
        Self::starting_at(agreed, 1)
    }

    /// As [`Sender::new`], with the number of the first message that is sent in fragments. Messages whose fragments
    /// are under way at the same time must have different ones; making a sender costs nothing, so each message may
    /// have a sender of its own.
    #[must_use]
    pub fn starting_at(agreed: DistFlags, sequence: u64) -> Self {
        Self {
            headers: with_headers(agreed),
            fragments: agreed.contains(DistFlags::FRAGMENTS),
            next_sequence: sequence,
        }
    }

    /// Appends the frames of one message to `out`, lengths included, so that many messages make one write.
    ///
    /// # Errors
    /// Any [`SendError`]; `out` is then as it was.
    pub fn send(
        &mut self,
        control: Control,
        payload: Option<&Term>,
        out: &mut Vec<u8>,
    ) -> Result<(), SendError> {
        let op = control.op();
        let fits = match control.payload() {
            Payload::Required => payload.is_some(),
            Payload::Forbidden => payload.is_none(),
            Payload::Optional => true,
        };
        if !fits {
            return Err(SendError::WrongPayload {
                op,
                given: payload.is_some(),
            });
        }
        self.frames(|out| control.encode(out), payload, out)
    }

    /// As [`Sender::send`], with a control message that is encoded already.
    ///
    /// # Errors
    /// Any [`SendError`]; `out` is then as it was.
    pub fn send_prepared(
        &mut self,
        control: &Prepared,
        payload: &Term,
        out: &mut Vec<u8>,
    ) -> Result<(), SendError> {
        let put = |out: &mut Vec<u8>| {
            out.extend_from_slice(&control.0);
            Ok(())
        };
        self.frames(put, Some(payload), out)
    }

    fn frames(
        &mut self,
        control: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
        payload: Option<&Term>,
        out: &mut Vec<u8>,
    ) -> Result<(), SendError> {
        let start = out.len();
        let sent = if self.headers {
            self.send_with_header(control, payload, out)
        } else {
            send_pass_through(control, payload, out)
        };
        if sent.is_err() {
            out.truncate(start);
        }
        sent
    }

    fn send_with_header(
        &mut self,
        control: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
        payload: Option<&Term>,
        out: &mut Vec<u8>,
    ) -> Result<(), SendError> {
        let mut written = Ok(());
        let start = out.len();
        let mut cut_at = None;
        encode_frame(out, MAX_FRAME, |out| {
            out.extend_from_slice(&[VERSION, DIST_HEADER, 0]);
            written = control(out);
            let control_end = out.len();
            if let (Ok(()), Some(payload)) = (&written, payload) {
                written = encode_bare(payload, out);
            }
            if self.fragments && out.len() - control_end > FRAGMENT_SIZE {
                cut_at = Some(control_end);
            }
        })?;
        written?;
        if let Some(control_end) = cut_at {
            // Only now is it known to be large: its bytes move once more, behind the headers of its fragments.
            let body = start + HEADER;
            let bytes = out.split_off(body.min(out.len()));
            out.truncate(start);
            self.cut(&bytes, control_end.saturating_sub(body), out)?;
        }
        Ok(())
    }

    /// The control message must be whole in the first fragment.
    fn cut(&mut self, bytes: &[u8], control_len: usize, out: &mut Vec<u8>) -> Result<(), SendError> {
        let sequence = self.next_sequence;
        self.next_sequence = sequence.wrapping_add(1);
        out.reserve(bytes.len() + (bytes.len() / FRAGMENT_SIZE + 1) * FRAGMENT_OVERHEAD);
        let (first, rest) = bytes
            .split_at_checked(control_len + FRAGMENT_SIZE)
            .unwrap_or((bytes, &[]));
        let continuations = rest.chunks(FRAGMENT_SIZE);
        let mut fragment = continuations.len() as u64 + 1;
        encode_frame(out, MAX_FRAME, |out| {
            put_fragment(out, FIRST_FRAGMENT, sequence, fragment);
            out.push(0);
            out.extend_from_slice(first);
        })?;
        for chunk in continuations {
            fragment -= 1;
            encode_frame(out, MAX_FRAME, |out| {
                put_fragment(out, CONTINUATION, sequence, fragment);
                out.extend_from_slice(chunk);
            })?;
        }
        Ok(())
    }
}

fn send_pass_through(
    control: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
    payload: Option<&Term>,
    out: &mut Vec<u8>,
) -> Result<(), SendError> {
    let mut encoded = Ok(());
    encode_frame(out, MAX_FRAME, |out| {
        out.extend_from_slice(&[PASS_THROUGH, VERSION]);
        encoded = control(out).and_then(|()| payload.map_or(Ok(()), |payload| encode(payload, out)));
    })?;
    Ok(encoded?)
}

fn put_fragment(out: &mut Vec<u8>, tag: u8, sequence: u64, fragment: u64) {
    out.extend_from_slice(&[VERSION, tag]);
    out.extend_from_slice(&sequence.to_be_bytes());
    out.extend_from_slice(&fragment.to_be_bytes());
}
