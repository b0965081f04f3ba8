//! Blocking queries: what Consul knows of one thing, kept current.
//!
//! By the rules of Consul's page on blocking queries: an index that goes backwards starts over, zero counts as
//! one, and an answer may come without a change.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep};

use super::client::{Client, Fault, Reply, Request};
use crate::node::Backoff;
use crate::node::backoff::Attempts;

/// How long Consul may hold a query. A Consul that vanished without a word is noticed after it.
const WAIT: Duration = Duration::from_secs(60);
/// The same after a pause, in which a Consul may have begun anew unseen: its index means nothing then, and it would
/// not answer before its own has grown beyond.
const WAIT_AFTER_PAUSE: Duration = Duration::from_secs(1);
/// Queries of one watch are at least this far apart, however often the thing changes.
const PACE: Duration = Duration::from_millis(50);
/// After failures, and after answers that came too early.
const BACKOFF: Backoff = Backoff {
    min: Duration::from_millis(200),
    max: Duration::from_secs(5),
};

/// What a watch has seen.
#[derive(Debug, Clone)]
pub(super) struct Seen<T> {
    /// The last good answer.
    pub(super) value: Option<T>,
    /// Why the last query failed; none after one that did not.
    pub(super) fault: Option<Fault>,
    /// Grows with every answer that may differ from the one before.
    pub(super) version: u64,
    /// Grows with every failure, and with every index that went backwards: Consul may have lost its state.
    pub(super) breaks: u64,
}

impl<T> Seen<T> {
    /// Whether there is an answer, or a reason why there is none.
    pub(super) fn is_known(&self) -> bool {
        self.value.is_some() || self.fault.is_some()
    }
}

/// Keeps asking, until every receiver is dropped. `slot` is held as long, `known` is what was seen already, and
/// at which index.
pub(super) fn watch<T: Clone + Send + Sync + 'static>(
    client: Arc<Client>,
    request: Request,
    slot: Option<OwnedSemaphorePermit>,
    known: Option<(T, u64)>,
    read: impl Fn(&Reply) -> Result<T, Fault> + Send + 'static,
) -> watch::Receiver<Seen<T>> {
    let index = known.as_ref().map_or(0, |(_, index)| *index);
    let seen = Seen {
        version: u64::from(known.is_some()),
        value: known.map(|(value, _)| value),
        fault: None,
        breaks: 0,
    };
    let (sender, receiver) = watch::channel(seen);
    tokio::spawn(async move {
        let _slot = slot;
        tokio::select! {
            () = sender.closed() => {}
            () = follow(&client, &request, index, &sender, read) => {}
        }
    });
    receiver
}

async fn follow<T>(
    client: &Client,
    request: &Request,
    mut index: u64,
    sender: &watch::Sender<Seen<T>>,
    read: impl Fn(&Reply) -> Result<T, Fault>,
) {
    let mut attempts = Attempts::new(BACKOFF);
    let hasher = RandomState::new();
    let mut last = None;
    let mut pause = PACE;
    loop {
        let began = Instant::now();
        let wait = if pause.is_zero() { WAIT } else { WAIT_AFTER_PAUSE };
        let answer = match index {
            0 => client.send(request).await,
            index => client.send_blocking(request, index, wait).await,
        };
        let read = answer.and_then(|reply| {
            let seen = reply.index.ok_or_else(|| {
                Fault::Away("Consul's answer to a blocking query has no X-Consul-Index".to_owned())
            })?;
            // Another body under the same index is another Consul's.
            let digest = hasher.hash_one(&reply.body);
            let other = last.replace(digest).is_some_and(|last| last != digest);
            let changed = index == 0 || seen != index || other;
            Ok((next_index(index, seen), changed, read(&reply)?))
        });
        pause = match read {
            Ok((next, changed, value)) => {
                let odd = next == 0 || !changed && began.elapsed() < wait / 2;
                sender.send_if_modified(|seen| {
                    let news = changed || seen.fault.is_some();
                    if news {
                        *seen = Seen {
                            value: Some(value),
                            fault: None,
                            version: seen.version + 1,
                            breaks: seen.breaks + u64::from(next == 0),
                        };
                    }
                    news
                });
                index = next;
                if odd {
                    attempts.wait()
                } else {
                    attempts = Attempts::new(BACKOFF);
                    PACE.saturating_sub(began.elapsed())
                }
            }
            Err(fault) => {
                // A Consul that comes back may have lost its state: its index is asked for anew.
                index = 0;
                sender.send_modify(|seen| {
                    seen.fault = Some(fault);
                    seen.breaks += 1;
                });
                attempts.wait()
            }
        };
        if !pause.is_zero() {
            sleep(pause).await;
        }
    }
}

/// The index to ask with after an answer.
fn next_index(asked: u64, seen: u64) -> u64 {
    if seen < asked { 0 } else { seen.max(1) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn consuls_index_rules() {
        for (asked, seen, next) in [(0, 0, 1), (0, 7, 7), (7, 7, 7), (7, 9, 9), (9, 7, 0), (1, 0, 0)] {
            assert_eq!(next_index(asked, seen), next, "{asked} {seen}");
        }
    }
}
