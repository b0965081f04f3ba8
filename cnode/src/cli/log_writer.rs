//! The log, written by a thread of its own: links, requests and signals do not wait for somebody who holds the other
//! end of standard error and does not read it.

use std::io::{self, ErrorKind, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes of lines that wait to be written.
const WAITING_MAX: usize = 256 << 10;
/// Bytes that a pipe takes in one piece (pipe(7), PIPE_BUF): lines of two agents with one log stay whole.
const PIECE_MAX: usize = 4096;
/// How long the end of the process waits for what is still to be written.
const END_TIME: Duration = Duration::from_secs(1);

/// The log of this process. Dropping it waits, within a limit, until all is written.
pub(super) struct Log {
    lines: Arc<Lines>,
}

/// What is to be written. Each write is a whole line, or several.
#[derive(Default)]
pub(super) struct Lines {
    // Held to add or take lines, never while they are written.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// Lines that there was no room for. While there are any, all others go the same way: what is lost is in one place.
    lost: u64,
    writing: bool,
}

impl Log {
    /// A log that is written to `out`, with a word of it about lines that were lost. `ready` waits until `out` may take
    /// something, where its writes do not block.
    pub(super) fn start<W: Write + Send + 'static>(
        out: W,
        ready: fn(&W),
        tell_lost: fn(u64),
    ) -> io::Result<Self> {
        let lines = Arc::new(Lines::default());
        let of_thread = lines.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || of_thread.write_to(out, ready, tell_lost))?;
        Ok(Self { lines })
    }

    pub(super) fn lines(&self) -> Arc<Lines> {
        self.lines.clone()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let state = self.lines.lock();
        let unwritten = |state: &mut State| state.writing || !state.waiting.is_empty() || state.lost > 0;
        // An error is a lock that somebody panicked under; either way nothing more can be done.
        let _ = self.lines.changed.wait_timeout_while(state, END_TIME, unwritten);
    }
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to<W: Write>(&self, mut out: W, ready: fn(&W), tell_lost: fn(u64)) {
        let mut taken = Vec::new();
        loop {
            let mut state = self.lock();
            state.writing = false;
            self.changed.notify_all();
            while state.waiting.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            taken.clear();
            mem::swap(&mut taken, &mut state.waiting);
            let lost = mem::take(&mut state.lost);
            state.writing = true;
            drop(state);
            // A line like all others, and the first behind those that were not lost.
            if lost > 0 {
                tell_lost(lost);
            }
            write_pieces(&mut out, ready, &taken);
        }
    }
}

impl Write for &Lines {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        if state.lost > 0 || state.waiting.len() + lines.len() > WAITING_MAX {
            state.lost += 1;
        } else {
            state.waiting.extend_from_slice(lines);
            drop(state);
            self.changed.notify_all();
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_pieces<W: Write>(out: &mut W, ready: fn(&W), mut lines: &[u8]) {
    while !lines.is_empty() {
        let (mut piece, rest) = lines.split_at(piece_of(lines));
        lines = rest;
        while !piece.is_empty() {
            match out.write(piece) {
                Ok(0) => break,
                Ok(written) => piece = piece.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => ready(out),
                // Of a full disk for example. There is no other place to say it.
                Err(_) => break,
            }
        }
    }
    let _ = out.flush();
}

/// Bytes of as many whole lines as go in one piece, or of one that is longer.
fn piece_of(lines: &[u8]) -> usize {
    let end = |byte: &u8| *byte == b'\n';
    let last = match lines.get(..PIECE_MAX) {
        None => return lines.len(),
        Some(piece) => piece.iter().rposition(end),
    };
    let end = last.or_else(|| lines.iter().position(end));
    end.map_or(lines.len(), |end| end + 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::time::Instant;

    use super::*;

    /// Takes a piece each time that somebody reads one.
    struct Pipe(SyncSender<Vec<u8>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn pipe() -> (Pipe, Receiver<Vec<u8>>) {
        let (sender, receiver) = sync_channel(0);
        (Pipe(sender), receiver)
    }

    #[test]
    fn lines_keep_their_order_and_are_written_before_the_end() {
        let (pipe, reader) = pipe();
        let log = Log::start(pipe, |_| (), |_| panic!("none is lost")).unwrap();
        let lines = log.lines();
        let reading = thread::spawn(move || {
            let pieces: Vec<_> = reader.iter().take(2).collect();
            assert!(
                pieces
                    .iter()
                    .all(|piece| piece.len() <= PIECE_MAX && piece.ends_with(b"\n"))
            );
            let mut seen = pieces.concat();
            while !seen.ends_with(b"line 1999\n") {
                seen.extend(reader.recv().unwrap());
            }
            seen
        });
        let wanted: Vec<u8> = (0..2000)
            .flat_map(|i| format!("line {i}\n").into_bytes())
            .collect();
        for line in wanted.split_inclusive(|byte| *byte == b'\n') {
            lines.as_ref().write_all(line).unwrap();
        }
        drop(log);
        let state = lines.lock();
        assert!(state.waiting.is_empty() && !state.writing);
        assert_eq!(reading.join().unwrap(), wanted);
    }

    #[test]
    fn a_log_that_nobody_reads_holds_nobody_up() {
        let (pipe, reader) = pipe();
        let log = Log::start(pipe, |_| (), |_| ()).unwrap();
        let lines = log.lines();
        let line = [b'x'; 1023].iter().chain(b"\n").copied().collect::<Vec<_>>();
        let began = Instant::now();
        for _ in 0..10_000 {
            lines.as_ref().write_all(&line).unwrap();
        }
        {
            let state = lines.lock();
            assert!(state.waiting.len() <= WAITING_MAX);
            // What was taken before is as much at most.
            assert!(
                state.lost >= 10_000 - 2 * (WAITING_MAX / line.len()) as u64,
                "{}",
                state.lost
            );
        }
        drop(log);
        assert!(began.elapsed() < END_TIME * 5);
        // Who reads after all gets what comes from then on.
        while lines.lock().lost > 0 {
            reader.recv().unwrap();
        }
        lines.as_ref().write_all(b"again\n").unwrap();
        while !reader.recv().unwrap().ends_with(b"again\n") {}
    }

    #[test]
    fn pieces_are_whole_lines() {
        assert_eq!(piece_of(b"a\nb"), 3);
        let short = [b'a'; 999].iter().chain(b"\n").copied().collect::<Vec<_>>();
        assert_eq!(piece_of(&short.repeat(5)), 4000);
        let mut long = vec![b'a'; 5000];
        assert_eq!(piece_of(&long), 5000);
        long.extend(b"\nb\n");
        assert_eq!(piece_of(&long), 5001);
    }
}
