//! Whether the VM behind a control connection still runs: it is asked, and must answer (docs/mesh-protocol.md,
//! "Heartbeat").
//!
//! One question is on its way at a time, so that nothing piles up in the socket of a VM that has stopped.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    commands::{Client, Context},
    message::{event, map},
    outbox::Outbox,
};

/// The feature of `hello`: the client answers `ping`.
pub(super) const FEATURE: &str = "heartbeat";
/// How long a client may be silent before what it has registered counts as hung, unless it says otherwise.
pub const HUNG_AFTER: Duration = Duration::from_secs(10);
/// The least that a client may ask for: a VM that runs may be kept from its answer for a moment.
pub const HUNG_AFTER_MIN: Duration = Duration::from_secs(1);
/// The most that a client may ask for.
pub const HUNG_AFTER_MAX: Duration = Duration::from_secs(86_400);
/// The time is counted in so many steps: while this agent itself was stopped, no more than one of them passes.
const STEPS: u32 = 8;
/// Steps between an answer and the next question.
const PAUSE: u32 = 2;

/// What is heard of one client.
#[derive(Debug)]
pub(in crate::agent) struct Heart {
    /// Unset for a client that is not asked.
    after: OnceLock<Duration>,
    heard: watch::Sender<()>,
}

impl Heart {
    pub(super) fn new(after: Option<Duration>) -> Self {
        Self {
            after: after.map_or_else(OnceLock::new, OnceLock::from),
            heard: watch::Sender::new(()),
        }
    }

    /// How long this client may be silent; none for one that is not asked.
    pub(in crate::agent) fn after(&self) -> Option<Duration> {
        self.after.get().copied()
    }

    /// From now on it is asked.
    pub(super) fn begin(&self, after: Duration) {
        // There is one hello.
        let _ = self.after.set(after);
    }

    /// It said something.
    pub(super) fn beat(&self) {
        self.heard.send_replace(());
    }
}

/// Asks until `quiet` fires, and has what the client registered marked by its answers.
pub(super) async fn follow(
    context: Arc<Context>,
    client: Arc<Client>,
    outbox: Outbox,
    quiet: CancellationToken,
) {
    let Some(after) = client.heart.after() else {
        return;
    };
    let mut heard = client.heart.heard.subscribe();
    let step = after / STEPS;
    loop {
        tokio::select! {
            () = quiet.cancelled() => return,
            () = sleep(step * PAUSE) => {}
        }
        heard.mark_unchanged();
        if let Ok(frame) = event("ping", map([])) {
            outbox.send(frame);
        }
        let mut left = STEPS - PAUSE;
        loop {
            tokio::select! {
                // The answer may have come while this agent was stopped, too.
                biased;
                () = quiet.cancelled() => return,
                _ = heard.changed() => break,
                () = sleep(step) => {}
            }
            left = left.saturating_sub(1);
            if left == 0 {
                // Again at each step: the mesh may not have taken it, or a registration have come since.
                context.registry.mark_hung(client.owner, Some(after)).await;
            }
        }
        context.registry.mark_hung(client.owner, None).await;
    }
}
