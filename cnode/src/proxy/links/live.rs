//! A live link: its counters, and the guard that it lives by.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use tokio_util::sync::CancellationToken;

use super::{Direction, LinkInfo, LinkSnapshot, LinkTable, Purpose, lock};
use crate::proxy::cause::Cause;
use crate::proxy::proof::Proof;
use crate::proxy::totals::PairKey;

pub(super) struct Live {
    /// Without its proof, which changes.
    pub(super) info: LinkInfo,
    pub(super) proof: Mutex<Option<Proof>>,
    pub(super) since: i64,
    pub(super) counters: Arc<Counters>,
    /// Since it carries bytes.
    pub(super) pair: OnceLock<PairKey>,
    pub(super) cut: CancellationToken,
}

/// Bytes that a link has carried.
#[derive(Debug, Default)]
pub struct Counters {
    /// Towards this end.
    pub bytes_in: AtomicU64,
    /// From this end.
    pub bytes_out: AtomicU64,
}

impl Counters {
    pub(super) fn both(&self) -> (u64, u64) {
        (
            self.bytes_in.load(Ordering::Relaxed),
            self.bytes_out.load(Ordering::Relaxed),
        )
    }
}

impl Live {
    pub(super) fn snapshot(&self) -> LinkSnapshot {
        let (bytes_in, bytes_out) = self.counters.both();
        LinkSnapshot {
            info: LinkInfo {
                proof: lock(&self.proof).clone(),
                ..self.info.clone()
            },
            since: self.since,
            bytes_in,
            bytes_out,
        }
    }
}

/// A live link. Dropping it takes the link out of the table.
pub struct LinkGuard {
    pub(super) table: LinkTable,
    pub(super) live: Arc<Live>,
}

impl LinkGuard {
    /// The link carries bytes from now on.
    pub(in crate::proxy) fn opened(&self) {
        let mut links = lock(&self.table.inner.live);
        self.live.pair.get_or_init(|| links.pairs.opened(&self.live.info));
    }

    /// Whether nodes are at its ends, which can be told why it ends.
    pub(in crate::proxy) fn is_dist(&self) -> bool {
        self.live.info.purpose == Purpose::Dist
    }

    /// Whether another agent has its other end.
    pub(in crate::proxy) fn has_other_agent(&self) -> bool {
        self.live.info.direction != Direction::Local
    }

    /// Cuts it: its other end does not answer any more.
    pub(in crate::proxy) fn is_gone(&self, text: &str) {
        self.table.cut(self.live.info.id, Cause::Unreachable, text);
    }

    /// Where to count.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.live.counters
    }

    /// Fires when the link is to be cut.
    pub fn cut(&self) -> &CancellationToken {
        &self.live.cut
    }
}

impl Drop for LinkGuard {
    fn drop(&mut self) {
        let mut links = lock(&self.table.inner.live);
        links.by_id.remove(&self.live.info.id);
        if let Some(pair) = self.live.pair.get() {
            links.pairs.closed(pair, self.live.counters.both());
        }
        take_one(&mut links.dialled, &self.live.info.dialler());
        if let Some(instance) = self.live.info.chosen_instance() {
            take_one(&mut links.to_instance, &instance.to_owned());
        }
    }
}

/// One less of this; none is no entry.
fn take_one<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(key);
        }
    }
}
