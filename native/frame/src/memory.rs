//! Where the memory of large messages comes from and goes to.
//!
//! To the system new memory is a page fault for every 4 KiB and, in the end, an unmapping: a quarter of the CPU of a
//! call with 1 MiB, and milliseconds in which a scheduler does nothing else for 64 MiB. A [`Pool`] uses it again.

use std::collections::TryReserveError;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How a decoder gets and gives up memory.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// An empty vector with room for at least so many bytes. Its room may be what another message had: only what is
    /// written to it can be read.
    pub reserve: fn(usize) -> Result<Vec<u8>, TryReserveError>,
    /// Takes the memory of messages that nobody gets: of one, or of all that a connection had when it ended. To give
    /// hundreds of MiB back to the system takes milliseconds: an owner that must not stall can do it elsewhere.
    pub discard: fn(Vec<Vec<u8>>),
}

impl Default for Memory {
    /// The allocator's.
    fn default() -> Self {
        Self {
            reserve: fresh,
            discard: drop,
        }
    }
}

fn fresh(size: usize) -> Result<Vec<u8>, TryReserveError> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(size)?;
    Ok(bytes)
}

/// Less than this the allocator keeps by itself.
const POOLED_FROM: usize = 128 << 10;
/// What waits to be used again is at most so much, and
const KEPT: usize = 64 << 20;
/// at most so long.
const KEPT_FOR: Duration = Duration::from_secs(10);

/// Memory that was used and will be used again: at most 64 MiB. What lay unused for 10 s goes back to the system when
/// something is put back the next time.
#[derive(Debug)]
pub struct Pool {
    // The longest unused first.
    free: Mutex<Vec<(Instant, Vec<u8>)>>,
}

impl Pool {
    /// An empty one.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            free: Mutex::new(Vec::new()),
        }
    }

    /// An empty vector with room for `size` bytes, and for no more than twice as many.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn reserve(&self, size: usize) -> Result<Vec<u8>, TryReserveError> {
        if size < POOLED_FROM {
            return fresh(size);
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = free
            .iter()
            .enumerate()
            .map(|(at, (_since, bytes))| (bytes.capacity(), at))
            .filter(|(room, _at)| (size..=size.saturating_mul(2)).contains(room))
            .min();
        match fitting {
            Some((_room, at)) => Ok(free.remove(at).1),
            None => {
                drop(free);
                fresh(size)
            }
        }
    }

    /// Takes memory back; what there is no use for comes back, for the caller to drop where it does no harm.
    #[must_use]
    pub fn put_back(&self, mut bytes: Vec<u8>) -> Vec<Vec<u8>> {
        if !(POOLED_FROM..=KEPT).contains(&bytes.capacity()) {
            return vec![bytes];
        }
        bytes.clear();
        let now = Instant::now();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push((now, bytes));
        let mut kept: usize = free.iter().map(|(_since, bytes)| bytes.capacity()).sum();
        let too_many = free
            .iter()
            .take_while(|(since, bytes)| {
                let over = kept > KEPT || now.duration_since(*since) > KEPT_FOR;
                kept -= if over { bytes.capacity() } else { 0 };
                over
            })
            .count();
        free.drain(..too_many).map(|(_since, bytes)| bytes).collect()
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn memory_is_used_again_and_shows_nothing_of_before() {
        let pool = Pool::new();
        let mut bytes = pool.reserve(MIB).unwrap();
        bytes.extend_from_slice(&[7; MIB]);
        let (at, room) = (bytes.as_ptr(), bytes.capacity());
        assert!(pool.put_back(bytes).is_empty());
        // Neither too small for it, nor less than half of it.
        for other in [room + 1, room / 2 - 1] {
            let unfit = pool.reserve(other).unwrap();
            assert_ne!(unfit.as_ptr(), at);
        }
        let again = pool.reserve(room / 2 + 1).unwrap();
        assert_eq!((again.as_ptr(), again.len()), (at, 0));
    }

    #[test]
    fn the_closest_fit_is_taken() {
        let pool = Pool::new();
        let rooms = [4 * MIB, 3 * MIB, 2 * MIB].map(|room| pool.reserve(room).unwrap());
        for bytes in rooms {
            assert!(pool.put_back(bytes).is_empty());
        }
        assert_eq!(pool.reserve(2 * MIB + 1).unwrap().capacity(), 3 * MIB);
    }

    #[test]
    fn no_more_is_kept_than_allowed_and_the_oldest_goes_first() {
        let pool = Pool::new();
        let used: Vec<_> = (0..5).map(|n| pool.reserve(16 * MIB + n).unwrap()).collect();
        let mut over = Vec::new();
        for bytes in used {
            over.extend(pool.put_back(bytes));
        }
        let over: Vec<usize> = over.iter().map(Vec::capacity).collect();
        assert_eq!(
            over,
            [16 * MIB, 16 * MIB + 1],
            "three fit with what they have beyond"
        );
        for bytes in [fresh(100).unwrap(), fresh(65 * MIB).unwrap()] {
            let room = bytes.capacity();
            assert_eq!(pool.put_back(bytes)[0].capacity(), room);
        }
    }

    #[test]
    fn what_lay_unused_goes() {
        let pool = Pool::new();
        let long_ago = Instant::now()
            .checked_sub(KEPT_FOR + Duration::from_secs(1))
            .unwrap();
        pool.free.lock().unwrap().push((long_ago, fresh(MIB).unwrap()));
        assert_eq!(pool.put_back(fresh(2 * MIB).unwrap())[0].capacity(), MIB);
    }
}
