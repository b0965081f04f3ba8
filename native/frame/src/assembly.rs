//! One message's bytes, in the order they came.

use std::collections::TryReserveError;

use crate::Memory;
use crate::copy::append;

/// Up to here room is made by doubling, so that a message costs no more than twice what has come of it. Beyond, room
/// for the whole message is reserved at once: the peer has sent this much already, the byte budget holds the
/// rest, pages that were never written cost no memory, and a later move of many MiB would stall a scheduler.
const DOUBLING_UP_TO: usize = 128 << 10;
const FIRST_STEP: usize = 4 << 10;

/// Collects a message of a known length. Never asks for more than `total`.
#[derive(Debug)]
pub(crate) struct Assembly {
    total: usize,
    bytes: Vec<u8>,
    memory: Memory,
}

impl Drop for Assembly {
    fn drop(&mut self) {
        if self.bytes.capacity() > 0 {
            (self.memory.discard)(vec![std::mem::take(&mut self.bytes)]);
        }
    }
}

impl Assembly {
    pub(crate) fn new(total: usize, memory: Memory) -> Self {
        Self {
            total,
            bytes: Vec::new(),
            memory,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Appends a block. The caller has checked that the message is not longer than its total.
    pub(crate) fn push(&mut self, block: &[u8]) -> Result<(), TryReserveError> {
        let needed = self.bytes.len() + block.len();
        if needed > self.bytes.capacity() {
            if needed > DOUBLING_UP_TO {
                let mut whole = (self.memory.reserve)(self.total.max(needed))?;
                append(&mut whole, &self.bytes);
                self.bytes = whole;
            } else {
                let target = needed
                    .max(2 * self.bytes.capacity())
                    .max(FIRST_STEP)
                    .min(self.total);
                self.bytes
                    .try_reserve_exact(target.max(needed) - self.bytes.len())?;
            }
        }
        append(&mut self.bytes, block);
        Ok(())
    }

    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_announced_gibibyte_costs_nothing() {
        let mut assembly = Assembly::new(1 << 30, Memory::default());
        assert_eq!(assembly.bytes.capacity(), 0);
        assembly.push(&[1; 100]).unwrap();
        assert!(assembly.bytes.capacity() <= FIRST_STEP);
        for _ in 0..13 {
            assembly.push(&[2; 10_000]).unwrap();
            assert!(assembly.bytes.capacity() <= 2 * assembly.len());
        }
    }

    #[test]
    fn never_reserves_more_than_the_total() {
        for total in [0, 1, 5_000, (1 << 20) + 7, 5 << 20] {
            let mut assembly = Assembly::new(total, Memory::default());
            while assembly.len() < total {
                let n = 1000.min(total - assembly.len());
                assembly.push(&vec![7; n]).unwrap();
                assert!(assembly.bytes.capacity() <= total, "{total}");
            }
            assert_eq!(assembly.into_bytes().len(), total);
        }
    }
}
