//! When an agent that nobody uses may end.

use std::{future::pending, time::Duration};

use tokio::time::{Instant, sleep};

/// Between two looks at whether something is used that tells nobody when it ends.
const LOOK: Duration = Duration::from_secs(1);

/// How long nothing was used, and how long that may be.
#[derive(Debug)]
pub(in crate::agent) struct Idle {
    /// None: for ever.
    limit: Option<Duration>,
    since: Instant,
}

impl Idle {
    pub(in crate::agent) fn new(limit: Option<Duration>) -> Self {
        Self {
            limit,
            since: Instant::now(),
        }
    }

    /// Somebody came or left: the time begins anew.
    pub(super) fn touch(&mut self) {
        self.since = Instant::now();
    }

    /// Returns once nothing was used for the whole limit. May be dropped and called again.
    pub(super) async fn over(&mut self, used: impl Fn() -> bool) {
        let Some(limit) = self.limit else {
            return pending().await;
        };
        loop {
            if used() {
                self.touch();
            }
            let left = limit.saturating_sub(self.since.elapsed());
            if left.is_zero() {
                return;
            }
            sleep(left.min(LOOK)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn what_is_used_is_never_over() {
        for (limit, used) in [(Some(LIMIT), true), (None, false)] {
            let mut idle = Idle::new(limit);
            assert!(timeout(LIMIT * 4, idle.over(|| used)).await.is_err());
        }
    }

    #[tokio::test]
    async fn the_time_counts_from_the_last_use() {
        let mut idle = Idle::new(Some(LIMIT));
        // Dropped between two looks, it goes on from there.
        let _ = timeout(LIMIT * 2, idle.over(|| true)).await;
        let last = idle.since;
        idle.over(|| false).await;
        assert!(last.elapsed() >= LIMIT);
        let touched = Instant::now();
        idle.touch();
        idle.over(|| false).await;
        assert!(touched.elapsed() >= LIMIT);
    }
}
