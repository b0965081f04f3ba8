//! What a sidecar prints, line by line: always read, so that it never waits for us, and handed on as far as the limits go.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::mpsc::{self, error::TrySendError},
};

use super::{SidecarEvent, SidecarEventKind, Stream};
use crate::mesh::Token;

/// Longest line that is handed on, in bytes; the rest of a longer one is left out.
pub(super) const LINE_MAX: usize = 4096;
/// Lines of one sidecar that are handed on each second.
pub(super) const LINES_PER_SECOND: u32 = 200;
const WINDOW: Duration = Duration::from_secs(1);
/// What stands for a token that a sidecar printed.
const REDACTED: &[u8] = b"(token)";
const CHUNK: usize = 8192;

/// Where the lines of one sidecar go. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Sink {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: String,
    /// None when nobody asked for lines.
    events: Option<mpsc::Sender<SidecarEvent>>,
    secret: Option<Token>,
    // Held for a line, never across an await.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The last line, for the text that tells of its end.
    last: Vec<u8>,
    window: Instant,
    written: u32,
    left_out: u64,
}

impl Sink {
    pub(super) fn new(id: String, events: Option<mpsc::Sender<SidecarEvent>>, secret: Option<Token>) -> Self {
        Self {
            inner: Arc::new(Inner {
                id,
                events,
                secret,
                state: Mutex::new(State {
                    last: Vec::new(),
                    window: Instant::now(),
                    written: 0,
                    left_out: 0,
                }),
            }),
        }
    }

    /// The last line that was printed, and from now on none.
    pub(super) fn take_last(&self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.state().last)).into_owned()
    }

    /// Bytes of a line that must be kept so that a token in what is handed on is seen whole.
    fn keep(&self) -> usize {
        LINE_MAX + self.inner.secret.as_ref().map_or(0, |token| token.expose().len())
    }

    fn line(&self, stream: Stream, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let secret = self.inner.secret.as_ref().map_or("", |token| token.expose());
        let line = redact(line, secret.as_bytes());
        let mut state = self.state();
        if !line.is_empty() {
            state.last.clone_from(&line);
        }
        let Some(events) = &self.inner.events else {
            return;
        };
        if state.window.elapsed() >= WINDOW {
            state.window = Instant::now();
            state.written = 0;
        }
        if state.written >= LINES_PER_SECOND {
            state.left_out += 1;
            return;
        }
        let send = |line: Vec<u8>| {
            events.try_send(SidecarEvent {
                id: self.inner.id.clone(),
                kind: SidecarEventKind::Output { stream, line },
            })
        };
        if state.left_out > 0 {
            let told = format!("(meshx: {} lines left out)", state.left_out);
            if send(told.into_bytes()).is_ok() {
                state.left_out = 0;
            }
        }
        match send(line) {
            Ok(()) => state.written += 1,
            Err(TrySendError::Full(_)) => state.left_out += 1,
            Err(TrySendError::Closed(_)) => {}
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads to the end.
pub(super) async fn pump(mut from: impl AsyncRead + Unpin, stream: Stream, sink: Sink) {
    let (mut chunk, mut line, keep) = (vec![0; CHUNK], Vec::new(), sink.keep());
    while let Ok(read @ 1..) = from.read(&mut chunk).await {
        for piece in chunk[..read].split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            let room = keep.saturating_sub(line.len());
            line.extend_from_slice(text.get(..room).unwrap_or(text));
            if ends {
                sink.line(stream, &line);
                line.clear();
            }
        }
        // A flood must not keep the other tasks of this thread waiting.
        tokio::task::yield_now().await;
    }
    if !line.is_empty() {
        sink.line(stream, &line);
    }
}

/// What is handed on of a line. Each token in it was read whole if it begins there ([`Sink::keep`]).
fn redact(line: &[u8], secret: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(line.len().min(LINE_MAX));
    let mut at = 0;
    while let Some(byte) = line.get(at).filter(|_| at < LINE_MAX) {
        if !secret.is_empty() && line[at..].starts_with(secret) {
            out.extend_from_slice(REDACTED);
            at += secret.len();
        } else {
            out.push(*byte);
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    async fn lines_of(bytes: &[u8], secret: Option<&str>, room: usize) -> (Vec<Vec<u8>>, Sink) {
        let (events, mut received) = mpsc::channel(room);
        let sink = Sink::new("a".into(), Some(events), secret.map(Token::new));
        pump(bytes, Stream::Stderr, sink.clone()).await;
        let mut lines = Vec::new();
        while let Ok(SidecarEvent {
            kind: SidecarEventKind::Output { stream, line },
            ..
        }) = received.try_recv()
        {
            assert_eq!(stream, Stream::Stderr);
            lines.push(line);
        }
        (lines, sink)
    }

    #[tokio::test]
    async fn lines_are_split_and_long_ones_cut() {
        let mut bytes = b"one\r\n\ntwo".to_vec();
        let (lines, sink) = lines_of(&bytes, None, 10).await;
        assert_eq!(lines, [b"one".to_vec(), b"".to_vec(), b"two".to_vec()]);
        assert_eq!(
            (sink.take_last(), sink.take_last()),
            ("two".to_owned(), String::new())
        );
        bytes = vec![b'x'; 5 * CHUNK];
        bytes.extend_from_slice(b"\nshort\n");
        let (lines, _) = lines_of(&bytes, None, 10).await;
        assert_eq!(
            (lines[0].len(), lines[1].as_slice()),
            (LINE_MAX, b"short".as_slice())
        );
    }

    #[tokio::test]
    async fn a_token_is_never_handed_on_not_even_in_part() {
        let token = "0123456789abcdef";
        let mut bytes = format!("token={token},{token}\n").into_bytes();
        bytes.extend(std::iter::repeat_n(b'x', LINE_MAX - 8));
        bytes.extend_from_slice(format!("{token}\n").as_bytes());
        // What is shortened in front must not pull the half of one in.
        bytes.extend(token.repeat(LINE_MAX / token.len() + 1).bytes().skip(8));
        bytes.push(b'\n');
        let (lines, sink) = lines_of(&bytes, Some(token), 10).await;
        assert_eq!(lines[0], b"token=(token),(token)");
        assert!(lines[1].ends_with(b"x(token)") && !lines[1].ends_with(b"01234567"));
        assert_eq!(
            lines[2].iter().filter(|byte| **byte == b'9').count(),
            1,
            "the half at its start"
        );
        assert!(!sink.take_last().contains("0123"));
    }

    #[tokio::test]
    async fn a_flood_is_counted_and_told() {
        let flood = b"line\n".repeat(LINES_PER_SECOND as usize + 50);
        // All of it in one second, which a busy machine may need more than one try for.
        let (lines, sink) = loop {
            let began = Instant::now();
            let result = lines_of(&flood, None, 1000).await;
            if began.elapsed() < WINDOW {
                break result;
            }
        };
        assert_eq!(lines.len(), LINES_PER_SECOND as usize);
        assert_eq!(sink.state().left_out, 50);
        // A channel that nobody reads holds nothing up.
        let (lines, sink) = lines_of(&b"line\n".repeat(10), None, 3).await;
        assert_eq!((lines.len(), sink.state().left_out), (3, 7));
    }
}
