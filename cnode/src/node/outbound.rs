//! The queue in front of one connection's writer: bounded in bytes, emptied in as few writes as possible.
//!
//! Senders wait for room ([`Outbound::send`]). Servers that answer calls wait for room of their own
//! ([`Outbound::reply`]), so that they depend on their caller alone. What the reader answers may not wait at all,
//! because reads must always be drained; it has a budget ([`Outbound::answer`]), and a peer that uses it up is not
//! reading.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, Semaphore};

/// Messages are joined up to this size; a larger one is a write of its own, without a copy.
const COALESCE: usize = 64 * 1024;
/// What a semaphore can count.
const MAX_CAPACITY: usize = u32::MAX as usize >> 4;

/// Why bytes were not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QueueError {
    /// The connection is over.
    Closed,
    /// The budget for answers is used up.
    Full,
}

/// Bytes for one write.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    /// Permits that come back once it is written.
    permits: usize,
    reply_permits: usize,
    answers: usize,
}

#[derive(Debug)]
pub(crate) struct Outbound {
    state: Mutex<State>,
    room: Semaphore,
    reply_room: Semaphore,
    ready: Notify,
    capacity: usize,
    reply_capacity: usize,
    answer_capacity: usize,
}

#[derive(Debug, Default)]
struct State {
    batches: VecDeque<Batch>,
    /// Bytes of answers that are queued or being written.
    answers: usize,
    /// Nothing more is taken; what is queued is still written.
    finishing: bool,
    closed: bool,
}

impl Outbound {
    pub(crate) fn new(capacity: usize, reply_capacity: usize, answer_capacity: usize) -> Self {
        let capacity = capacity.clamp(1, MAX_CAPACITY);
        let reply_capacity = reply_capacity.clamp(1, MAX_CAPACITY);
        Self {
            state: Mutex::default(),
            room: Semaphore::new(capacity),
            reply_room: Semaphore::new(reply_capacity),
            ready: Notify::new(),
            capacity,
            reply_capacity,
            answer_capacity,
        }
    }

    /// Queues whole frames once there is room for them. Frames of one task stay in order.
    pub(crate) async fn send(&self, frames: Vec<u8>) -> Result<(), QueueError> {
        // One larger than the whole queue takes all of it.
        let permits = frames.len().min(self.capacity);
        take(&self.room, permits).await?;
        self.push(Batch {
            bytes: frames,
            permits,
            ..Batch::default()
        })
    }

    /// As [`Outbound::send`], with the room that is kept for answers to calls.
    pub(crate) async fn reply(&self, frames: Vec<u8>) -> Result<(), QueueError> {
        let reply_permits = frames.len().min(self.reply_capacity);
        take(&self.reply_room, reply_permits).await?;
        self.push(Batch {
            bytes: frames,
            reply_permits,
            ..Batch::default()
        })
    }

    /// Queues what the peer's own signals caused, at once.
    pub(crate) fn answer(&self, frames: Vec<u8>) -> Result<(), QueueError> {
        let answers = frames.len();
        let mut state = self.lock();
        let queued = state.answers.saturating_add(answers);
        if queued > self.answer_capacity {
            return Err(QueueError::Full);
        }
        state.answers = queued;
        drop(state);
        self.push(Batch {
            bytes: frames,
            answers,
            ..Batch::default()
        })
    }

    /// Queues signals that this node's own links and monitors cause, which bound them.
    pub(crate) fn notice(&self, frames: Vec<u8>) -> Result<(), QueueError> {
        self.push(Batch {
            bytes: frames,
            ..Batch::default()
        })
    }

    fn push(&self, batch: Batch) -> Result<(), QueueError> {
        let mut state = self.lock();
        if state.closed || state.finishing {
            return Err(QueueError::Closed);
        }
        state.push(batch);
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// What to write next; `None` once closed, or finished and empty. Cancel-safe.
    pub(crate) async fn next(&self) -> Option<Batch> {
        loop {
            let ready = self.ready.notified();
            {
                let mut state = self.lock();
                if state.closed {
                    return None;
                }
                if let Some(batch) = state.batches.pop_front() {
                    return Some(batch);
                }
                if state.finishing {
                    return None;
                }
            }
            ready.await;
        }
    }

    /// Gives the room of a written batch back.
    pub(crate) fn written(&self, batch: &Batch) {
        self.room.add_permits(batch.permits);
        self.reply_room.add_permits(batch.reply_permits);
        let mut state = self.lock();
        state.answers = state.answers.saturating_sub(batch.answers);
    }

    /// Lets the writer end when it has written what is queued.
    pub(crate) fn finish(&self) {
        self.lock().finishing = true;
        self.ready.notify_one();
    }

    /// Drops what is queued and fails whoever waits.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.batches.clear();
        drop(state);
        self.room.close();
        self.reply_room.close();
        self.ready.notify_one();
    }

    /// Held for short, synchronous sections only.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, batch: Batch) {
        match self.batches.back_mut() {
            Some(last) if last.bytes.len() + batch.bytes.len() <= COALESCE => {
                last.bytes.extend_from_slice(&batch.bytes);
                last.permits += batch.permits;
                last.reply_permits += batch.reply_permits;
                last.answers += batch.answers;
            }
            _ => self.batches.push_back(batch),
        }
    }
}

async fn take(room: &Semaphore, permits: usize) -> Result<(), QueueError> {
    let count = u32::try_from(permits).unwrap_or(u32::MAX);
    room.acquire_many(count)
        .await
        .map_err(|_| QueueError::Closed)?
        .forget();
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::pin::pin;
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn small_frames_become_one_write() {
        let queue = Outbound::new(1000, 1000, 1000);
        for i in 0..10u8 {
            queue.send(vec![i; 10]).await.unwrap();
        }
        queue.answer(b"answer".to_vec()).unwrap();
        let batch = queue.next().await.unwrap();
        assert_eq!(batch.bytes.len(), 106);
        assert_eq!(batch.bytes.get(100..), Some(b"answer".as_slice()));
    }

    #[tokio::test]
    async fn a_large_frame_is_a_write_of_its_own() {
        let queue = Outbound::new(1 << 20, 1, 0);
        queue.send(vec![1; 10]).await.unwrap();
        queue.send(vec![2; COALESCE]).await.unwrap();
        assert_eq!(queue.next().await.unwrap().bytes.len(), 10);
        assert_eq!(queue.next().await.unwrap().bytes.len(), COALESCE);
    }

    #[tokio::test]
    async fn senders_wait_for_room_and_answers_do_not() {
        let queue = Outbound::new(100, 5, 10);
        queue.send(vec![0; 100]).await.unwrap();
        let mut second = pin!(queue.send(vec![1; 1]));
        assert_eq!(futures::poll!(second.as_mut()), Poll::Pending);
        queue.answer(vec![2; 10]).unwrap();
        assert_eq!(queue.answer(vec![2]), Err(QueueError::Full));
        queue.reply(vec![3; 5]).await.unwrap();
        let mut second_reply = pin!(queue.reply(vec![3]));
        assert_eq!(futures::poll!(second_reply.as_mut()), Poll::Pending);
        let batch = queue.next().await.unwrap();
        assert_eq!(batch.bytes.len(), 115);
        assert_eq!(
            futures::poll!(second.as_mut()),
            Poll::Pending,
            "taken is not yet written"
        );
        queue.written(&batch);
        second.await.unwrap();
        second_reply.await.unwrap();
        queue.answer(vec![2; 10]).unwrap();
    }

    #[tokio::test]
    async fn one_larger_than_the_queue_goes_through_alone() {
        let queue = Outbound::new(10, 1, 0);
        queue.send(vec![0; 1000]).await.unwrap();
        assert_eq!(futures::poll!(pin!(queue.send(vec![0; 1]))), Poll::Pending);
        let batch = queue.next().await.unwrap();
        queue.written(&batch);
        queue.send(vec![0; 10]).await.unwrap();
    }

    #[tokio::test]
    async fn closing_wakes_everyone() {
        let queue = Outbound::new(1, 1, 1);
        queue.send(vec![0; 1]).await.unwrap();
        let waiting = queue.send(vec![0; 1]);
        queue.close();
        assert_eq!(waiting.await, Err(QueueError::Closed));
        assert_eq!(queue.answer(vec![0]), Err(QueueError::Closed));
        assert!(queue.next().await.is_none());
    }
}
