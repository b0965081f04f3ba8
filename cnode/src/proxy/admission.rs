//! Connections that are not decided yet, no more of them than there is room for, and none pushed out by those of others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use super::cause::{Cause, Refusal};
use crate::mesh::SpiffeId;

/// Who dials, as far as that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    who: Who,
    /// Which of his hosts or programs it is.
    part: Option<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Who {
    Unknown,
    Address(IpAddr),
    User(u32),
    Service(SpiffeId),
    Node(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Part {
    Host(IpAddr),
    Registration(String),
}

impl Origin {
    /// Nothing is known.
    pub(crate) const UNKNOWN: Self = Self::new(Who::Unknown);

    const fn new(who: Who) -> Self {
        Self { who, part: None }
    }

    /// Somebody who has proven nothing. Of IPv6 a host may have all addresses of a /64.
    pub(crate) fn address(ip: IpAddr) -> Self {
        Self::new(Who::Address(match ip.to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
            ip => ip,
        }))
    }

    /// A program of this host.
    pub(crate) fn user(uid: u32) -> Self {
        Self::new(Who::User(uid))
    }

    /// A registration of this agent, by its id, and the user whose it is: he may have many.
    pub(crate) fn registration(uid: u32, id: &str) -> Self {
        Self {
            who: Who::User(uid),
            part: Some(Part::Registration(id.to_owned())),
        }
    }

    /// A node that whoever carries its connection vouches for.
    pub(crate) fn node(name: String) -> Self {
        Self::new(Who::Node(name))
    }

    /// A service that has shown its certificate, and the host that it did it from.
    pub(crate) fn service(id: SpiffeId, from: IpAddr) -> Self {
        Self {
            who: Who::Service(id),
            part: Some(Part::Host(from.to_canonical())),
        }
    }
}

/// Room for connections under way. The newest always gets in, and whoever has most makes room for it with his oldest:
/// of all services that with most, and of its hosts that with most; of all users likewise, and of their programs. So who opens many connections, and leaves them half
/// done or not, pushes out his own.
#[derive(Debug)]
pub(crate) struct Admission {
    max: usize,
    // Held for an insertion or a removal, never across an await.
    slots: Mutex<Slots>,
}

/// The connections of one origin, the oldest first.
type Places = BTreeMap<u64, CancellationToken>;

#[derive(Debug, Default)]
struct Slots {
    next: u64,
    taken: HashMap<Who, HashMap<Option<Part>, Places>>,
}

/// How many of `max` one origin may have: others find room at once.
pub(super) fn of_one(max: usize) -> usize {
    max.saturating_mul(3).div_ceil(4).max(1)
}

impl Admission {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max: max.max(1),
            slots: Mutex::default(),
        })
    }

    /// Takes a slot for `origin`.
    pub(crate) fn enter(self: &Arc<Self>, origin: Origin) -> Slot {
        let evicted = CancellationToken::new();
        Slot {
            place: Mutex::new(self.place(origin, evicted.clone())),
            max: self.max,
            evicted,
        }
    }

    fn place(self: &Arc<Self>, origin: Origin, evicted: CancellationToken) -> Place {
        let mut slots = self.lock();
        while slots.of(&origin) >= of_one(self.max) && slots.evict(&origin) {}
        while slots.len() >= self.max
            && let Some(most) = slots.most()
            && slots.evict(&most)
        {}
        let id = slots.next;
        slots.next += 1;
        let parts = slots.taken.entry(origin.who.clone()).or_default();
        parts.entry(origin.part.clone()).or_default().insert(id, evicted);
        drop(slots);
        Place {
            admission: self.clone(),
            origin,
            id,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    fn len(&self) -> usize {
        self.taken.values().map(size).sum()
    }

    fn of(&self, origin: &Origin) -> usize {
        let places = self
            .taken
            .get(&origin.who)
            .and_then(|parts| parts.get(&origin.part));
        places.map_or(0, Places::len)
    }

    /// Who has most; of several the one whose oldest connection is the oldest.
    fn most(&self) -> Option<Origin> {
        let oldest = |places: &Places| places.keys().next().copied();
        let (who, parts) = self
            .taken
            .iter()
            .max_by_key(|(_, parts)| (size(parts), Reverse(parts.values().filter_map(oldest).min())))?;
        let (part, _) = parts
            .iter()
            .max_by_key(|(_, places)| (places.len(), Reverse(oldest(places))))?;
        Some(Origin {
            who: who.clone(),
            part: part.clone(),
        })
    }

    /// Ends the oldest connection of `origin`; false when there is none.
    fn evict(&mut self, origin: &Origin) -> bool {
        let places = self
            .taken
            .get(&origin.who)
            .and_then(|parts| parts.get(&origin.part));
        let Some((&id, evicted)) = places.and_then(Places::first_key_value) else {
            return false;
        };
        evicted.cancel();
        self.remove(origin, id);
        true
    }

    fn remove(&mut self, origin: &Origin, id: u64) {
        let Some(parts) = self.taken.get_mut(&origin.who) else {
            return;
        };
        if let Some(places) = parts.get_mut(&origin.part) {
            places.remove(&id);
        }
        parts.retain(|_, places| !places.is_empty());
        if parts.is_empty() {
            self.taken.remove(&origin.who);
        }
    }
}

fn size(parts: &HashMap<Option<Part>, Places>) -> usize {
    parts.values().map(Places::len).sum()
}

/// A place among the connections under way, given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    // Held to look at it or to change it, never across an await.
    place: Mutex<Place>,
    max: usize,
    evicted: CancellationToken,
}

#[derive(Debug)]
struct Place {
    admission: Arc<Admission>,
    origin: Origin,
    id: u64,
}

impl Slot {
    /// It is known better who dials.
    pub(crate) fn is_of(&self, origin: Origin) {
        let mut place = self.lock();
        let admission = place.admission.clone();
        self.change(&mut place, &admission, origin);
    }

    /// It is known who dials, and its connections have room of their own, which nobody else can take.
    pub(crate) fn moves(&self, admission: &Arc<Admission>, origin: Origin) {
        self.change(&mut self.lock(), admission, origin);
    }

    fn change(&self, place: &mut Place, admission: &Arc<Admission>, origin: Origin) {
        // One that has to go anyway takes nobody's place.
        if !self.evicted.is_cancelled() {
            // Out first: it is not to push out itself.
            place.leave();
            *place = admission.place(origin, self.evicted.clone());
        }
    }

    /// Waits until a newer connection needs the place.
    pub(crate) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// What an evicted connection is refused with.
    pub(crate) fn refusal(&self) -> Refusal {
        Cause::Limit.because(format!(
            "max_pending: {} connections are being decided, or {} of the same origin: newer ones take the place of \
             the oldest of whoever has most",
            self.max,
            of_one(self.max)
        ))
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn leave(&self) {
        self.admission.lock().remove(&self.origin, self.id);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn at(host: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, host).into()
    }

    fn from(host: u8) -> Origin {
        Origin::address(at(host))
    }

    #[allow(clippy::unwrap_used)]
    fn service(name: &str, host: u8) -> Origin {
        Origin::service(SpiffeId::new("a.consul", name.parse().unwrap()), at(host))
    }

    fn gone(slots: &[Slot]) -> Vec<bool> {
        slots.iter().map(|slot| slot.evicted.is_cancelled()).collect()
    }

    #[tokio::test]
    async fn the_oldest_of_equals_makes_room() {
        let admission = Admission::new(4);
        let mut slots: Vec<_> = (0..4).map(|host| admission.enter(from(host))).collect();
        drop(slots.remove(1));
        slots.push(admission.enter(from(7)));
        assert_eq!(gone(&slots), [false; 4]);
        let _newest = admission.enter(from(8));
        slots[0].evicted().await;
        assert_eq!(gone(&slots), [true, false, false, false]);
        drop(slots);
        assert_eq!(admission.lock().len(), 1);
    }

    #[test]
    fn who_has_most_makes_room_for_others() {
        let admission = Admission::new(8);
        let first = admission.enter(from(1));
        let crowd: Vec<_> = (0..100).map(|_| admission.enter(from(2))).collect();
        let others: Vec<_> = (3..7).map(|host| admission.enter(from(host))).collect();
        assert!(!first.evicted.is_cancelled() && gone(&others) == [false; 4]);
        let left = crowd.iter().filter(|slot| !slot.evicted.is_cancelled()).count();
        assert_eq!(left, 3, "eight, less one and four of others");
    }

    #[test]
    fn one_origin_has_three_quarters_at_most() {
        let admission = Admission::new(8);
        let crowd: Vec<_> = (0..9).map(|_| admission.enter(from(1))).collect();
        assert_eq!(admission.lock().len(), 6);
        let gone = gone(&crowd);
        assert_eq!(gone[..4], [true, true, true, false]);
    }

    #[test]
    fn a_service_of_many_hosts_counts_as_one_and_its_greatest_host_goes_first() {
        let admission = Admission::new(8);
        let small = admission.enter(service("shop", 1));
        let shop: Vec<_> = (0..4).map(|_| admission.enter(service("shop", 2))).collect();
        let cart: Vec<_> = (0..3).map(|_| admission.enter(service("cart", 3))).collect();
        let _newest = admission.enter(service("stats", 4));
        assert!(!small.evicted.is_cancelled());
        assert_eq!(gone(&shop), [true, false, false, false]);
        assert_eq!(gone(&cart), [false; 3]);
    }

    #[test]
    fn a_user_of_many_registrations_counts_as_one() {
        let admission = Admission::new(8);
        let web: Vec<_> = (0..2)
            .map(|_| admission.enter(Origin::registration(1, "web@h1")))
            .collect();
        let many: Vec<_> = (0..6)
            .map(|at| admission.enter(Origin::registration(2, &format!("n{at}@h1"))))
            .collect();
        let _newest = admission.enter(Origin::user(3));
        assert_eq!(gone(&web), [false; 2]);
        assert_eq!(gone(&many), [true, false, false, false, false, false]);
    }

    #[test]
    fn who_is_known_better_counts_among_those() {
        let (strangers, known) = (Admission::new(4), Admission::new(4));
        let slot = strangers.enter(from(1));
        slot.moves(&known, service("shop", 1));
        assert_eq!((strangers.lock().len(), known.lock().len()), (0, 1));
        let _crowd: Vec<_> = (0..100).map(|host| strangers.enter(from(host))).collect();
        assert!(!slot.evicted.is_cancelled());
        slot.is_of(Origin::user(7));
        assert_eq!(known.lock().of(&Origin::user(7)), 1);
        drop(slot);
        assert_eq!(known.lock().len(), 0);
        // One that had to go comes back nowhere.
        let old = strangers.enter(from(1));
        let _crowd: Vec<_> = (0..4).map(|host| strangers.enter(from(host))).collect();
        assert!(old.evicted.is_cancelled());
        old.moves(&known, service("shop", 1));
        assert_eq!(known.lock().len(), 0);
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn addresses_that_one_host_may_have_are_one() {
        let same =
            |a: &str, b: &str| Origin::address(a.parse().unwrap()) == Origin::address(b.parse().unwrap());
        assert!(same("2001:db8::1", "2001:db8::ffff:2"));
        assert!(same("::ffff:10.0.0.1", "10.0.0.1"));
        assert!(!same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(!same("10.0.0.1", "10.0.0.2"));
    }
}
