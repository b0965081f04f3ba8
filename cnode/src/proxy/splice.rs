//! Bytes both ways until both ends have closed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes};
use tokio::time::timeout;

use super::frames::Duplex;
use super::links::LinkGuard;

/// Buffer of each direction: four TLS records, and rustls holds as much again.
const BUFFER: usize = 64 << 10;

/// Carries bytes until both directions have ended, each for itself, or the link is cut. There is no idle
/// limit: a distribution link has ticks of its own, and an RPC connection may wait for days.
pub(super) async fn splice(
    local: Box<dyn Duplex>,
    remote: Box<dyn Duplex>,
    link: &LinkGuard,
    grace: Duration,
) -> io::Result<()> {
    link.opened();
    let counters = link.counters();
    let mut local = Counted {
        stream: local,
        counters: counters.clone(),
        count: |c| &c.bytes_out,
    };
    let mut remote = Counted {
        stream: remote,
        counters: counters.clone(),
        count: |c| &c.bytes_in,
    };
    tokio::select! {
        // First: a link that was cut before it began carries nothing.
        biased;
        () = link.cut().cancelled() => {
            // The far end is closed at once. The near one hears the reason from its agent and closes by
            // itself, so that the node can tell its processes why.
            drop(remote);
            let mut discarded = vec![0; BUFFER];
            let closed = async { while local.stream.read(&mut discarded).await.is_ok_and(|read| read > 0) {} };
            let _ = timeout(grace, closed).await;
            Ok(())
        }
        ended = copy_bidirectional_with_sizes(&mut local, &mut remote, BUFFER, BUFFER) => {
            tracing::debug!(?ended, "link ended");
            ended.map(|_| ())
        }
    }
}

/// Counts what is read from a stream.
struct Counted {
    stream: Box<dyn Duplex>,
    counters: Arc<super::links::Counters>,
    count: fn(&super::links::Counters) -> &AtomicU64,
}

impl AsyncRead for Counted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let poll = Pin::new(&mut this.stream).poll_read(cx, buf);
        let read = buf.filled().len() - before;
        (this.count)(&this.counters).fetch_add(read as u64, Ordering::Relaxed);
        poll
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
