//! What the data plane has counted, for metrics.
//!
//! Nothing here is named by a node, an instance or an address: those are without bound, and a peer chooses some of
//! them. Services are named only in pairs that were allowed, and only [`PAIRS_MAX`] of them. Commands, each of which is
//! a service by its pid, have one name together.

use std::collections::HashMap;
use std::time::Duration;

use super::cause::Cause;
use super::links::{Direction, LinkInfo, Purpose};
use super::listener::Listener;
use crate::mesh::ServiceName;

/// Pairs of services that are counted each for itself; all others are counted together.
pub const PAIRS_MAX: usize = 1024;
/// What commands are called, with `-` and a pid behind it.
const TOOL: &str = "tool";

/// What was counted since the agent's start.
#[derive(Debug, Clone)]
pub struct Totals {
    /// TLS handshakes that this agent answered.
    pub accepted: Handshakes,
    /// TLS handshakes that this agent began.
    pub dialled: Handshakes,
    /// Re-proofs of live links that failed.
    pub unproven: u64,
    /// Refused connections: every listener with every cause.
    pub refusals: Vec<(Listener, Cause, u64)>,
    /// Live links that were cut: every cause.
    pub cuts: Vec<(Cause, u64)>,
    /// Links that came to carry bytes, by the services at their ends. The agent's totals are the sums.
    pub pairs: Vec<PairTotals>,
}

/// TLS handshakes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Handshakes {
    /// Both sides believed each other.
    pub done: u64,
    /// One side did not, or was silent.
    pub failed: u64,
}

/// The links of one pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairTotals {
    /// The service that dialled, and the one that was dialled; none for all pairs beyond [`PAIRS_MAX`] together.
    pub services: Option<(ServiceName, ServiceName)>,
    /// Which end made them.
    pub direction: Direction,
    /// What they carry.
    pub purpose: Purpose,
    /// How many there were.
    pub opened: u64,
    /// How many there are.
    pub live: u64,
    /// Bytes towards this end, those of live links included.
    pub bytes_in: u64,
    /// Bytes from this end, likewise.
    pub bytes_out: u64,
    /// How often its links were proven anew.
    pub proven: u64,
    /// How long that took together, from the request to the reply.
    pub proving: Duration,
}

/// What a pair is counted under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PairKey {
    services: Option<(ServiceName, ServiceName)>,
    direction: Direction,
    purpose: Purpose,
}

/// Pairs of services whose links came to carry bytes.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    counts: HashMap<PairKey, PairCount>,
    /// Links that have ended.
    ended: u64,
}

#[derive(Debug, Clone, Default)]
struct PairCount {
    opened: u64,
    live: u64,
    bytes_in: u64,
    bytes_out: u64,
    proven: u64,
    proving: Duration,
    /// How many links had ended when the last one of this pair did.
    last_ended: u64,
}

impl PairCount {
    fn add(&mut self, other: &Self) {
        self.opened += other.opened;
        self.live += other.live;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.proven += other.proven;
        self.proving += other.proving;
    }
}

impl PairKey {
    fn others(&self) -> Self {
        Self {
            services: None,
            ..self.clone()
        }
    }
}

/// The service as metrics name it.
fn label(service: ServiceName) -> ServiceName {
    let digits = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit());
    let rest = service.as_ref().strip_prefix(TOOL);
    match rest.and_then(|rest| rest.strip_prefix('-')).is_some_and(digits) {
        true => ServiceName::new(TOOL).unwrap_or(service),
        false => service,
    }
}

impl Pairs {
    /// Counts a link that carries bytes from now on. It is to be [closed](Self::closed) under the key that this returns.
    pub(super) fn opened(&mut self, info: &LinkInfo) -> PairKey {
        let (source, target) = info.services();
        let mut key = PairKey {
            services: Some((label(source), label(target))),
            direction: info.direction,
            purpose: info.purpose,
        };
        if self.counts.len() >= PAIRS_MAX && !self.counts.contains_key(&key) && !self.make_room() {
            key = key.others();
        }
        let count = self.counts.entry(key.clone()).or_default();
        count.opened += 1;
        count.live += 1;
        key
    }

    /// Counts the pair whose last link ended before all the others' with those that have no name. Their sum stays.
    fn make_room(&mut self) -> bool {
        let idle = self.counts.iter();
        let idle = idle.filter(|(key, count)| key.services.is_some() && count.live == 0);
        let Some(oldest) = idle.min_by_key(|(_, count)| count.last_ended) else {
            return false;
        };
        let oldest = oldest.0.clone();
        if let Some(count) = self.counts.remove(&oldest) {
            self.counts.entry(oldest.others()).or_default().add(&count);
        }
        true
    }

    /// Counts a link that was proven anew.
    pub(super) fn proven(&mut self, key: &PairKey, took: Duration) {
        if let Some(count) = self.counts.get_mut(key) {
            count.proven += 1;
            count.proving += took;
        }
    }

    /// Counts the end of a link, and what it has carried.
    pub(super) fn closed(&mut self, key: &PairKey, (bytes_in, bytes_out): (u64, u64)) {
        if let Some(count) = self.counts.get_mut(key) {
            self.ended += 1;
            count.last_ended = self.ended;
            count.live = count.live.saturating_sub(1);
            count.bytes_in += bytes_in;
            count.bytes_out += bytes_out;
        }
    }

    /// All pairs, `live` being what the links that are not closed yet have carried.
    pub(super) fn totals<'a>(
        &self,
        live: impl Iterator<Item = (&'a PairKey, (u64, u64))>,
    ) -> Vec<PairTotals> {
        let mut counts = self.counts.clone();
        for (key, (bytes_in, bytes_out)) in live {
            if let Some(count) = counts.get_mut(key) {
                count.bytes_in += bytes_in;
                count.bytes_out += bytes_out;
            }
        }
        let total = |(key, count): (PairKey, PairCount)| PairTotals {
            services: key.services,
            direction: key.direction,
            purpose: key.purpose,
            opened: count.opened,
            live: count.live,
            bytes_in: count.bytes_in,
            bytes_out: count.bytes_out,
            proven: count.proven,
            proving: count.proving,
        };
        counts.into_iter().map(total).collect()
    }
}
