//! Buffers of messages that have been received, to be filled again.
//!
//! Messages are copied out of a connection's buffer by its task and freed by the task that receives them. For large
//! ones that is hard work for an allocator, which gets its pages from the system and gives them back all the time.

use std::sync::{Mutex, PoisonError};

/// Smaller ones cost an allocator nothing.
const MIN: usize = 1024;
/// Larger ones are not kept.
const MAX: usize = 128 * 1024;
/// So many bytes of them are kept.
const BYTES: usize = 8 * 1024 * 1024;

/// What is kept.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    buffers: Vec<Vec<u8>>,
    /// Their capacities.
    bytes: usize,
}

impl Buffers {
    /// An empty buffer for so many bytes, and with room for at most twice as many: what a mailbox counts is what its
    /// messages take.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        if len >= MIN {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // One of another size makes room for one of this.
            if let Some(buffer) = kept.buffers.pop() {
                kept.bytes = kept.bytes.saturating_sub(buffer.capacity());
                if (len..=2 * len).contains(&buffer.capacity()) {
                    return buffer;
                }
            }
        }
        Vec::with_capacity(len)
    }

    /// Takes one back.
    pub(crate) fn give(&self, mut buffer: Vec<u8>) {
        if (MIN..=MAX).contains(&buffer.capacity()) {
            buffer.clear();
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.bytes + buffer.capacity() <= BYTES {
                kept.bytes += buffer.capacity();
                kept.buffers.push(buffer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_empty_and_are_bounded() {
        let buffers = Buffers::default();
        let mut buffer = buffers.take(20_000);
        buffer.extend_from_slice(&[1; 20_000]);
        let at = buffer.as_ptr();
        buffers.give(buffer);
        let again = buffers.take(16_000);
        assert_eq!((again.as_ptr(), again.len()), (at, 0));
        buffers.give(again);
        assert!(
            buffers.take(9_000).capacity() < 18_000,
            "a small message keeps no large buffer"
        );
        assert!(buffers.take(MAX).capacity() >= MAX);
        buffers.give(Vec::with_capacity(MAX + 1));
        buffers.give(Vec::with_capacity(MIN - 1));
        for _ in 0..3 * BYTES / MAX {
            buffers.give(Vec::with_capacity(MAX));
        }
        let kept = buffers.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: usize = kept.buffers.iter().map(Vec::capacity).sum();
        assert_eq!(kept.bytes, bytes);
        assert!(bytes <= BYTES && bytes > BYTES - MAX, "{bytes}");
    }
}
