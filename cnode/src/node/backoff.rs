//! How long to wait before something that failed is tried again.

use std::time::Duration;

/// Waits between attempts: doubled from one to the next, up to a cap, and spread out so that many who failed together
/// do not all come back together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The first wait. At least 10 ms are waited, whatever it says.
    pub min: Duration,
    /// No wait is longer than this.
    pub max: Duration,
}

impl Default for Backoff {
    /// From 200 ms to 30 s.
    fn default() -> Self {
        Self {
            min: Duration::from_millis(200),
            max: Duration::from_secs(30),
        }
    }
}

/// Attempts that go on.
#[derive(Debug)]
pub(crate) struct Attempts {
    backoff: Backoff,
    next: Duration,
}

impl Attempts {
    pub(crate) fn new(backoff: Backoff) -> Self {
        let min = backoff.min.max(Duration::from_millis(10));
        let backoff = Backoff {
            min,
            max: backoff.max.max(min),
        };
        Self { backoff, next: min }
    }

    /// The wait before the next attempt: between a half and the whole of what the cap allows.
    pub(crate) fn wait(&mut self) -> Duration {
        let whole = self.next;
        self.next = whole.saturating_mul(2).min(self.backoff.max);
        // Without random numbers all wait the longest.
        let share = getrandom::u32().map_or(1024, |random| 512 + random % 513);
        whole / 1024 * share
    }

    /// It went well for `lasted`: what lasted longer than the longest wait begins anew.
    pub(crate) fn succeeded(&mut self, lasted: Duration) {
        if lasted > self.backoff.max {
            self.next = self.backoff.min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_are_spread_out() {
        let (min, max) = (Duration::from_millis(100), Duration::from_millis(500));
        let mut attempts = Attempts::new(Backoff { min, max });
        for whole in [100, 200, 400, 500, 500] {
            let (whole, wait) = (Duration::from_millis(whole), attempts.wait());
            assert!(
                wait <= whole && wait >= whole / 2 - Duration::from_millis(1),
                "{wait:?}"
            );
        }
        attempts.succeeded(max);
        assert!(
            attempts.wait() > min,
            "what lasts no longer than a wait is no success"
        );
        attempts.succeeded(max * 2);
        assert!(attempts.wait() <= min);
        let spread: std::collections::HashSet<_> = (0..100).map(|_| attempts.wait()).collect();
        assert!(spread.len() > 10, "{spread:?}");
    }

    #[test]
    fn senseless_settings_do_not_spin() {
        let zero = Backoff {
            min: Duration::ZERO,
            max: Duration::ZERO,
        };
        assert!(Attempts::new(zero).wait() >= Duration::from_millis(4));
    }
}
