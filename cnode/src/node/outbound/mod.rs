//! The queue in front of one connection's writer: bounded in bytes, emptied in as few writes as possible.
//!
//! Senders wait for room ([`Outbound::queue`] with [`Room::Send`]). Servers that answer calls wait for room of their
//! own ([`Room::Reply`]), so that they depend on their caller alone. What the reader answers may not wait at all,
//! because reads must always be drained; it has a budget ([`Outbound::answer`]), and a peer that uses it up is not
//! reading.
//!
//! ```text
//!  small messages ---------------------> express: joined up to 64 KiB --+
//!  messages in fragments, and what       lane of sender A  ..fragments--+--> one write: the express, then
//!  their senders send behind them -----> lane of sender B  ..fragments--+    one piece of each of 4 lanes
//! ```
//!
//! So a large message holds up nobody but its own sender, whose messages stay in order as Erlang promises.

mod waiting;

#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, Semaphore, SemaphorePermit, TryAcquireError};

pub(crate) use waiting::{Batch, Origin};
use waiting::{Share, Waiting};

/// At least this many messages find room at the same time, however large they are.
const MIN_MESSAGES: usize = 4;
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

/// Whose room a message takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// What processes send of their own accord.
    Send,
    /// Answers to calls.
    Reply,
}

/// Room for one message. It comes back when it is dropped, or once what was queued in it is written.
#[derive(Debug)]
pub(crate) struct Reserved<'a> {
    permit: SemaphorePermit<'a>,
    share: Share,
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
    notice_capacity: usize,
}

#[derive(Debug, Default)]
struct State {
    waiting: Waiting,
    /// Bytes of answers that are queued or being written.
    answers: usize,
    /// As `answers`, of [`Outbound::notice`].
    notices: usize,
    /// Nothing more is taken; what is queued is still written.
    finishing: bool,
    closed: bool,
}

impl Outbound {
    pub(crate) fn new(
        capacity: usize,
        reply_capacity: usize,
        answer_capacity: usize,
        notice_capacity: usize,
    ) -> Self {
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
            notice_capacity,
        }
    }

    /// Queues whole frames when there is room for them at once; else returns false and leaves them where they are.
    pub(crate) fn try_queue(
        &self,
        room: Room,
        origin: Origin,
        frames: &mut Vec<u8>,
    ) -> Result<bool, QueueError> {
        match self.try_reserve(room, frames.len())? {
            Some(reserved) => self.push_reserved(reserved, origin, frames).map(|()| true),
            None => Ok(false),
        }
    }

    /// Queues whole frames once there is room for them.
    pub(crate) async fn queue(
        &self,
        room: Room,
        origin: Origin,
        mut frames: Vec<u8>,
    ) -> Result<(), QueueError> {
        let reserved = self.reserve(room, frames.len()).await?;
        self.push_reserved(reserved, origin, &mut frames)
    }

    /// Room for a message of this length, if there is some at once.
    pub(crate) fn try_reserve(&self, room: Room, len: usize) -> Result<Option<Reserved<'_>>, QueueError> {
        let (semaphore, permits, share) = self.price(room, len);
        match semaphore.try_acquire_many(permits) {
            Ok(permit) => Ok(Some(Reserved { permit, share })),
            Err(TryAcquireError::NoPermits) => Ok(None),
            Err(TryAcquireError::Closed) => Err(QueueError::Closed),
        }
    }

    /// Waits for room for a message of this length.
    pub(crate) async fn reserve(&self, room: Room, len: usize) -> Result<Reserved<'_>, QueueError> {
        let (semaphore, permits, share) = self.price(room, len);
        let permit = semaphore.acquire_many(permits).await;
        let permit = permit.map_err(|_| QueueError::Closed)?;
        Ok(Reserved { permit, share })
    }

    /// Queues whole frames in the room that was reserved for them.
    pub(crate) fn push_reserved(
        &self,
        reserved: Reserved<'_>,
        origin: Origin,
        frames: &mut Vec<u8>,
    ) -> Result<(), QueueError> {
        reserved.permit.forget();
        self.push(origin, frames, reserved.share)
    }

    /// A large message takes no more than a part of the room, so that others find some beside it.
    fn price(&self, room: Room, len: usize) -> (&Semaphore, u32, Share) {
        let (semaphore, capacity) = match room {
            Room::Send => (&self.room, self.capacity),
            Room::Reply => (&self.reply_room, self.reply_capacity),
        };
        let permits = len.min(capacity.div_ceil(MIN_MESSAGES));
        let share = match room {
            Room::Send => Share {
                permits,
                ..Share::default()
            },
            Room::Reply => Share {
                reply_permits: permits,
                ..Share::default()
            },
        };
        (semaphore, u32::try_from(permits).unwrap_or(u32::MAX), share)
    }

    /// Queues what the peer's own signals caused, at once.
    pub(crate) fn answer(&self, origin: Origin, frames: &mut Vec<u8>) -> Result<(), QueueError> {
        let answers = frames.len();
        let mut state = self.lock();
        let queued = state.answers.saturating_add(answers);
        if queued > self.answer_capacity {
            return Err(QueueError::Full);
        }
        state.answers = queued;
        drop(state);
        let share = Share {
            answers,
            ..Share::default()
        };
        self.push(origin, frames, share)
    }

    /// Queues signals that the ends of links and monitors cause, at once. The first is always taken.
    pub(crate) fn notice(&self, origin: Origin, frames: &mut Vec<u8>) -> Result<(), QueueError> {
        let notices = frames.len();
        let mut state = self.lock();
        let queued = state.notices.saturating_add(notices);
        if queued > self.notice_capacity && state.notices > 0 {
            return Err(QueueError::Full);
        }
        state.notices = queued;
        drop(state);
        let share = Share {
            notices,
            ..Share::default()
        };
        self.push(origin, frames, share)
    }

    fn push(&self, origin: Origin, frames: &mut Vec<u8>, share: Share) -> Result<(), QueueError> {
        let mut state = self.lock();
        if state.closed || state.finishing {
            return Err(QueueError::Closed);
        }
        state.waiting.push(origin, frames, share);
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
                if let Some(batch) = state.waiting.take() {
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
    pub(crate) fn written(&self, batch: Batch) {
        let share = batch.share;
        self.room.add_permits(share.permits);
        self.reply_room.add_permits(share.reply_permits);
        let mut state = self.lock();
        state.answers = state.answers.saturating_sub(share.answers);
        state.notices = state.notices.saturating_sub(share.notices);
        state.waiting.keep(batch.bytes);
    }

    /// Lets the writer end when it has written what is queued.
    pub(crate) fn finish(&self) {
        self.lock().finishing = true;
        self.ready.notify_one();
    }

    /// Drops what is queued and fails whoever waits.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        *state = State {
            closed: true,
            ..State::default()
        };
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
