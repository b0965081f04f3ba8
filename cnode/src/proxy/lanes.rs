//! Threads that carry links, each with a runtime of its own.
//!
//! In one runtime with many threads, whichever is idle waits for what happens at all sockets. So each edge at a socket
//! that one thread is just working with wakes another for nothing: once for every 100 KiB, and for a tenth of all the
//! time that an agent spends on a link. Here a connection stays on the thread that it was given to when it came in,
//! with all that its link needs: the handshake, what it dials, its timers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::busy_poll;

/// See above. The default has none: connections stay where they came in.
#[derive(Debug, Clone, Default)]
pub struct Lanes {
    all: Arc<[Lane]>,
}

#[derive(Debug)]
struct Lane {
    runtime: Handle,
    /// Connections that are on it.
    load: Arc<AtomicUsize>,
    _until: DropGuard,
}

impl Lanes {
    /// So many threads, which end when nobody has the lanes any more. Each polls for so long after a small message
    /// before it sleeps: zero for not at all.
    ///
    /// # Errors
    /// When the system gives no more threads or descriptors.
    pub fn new(count: usize, busy_poll: Duration) -> io::Result<Self> {
        let all: io::Result<Vec<Lane>> = (0..count).map(|number| Lane::new(number, busy_poll)).collect();
        Ok(Self { all: all?.into() })
    }

    /// The one with the fewest connections.
    pub(super) fn take(&self) -> Option<Place> {
        let lane = self
            .all
            .iter()
            .min_by_key(|lane| lane.load.load(Ordering::Relaxed))?;
        lane.load.fetch_add(1, Ordering::Relaxed);
        Some(Place {
            runtime: lane.runtime.clone(),
            load: lane.load.clone(),
        })
    }
}

impl Lane {
    fn new(number: usize, busy_poll: Duration) -> io::Result<Self> {
        // Whether others have something is looked at after so many turns of links, not after 61. After each one would
        // cost a round trip a tenth.
        let runtime = Builder::new_current_thread()
            .enable_all()
            .event_interval(8)
            .build()?;
        if !busy_poll.is_zero() {
            runtime.spawn(busy_poll::run(busy_poll));
        }
        let until = CancellationToken::new();
        let lane = Self {
            runtime: runtime.handle().clone(),
            load: Arc::default(),
            _until: until.clone().drop_guard(),
        };
        thread::Builder::new()
            .name(format!("meshx-links-{number}"))
            .spawn(move || runtime.block_on(until.cancelled()))?;
        Ok(lane)
    }
}

/// A connection's place on a lane, until dropped.
#[derive(Debug)]
pub(super) struct Place {
    runtime: Handle,
    load: Arc<AtomicUsize>,
}

impl Place {
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn connections_go_where_there_are_fewest() {
        let lanes = Lanes::new(2, Duration::ZERO).unwrap();
        let thread_of = |place: &Place| place.runtime().spawn(async { thread::current().id() });
        let (first, second) = (lanes.take().unwrap(), lanes.take().unwrap());
        let [one, other] = [
            thread_of(&first).await.unwrap(),
            thread_of(&second).await.unwrap(),
        ];
        assert_ne!(one, other);
        assert_ne!(one, thread::current().id());
        drop(second);
        let third = lanes.take().unwrap();
        assert_eq!(thread_of(&third).await.unwrap(), other);
    }

    #[tokio::test]
    async fn a_lane_ends_with_the_last_who_has_it() {
        let lanes = Lanes::new(1, Duration::from_micros(200)).unwrap();
        let place = lanes.take().unwrap();
        let never = place.runtime().spawn(std::future::pending::<()>());
        drop(lanes);
        assert!(never.await.unwrap_err().is_cancelled());
    }

    #[test]
    fn without_lanes_there_is_no_place() {
        assert!(Lanes::default().take().is_none());
    }
}
