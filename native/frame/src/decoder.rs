//! Bytes to frames, and the frames of the connection itself.

use std::sync::Arc;
use std::time::Duration;

use crate::copy::append;
use crate::header::{FLAG_CKS, HEADER_LEN, Header, frame_type::*};
use crate::streams::{Check, Streams};
use crate::{
    Budget, Cause, Checksum, Event, Failure, MAX_PAYLOAD, MAX_WINDOW, Memory, Options, OptionsError, Output,
    Role, encode,
};

/// How far the handshake is.
///
/// ```text
/// client   Hello --HELLO_ACK--> Auth --READY--> Up
/// server   Hello --HELLO--> Auth --AUTH--> Proved     and agree(), when the owner is content, to Up
/// either   any --REFUSED--> Over
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Hello,
    Auth,
    Proved,
    Up,
    Over,
}

/// Counters of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Frames received and parsed.
    pub frames: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Streams that were opened and not yet released.
    pub open: usize,
    /// Bytes of the budget that are taken.
    pub reserved: u64,
}

/// The receiving side of one connection.
#[derive(Debug)]
pub struct Decoder {
    role: Role,
    phase: Phase,
    checksum: Option<Checksum>,
    block: usize,
    /// A frame that is not complete; never more than one.
    partial: Vec<u8>,
    streams: Streams,
    failure: Option<Failure>,
    frames: u64,
    bytes: u64,
}

impl Decoder {
    /// A decoder for a fresh connection: it takes hello frames only.
    ///
    /// # Errors
    /// A window that is 0 or above [`MAX_WINDOW`].
    pub fn new(options: Options) -> Result<Self, OptionsError> {
        Self::with_memory(options, Memory::default())
    }

    /// As [`new`](Self::new), with the owner's memory for large messages.
    ///
    /// # Errors
    /// A window that is 0 or above [`MAX_WINDOW`].
    pub fn with_memory(options: Options, memory: Memory) -> Result<Self, OptionsError> {
        options.check()?;
        Ok(Self {
            role: options.role,
            phase: Phase::Hello,
            checksum: None,
            block: MAX_PAYLOAD,
            partial: Vec::new(),
            streams: Streams::new(options, memory),
            failure: None,
            frames: 0,
            bytes: 0,
        })
    }

    /// Counts the bytes of messages against a budget that several connections share, too.
    pub fn share(&mut self, budget: Arc<Budget>) {
        self.streams.share(budget);
    }

    /// Request ids up to the largest that no request has taken: a GOAWAY of the owner's resets them, since its `last`
    /// says nothing of them.
    pub fn skipped(&self) -> Vec<u32> {
        self.streams.skipped().collect()
    }

    /// Sets what the hello agreed on. A server takes requests from here on, so it calls this when the client is
    /// authenticated; a client takes responses from READY on.
    pub fn agree(&mut self, checksum: Option<Checksum>, blk_max_size: usize) {
        self.checksum = checksum;
        self.block = blk_max_size.min(MAX_PAYLOAD);
        self.streams.block_size = self.block;
        if self.role == Role::Server && self.phase != Phase::Over {
            self.phase = Phase::Up;
        }
    }

    /// The client opened this stream. Ids must grow.
    pub fn open(&mut self, stream: u32) {
        self.streams.open(stream);
    }

    /// This stream is over for us: its budget is returned, and what still comes for it is ignored as long as it
    /// can have been on its way.
    pub fn release(&mut self, stream: u32) {
        self.streams.release(stream);
    }

    /// Takes one read. `now` counts from any fixed moment and must not go back.
    ///
    /// # Errors
    /// The peer broke the protocol: the connection is over. Events and bytes that came before are in the output, the
    /// last of the bytes is a GOAWAY or REFUSED. Further calls give the same error.
    pub fn feed(&mut self, now: Duration, bytes: &[u8], output: &mut Output) -> Result<(), Failure> {
        self.feed_some(now, bytes, usize::MAX, output).map(drop)
    }

    /// Like [`feed`](Self::feed), for callers that must not be kept long: stops after `max_frames` frames and says
    /// how many of the bytes were used. The rest must be fed next.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn feed_some(
        &mut self,
        now: Duration,
        bytes: &[u8],
        max_frames: usize,
        output: &mut Output,
    ) -> Result<usize, Failure> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        if self.phase == Phase::Over {
            return Ok(bytes.len());
        }
        self.streams.control.refill(now);
        match self.run(bytes, max_frames, output) {
            Ok(used) => {
                self.bytes += used as u64;
                Ok(used)
            }
            Err(failure) => {
                self.bytes += bytes.len() as u64;
                self.fail(&failure, output);
                Err(failure)
            }
        }
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        Stats {
            frames: self.frames,
            bytes: self.bytes,
            open: self.streams.open_count(),
            reserved: self.streams.reserved(),
        }
    }

    fn run(&mut self, bytes: &[u8], max_frames: usize, output: &mut Output) -> Result<usize, Failure> {
        let mut rest = bytes;
        for _ in 0..max_frames {
            if self.phase == Phase::Over {
                return Ok(bytes.len());
            }
            let done = if self.partial.is_empty() {
                self.whole(&mut rest, output)?
            } else {
                self.joined(&mut rest, output)?
            };
            if !done {
                break;
            }
        }
        Ok(bytes.len() - rest.len())
    }

    /// Takes a frame that lies whole in the input. False when it does not; it is kept then.
    fn whole(&mut self, rest: &mut &[u8], output: &mut Output) -> Result<bool, Failure> {
        let frame = match self.header(rest)? {
            Some(header) => rest
                .split_at_checked(header.frame_len())
                .map(|(frame, after)| (header, frame, after)),
            None => None,
        };
        let Some((header, frame, after)) = frame else {
            append(&mut self.partial, rest);
            *rest = &[];
            return Ok(false);
        };
        *rest = after;
        self.frame(header, frame, output)?;
        Ok(true)
    }

    /// Completes the frame that an earlier read began.
    fn joined(&mut self, rest: &mut &[u8], output: &mut Output) -> Result<bool, Failure> {
        self.fill(HEADER_LEN, rest);
        let Some(header) = self.header(&self.partial)? else {
            return Ok(false);
        };
        self.fill(header.frame_len(), rest);
        if self.partial.len() < header.frame_len() {
            return Ok(false);
        }
        let frame = std::mem::take(&mut self.partial);
        self.frame(header, &frame, output)?;
        Ok(true)
    }

    fn fill(&mut self, wanted: usize, rest: &mut &[u8]) {
        let missing = wanted.saturating_sub(self.partial.len()).min(rest.len());
        let (now, later) = rest.split_at(missing);
        append(&mut self.partial, now);
        *rest = later;
    }

    fn header(&self, bytes: &[u8]) -> Result<Option<Header>, Failure> {
        let Some(header) = Header::parse(bytes) else {
            return Ok(None);
        };
        header.check(self.role, self.phase, self.block)?;
        Ok(Some(header))
    }

    fn frame(&mut self, header: Header, frame: &[u8], output: &mut Output) -> Result<(), Failure> {
        self.frames += 1;
        let (body, checksum) = frame.split_at(header.body_end());
        let payload = &body[HEADER_LEN..];
        if header.is_block() {
            let check = self.checksum(header.flags, body, checksum);
            return self.streams.block(&header, payload, check, output);
        }
        self.control(&header, payload, output)
    }

    fn checksum(&self, flags: u8, body: &[u8], checksum: &[u8]) -> Check {
        match (self.checksum, flags & FLAG_CKS != 0) {
            (Some(_), false) => Err("no checksum though one was agreed on"),
            (None, true) => Err("a checksum though none was agreed on"),
            (None, false) => Ok(()),
            (Some(agreed), true) if agreed.of(body).to_be_bytes() == checksum => Ok(()),
            (Some(_), true) => Err("the checksum does not fit the block"),
        }
    }

    fn control(&mut self, header: &Header, payload: &[u8], output: &mut Output) -> Result<(), Failure> {
        let stream = header.stream;
        match header.frame_type {
            HELLO => self.advance(Phase::Auth, Event::Hello(payload.to_vec()), output),
            HELLO_ACK => self.advance(Phase::Auth, Event::HelloAck(payload.to_vec()), output),
            AUTH => self.advance(Phase::Proved, Event::Auth(payload.to_vec()), output),
            READY => self.advance(Phase::Up, Event::Ready, output),
            REFUSED => {
                let (cause, text) = split_u16(payload);
                let event = Event::Refused {
                    cause,
                    text: text.to_vec(),
                };
                self.advance(Phase::Over, event, output);
                self.partial = Vec::new();
            }
            WINDOW => {
                let (increment, _) = split_u32(payload);
                if increment == 0 || increment > MAX_WINDOW {
                    let text = format!("a window grows by {increment} bytes, 1 to {MAX_WINDOW} wanted");
                    return Err(Failure {
                        cause: Cause::Protocol,
                        text,
                    });
                }
                self.streams.window(stream, increment, output)?;
            }
            RESET => {
                let (cause, text) = split_u16(payload);
                self.streams.reset(stream, cause, text, output)?;
            }
            CANCEL => self.streams.cancel(stream, output)?,
            frame_type => {
                self.streams.control.spend()?;
                match frame_type {
                    PING => encode::control(&mut output.bytes, PONG, 0, &[payload]),
                    PONG => output.events.push(Event::Pong(payload.to_vec())),
                    GOAWAY => {
                        let (last, rest) = split_u32(payload);
                        let (cause, text) = split_u16(rest);
                        output.events.push(Event::Goaway {
                            last,
                            cause,
                            text: text.to_vec(),
                        });
                    }
                    // An extension that we do not know.
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn advance(&mut self, phase: Phase, event: Event, output: &mut Output) {
        self.phase = phase;
        output.events.push(event);
    }

    fn fail(&mut self, failure: &Failure, output: &mut Output) {
        let Failure { cause, text } = failure;
        match self.phase {
            Phase::Up => {
                for stream in self.streams.skipped() {
                    encode::reset(&mut output.bytes, stream, Cause::Shutdown, "not run");
                }
                encode::goaway(&mut output.bytes, self.streams.goaway_last(), *cause, text);
            }
            _ => encode::refused(&mut output.bytes, *cause, text),
        }
        self.failure = Some(failure.clone());
        self.partial = Vec::new();
        self.streams.clear();
    }
}

/// The lengths were checked with the header; a short slice reads as zeroes.
fn split_u16(bytes: &[u8]) -> (u16, &[u8]) {
    bytes
        .split_first_chunk()
        .map_or((0, bytes), |(n, rest)| (u16::from_be_bytes(*n), rest))
}

fn split_u32(bytes: &[u8]) -> (u32, &[u8]) {
    bytes
        .split_first_chunk()
        .map_or((0, bytes), |(n, rest)| (u32::from_be_bytes(*n), rest))
}
