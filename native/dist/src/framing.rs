//! Frames from a byte stream: `{packet, 2}` during the handshake, `{packet, 4}` once connected.
//!
//! ```text
//! handshake   len:16 message[len]
//! connected   len:32 message[len]      len = 0 is a tick
//! ```
//!
//! One buffer serves a connection for its whole life: [`HandshakeDecoder::into_connected`] hands over what the
//! peer sent right behind its last handshake message.

use std::sync::Arc;

/// Largest handshake message taken, in bytes. The largest that makes sense holds a name of
/// [`crate::handshake::MAX_NAME_LEN`] bytes and what future versions append behind it.
pub const MAX_HANDSHAKE_FRAME: usize = 4096;
/// Default of the largest frame taken once connected, in bytes.
pub const DEFAULT_MAX_FRAME: usize = 128 * 1024 * 1024;
/// A tick: what a node sends when it has had nothing else to say for a quarter of the tick time.
pub const TICK: [u8; 4] = [0; 4];

/// Least room that `read_buf` lends, in bytes, so that a reader in place gets what one read can give.
const READ_SPACE: usize = 32 * 1024;
const HANDSHAKE_READ_SPACE: usize = 512;

/// Room of a buffer, in bytes; one that had to grow for a large frame shrinks to it.
const BUFFER_CAPACITY: usize = 256 * 1024;
/// Buffers of one connection that messages may lie in and keep, beside the one that is read into.
const LENT_MAX: usize = 8;

/// Why a stream can't be split any further. The connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The header announces more than the limit; seen before any of the body is buffered for its sake.
    #[error("frame of {len} bytes announced, at most {max} are taken")]
    TooLarge {
        /// Bytes announced.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
}

/// One frame of the connected phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The zero-length frame: the peer lives.
    Tick,
    /// One message or fragment, without its length.
    Data(&'a [u8]),
}

/// The buffer that a frame lies in, if it may be kept.
pub type Lent<'a> = Option<&'a Arc<Vec<u8>>>;

/// Splits the handshake's `{packet, 2}` stream.
#[derive(Debug, Default)]
pub struct HandshakeDecoder {
    buffer: Buffer,
}

impl HandshakeDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.writable().extend_from_slice(bytes);
    }

    /// The buffer that received bytes are to be appended to, for readers that write in place. Append only.
    pub fn read_buf(&mut self) -> &mut Vec<u8> {
        let bytes = self.buffer.writable();
        bytes.reserve(HANDSHAKE_READ_SPACE);
        bytes
    }

    /// The next message without its length; `Ok(None)`: more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] beyond [`MAX_HANDSHAKE_FRAME`].
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let Some(header) = self.buffer.unread().first_chunk::<2>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes(*header));
        let frame = self.buffer.consume(2, len, MAX_HANDSHAKE_FRAME)?;
        Ok(frame.map(|(data, _)| data))
    }

    /// The decoder for what follows the handshake, holding whatever has already arrived of it.
    #[must_use]
    pub fn into_connected(self, max_frame: usize) -> FrameDecoder {
        FrameDecoder {
            buffer: self.buffer,
            max_frame,
        }
    }
}

/// Splits the connected phase's `{packet, 4}` stream.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: Buffer,
    max_frame: usize,
}

impl FrameDecoder {
    /// An empty decoder that takes frames of at most `max_frame` bytes.
    #[must_use]
    pub fn new(max_frame: usize) -> Self {
        Self {
            buffer: Buffer::default(),
            max_frame,
        }
    }

    /// Takes bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.writable().extend_from_slice(bytes);
    }

    /// The buffer that received bytes are to be appended to, for readers that write in place. Append only. Take
    /// out all frames before the next read: then at most one unfinished frame is ever moved.
    pub fn read_buf(&mut self) -> &mut Vec<u8> {
        let bytes = self.buffer.writable();
        bytes.reserve(READ_SPACE);
        bytes
    }

    /// As [`FrameDecoder::next_frame`], with the buffer that the frame lies in, if that may be kept: what lies in it then
    /// need not be copied. At most 2 MiB of a connection's buffers is kept so, however little of them is wanted; a
    /// buffer is filled again once nobody else has it.
    ///
    /// # Errors
    /// As [`FrameDecoder::next_frame`].
    pub fn next_shared(&mut self) -> Result<Option<(Frame<'_>, Lent<'_>)>, FrameError> {
        let Some(header) = self.buffer.unread().first_chunk::<4>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX);
        let frame = self.buffer.consume(4, len, self.max_frame)?;
        Ok(frame.map(|(data, buffer)| match data {
            [] => (Frame::Tick, None),
            data => (Frame::Data(data), buffer),
        }))
    }

    /// Whether somebody keeps the buffer that was read into last, or so many that what is read next may not be kept: a
    /// good moment to let those run who keep them.
    pub fn is_lent_out(&mut self) -> bool {
        let Buffer { bytes, lent, .. } = &mut self.buffer;
        Arc::get_mut(bytes).is_none() || lent.len() >= LENT_MAX && self.buffer.position_of_free().is_none()
    }

    /// Bytes that are buffered and not yet taken out as a frame.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.unread().len()
    }

    /// The next frame; `Ok(None)`: more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] when a header announces more than the limit.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        Ok(self.next_shared()?.map(|(frame, _)| frame))
    }
}

/// Appends a frame to `out`: length and whatever `body` writes behind it.
///
/// # Errors
/// [`FrameError::TooLarge`] when the body doesn't fit `max_frame` or a 32-bit length; `out` is as before then.
pub fn encode_frame(
    out: &mut Vec<u8>,
    max_frame: usize,
    body: impl FnOnce(&mut Vec<u8>),
) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    let len = out.len().saturating_sub(start + 4);
    let max = max_frame.min(u32::MAX as usize);
    match (u32::try_from(len), out.get_mut(start..start + 4)) {
        (Ok(wire_len), Some(header)) if len <= max => {
            header.copy_from_slice(&wire_len.to_be_bytes());
            Ok(())
        }
        _ => {
            out.truncate(start);
            Err(FrameError::TooLarge { len, max })
        }
    }
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Arc<Vec<u8>>,
    /// Bytes at the front that have been handed out.
    taken: usize,
    /// Buffers that were read into before, and were still kept by somebody then.
    lent: Vec<Arc<Vec<u8>>>,
}

impl Buffer {
    fn unread(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }

    /// Makes room at the front, then lends the buffer for appending. What is moved is the unfinished frame
    /// only, and only once: afterwards it starts at the front.
    fn writable(&mut self) -> &mut Vec<u8> {
        if Arc::get_mut(&mut self.bytes).is_none() {
            let mut next = self.free();
            // Nobody else has it.
            Arc::make_mut(&mut next).extend_from_slice(self.unread());
            self.lent.push(std::mem::replace(&mut self.bytes, next));
            self.taken = 0;
        } else if self.lent.len() >= LENT_MAX
            && let Some(at) = self.position_of_free()
        {
            // Makes room for this one, which may be kept again then.
            self.lent.remove(at);
        }
        let bytes = Arc::make_mut(&mut self.bytes);
        if self.taken > 0 {
            bytes.drain(..self.taken.min(bytes.len()));
            self.taken = 0;
            if bytes.len() < BUFFER_CAPACITY / 2 && bytes.capacity() > BUFFER_CAPACITY {
                bytes.shrink_to(BUFFER_CAPACITY);
            }
        }
        bytes
    }

    /// An empty buffer: one that has come back, or a new one.
    fn free(&mut self) -> Arc<Vec<u8>> {
        match self.position_of_free() {
            Some(at) => {
                let mut buffer = self.lent.remove(at);
                Arc::make_mut(&mut buffer).clear();
                buffer
            }
            None => Arc::new(Vec::with_capacity(BUFFER_CAPACITY)),
        }
    }

    /// A buffer that nobody else has any more.
    fn position_of_free(&mut self) -> Option<usize> {
        self.lent
            .iter_mut()
            .position(|buffer| Arc::get_mut(buffer).is_some())
    }

    /// The frame, and the buffer that it lies in if that may be kept.
    fn consume(
        &mut self,
        header: usize,
        len: usize,
        max: usize,
    ) -> Result<Option<(&[u8], Lent<'_>)>, FrameError> {
        if len > max {
            return Err(FrameError::TooLarge { len, max });
        }
        let start = self.taken + header;
        let Some(frame) = self.bytes.get(start..).and_then(|rest| rest.get(..len)) else {
            return Ok(None);
        };
        self.taken = start + len;
        let may_be_kept = self.lent.len() < LENT_MAX && self.bytes.capacity() <= BUFFER_CAPACITY;
        Ok(Some((frame, may_be_kept.then_some(&self.bytes))))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    fn framed(bodies: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        for body in bodies {
            encode_frame(&mut out, DEFAULT_MAX_FRAME, |out| out.extend_from_slice(body)).unwrap();
        }
        out
    }

    fn drain(decoder: &mut FrameDecoder, into: &mut Vec<Vec<u8>>) {
        while let Some(frame) = decoder.next_frame().unwrap() {
            into.push(match frame {
                Frame::Tick => Vec::new(),
                Frame::Data(data) => data.to_vec(),
            });
        }
    }

    #[test]
    fn exact_bytes() {
        let mut out = vec![7];
        encode_frame(&mut out, 10, |out| out.extend_from_slice(b"ab")).unwrap();
        out.extend_from_slice(&TICK);
        assert_eq!(out, [7, 0, 0, 0, 2, b'a', b'b', 0, 0, 0, 0]);
        let mut decoder = FrameDecoder::new(10);
        decoder.push(&out[1..]);
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Data(b"ab"))));
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Tick)));
        assert_eq!(decoder.next_frame(), Ok(None));
    }

    #[test]
    fn a_frame_at_the_limit_passes_and_one_byte_more_is_refused_from_the_header() {
        let mut decoder = FrameDecoder::new(5);
        decoder.push(&[0, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0, 6]);
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Data(&[1, 2, 3, 4, 5]))));
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLarge { len: 6, max: 5 }));
        let mut handshake = HandshakeDecoder::new();
        handshake.push(&u16::to_be_bytes(4097));
        assert_eq!(
            handshake.next_frame(),
            Err(FrameError::TooLarge { len: 4097, max: 4096 })
        );
        let mut out = vec![1];
        let refused = encode_frame(&mut out, 1, |out| out.extend_from_slice(b"ab"));
        assert_eq!(
            (refused, out),
            (Err(FrameError::TooLarge { len: 2, max: 1 }), vec![1])
        );
    }

    #[test]
    fn an_announced_length_reserves_nothing() {
        let mut decoder = FrameDecoder::new(DEFAULT_MAX_FRAME);
        decoder.push(&u32::to_be_bytes(DEFAULT_MAX_FRAME as u32));
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.buffer.bytes.capacity() < 4096);
    }

    #[test]
    fn a_large_frame_is_not_moved_while_it_arrives_and_its_space_is_given_back() {
        let len = 8 * BUFFER_CAPACITY;
        let mut decoder = FrameDecoder::new(DEFAULT_MAX_FRAME);
        decoder.push(&[0, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Tick)));
        decoder.push(&(len as u32).to_be_bytes());
        for _ in 0..len / 65536 {
            assert_eq!(decoder.next_frame(), Ok(None));
            decoder.push(&[7; 65536]);
            assert_eq!(decoder.buffer.taken, 0);
        }
        assert!(matches!(decoder.next_frame(), Ok(Some(Frame::Data(data))) if data.len() == len));
        decoder.push(&[0]);
        assert_eq!(decoder.buffered(), 1);
        assert!(decoder.buffer.bytes.capacity() <= 2 * BUFFER_CAPACITY);
    }

    #[test]
    fn buffers_that_are_kept_are_few_and_are_filled_again() {
        let mut decoder = FrameDecoder::new(DEFAULT_MAX_FRAME);
        let mut stream = Vec::new();
        for byte in 0..40u8 {
            encode_frame(&mut stream, 100, |out| out.extend_from_slice(&[byte; 9])).unwrap();
        }
        let mut kept: Vec<Arc<Vec<u8>>> = Vec::new();
        let mut seen = Vec::new();
        let mut not_to_be_kept = 0;
        // Each piece ends within a frame, which moves on to the next buffer.
        for piece in stream.chunks(30) {
            decoder.push(piece);
            while let Some((frame, buffer)) = decoder.next_shared().unwrap() {
                let Frame::Data(data) = frame else { panic!() };
                seen.push(data[0]);
                assert_eq!(data, [data[0]; 9]);
                match buffer {
                    Some(buffer) => kept.push(Arc::clone(buffer)),
                    None => not_to_be_kept += 1,
                }
            }
        }
        assert_eq!(seen, (0..40).collect::<Vec<u8>>());
        kept.dedup_by(|a, b| Arc::ptr_eq(a, b));
        assert_eq!(kept.len(), LENT_MAX);
        assert!(not_to_be_kept > 10, "{not_to_be_kept}");
        assert!(decoder.is_lent_out());
        let lent: Vec<_> = kept.iter().map(Arc::as_ptr).collect();
        kept.clear();
        assert!(!decoder.is_lent_out());
        for _ in 0..50 {
            decoder.push(&stream[..13]);
            let (_, buffer) = decoder.next_shared().unwrap().unwrap();
            kept = vec![Arc::clone(buffer.unwrap())];
        }
        assert!(decoder.is_lent_out(), "the one read into last is kept");
        let again = Arc::as_ptr(&kept[0]);
        assert!(lent.contains(&again), "a buffer that came back is filled again");
    }

    #[test]
    fn a_buffer_that_grew_for_a_large_frame_may_not_be_kept() {
        let mut decoder = FrameDecoder::new(DEFAULT_MAX_FRAME);
        for (len, may_be_kept) in [(BUFFER_CAPACITY * 2, false), (10, true)] {
            let mut stream = Vec::new();
            encode_frame(&mut stream, DEFAULT_MAX_FRAME, |out| {
                out.resize(out.len() + len, 7)
            })
            .unwrap();
            decoder.push(&stream);
            let (_, buffer) = decoder.next_shared().unwrap().unwrap();
            assert_eq!(buffer.is_some(), may_be_kept);
        }
    }

    #[test]
    fn a_reader_in_place_gets_room_and_an_unfinished_frame_survives_it() {
        let mut decoder = FrameDecoder::new(DEFAULT_MAX_FRAME);
        decoder.push(&[0, 0, 0, 0, 0, 0, 0, 2, 8]);
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Tick)));
        let bytes = decoder.read_buf();
        assert!(bytes.capacity() - bytes.len() >= READ_SPACE);
        bytes.push(9);
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::Data(&[8, 9]))));
        let mut handshake = HandshakeDecoder::new();
        assert!(handshake.read_buf().capacity() >= HANDSHAKE_READ_SPACE);
    }

    #[test]
    fn what_follows_the_handshake_is_kept() {
        let mut handshake = HandshakeDecoder::new();
        handshake.push(&[0, 1, b'x', 0, 0, 0, 2, 8]);
        assert_eq!(handshake.next_frame(), Ok(Some(&b"x"[..])));
        let mut connected = handshake.into_connected(100);
        assert_eq!(connected.next_frame(), Ok(None));
        connected.push(&[9]);
        assert_eq!(connected.next_frame(), Ok(Some(Frame::Data(&[8, 9]))));
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_gives_the_same_frames(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..12),
            cuts in prop::collection::vec(1usize..30, 1..20),
        ) {
            let stream = framed(&bodies);
            let mut decoder = FrameDecoder::new(64);
            let (mut seen, mut rest) = (Vec::new(), &stream[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                drain(&mut decoder, &mut seen);
                rest = later;
            }
            prop_assert_eq!(seen, bodies);
            prop_assert_eq!(decoder.buffered(), 0);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut connected = FrameDecoder::new(100);
            connected.push(&bytes);
            while let Ok(Some(_)) = connected.next_frame() {}
            let mut handshake = HandshakeDecoder::new();
            handshake.push(&bytes);
            while let Ok(Some(_)) = handshake.next_frame() {}
        }
    }
}
