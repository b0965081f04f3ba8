//! Live links, and why others were refused.

mod counts;
mod cuts;
mod info;
mod live;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use self::counts::{MAX_REFUSALS, RefusalRecord};
pub use self::cuts::{CutEvent, MAX_CUT_EVENTS};
pub use self::info::{Direction, LinkId, LinkInfo, LinkSnapshot, Purpose};
pub use self::live::{Counters, LinkGuard};

use self::counts::HandshakeCounts;
use self::info::Dialler;
use self::live::Live;
use super::cause::{Cause, Refusal};
use super::listener::Listener;
use super::proof::Proof;
use super::totals::Pairs;

/// Live links of one agent, where its descriptors are enough.
pub const LINKS_MAX: usize = 16_384;
/// Descriptors of one link.
const DESCRIPTORS_PER_LINK: u64 = 2;
/// Descriptors that links leave to everything else: connections that are being decided, control clients, watches.
pub const DESCRIPTORS_KEPT: u64 = 512;
/// Live links that one service may have dialled through or to one agent, so that none can use up all.
pub const LINKS_PER_SERVICE_MAX: usize = 4096;

/// Live links and past refusals of one agent. Clones share one table.
#[derive(Clone, Default)]
pub struct LinkTable {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    max: Max,
    // Each is held for a look-up or a change, never across an await.
    live: Mutex<LiveLinks>,
    refusals: Mutex<VecDeque<RefusalRecord>>,
    owners: Mutex<HashMap<u64, mpsc::Sender<CutEvent>>>,
    refused: [[AtomicU64; Cause::ALL.len()]; Listener::ALL.len()],
    cuts: [AtomicU64; Cause::ALL.len()],
    unproven: AtomicU64,
    accepted: HandshakeCounts,
    dialled: HandshakeCounts,
}

/// How many links may live at a time, and why no more.
#[derive(Debug, Clone)]
struct Max {
    links: usize,
    why: String,
}

impl Default for Max {
    fn default() -> Self {
        Self {
            links: LINKS_MAX,
            why: "LINKS_MAX".to_owned(),
        }
    }
}

#[derive(Default)]
struct LiveLinks {
    by_id: HashMap<LinkId, Arc<Live>>,
    /// How many each service has dialled.
    dialled: HashMap<Dialler, usize>,
    /// How many lead to each instance of a service, which is not a node.
    to_instance: HashMap<String, usize>,
    pairs: Pairs,
}

impl LinkTable {
    /// A table of a process that may have so many files open (`RLIMIT_NOFILE`): links are refused before there is no
    /// descriptor left, since then nobody could be told why.
    pub fn with_descriptors(descriptors: u64) -> Self {
        let room = descriptors.saturating_sub(DESCRIPTORS_KEPT) / DESCRIPTORS_PER_LINK;
        let max = match usize::try_from(room) {
            Ok(room) if room < LINKS_MAX => Max {
                links: room,
                why: format!(
                    "{descriptors} files may be open: raise the hard limit, ulimit -Hn or LimitNOFILE="
                ),
            },
            _ => Max::default(),
        };
        Self {
            inner: Arc::new(Inner {
                max,
                ..Inner::default()
            }),
        }
    }

    /// How many links may live at a time.
    pub fn max(&self) -> usize {
        self.inner.max.links
    }

    /// Enters a link; it is live until the guard is dropped.
    ///
    /// # Errors
    /// [`Cause::InvalidRequest`] when a live link has this id: ids are random, so one of the two
    /// is an imitation. [`Cause::Limit`] beyond [`LINKS_MAX`] and [`LINKS_PER_SERVICE_MAX`].
    pub fn insert(&self, mut info: LinkInfo) -> Result<LinkGuard, Refusal> {
        let id = info.id;
        let live = Arc::new(Live {
            proof: Mutex::new(info.proof.take()),
            info,
            since: unix_now(),
            counters: Arc::default(),
            pair: OnceLock::new(),
            cut: CancellationToken::new(),
        });
        let mut links = lock(&self.inner.live);
        if links.by_id.contains_key(&id) {
            return Err(Cause::InvalidRequest.because(format!("link id {id} names a live link already")));
        }
        let Max { links: max, why } = &self.inner.max;
        if links.by_id.len() >= *max {
            return Err(Cause::Limit.because(format!("{max} links are live, more are not taken ({why})")));
        }
        let dialled = links.dialled.entry(live.info.dialler()).or_default();
        if *dialled >= LINKS_PER_SERVICE_MAX {
            return Err(Cause::Limit.because(format!(
                "{} has dialled {LINKS_PER_SERVICE_MAX} live links, more are not taken (LINKS_PER_SERVICE_MAX)",
                live.info.dialler().0
            )));
        }
        *dialled += 1;
        if let Some(instance) = live.info.chosen_instance() {
            *links.to_instance.entry(instance.to_owned()).or_default() += 1;
        }
        links.by_id.insert(id, live.clone());
        drop(links);
        Ok(LinkGuard {
            table: self.clone(),
            live,
        })
    }

    /// How many live links this agent has made to each of these instances.
    pub(super) fn to_instances<'a>(&self, ids: impl Iterator<Item = &'a str>) -> Vec<usize> {
        let links = lock(&self.inner.live);
        ids.map(|id| links.to_instance.get(id).copied().unwrap_or_default())
            .collect()
    }

    /// All live links, in no order.
    pub fn snapshot(&self) -> Vec<LinkSnapshot> {
        lock(&self.inner.live)
            .by_id
            .values()
            .map(|live| live.snapshot())
            .collect()
    }

    /// The live link of this id.
    pub fn get(&self, id: LinkId) -> Option<LinkSnapshot> {
        lock(&self.inner.live).by_id.get(&id).map(|live| live.snapshot())
    }

    /// The ends of a link have proven themselves anew; at the end that asked for it, that took `round_trip`.
    pub(super) fn prove(&self, id: LinkId, proof: Proof, round_trip: Option<Duration>) {
        let mut links = lock(&self.inner.live);
        let Some(live) = links.by_id.get(&id).cloned() else {
            return;
        };
        *lock(&live.proof) = Some(proof);
        if let (Some(pair), Some(took)) = (live.pair.get(), round_trip) {
            links.pairs.proven(pair, took);
        }
    }

    /// A link could not be proven anew by this agent, or what was asked of it was no proof.
    pub(super) fn count_unproven(&self) {
        self.inner.unproven.fetch_add(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for LinkTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkTable")
            .field("live", &lock(&self.inner.live).by_id.len())
            .finish_non_exhaustive()
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks, so what they hold is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
