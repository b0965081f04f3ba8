#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::pin::pin;
use std::task::Poll;

use meshx_dist::control::Control;
use meshx_dist::flags::DistFlags;
use meshx_dist::framing::{Frame, FrameDecoder};
use meshx_dist::link::{LinkLimits, Receiver, Sender};
use meshx_etf::{Atom, Pid, Term};

use super::waiting::{COALESCE, LANES_PER_WRITE};
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
