//! What is counted, and the refusals that are remembered.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{LinkId, LinkTable, lock, unix_now};
use crate::proxy::cause::{Cause, Refusal};
use crate::proxy::listener::Listener;
use crate::proxy::totals::{Handshakes, Totals};

/// Refusals that are remembered for the `refusal` command; older ones are forgotten.
pub const MAX_REFUSALS: usize = 256;

/// A link that was refused.
#[derive(Debug, Clone)]
pub struct RefusalRecord {
    /// Its name, when the request had one.
    pub link: Option<LinkId>,
    /// Node or service that was dialled.
    pub target: String,
    /// Why.
    pub refusal: Refusal,
    /// When, unix seconds.
    pub at: i64,
}

#[derive(Default)]
pub(super) struct HandshakeCounts {
    done: AtomicU64,
    failed: AtomicU64,
}

impl HandshakeCounts {
    fn count(&self, done: bool) {
        let count = if done { &self.done } else { &self.failed };
        count.fetch_add(1, Ordering::Relaxed);
    }

    fn total(&self) -> Handshakes {
        Handshakes {
            done: self.done.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }
}

impl LinkTable {
    /// Remembers and counts a refusal.
    pub fn refused(&self, at: Listener, link: Option<LinkId>, target: &str, refusal: &Refusal) {
        let counts = self.inner.refused.get(at.index());
        if let Some(count) = counts.and_then(|counts| counts.get(refusal.cause.index())) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let mut refusals = lock(&self.inner.refusals);
        if refusals.len() >= MAX_REFUSALS {
            refusals.pop_front();
        }
        refusals.push_back(RefusalRecord {
            link,
            target: target.to_owned(),
            refusal: refusal.clone(),
            at: unix_now(),
        });
    }

    /// Why the link of this id was refused.
    pub fn refusal_of_link(&self, link: LinkId) -> Option<RefusalRecord> {
        lock(&self.inner.refusals)
            .iter()
            .rev()
            .find(|record| record.link == Some(link))
            .cloned()
    }

    /// Why the last link to this node or service was refused.
    pub fn refusal_of_target(&self, target: &str) -> Option<RefusalRecord> {
        lock(&self.inner.refusals)
            .iter()
            .rev()
            .find(|record| record.target == target)
            .cloned()
    }

    /// How many refusals there were by this cause since the start.
    pub fn refusals(&self, cause: Cause) -> u64 {
        let counts = self
            .inner
            .refused
            .iter()
            .filter_map(|counts| counts.get(cause.index()));
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Counts a TLS handshake that this agent answered.
    pub(in crate::proxy) fn count_accepted(&self, done: bool) {
        self.inner.accepted.count(done);
    }

    /// Counts a TLS handshake that this agent began.
    pub(in crate::proxy) fn count_dialled(&self, done: bool) {
        self.inner.dialled.count(done);
    }

    /// Everything that was counted.
    pub fn totals(&self) -> Totals {
        let inner = &self.inner;
        let refused = |at: &Listener| {
            let (at, counts) = (*at, inner.refused.get(at.index()).into_iter().flatten());
            let counts = Cause::ALL.iter().zip(counts);
            counts.map(move |(cause, count)| (at, *cause, count.load(Ordering::Relaxed)))
        };
        let cuts = Cause::ALL.iter().zip(&inner.cuts);
        let pairs = {
            let links = lock(&inner.live);
            let live = links.by_id.values();
            let live = live.filter_map(|live| Some((live.pair.get()?, live.counters.both())));
            links.pairs.totals(live)
        };
        Totals {
            accepted: inner.accepted.total(),
            dialled: inner.dialled.total(),
            unproven: inner.unproven.load(Ordering::Relaxed),
            refusals: Listener::ALL.iter().flat_map(refused).collect(),
            cuts: cuts
                .map(|(cause, count)| (*cause, count.load(Ordering::Relaxed)))
                .collect(),
            pairs,
        }
    }
}
