//! Frames that wait for their write, and the order in which they get it.

use std::collections::VecDeque;

/// Messages are joined up to this size, and this much of a lane goes into one write.
pub(super) const COALESCE: usize = 64 * 1024;
/// Lanes that have a part in one write.
pub(super) const LANES_PER_WRITE: usize = 4;
/// Largest buffer that is kept for the next write, in bytes.
const RETAINED_CAPACITY: usize = 1024 * 1024;

/// The process that frames come from, whose messages stay in order: id and serial of its pid. `None` where the order
/// does not matter.
pub(crate) type Origin = Option<(u32, u32)>;

/// Bytes for one write.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    pub(super) share: Share,
}

/// What comes back once bytes are written.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Share {
    pub(super) permits: usize,
    pub(super) reply_permits: usize,
    pub(super) answers: usize,
    pub(super) notices: usize,
}

#[derive(Debug, Default)]
pub(super) struct Waiting {
    express: VecDeque<Batch>,
    lanes: VecDeque<Lane>,
    /// Batches that have left `express`.
    popped: u64,
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

impl Waiting {
    /// Takes whole frames of one message.
    pub(super) fn push(&mut self, origin: Origin, frames: &mut Vec<u8>, share: Share) {
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

    /// What to write next.
    pub(super) fn take(&mut self) -> Option<Batch> {
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

    /// Takes the buffer of a written batch back.
    pub(super) fn keep(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() <= RETAINED_CAPACITY && buffer.capacity() > self.spare.capacity() {
            buffer.clear();
            self.spare = buffer;
        }
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
