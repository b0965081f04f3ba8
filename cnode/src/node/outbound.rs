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

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, Semaphore};

/// Messages are joined up to this size, and this much of a lane goes into one write.
const COALESCE: usize = 64 * 1024;
/// Lanes that have a part in one write.
const LANES_PER_WRITE: usize = 4;
/// At least this many messages find room at the same time, however large they are.
const MIN_MESSAGES: usize = 4;
/// Largest buffer that is kept for the next write, in bytes.
const RETAINED_CAPACITY: usize = 1024 * 1024;
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

/// The process that frames come from, whose messages stay in order: id and serial of its pid. `None` where the order
/// does not matter.
pub(crate) type Origin = Option<(u32, u32)>;

/// Whose room a message takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// What processes send of their own accord.
    Send,
    /// Answers to calls.
    Reply,
}

/// Bytes for one write.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    share: Share,
}

/// What comes back once bytes are written.
#[derive(Debug, Default, Clone, Copy)]
struct Share {
    permits: usize,
    reply_permits: usize,
    answers: usize,
    notices: usize,
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
    express: VecDeque<Batch>,
    lanes: VecDeque<Lane>,
    /// Bytes of answers that are queued or being written.
    answers: usize,
    /// As `answers`, of [`Outbound::notice`].
    notices: usize,
    /// Batches that have left `express`.
    popped: u64,
    /// Nothing more is taken; what is queued is still written.
    finishing: bool,
    closed: bool,
    /// A written buffer, empty, to be filled again.
    spare: Vec<u8>,
}

/// Messages of one sender, the first of them in fragments.
#[derive(Debug)]
struct Lane {
    origin: Origin,
    queue: VecDeque<Batch>,
    /// Bytes of the first that have been taken.
    taken: usize,
    /// Batches that must have left the express before it begins: they may hold earlier messages of its sender.
    behind: u64,
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
        let (semaphore, permits, share) = self.price(room, frames.len());
        match semaphore.try_acquire_many(permits) {
            Ok(permit) => permit.forget(),
            Err(tokio::sync::TryAcquireError::NoPermits) => return Ok(false),
            Err(tokio::sync::TryAcquireError::Closed) => return Err(QueueError::Closed),
        }
        self.push(origin, frames, share).map(|()| true)
    }

    /// Queues whole frames once there is room for them.
    pub(crate) async fn queue(
        &self,
        room: Room,
        origin: Origin,
        mut frames: Vec<u8>,
    ) -> Result<(), QueueError> {
        let (semaphore, permits, share) = self.price(room, frames.len());
        let permit = semaphore.acquire_many(permits).await;
        permit.map_err(|_| QueueError::Closed)?.forget();
        self.push(origin, &mut frames, share)
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
        state.push(origin, frames, share);
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
                if let Some(batch) = state.take() {
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
        let Batch { mut bytes, share } = batch;
        self.room.add_permits(share.permits);
        self.reply_room.add_permits(share.reply_permits);
        bytes.clear();
        let mut state = self.lock();
        state.answers = state.answers.saturating_sub(share.answers);
        state.notices = state.notices.saturating_sub(share.notices);
        if bytes.capacity() <= RETAINED_CAPACITY && bytes.capacity() > state.spare.capacity() {
            state.spare = bytes;
        }
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

impl State {
    fn push(&mut self, origin: Origin, frames: &mut Vec<u8>, share: Share) {
        let behind = self
            .lanes
            .iter_mut()
            .find(|lane| origin.is_some() && lane.origin == origin);
        if let Some(lane) = behind {
            append(&mut lane.queue, frames, share, &mut self.spare);
        } else if is_cut(frames) {
            let batch = Batch {
                bytes: std::mem::take(frames),
                share,
            };
            self.lanes.push_back(Lane {
                origin,
                queue: VecDeque::from([batch]),
                taken: 0,
                behind: self.popped.saturating_add(self.express.len() as u64),
            });
        } else {
            append(&mut self.express, frames, share, &mut self.spare);
        }
    }

    fn take(&mut self) -> Option<Batch> {
        let mut batch = match self.express.pop_front() {
            Some(batch) => {
                self.popped = self.popped.saturating_add(1);
                batch
            }
            None => Batch::default(),
        };
        for _ in 0..self.lanes.len().min(LANES_PER_WRITE) {
            let Some(mut lane) = self.lanes.pop_front() else {
                break;
            };
            if lane.behind > self.popped {
                self.lanes.push_back(lane);
                continue;
            }
            if batch.bytes.capacity() == 0 {
                batch.bytes = std::mem::take(&mut self.spare);
            }
            lane.take_piece(&mut batch);
            if !lane.queue.is_empty() {
                self.lanes.push_back(lane);
            }
        }
        (!batch.bytes.is_empty()).then_some(batch)
    }
}

/// Joins small messages; a large one stays as it is.
fn append(queue: &mut VecDeque<Batch>, frames: &mut Vec<u8>, share: Share, spare: &mut Vec<u8>) {
    match queue.back_mut() {
        Some(last) if last.bytes.len() + frames.len() <= COALESCE => {
            last.bytes.extend_from_slice(frames);
            last.share.add(share);
            frames.clear();
        }
        _ => {
            let bytes = if frames.len() > COALESCE {
                std::mem::take(frames)
            } else {
                let busy = !queue.is_empty();
                let mut bytes = std::mem::take(spare);
                if busy {
                    // More will follow: it is not to grow step by step.
                    bytes.reserve(COALESCE);
                }
                bytes.append(frames);
                bytes
            };
            queue.push_back(Batch { bytes, share });
        }
    }
}

/// Whether these are the fragments of a large message.
fn is_cut(frames: &[u8]) -> bool {
    frames.len() > COALESCE && frame_len(frames) < frames.len()
}

/// Bytes of the first frame, its length included.
fn frame_len(frames: &[u8]) -> usize {
    let announced = frames
        .first_chunk::<4>()
        .map_or(u32::MAX, |len| u32::from_be_bytes(*len));
    usize::try_from(announced).unwrap_or(usize::MAX).saturating_add(4)
}

impl Lane {
    /// Moves whole frames to the batch: one, and further ones while they fit.
    fn take_piece(&mut self, batch: &mut Batch) {
        let start = batch.bytes.len();
        while let Some(first) = self.queue.front() {
            let rest = first.bytes.get(self.taken..).unwrap_or_default();
            let len = frame_len(rest).min(rest.len());
            let piece = batch.bytes.len() - start;
            if piece > 0 && piece + len > COALESCE {
                return;
            }
            batch.bytes.extend_from_slice(rest.get(..len).unwrap_or_default());
            self.taken += len;
            if self.taken >= first.bytes.len() {
                batch.share.add(first.share);
                self.taken = 0;
                self.queue.pop_front();
            }
        }
    }
}

impl Share {
    fn add(&mut self, other: Self) {
        // Spelled out, so that what is added to a share is never left out here: it would not come back.
        let Self {
            permits,
            reply_permits,
            answers,
            notices,
        } = other;
        self.permits += permits;
        self.reply_permits += reply_permits;
        self.answers += answers;
        self.notices += notices;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::pin::pin;
    use std::task::Poll;

    use meshx_dist::control::Control;
    use meshx_dist::flags::DistFlags;
    use meshx_dist::framing::{Frame, FrameDecoder};
    use meshx_dist::link::{LinkLimits, Receiver, Sender};
    use meshx_etf::{Atom, Pid, Term};

    use super::*;

    impl Outbound {
        async fn send(&self, frames: Vec<u8>) -> Result<(), QueueError> {
            self.queue(Room::Send, None, frames).await
        }

        async fn reply(&self, frames: Vec<u8>) -> Result<(), QueueError> {
            self.queue(Room::Reply, None, frames).await
        }
    }

    #[tokio::test]
    async fn small_frames_become_one_write() {
        let queue = Outbound::new(1000, 1000, 1000, 0);
        for i in 0..10u8 {
            queue.send(vec![i; 10]).await.unwrap();
        }
        queue.answer(None, &mut b"answer".to_vec()).unwrap();
        let batch = queue.next().await.unwrap();
        assert_eq!(batch.bytes.len(), 106);
        assert_eq!(batch.bytes.get(100..), Some(b"answer".as_slice()));
    }

    #[tokio::test]
    async fn a_large_frame_is_a_write_of_its_own() {
        let queue = Outbound::new(1 << 20, 1, 0, 0);
        queue.send(vec![1; 10]).await.unwrap();
        queue.send(vec![2; COALESCE]).await.unwrap();
        assert_eq!(queue.next().await.unwrap().bytes.len(), 10);
        assert_eq!(queue.next().await.unwrap().bytes.len(), COALESCE);
    }

    #[tokio::test]
    async fn senders_wait_for_room_and_answers_do_not() {
        let queue = Outbound::new(100, 1, 10, 0);
        for _ in 0..4 {
            queue.send(vec![0; 25]).await.unwrap();
        }
        let mut second = pin!(queue.send(vec![1; 1]));
        assert_eq!(futures::poll!(second.as_mut()), Poll::Pending);
        queue.answer(None, &mut vec![2; 10]).unwrap();
        assert_eq!(queue.answer(None, &mut vec![2]), Err(QueueError::Full));
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
        queue.written(batch);
        second.await.unwrap();
        second_reply.await.unwrap();
        queue.answer(None, &mut vec![2; 10]).unwrap();
    }

    #[tokio::test]
    async fn messages_larger_than_the_queue_go_through() {
        let queue = Outbound::new(8, 1, 0, 0);
        for _ in 0..MIN_MESSAGES {
            queue.send(vec![0; 1000]).await.unwrap();
        }
        assert_eq!(futures::poll!(pin!(queue.send(vec![0; 1]))), Poll::Pending);
        let batch = queue.next().await.unwrap();
        queue.written(batch);
        queue.send(vec![0; 10]).await.unwrap();
    }

    #[tokio::test]
    async fn closing_wakes_everyone() {
        let queue = Outbound::new(1, 1, 1, 0);
        queue.send(vec![0; 1]).await.unwrap();
        let waiting = queue.send(vec![0; 1]);
        queue.close();
        assert_eq!(waiting.await, Err(QueueError::Closed));
        assert_eq!(queue.answer(None, &mut vec![0]), Err(QueueError::Closed));
        assert!(queue.next().await.is_none());
    }

    fn pid(id: u32) -> Pid {
        Pid {
            node: Atom::from("a@h"),
            id,
            serial: 0,
            creation: 4,
        }
    }

    /// A message from process `from` with a binary of `len` bytes, as it goes into the queue.
    fn message(from: u32, sequence: u64, len: usize) -> Vec<u8> {
        let control = Control::SendSender {
            from: pid(from),
            to: pid(1000 + from),
            token: None,
        };
        let mut frames = Vec::new();
        let payload = Term::binary(vec![from as u8; len]);
        Sender::starting_at(DistFlags::FRAGMENTS, sequence)
            .send(control, Some(&payload), &mut frames)
            .unwrap();
        frames
    }

    fn origin(from: u32) -> Origin {
        Some((from, 0))
    }

    /// Senders in the order in which their messages are complete at the other end, with the batch that completed each.
    async fn arrivals(queue: &Outbound) -> Vec<(u32, usize)> {
        queue.finish();
        let mut receiver = Receiver::new(DistFlags::FRAGMENTS, LinkLimits::default());
        let mut frames = FrameDecoder::new(1 << 20);
        let (mut seen, mut batches) = (Vec::new(), 0);
        while let Some(batch) = queue.next().await {
            assert!(batch.bytes.len() < (LANES_PER_WRITE + 2) * COALESCE);
            frames.push(&batch.bytes);
            batches += 1;
            queue.written(batch);
            while let Some(frame) = frames.next_frame().unwrap() {
                let Frame::Data(frame) = frame else {
                    panic!("no ticks here")
                };
                if let Some(message) = receiver.receive(frame).unwrap() {
                    let Control::SendSender { from, .. } = message.control else {
                        panic!("{:?}", message.control)
                    };
                    seen.push((from.id, batches));
                }
            }
        }
        assert_eq!((receiver.waiting(), frames.buffered()), (0, 0));
        seen
    }

    #[tokio::test]
    async fn a_large_message_stays_behind_small_ones_of_its_sender_that_wait_for_later_writes() {
        let queue = Outbound::new(100 << 20, 1, 0, 0);
        for (from, len) in [
            (2, 50_000),
            (2, 50_000),
            (2, 50_000),
            (2, 50_000),
            (1, 10),
            (1, 100_000),
        ] {
            let frames = message(from, 1 + len as u64, len);
            queue.queue(Room::Send, origin(from), frames).await.unwrap();
        }
        let seen = arrivals(&queue).await;
        let order: Vec<u32> = seen.iter().map(|(from, _)| *from).collect();
        assert_eq!(order, [2, 2, 2, 2, 1, 1]);
    }

    #[tokio::test]
    async fn large_messages_share_the_writes_and_hold_up_only_their_own_senders() {
        let queue = Outbound::new(100 << 20, 1, 0, 0);
        for (from, len) in [
            (1, 3 << 20),
            (2, 1 << 20),
            (3, 10),
            (1, 20),
            (2, 30),
            (1, 200_000),
            (4, 10),
            (1, 10),
        ] {
            let frames = message(from, u64::from(from) * 10 + len as u64, len);
            queue.queue(Room::Send, origin(from), frames).await.unwrap();
        }
        let seen = arrivals(&queue).await;
        let order: Vec<u32> = seen.iter().map(|(from, _)| *from).collect();
        // 3 and 4 overtake all; 2 is shorter than 1, and what 2 and 1 send behind their large ones comes behind them.
        assert_eq!(order, [3, 4, 2, 2, 1, 1, 1, 1]);
        assert_eq!(
            (seen[0].1, seen[1].1),
            (1, 1),
            "small ones go with the first write"
        );
        assert_eq!(
            queue.room.available_permits(),
            queue.capacity,
            "all room has come back"
        );
    }

    #[tokio::test]
    async fn many_large_messages_take_turns() {
        let queue = Outbound::new(100 << 20, 1, 0, 0);
        for from in 1..=9 {
            let frames = message(from, u64::from(from), 300_000);
            queue.queue(Room::Send, origin(from), frames).await.unwrap();
        }
        let seen = arrivals(&queue).await;
        // Five pieces of each, four in a write: all nine are under way before the first is complete.
        assert!(seen[0].1 >= 9, "{seen:?}");
        assert_eq!(seen.len(), 9);
    }

    #[tokio::test]
    async fn a_large_message_leaves_room_for_others() {
        let queue = Outbound::new(1 << 20, 1, 0, 0);
        for from in 1..=MIN_MESSAGES as u32 {
            let mut frames = message(from, u64::from(from), 5 << 20);
            assert_eq!(queue.try_queue(Room::Send, origin(from), &mut frames), Ok(true));
        }
        let mut frames = message(9, 9, 5 << 20);
        let len = frames.len();
        assert_eq!(queue.try_queue(Room::Send, origin(9), &mut frames), Ok(false));
        assert_eq!(frames.len(), len, "what found no room is still its sender's");
        queue.close();
        assert_eq!(
            queue.try_queue(Room::Send, origin(9), &mut frames),
            Err(QueueError::Closed)
        );
    }

    #[tokio::test]
    async fn every_budget_comes_back_from_joined_and_cut_messages() {
        let queue = Outbound::new(1 << 20, 1 << 20, 1 << 20, 1 << 20);
        for large in [false, true, false, true, false] {
            let frames = || message(1, 1, if large { 200_000 } else { 10 });
            assert_eq!(queue.try_queue(Room::Send, origin(1), &mut frames()), Ok(true));
            assert_eq!(queue.try_queue(Room::Reply, origin(1), &mut frames()), Ok(true));
            queue.answer(origin(2), &mut frames()).unwrap();
            queue.notice(origin(3), &mut frames()).unwrap();
            queue.notice(origin(1), &mut frames()).unwrap();
        }
        queue.finish();
        while let Some(batch) = queue.next().await {
            queue.written(batch);
        }
        let rooms = (
            queue.room.available_permits(),
            queue.reply_room.available_permits(),
        );
        assert_eq!(rooms, (1 << 20, 1 << 20));
        let state = queue.lock();
        assert_eq!((state.answers, state.notices), (0, 0));
    }

    #[tokio::test]
    async fn written_buffers_are_filled_again() {
        let queue = Outbound::new(1 << 20, 1, 0, 0);
        queue.send(vec![1; 50_000]).await.unwrap();
        let batch = queue.next().await.unwrap();
        let buffer = batch.bytes.as_ptr();
        queue.written(batch);
        queue.send(vec![2; 10]).await.unwrap();
        assert_eq!(queue.next().await.unwrap().bytes.as_ptr(), buffer);
    }
}
