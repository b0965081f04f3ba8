//! Live links, and why others were refused.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::Hash;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::cause::{Cause, Refusal};
use super::listener::Listener;
use super::proof::Proof;
use super::totals::{Handshakes, PairKey, Pairs, Totals};
use crate::mesh::{ServiceName, SpiffeId};

/// Refusals that are remembered for the `refusal` command; older ones are forgotten.
pub const MAX_REFUSALS: usize = 256;
/// Cut events that may wait for one control connection; a link is closed all the same.
pub const MAX_CUT_EVENTS: usize = 256;

/// Live links of one agent, where its descriptors are enough.
pub const LINKS_MAX: usize = 16_384;
/// Descriptors of one link.
const DESCRIPTORS_PER_LINK: u64 = 2;
/// Descriptors that links leave to everything else: connections that are being decided, control clients, watches.
pub const DESCRIPTORS_KEPT: u64 = 512;
/// Live links that one service may have dialled through or to one agent, so that none can use up all.
pub const LINKS_PER_SERVICE_MAX: usize = 4096;

/// The 16 bytes that name a link at both of its ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LinkId(pub [u8; 16]);

impl LinkId {
    /// A fresh id, for a link that nobody else has named.
    pub(super) fn generate() -> Result<Self, Refusal> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)
            .map_err(|error| Cause::NotReady.because(format!("the system gave no random bytes: {error}")))?;
        Ok(Self(id))
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinkId({self})")
    }
}

/// Which end made a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// An instance of this agent dialled another agent, or a proxy of another make.
    Outbound,
    /// Another agent, or a proxy of another make, dialled an instance of this one.
    Inbound,
    /// Both ends are here.
    Local,
    /// Likewise, and the one that dialled is a session of the other's user: no rule is about it.
    Session,
}

impl Direction {
    /// The name in the `links` command.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Local | Self::Session => "local",
        }
    }
}

/// What a link carries. The numbers are those of the `meshx/1` request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Erlang distribution.
    Dist = 1,
    /// MeshxRpc.
    Rpc = 2,
    /// Plain bytes.
    Tcp = 3,
}

impl Purpose {
    /// The purpose of this number.
    pub fn from_wire(number: u8) -> Option<Self> {
        [Self::Dist, Self::Rpc, Self::Tcp]
            .into_iter()
            .find(|purpose| *purpose as u8 == number)
    }

    /// The name in the `links` command.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dist => "dist",
            Self::Rpc => "rpc",
            Self::Tcp => "tcp",
        }
    }
}

/// A service, and whether it has proven to be that: whoever only says so takes no links from who is.
#[derive(PartialEq, Eq, Hash)]
struct Dialler(SpiffeId, bool);

/// What is known of a link from its start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkInfo {
    /// Its name.
    pub id: LinkId,
    /// Which end made it.
    pub direction: Direction,
    /// What it carries.
    pub purpose: Purpose,
    /// Node or service at this end (of a local link: the one that dialled).
    pub local: String,
    /// Node or service at the other end.
    pub remote: String,
    /// Proven identity of this end.
    pub local_spiffe: SpiffeId,
    /// Identity of the other end: proven when `verified`, else only what its name stands for.
    pub remote_spiffe: SpiffeId,
    /// Whether this agent knows by itself who is at the other end. False when a sidecar of another make is between.
    pub verified: bool,
    /// Where the other agent or proxy is; none on a local link.
    pub remote_agent: Option<SocketAddr>,
    /// What the ends have proven to each other last; none where this agent showed and saw no certificate.
    #[serde(skip)]
    pub proof: Option<Proof>,
    /// Registered instances that are ends of it here: it ends with them.
    pub instances: Vec<String>,
    /// Control connections of the ends that are here, to be told of a cut.
    pub owners: Vec<u64>,
}

impl LinkInfo {
    /// Who made the link.
    fn dialler(&self) -> Dialler {
        match self.direction {
            Direction::Inbound => Dialler(self.remote_spiffe.clone(), self.verified),
            Direction::Outbound | Direction::Local | Direction::Session => {
                Dialler(self.local_spiffe.clone(), true)
            }
        }
    }

    /// The instance of a service that this agent chose.
    fn chosen_instance(&self) -> Option<&str> {
        let chosen = self.direction != Direction::Inbound && self.purpose != Purpose::Dist;
        chosen.then_some(&self.remote)
    }

    /// End of this end's certificate, unix seconds; none where this agent showed none.
    pub fn local_not_after(&self) -> Option<i64> {
        self.proof.as_ref().map(|proof| proof.shown.not_after)
    }

    /// End of the other end's certificate, unix seconds; none where this agent saw none.
    pub fn remote_not_after(&self) -> Option<i64> {
        self.proof.as_ref().map(|proof| proof.peer.not_after)
    }

    /// The service that dialled, and the one that was dialled.
    pub(super) fn services(&self) -> (ServiceName, ServiceName) {
        let (here, there) = (self.local_spiffe.service(), self.remote_spiffe.service());
        match self.direction {
            Direction::Inbound => (there.clone(), here.clone()),
            Direction::Outbound | Direction::Local | Direction::Session => (here.clone(), there.clone()),
        }
    }
}

/// A live link as seen at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkSnapshot {
    /// What is known from its start.
    pub info: LinkInfo,
    /// When it started, unix seconds.
    pub since: i64,
    /// Bytes towards this end.
    pub bytes_in: u64,
    /// Bytes from this end.
    pub bytes_out: u64,
}

/// Tells the owner of an end to close a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutEvent {
    /// The link.
    pub link: LinkId,
    /// Why.
    pub cause: Cause,
    /// Why, for people.
    pub text: String,
}

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
struct HandshakeCounts {
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

#[derive(Default)]
struct LiveLinks {
    by_id: HashMap<LinkId, Arc<Live>>,
    /// How many each service has dialled.
    dialled: HashMap<Dialler, usize>,
    /// How many lead to each instance of a service, which is not a node.
    to_instance: HashMap<String, usize>,
    pairs: Pairs,
}

struct Live {
    /// Without its proof, which changes.
    info: LinkInfo,
    proof: Mutex<Option<Proof>>,
    since: i64,
    counters: Arc<Counters>,
    /// Since it carries bytes.
    pair: OnceLock<PairKey>,
    cut: CancellationToken,
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
    fn both(&self) -> (u64, u64) {
        (
            self.bytes_in.load(Ordering::Relaxed),
            self.bytes_out.load(Ordering::Relaxed),
        )
    }
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

    /// Ends a link: tells the owners of its ends, then stops it. False when there is none, or it was cut before.
    pub fn cut(&self, id: LinkId, cause: Cause, text: &str) -> bool {
        let Some(live) = lock(&self.inner.live).by_id.get(&id).cloned() else {
            return false;
        };
        if live.cut.is_cancelled() {
            return false;
        }
        let event = CutEvent {
            link: id,
            cause,
            text: text.to_owned(),
        };
        {
            let owners = lock(&self.inner.owners);
            for sender in live.info.owners.iter().filter_map(|owner| owners.get(owner)) {
                // A full queue loses only the reason; the link ends either way.
                let _ = sender.try_send(event.clone());
            }
        }
        live.cut.cancel();
        if let Some(count) = self.inner.cuts.get(cause.index()) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        tracing::info!(link = %id, %cause, text, local = live.info.local, remote = live.info.remote, "link cut");
        true
    }

    /// Ends all links of an instance of this agent that is no more; says how many.
    pub fn cut_instance(&self, instance: &str, cause: Cause, text: &str) -> usize {
        let of_instance = |live: &&Arc<Live>| live.info.instances.iter().any(|id| id == instance);
        let links: Vec<LinkId> = lock(&self.inner.live)
            .by_id
            .values()
            .filter(of_instance)
            .map(|live| live.info.id)
            .collect();
        links.into_iter().filter(|id| self.cut(*id, cause, text)).count()
    }

    /// Cuts all links. Says how many.
    pub fn cut_all(&self, cause: Cause, text: &str) -> usize {
        let all: Vec<LinkId> = lock(&self.inner.live).by_id.keys().copied().collect();
        all.into_iter().filter(|id| self.cut(*id, cause, text)).count()
    }

    /// Hands a cut event that another table's link has brought to a control connection of this one.
    pub(crate) fn tell(&self, owner: u64, event: CutEvent) {
        if let Some(sender) = lock(&self.inner.owners).get(&owner) {
            // A full queue loses only the reason; the link ends either way.
            let _ = sender.try_send(event);
        }
    }

    /// The cut events for one control connection, until the receiver is dropped.
    pub fn subscribe(&self, owner: u64) -> mpsc::Receiver<CutEvent> {
        let (sender, receiver) = mpsc::channel(MAX_CUT_EVENTS);
        let mut owners = lock(&self.inner.owners);
        owners.retain(|_, sender| !sender.is_closed());
        owners.insert(owner, sender);
        receiver
    }

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
    pub(super) fn count_accepted(&self, done: bool) {
        self.inner.accepted.count(done);
    }

    /// Counts a TLS handshake that this agent began.
    pub(super) fn count_dialled(&self, done: bool) {
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

impl fmt::Debug for LinkTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkTable")
            .field("live", &lock(&self.inner.live).by_id.len())
            .finish_non_exhaustive()
    }
}

impl Live {
    fn snapshot(&self) -> LinkSnapshot {
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
    table: LinkTable,
    live: Arc<Live>,
}

impl LinkGuard {
    /// The link carries bytes from now on.
    pub(super) fn opened(&self) {
        let mut links = lock(&self.table.inner.live);
        self.live.pair.get_or_init(|| links.pairs.opened(&self.live.info));
    }

    /// Whether nodes are at its ends, which can be told why it ends.
    pub(super) fn is_dist(&self) -> bool {
        self.live.info.purpose == Purpose::Dist
    }

    /// Whether another agent has its other end.
    pub(super) fn has_other_agent(&self) -> bool {
        self.live.info.direction != Direction::Local
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

/// Seconds since 1970.
pub(crate) fn unix_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks, so what they hold is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::proxy::totals::{PAIRS_MAX, PairTotals};

    fn info(id: u8, owner: u64) -> LinkInfo {
        let spiffe = |name| SpiffeId::new("td", ServiceName::new(name).unwrap());
        LinkInfo {
            id: LinkId([id; 16]),
            direction: Direction::Local,
            purpose: Purpose::Dist,
            local: "shop@h1".to_owned(),
            remote: "cart@h1".to_owned(),
            local_spiffe: spiffe("shop"),
            remote_spiffe: spiffe("cart"),
            verified: true,
            remote_agent: None,
            proof: None,
            instances: vec![],
            owners: vec![owner],
        }
    }

    #[test]
    fn links_leave_descriptors_for_everything_else() {
        let room = |descriptors| LinkTable::with_descriptors(descriptors).max();
        assert_eq!(room(1 << 20), LINKS_MAX);
        assert_eq!((room(1024), room(514), room(512), room(10)), (256, 1, 0, 0));
        let table = LinkTable::with_descriptors(514);
        let guard = table.insert(info(1, 7)).unwrap();
        let refusal = table.insert(info(2, 7)).err().unwrap();
        assert_eq!(refusal.cause, Cause::Limit);
        assert!(refusal.text.contains("514 files may be open"), "{refusal}");
        drop(guard);
        table.insert(info(2, 7)).unwrap();
    }

    #[test]
    fn a_link_lives_as_long_as_its_guard_and_ids_are_unique() {
        let table = LinkTable::default();
        let guard = table.insert(info(1, 7)).unwrap();
        guard.counters().bytes_in.fetch_add(5, Ordering::Relaxed);
        assert_eq!(
            table.insert(info(1, 8)).err().unwrap().cause,
            Cause::InvalidRequest
        );
        assert_eq!(table.snapshot().len(), 1);
        assert_eq!(table.get(LinkId([1; 16])).unwrap().bytes_in, 5);
        drop(guard);
        assert!(table.snapshot().is_empty());
        assert!(table.insert(info(1, 8)).is_ok());
    }

    #[test]
    fn one_service_cannot_take_all_links_and_an_ended_one_makes_room() {
        let table = LinkTable::default();
        let dialled_by = |service: &str, number: usize| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&number.to_be_bytes());
            let service = ServiceName::new(service).unwrap();
            let info = LinkInfo {
                id: LinkId(id),
                direction: Direction::Inbound,
                remote_spiffe: SpiffeId::new("td", service),
                ..info(0, 1)
            };
            table.insert(info)
        };
        let mut held: Vec<_> = (0..LINKS_PER_SERVICE_MAX)
            .map(|number| dialled_by("hostile", number).unwrap())
            .collect();
        let refusal = dialled_by("hostile", LINKS_MAX).err().unwrap();
        assert!(
            refusal.cause == Cause::Limit && refusal.text.contains("svc/hostile"),
            "{refusal}"
        );
        let unverified = LinkInfo {
            verified: false,
            direction: Direction::Inbound,
            remote_spiffe: SpiffeId::new("td", ServiceName::new("hostile").unwrap()),
            ..info(255, 1)
        };
        assert!(table.insert(unverified).is_ok(), "another one of that name");
        held.extend((held.len()..LINKS_MAX).map(|number| {
            let service = format!("s{}", number / LINKS_PER_SERVICE_MAX);
            dialled_by(&service, number).unwrap()
        }));
        let refusal = dialled_by("good", LINKS_MAX).err().unwrap();
        assert!(refusal.text.contains("LINKS_MAX"), "{refusal}");
        held.remove(0);
        assert!(dialled_by("good", LINKS_MAX).is_ok());
        assert!(dialled_by("hostile", LINKS_MAX).is_ok());
        drop(held);
        assert!(lock(&table.inner.live).dialled.is_empty());
    }

    #[tokio::test]
    async fn a_cut_reaches_its_owner_and_the_link() {
        let table = LinkTable::default();
        let guard = table.insert(info(1, 7)).unwrap();
        let mut mine = table.subscribe(7);
        let mut others = table.subscribe(8);
        assert!(table.cut(LinkId([1; 16]), Cause::IntentionDenied, "no"));
        assert!(!table.cut(LinkId([2; 16]), Cause::IntentionDenied, "no"));
        assert!(!table.cut(LinkId([1; 16]), Cause::IntentionDenied, "it is cut already"));
        let event = mine.recv().await.unwrap();
        assert_eq!(
            (event.link, event.cause),
            (LinkId([1; 16]), Cause::IntentionDenied)
        );
        assert!(others.try_recv().is_err());
        guard.cut().cancelled().await;
    }

    #[test]
    fn refusals_are_counted_and_bounded() {
        let table = LinkTable::default();
        for i in 0..MAX_REFUSALS + 10 {
            table.refused(
                Listener::Dist,
                Some(LinkId([1; 16])),
                &format!("n{i}@h"),
                &Cause::Timeout.because(format!("{i}")),
            );
        }
        assert_eq!(table.refusals(Cause::Timeout), (MAX_REFUSALS + 10) as u64);
        assert!(
            table.refusal_of_target("n0@h").is_none(),
            "the oldest are forgotten"
        );
        assert!(table.refusal_of_target("n10@h").is_some());
        assert_eq!(
            table.refusal_of_link(LinkId([1; 16])).unwrap().refusal.text,
            format!("{}", MAX_REFUSALS + 9)
        );
        assert!(table.refusal_of_link(LinkId([2; 16])).is_none());
    }

    #[test]
    fn ids_and_purposes_have_their_spelling() {
        assert_eq!(LinkId([0xab; 16]).to_string(), "ab".repeat(16));
        assert_eq!(Purpose::from_wire(2), Some(Purpose::Rpc));
        assert_eq!(Purpose::from_wire(4), None);
    }

    #[test]
    fn links_that_carry_bytes_are_counted_by_pairs_and_others_are_not() {
        let table = LinkTable::default();
        let (first, second) = (
            table.insert(info(1, 7)).unwrap(),
            table.insert(info(2, 7)).unwrap(),
        );
        drop(table.insert(info(3, 7)).unwrap());
        assert!(table.totals().pairs.is_empty(), "not decided yet, or refused");
        first.opened();
        first.opened();
        second.opened();
        for guard in [&first, &second] {
            guard.counters().bytes_in.fetch_add(5, Ordering::Relaxed);
            guard.counters().bytes_out.fetch_add(7, Ordering::Relaxed);
        }
        let name = |name| ServiceName::new(name).unwrap();
        let mut wanted = PairTotals {
            proven: 0,
            proving: Duration::ZERO,
            services: Some((name("shop"), name("cart"))),
            direction: Direction::Local,
            purpose: Purpose::Dist,
            opened: 2,
            live: 2,
            bytes_in: 10,
            bytes_out: 14,
        };
        assert_eq!(table.totals().pairs, [wanted.clone()]);
        drop(first);
        wanted.live = 1;
        assert_eq!(table.totals().pairs, [wanted.clone()], "what it carried stays");
        drop(second);
        wanted.live = 0;
        assert_eq!(table.totals().pairs, [wanted]);
        // Inbound, the other end has dialled.
        let inbound = LinkInfo {
            direction: Direction::Inbound,
            ..info(4, 7)
        };
        let guard = table.insert(inbound).unwrap();
        guard.opened();
        let pairs = table.totals().pairs;
        let of_inbound = pairs
            .iter()
            .find(|pair| pair.direction == Direction::Inbound)
            .unwrap();
        assert_eq!(of_inbound.services, Some((name("cart"), name("shop"))));
    }

    #[test]
    fn pairs_are_bounded() {
        let table = LinkTable::default();
        let open = |number: usize| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&number.to_be_bytes());
            let service = ServiceName::new(&format!("s{number}")).unwrap();
            let info = LinkInfo {
                id: LinkId(id),
                direction: Direction::Inbound,
                remote_spiffe: SpiffeId::new("td", service),
                ..info(0, 1)
            };
            let guard = table.insert(info).unwrap();
            guard.opened();
            guard.counters().bytes_in.fetch_add(1, Ordering::Relaxed);
            guard
        };
        let more = 10;
        let guards: Vec<_> = (0..PAIRS_MAX + more).map(open).collect();
        let others = || {
            let pairs = table.totals().pairs;
            assert_eq!(pairs.len(), PAIRS_MAX + 1);
            pairs.into_iter().find(|pair| pair.services.is_none()).unwrap()
        };
        let seen = others();
        assert_eq!(
            (seen.opened, seen.live, seen.bytes_in),
            (more as u64, more as u64, more as u64)
        );
        drop(guards);
        let seen = others();
        assert_eq!(
            (seen.opened, seen.live, seen.bytes_in),
            (more as u64, 0, more as u64)
        );
        let _again = open(0);
        assert_eq!(others().opened, more as u64, "a pair that has a place keeps it");
    }

    #[test]
    fn refusals_and_cuts_are_counted_by_cause_and_place() {
        let table = LinkTable::default();
        table.refused(Listener::Inbound, None, "x", &Cause::Timeout.because(""));
        table.refused(Listener::Upstream, None, "x", &Cause::Timeout.because(""));
        let guard = table.insert(info(1, 7)).unwrap();
        table.cut(LinkId([1; 16]), Cause::IntentionDenied, "no");
        table.cut(LinkId([1; 16]), Cause::IntentionDenied, "again");
        drop(guard);
        let totals = table.totals();
        assert_eq!(totals.refusals.len(), Listener::ALL.len() * Cause::ALL.len());
        let mut seen: Vec<_> = totals
            .refusals
            .into_iter()
            .filter(|(.., count)| *count > 0)
            .collect();
        seen.sort_by_key(|(at, ..)| at.index());
        assert_eq!(
            seen,
            [
                (Listener::Inbound, Cause::Timeout, 1),
                (Listener::Upstream, Cause::Timeout, 1)
            ]
        );
        assert_eq!(table.refusals(Cause::Timeout), 2);
        let cut: Vec<_> = totals.cuts.into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(cut, [(Cause::IntentionDenied, 1)]);
    }
}
