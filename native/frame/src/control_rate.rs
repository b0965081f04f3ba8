//! How many frames a peer may send that bring no message.

use std::time::Duration;

use crate::{CONTROL_BURST, CONTROL_PER_SECOND, Cause, Failure};

/// A bucket that refills with time. CANCEL, RESET, PING, frames of streams that are over and the like take from it;
/// blocks and WINDOW do not, since flow control and the byte budget bound those.
#[derive(Debug)]
pub(crate) struct ControlRate {
    tokens: u32,
    /// Milliseconds of the clock when it was refilled last.
    at: Option<u128>,
}

impl ControlRate {
    pub(crate) fn new() -> Self {
        Self {
            tokens: CONTROL_BURST,
            at: None,
        }
    }

    /// `now` counts from any fixed moment. A clock that goes back refills nothing.
    pub(crate) fn refill(&mut self, now: Duration) {
        let now = now.as_millis();
        let passed = now.saturating_sub(self.at.unwrap_or(now));
        let more = passed.saturating_mul(u128::from(CONTROL_PER_SECOND)) / 1000;
        self.tokens = more
            .saturating_add(u128::from(self.tokens))
            .min(u128::from(CONTROL_BURST)) as u32;
        self.at = Some(now);
    }

    pub(crate) fn spend(&mut self) -> Result<(), Failure> {
        let Some(left) = self.tokens.checked_sub(1) else {
            let text =
                format!("more than {CONTROL_BURST} control frames at once, or {CONTROL_PER_SECOND} a second");
            return Err(Failure {
                cause: Cause::Protocol,
                text,
            });
        };
        self.tokens = left;
        Ok(())
    }
}
