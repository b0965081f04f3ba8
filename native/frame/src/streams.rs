//! What arrives on streams: reassembly, byte budget, receive windows.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::assembly::Assembly;
use crate::control_rate::ControlRate;
use crate::header::{FLAG_END, Header, REQUEST_HEAD_MAX, block_too_large, frame_type::*};
use crate::stream::{Fault, Head, Receiving, State, Stream, sequence, split_request, split_response};
use crate::window::Window;
use crate::{Budget, Cause, Event, Failure, MAX_SKIPPED, Memory, Options, Output, Role, Status, encode};

/// What a block's checksum said, or what was wrong with it.
pub(crate) type Check = Result<(), &'static str>;

/// All streams of a connection. One that is not in the table is over when its id is at most `last` and not among the
/// skipped, and was never opened otherwise.
#[derive(Debug)]
pub(crate) struct Streams {
    options: Options,
    memory: Memory,
    pub(crate) block_size: usize,
    pub(crate) control: ControlRate,
    table: HashMap<u32, Stream>,
    last: u32,
    /// Ids below `last` that no request has taken yet: callers of one client race for the socket.
    skipped: BTreeSet<u32>,
    window: Window,
    reserved: u64,
    budget: Option<Arc<Budget>>,
    /// Bytes that may still come for streams that we ended before their message was whole.
    stray: u64,
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Streams {
    pub(crate) fn new(options: Options, memory: Memory) -> Self {
        Self {
            memory,
            block_size: crate::MAX_PAYLOAD,
            control: ControlRate::new(),
            table: HashMap::new(),
            last: 0,
            skipped: BTreeSet::new(),
            window: Window {
                left: options.connection_window,
                pending: 0,
            },
            reserved: 0,
            budget: None,
            stray: 0,
            options,
        }
    }

    pub(crate) fn open_count(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Counts what is reserved against a budget of several connections too.
    pub(crate) fn share(&mut self, budget: Arc<Budget>) {
        self.budget = Some(budget);
    }

    pub(crate) fn skipped(&self) -> impl Iterator<Item = u32> + '_ {
        self.skipped.iter().copied()
    }

    pub(crate) fn goaway_last(&self) -> u32 {
        if self.options.role == Role::Server {
            self.last
        } else {
            0
        }
    }

    /// Drops all streams, and hands the memory of their messages over at once.
    pub(crate) fn clear(&mut self) {
        let messages: Vec<Vec<u8>> = std::mem::take(&mut self.table)
            .into_values()
            .filter_map(|stream| match stream.state {
                State::Receiving(receiving) => Some(receiving.message.into_bytes()),
                _ => None,
            })
            .collect();
        if !messages.is_empty() {
            (self.memory.discard)(messages);
        }
        self.give_back(self.reserved);
    }

    /// Reserves bytes of the connection's budget and of the shared one, or of neither.
    fn reserve(&mut self, total: u64) -> Result<(), Fault> {
        let own = total <= self.options.max_bytes.saturating_sub(self.reserved);
        if !own || !self.budget.as_ref().is_none_or(|budget| budget.reserve(total)) {
            return Err((Cause::Full, "the byte budget is used up".to_owned()));
        }
        self.reserved += total;
        Ok(())
    }

    fn give_back(&mut self, bytes: u64) {
        self.reserved -= bytes;
        if let Some(budget) = &self.budget {
            budget.give_back(bytes);
        }
    }

    pub(crate) fn open(&mut self, stream: u32) {
        self.last = self.last.max(stream);
        let stream_entry = self.fresh();
        self.table.insert(stream, stream_entry);
    }

    pub(crate) fn release(&mut self, stream: u32) {
        if let Some(entry) = self.table.remove(&stream) {
            self.allow_stray(&entry);
            self.give_back(entry.state.reserved());
        }
    }

    pub(crate) fn cancel(&mut self, stream: u32, output: &mut Output) -> Result<(), Failure> {
        if !self.end_by_peer(stream)? {
            return self.control.spend();
        }
        output.events.push(Event::Cancel { stream });
        Ok(())
    }

    pub(crate) fn reset(
        &mut self,
        stream: u32,
        cause: u16,
        text: &[u8],
        output: &mut Output,
    ) -> Result<(), Failure> {
        let live = self.end_by_peer(stream)?;
        // To a request of ours it is an answer, and as many may come as we asked for.
        if !live || self.options.role == Role::Server {
            self.control.spend()?;
        }
        if live {
            output.events.push(Event::Reset {
                stream,
                cause,
                text: text.to_vec(),
            });
        }
        Ok(())
    }

    pub(crate) fn window(&mut self, stream: u32, increment: u32, output: &mut Output) -> Result<(), Failure> {
        self.check_known(stream)?;
        match self.table.get(&stream) {
            Some(entry) if entry.state.is_live() => {}
            None if stream == 0 => {}
            _ => return self.control.spend(),
        }
        output.events.push(Event::Window { stream, increment });
        Ok(())
    }

    /// One block, complete.
    pub(crate) fn block(
        &mut self,
        header: &Header,
        payload: &[u8],
        check: Check,
        output: &mut Output,
    ) -> Result<(), Failure> {
        if header.frame_type == REQUEST {
            return self.request(header, payload, check, output);
        }
        let (response, data) = match header.frame_type {
            RESPONSE => split_response(payload),
            _ => (None, payload),
        };
        self.check_known(header.stream)?;
        self.window
            .receive(data.len(), self.options.connection_window, output)?;
        // Out of the table while it is worked on, so that what fails simply stays out.
        let Some(mut entry) = self.table.remove(&header.stream) else {
            // A server that gives up on work may find that it has answered at the same moment.
            if header.frame_type == RESPONSE && header.flags & FLAG_END != 0 {
                return self.control.spend();
            }
            return self.take_stray(data.len());
        };
        if !entry.state.is_live() {
            self.table.insert(header.stream, entry);
            return self.take_stray(data.len());
        }
        entry.window.count("stream", data.len())?;
        let result = match check {
            Err(text) => Err((Cause::InvalidCks, text.to_owned())),
            Ok(()) if header.frame_type == RESPONSE => self.response(&mut entry, header, response, data),
            Ok(()) => entry.data(header, data),
        };
        self.settle(entry, header, result, output)
    }

    fn request(
        &mut self,
        header: &Header,
        payload: &[u8],
        check: Check,
        output: &mut Output,
    ) -> Result<(), Failure> {
        if header.stream <= self.last && !self.skipped.contains(&header.stream) {
            return Err(Failure::protocol(format!(
                "request {} after request {}",
                header.stream, self.last
            )));
        }
        let parsed = check.ok().and_then(|()| split_request(payload));
        // The sender did not count the head. When it cannot be read, count what is certainly not head.
        let size = parsed
            .as_ref()
            .map_or(payload.len().saturating_sub(REQUEST_HEAD_MAX), |(_, _, data)| {
                data.len()
            });
        if size > self.block_size {
            return Err(block_too_large(size, self.block_size));
        }
        self.take_id(header.stream)?;
        self.window
            .receive(size, self.options.connection_window, output)?;
        let mut entry = self.fresh();
        entry.window.count("stream", size)?;
        let result = match (check, parsed) {
            (Err(text), _) => Err((Cause::InvalidCks, text.to_owned())),
            (Ok(()), _) if header.seq != 0 => Err(sequence(header.seq, 0)),
            (Ok(()), None) => Err((Cause::Protocol, "the head of a request is malformed".to_owned())),
            (Ok(()), Some(_)) if self.table.len() >= self.options.max_streams => {
                Err((Cause::Full, "too many streams".to_owned()))
            }
            (Ok(()), Some((total, head, data))) => self.begin(&mut entry, total, head, data),
        };
        self.settle(entry, header, result, output)
    }

    fn response(
        &mut self,
        entry: &mut Stream,
        header: &Header,
        response: Option<(u8, u8, u64)>,
        data: &[u8],
    ) -> Result<(), Fault> {
        if !matches!(entry.state, State::Waiting) {
            return Err((Cause::Protocol, "a second response".to_owned()));
        }
        if header.seq != 0 {
            return Err(sequence(header.seq, 0));
        }
        let (status, term, total) = response.unwrap_or_default();
        let status = match status {
            0 => Status::Result,
            1 => Status::Error,
            2 => Status::Started,
            other => return Err((Cause::Protocol, format!("response status {other} is unknown"))),
        };
        self.begin(entry, total, Head::Response { status, term }, data)
    }

    /// Reserves the message's bytes and takes the first.
    fn begin(&mut self, entry: &mut Stream, total: u64, head: Head, data: &[u8]) -> Result<(), Fault> {
        let max = self.options.max_message;
        let size = usize::try_from(total).ok().filter(|_| total <= max);
        let Some(size) = size else {
            return Err((
                Cause::TooLarge,
                format!("a message of {total} bytes, at most {max} taken"),
            ));
        };
        self.reserve(total)?;
        let mut receiving = Receiving {
            head,
            message: Assembly::new(size, self.memory),
            next: 1,
        };
        let result = receiving.append(data);
        entry.state = State::Receiving(receiving);
        result
    }

    /// What happens to a stream after a block of it was looked at: it ends, is handed over, or gets more window.
    fn settle(
        &mut self,
        mut entry: Stream,
        header: &Header,
        result: Result<(), Fault>,
        output: &mut Output,
    ) -> Result<(), Failure> {
        let stream = header.stream;
        let result = result.and_then(|()| {
            if header.end() {
                entry.state.check_whole()
            } else {
                Ok(())
            }
        });
        if let Err((cause, text)) = result {
            // These two happen to honest peers.
            if !matches!(cause, Cause::Full | Cause::TooLarge) {
                self.control.spend()?;
            }
            self.allow_stray(&entry);
            self.end(stream, entry);
            encode::reset(&mut output.bytes, stream, cause, &text);
            output.events.push(Event::StreamError { stream, cause, text });
            return Ok(());
        }
        if header.end() {
            if let State::Receiving(receiving) = entry.state {
                let total = receiving.message.total() as u64;
                output.events.push(receiving.into_event(stream));
                if self.options.role == Role::Client {
                    // The caller has it: nothing of ours will use it any more.
                    self.give_back(total);
                    return Ok(());
                }
                entry.state = State::Used { total };
            }
        } else if let State::Receiving(receiving) = &entry.state {
            // In halves of the window, and no more than the message still needs: so no grant comes late.
            let needed = receiving.message.total() - receiving.message.len();
            if (entry.window.left as usize) < needed {
                entry.window.grant(stream, self.options.stream_window, output);
            }
        }
        self.table.insert(stream, entry);
        Ok(())
    }

    /// A peer that has not yet read our RESET or CANCEL may use up the window it had, and no more.
    fn take_stray(&mut self, size: usize) -> Result<(), Failure> {
        if size == 0 {
            return self.control.spend();
        }
        let Some(left) = self.stray.checked_sub(size as u64) else {
            return Err(Failure::protocol(format!(
                "{size} bytes on a stream that is over, {} can be on their way",
                self.stray
            )));
        };
        self.stray = left;
        Ok(())
    }

    fn allow_stray(&mut self, entry: &Stream) {
        // A message that came whole leaves nothing on its way.
        if matches!(entry.state, State::Waiting | State::Receiving(_)) {
            self.stray = self.stray.saturating_add(u64::from(entry.window.left));
        }
    }

    /// Takes an id for a request, or for the CANCEL of one that is not sent: false when it was taken before.
    fn take_id(&mut self, stream: u32) -> Result<bool, Failure> {
        if stream <= self.last {
            return Ok(self.skipped.remove(&stream));
        }
        let skipped = self.skipped.len() + (stream - self.last - 1) as usize;
        if skipped > MAX_SKIPPED {
            return Err(Failure::protocol(format!(
                "{skipped} request ids were left out up to {stream}, at most {MAX_SKIPPED} wanted"
            )));
        }
        self.skipped.extend(self.last + 1..stream);
        self.last = stream;
        Ok(true)
    }

    /// Whether the stream was live.
    fn end_by_peer(&mut self, stream: u32) -> Result<bool, Failure> {
        if self.options.role == Role::Server && self.take_id(stream)? {
            return Ok(false);
        }
        self.check_known(stream)?;
        let Some(entry) = self.table.remove(&stream) else {
            return Ok(false);
        };
        let live = entry.state.is_live();
        self.end(stream, entry);
        Ok(live)
    }

    /// Takes a stream out; if something of ours still works with its message, keeps its budget until the release.
    fn end(&mut self, stream: u32, mut entry: Stream) {
        match entry.state {
            State::Used { total } | State::Dead { total } => {
                entry.state = State::Dead { total };
                self.table.insert(stream, entry);
            }
            ref state => self.give_back(state.reserved()),
        }
    }

    fn check_known(&self, stream: u32) -> Result<(), Failure> {
        if stream <= self.last && !self.skipped.contains(&stream) {
            return Ok(());
        }
        let text = format!("stream {stream} was never opened, the last is {}", self.last);
        Err(Failure {
            cause: Cause::UnknownStream,
            text,
        })
    }

    fn fresh(&self) -> Stream {
        Stream {
            window: Window {
                left: self.options.stream_window,
                pending: 0,
            },
            state: State::Waiting,
        }
    }
}
