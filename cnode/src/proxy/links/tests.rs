#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::mesh::{ServiceName, SpiffeId};
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

/// A link of this number that a service dialled, and that has carried one byte.
fn carrying(table: &LinkTable, number: usize, service: &str) -> LinkGuard {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    let info = LinkInfo {
        id: LinkId(id),
        direction: Direction::Inbound,
        remote_spiffe: SpiffeId::new("td", ServiceName::new(service).unwrap()),
        ..info(0, 1)
    };
    let guard = table.insert(info).unwrap();
    guard.opened();
    guard.counters().bytes_in.fetch_add(1, Ordering::Relaxed);
    guard
}

#[test]
fn pairs_are_bounded() {
    let table = LinkTable::default();
    let open = |number: usize| carrying(&table, number, &format!("s{number}"));
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
fn the_pair_that_is_idle_for_longest_makes_room_and_the_sums_stay() {
    let table = LinkTable::default();
    let open = |number: usize| carrying(&table, number, &format!("s{number}"));
    let mut held: Vec<_> = (0..PAIRS_MAX).map(open).collect();
    let second = held.swap_remove(3);
    drop(held.swap_remove(7));
    drop(second);
    let named = |number: usize| {
        let service = ServiceName::new(&format!("s{number}")).unwrap();
        let pairs = table.totals().pairs;
        pairs
            .into_iter()
            .any(|pair| pair.services.is_some_and(|(source, _)| source == service))
    };
    for (count, (new, goes)) in [(0, 7), (1, 3)].into_iter().enumerate() {
        assert!(named(goes));
        held.push(open(PAIRS_MAX + new));
        assert!(named(PAIRS_MAX + new) && !named(goes));
        let pairs = table.totals().pairs;
        let other = pairs.iter().find(|pair| pair.services.is_none()).unwrap();
        let gone = count as u64 + 1;
        assert_eq!((other.opened, other.live, other.bytes_in), (gone, 0, gone));
        let all = PAIRS_MAX as u64 + gone;
        assert_eq!(pairs.iter().map(|pair| pair.opened).sum::<u64>(), all);
        assert_eq!(pairs.iter().map(|pair| pair.bytes_in).sum::<u64>(), all);
    }
    // Now all have links, and those are never counted elsewhere than they began.
    held.push(open(PAIRS_MAX + 2));
    assert!(!named(PAIRS_MAX + 2));
    assert_eq!(
        table.totals().pairs.iter().map(|pair| pair.live).sum::<u64>(),
        PAIRS_MAX as u64 + 1
    );
}

#[test]
fn commands_are_one_service_in_the_counts() {
    let table = LinkTable::default();
    let services = ["tool-1", "tool-4711", "tool", "tool-x1", "tools-1"];
    let _held: Vec<_> = (0..)
        .zip(services)
        .map(|(number, service)| carrying(&table, number, service))
        .collect();
    let pairs = table.totals().pairs.into_iter();
    let mut seen: Vec<_> = pairs
        .map(|pair| (pair.services.unwrap().0.to_string(), pair.opened))
        .collect();
    seen.sort();
    let wanted = [("tool", 3), ("tool-x1", 1), ("tools-1", 1)];
    assert_eq!(seen, wanted.map(|(service, opened)| (service.to_owned(), opened)));
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
