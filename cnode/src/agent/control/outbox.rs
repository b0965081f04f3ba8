//! What waits to be written to one client. It never makes the agent wait: a client that does not read is
//! dropped when its queue is full.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Frames that may wait for one client.
pub const QUEUE_FRAMES_MAX: usize = 256;
/// Bytes that may wait for one client when a further frame is queued.
pub const QUEUE_BYTES_MAX: usize = 1 << 20;
/// How long a client may take to read one frame.
pub const WRITE_TIME: Duration = Duration::from_secs(10);

/// The queue's near end.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    frames: mpsc::Sender<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    stop: CancellationToken,
}

/// The queue's far end.
#[derive(Debug)]
pub(super) struct Queue {
    frames: mpsc::Receiver<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    stop: CancellationToken,
}

impl Outbox {
    /// `stop` fires when the client does not read.
    pub(super) fn new(stop: CancellationToken) -> (Self, Queue) {
        let (sender, receiver) = mpsc::channel(QUEUE_FRAMES_MAX);
        let waiting = Arc::new(AtomicUsize::new(0));
        let queue = Queue {
            frames: receiver,
            waiting: waiting.clone(),
            stop: stop.clone(),
        };
        (
            Self {
                frames: sender,
                waiting,
                stop,
            },
            queue,
        )
    }

    /// Whether half of the room is taken: what can be left out should be.
    pub(super) fn is_crowded(&self) -> bool {
        self.frames.capacity() < QUEUE_FRAMES_MAX / 2
            || self.waiting.load(Ordering::Relaxed) > QUEUE_BYTES_MAX / 2
    }

    /// Queues a frame, or gives the client up.
    pub(super) fn send(&self, frame: Vec<u8>) {
        let len = frame.len();
        let waiting = self.waiting.fetch_add(len, Ordering::Relaxed);
        // One large reply alone is no fault of the client's.
        if waiting > QUEUE_BYTES_MAX || self.frames.try_send(frame).is_err() {
            self.waiting.fetch_sub(len, Ordering::Relaxed);
            if !self.stop.is_cancelled() {
                tracing::warn!(
                    waiting,
                    cause = "limit",
                    "a client does not read its replies, {QUEUE_FRAMES_MAX} frames and {QUEUE_BYTES_MAX} bytes may wait"
                );
            }
            self.stop.cancel();
        }
    }
}

impl Queue {
    /// Writes until every [`Outbox`] is dropped, and gives the writer back, or until the client takes no more.
    pub(super) async fn write_to<W: AsyncWrite + Unpin>(mut self, mut writer: W) -> Option<W> {
        while let Some(frame) = self.frames.recv().await {
            match timeout(WRITE_TIME, writer.write_all(&frame)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a client takes no more");
                    self.stop.cancel();
                    return None;
                }
                Err(_) => {
                    tracing::warn!(
                        cause = "timeout",
                        "a client did not read a frame within {} s",
                        WRITE_TIME.as_secs()
                    );
                    self.stop.cancel();
                    return None;
                }
            }
            self.waiting.fetch_sub(frame.len(), Ordering::Relaxed);
        }
        Some(writer)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn frames_are_written_in_order_and_the_writer_comes_back() {
        let stop = CancellationToken::new();
        let (outbox, queue) = Outbox::new(stop.clone());
        let (near, mut far) = tokio::io::duplex(4);
        let writing = tokio::spawn(queue.write_to(near));
        outbox.send(b"one ".to_vec());
        outbox.send(b"two".to_vec());
        drop(outbox);
        let mut text = [0; 7];
        far.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"one two");
        assert!(writing.await.unwrap().is_some());
        assert!(!stop.is_cancelled());
    }

    #[tokio::test]
    async fn a_client_that_takes_no_more_is_given_up() {
        let stop = CancellationToken::new();
        let (outbox, queue) = Outbox::new(stop.clone());
        let (near, far) = tokio::io::duplex(4);
        drop(far);
        outbox.send(b"one".to_vec());
        assert!(queue.write_to(near).await.is_none());
        assert!(stop.is_cancelled());
    }

    #[test]
    fn a_client_that_does_not_read_is_given_up_by_count_and_by_bytes() {
        let stop = CancellationToken::new();
        let (outbox, _queue) = Outbox::new(stop.clone());
        for _ in 0..QUEUE_FRAMES_MAX {
            outbox.send(vec![0]);
        }
        assert!(!stop.is_cancelled());
        outbox.send(vec![0]);
        assert!(stop.is_cancelled());

        let stop = CancellationToken::new();
        let (outbox, _queue) = Outbox::new(stop.clone());
        outbox.send(vec![0; 2 * QUEUE_BYTES_MAX]);
        assert!(!stop.is_cancelled(), "one large reply");
        outbox.send(vec![0]);
        assert!(stop.is_cancelled());
    }
}
