//! One way of a link: what is read at one end is written at the other.
//!
//! A link holds memory only for what it has read and the other end does not take yet. Reading goes into a buffer that
//! all links of a thread share, so thousands of idle links cost no buffer at all.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::ReadBuf;

use super::busy_poll;
use super::frames::Duplex;

/// What is read at once, and the most that a way holds: eight TLS records. Of those, rustls holds up to four again.
pub(super) const BUFFER: usize = 128 << 10;

/// What a way moves before others on its thread have their turn, which they would else have only when it has to wait:
/// a quarter of a millisecond.
const TURN: usize = 256 << 10;

thread_local! {
    static SHARED: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// One way.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// Read and not written yet.
    held: Box<[u8]>,
    written: usize,
    unflushed: bool,
    /// The other end takes no more.
    refused: bool,
    stage: Stage,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Stage {
    #[default]
    Flows,
    /// The one end has closed, and the other is to hear of it.
    Ends,
    Ended,
}

impl Flow {
    /// Moves what can be moved, and counts what is read. Ready when `from` has closed and `to` was told.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut dyn Duplex,
        to: &mut dyn Duplex,
        count: &AtomicU64,
    ) -> Poll<io::Result<()>> {
        let mut moved = 0;
        loop {
            match self.stage {
                Stage::Ended => return Poll::Ready(Ok(())),
                Stage::Ends => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    to.breaks_off(false);
                    self.stage = Stage::Ended;
                }
                Stage::Flows => {
                    ready!(self.write_held(cx, to))?;
                    if moved >= TURN {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    moved += ready!(self.pass(cx, from, to, count))?;
                }
            }
        }
    }

    /// Whether it ended because the other end takes no more.
    pub(super) fn refused(&self) -> bool {
        self.refused
    }

    fn write_held(&mut self, cx: &mut Context<'_>, to: &mut dyn Duplex) -> Poll<io::Result<()>> {
        while let Some(rest) = self.held.get(self.written..).filter(|rest| !rest.is_empty()) {
            let written = ready!(write(cx, to, rest));
            self.refused = written.is_err();
            self.written += written?;
            self.unflushed = true;
        }
        (self.held, self.written) = (Box::default(), 0);
        Poll::Ready(Ok(()))
    }

    /// Reads once, and writes of it what goes. Returns what was read.
    fn pass(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut dyn Duplex,
        to: &mut dyn Duplex,
        count: &AtomicU64,
    ) -> Poll<io::Result<usize>> {
        let mut shared = SHARED.take().unwrap_or_else(|| vec![0; BUFFER].into());
        let passed = self.pass_through(cx, &mut shared, from, to, count);
        SHARED.set(Some(shared));
        if passed.is_pending() && self.unflushed {
            ready!(Pin::new(to).poll_flush(cx))?;
            self.unflushed = false;
        }
        passed
    }

    fn pass_through(
        &mut self,
        cx: &mut Context<'_>,
        shared: &mut [u8],
        from: &mut dyn Duplex,
        to: &mut dyn Duplex,
        count: &AtomicU64,
    ) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(shared);
        ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
        let mut rest = buffer.filled();
        let read = rest.len();
        if rest.is_empty() {
            self.stage = Stage::Ends;
        }
        count.fetch_add(read as u64, Ordering::Relaxed);
        busy_poll::passed(read);
        while !rest.is_empty() {
            match write(cx, to, rest) {
                Poll::Ready(written) => {
                    self.refused = written.is_err();
                    rest = rest.get(written?..).unwrap_or_default();
                    self.unflushed = true;
                }
                Poll::Pending => {
                    self.held = rest.into();
                    break;
                }
            }
        }
        Poll::Ready(Ok(read))
    }
}

fn write(cx: &mut Context<'_>, to: &mut dyn Duplex, bytes: &[u8]) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(to).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::future::poll_fn;

    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, Join, Repeat, Sink, duplex};

    use super::*;

    impl Duplex for DuplexStream {}
    impl Duplex for Join<Repeat, Sink> {}

    async fn flow(flow: &mut Flow, from: &mut dyn Duplex, to: &mut dyn Duplex) -> io::Result<u64> {
        let count = AtomicU64::new(0);
        poll_fn(|cx| flow.poll(cx, from, to, &count)).await?;
        Ok(count.into_inner())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn all_bytes_come_through_in_order_and_then_the_end(
            len in 0usize..300_000, wide in 1usize..70_000, narrow in 1usize..70_000, read in 1usize..70_000,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
                let (mut near, mut from) = duplex(wide);
                let (mut to, mut far) = duplex(narrow);
                let send = async {
                    near.write_all(&bytes).await.unwrap();
                    near.shutdown().await.unwrap();
                };
                let receive = async {
                    let (mut seen, mut chunk) = (Vec::new(), vec![0; read]);
                    while let n @ 1.. = far.read(&mut chunk).await.unwrap() {
                        seen.extend_from_slice(&chunk[..n]);
                    }
                    seen
                };
                let mut way = Flow::default();
                let ((), seen, count) = tokio::join!(send, receive, flow(&mut way, &mut from, &mut to));
                assert_eq!(count.unwrap(), len as u64);
                assert!(seen == bytes);
                assert!(way.held.is_empty());
            });
        }
    }

    /// Neither end ever has to wait.
    #[tokio::test]
    async fn a_way_that_never_waits_gives_others_their_turn() {
        let endless = || tokio::io::join(tokio::io::repeat(7), tokio::io::sink());
        let (mut from, mut to) = (endless(), endless());
        let (mut way, count) = (Flow::default(), AtomicU64::new(0));
        for turn in 1..4 {
            // Only what the way wakes by itself lets this go on.
            let mut polled = false;
            poll_fn(|cx| {
                if polled {
                    return Poll::Ready(());
                }
                polled = true;
                assert!(way.poll(cx, &mut from, &mut to, &count).is_pending());
                Poll::Pending
            })
            .await;
            assert_eq!(count.load(Ordering::Relaxed), turn * TURN as u64);
        }
    }

    #[tokio::test]
    async fn only_what_is_not_taken_is_held() {
        let (mut near, mut from) = duplex(1 << 20);
        let (mut to, mut far) = duplex(1000);
        near.write_all(&[7; 200_000]).await.unwrap();
        let (mut way, count) = (Flow::default(), AtomicU64::new(0));
        let once = |cx: &mut Context<'_>| Poll::Ready(way.poll(cx, &mut from, &mut to, &count).is_pending());
        assert!(poll_fn(once).await);
        // One buffer full was read, and 1000 of it went on.
        assert_eq!(way.held.len(), BUFFER - 1000);
        assert_eq!(count.load(Ordering::Relaxed), BUFFER as u64);
        let drain = async { far.read_exact(&mut vec![0; 200_000]).await.unwrap() };
        let go_on = poll_fn(|cx| {
            let _ = way.poll(cx, &mut from, &mut to, &count);
            match way.held.is_empty() && count.load(Ordering::Relaxed) == 200_000 {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        });
        tokio::join!(drain, go_on);
        assert!(way.held.is_empty(), "an idle way holds nothing");
    }
}
