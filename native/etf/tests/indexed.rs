//! Terms with their atoms in a table are the terms they were made from, and nothing else is written.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::agreement::{check_indexed as check, form_only, indexed};
use common::{encoded, plain_value, readable_term};
use meshx_etf::{Atom, Term};
use proptest::collection::vec;
use proptest::prelude::*;

/// Rows with the same keys and a hundred atoms more, so that there is something to win.
fn rows() -> impl Strategy<Value = Vec<u8>> {
    let row = vec((any::<proptest::sample::Index>(), plain_value()), 0..8);
    (vec("\\PC{0,20}|[a-z]{250,255}", 1..12), vec(row, 1..40)).prop_map(|(names, rows)| {
        let rows = rows.into_iter().map(|row| {
            Term::map(
                row.into_iter()
                    .map(|(name, value)| (Term::atom(name.get(&names).as_str()), value)),
            )
        });
        let row = Term::list(rows.collect::<Vec<_>>());
        encoded(&Term::tuple([row, Term::list(vec![Term::atom("ok"); 600])]))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_are_the_same_with_their_atoms_in_a_table(bytes in rows()) {
        prop_assert!(check(&bytes).is_some());
    }

    #[test]
    fn any_term_is_the_same_or_stays_as_it_is(term in readable_term()) {
        check(&encoded(&Term::tuple([term, Term::list(vec![Term::atom("ok"); 600])])));
    }

    #[test]
    fn damaged_rows_never_panic(
        bytes in rows(),
        edits in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut damaged = bytes.clone();
        for (at, byte) in edits {
            damaged[at.index(bytes.len())] = byte;
        }
        check(&damaged);
        prop_assert_eq!(indexed(&bytes[..cut.index(bytes.len())], form_only(), 1 << 14), None);
    }
}

/// `[ok, ok, ...]` with another list in it.
fn with(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![131, 108];
    bytes.extend(u32::try_from(600 + parts.len()).unwrap().to_be_bytes());
    for part in parts {
        bytes.extend(part);
    }
    bytes.extend([119, 2, b'o', b'k'].repeat(600));
    bytes.push(106);
    bytes
}

fn utf8(text: &str) -> Vec<u8> {
    let mut bytes = vec![118];
    bytes.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
    bytes.extend(text.bytes());
    bytes
}

#[test]
fn every_form_of_an_atom_has_its_index() {
    let long = "日".repeat(255);
    let parts = [
        utf8("ok"),
        vec![100, 0, 2, b'o', b'k'],
        vec![115, 2, b'o', b'k'],
        // The same bytes as Latin-1 and as UTF-8.
        vec![115, 2, 0xC3, 0xA9],
        vec![119, 2, 0xC3, 0xA9],
        vec![100, 0, 1, 0xE9],
        vec![119, 0],
        utf8(&long),
        utf8(&"x".repeat(255)),
        utf8(&"x".repeat(17)),
        utf8(&"x".repeat(16)),
        vec![119, 3, b'o', b'k', 0],
    ];
    let written = check(&with(&parts)).unwrap();
    // No two that differ have one index: the term would be another. The same in two forms may have two.
    assert!(written.atoms.len() <= parts.len());
    for name in ["ok", "Ã©", "é", "", &long, "ok\0"] {
        assert!(written.atoms.contains(&Atom::new(name)), "{name}");
    }
}

#[test]
fn what_would_not_pay_stays_as_it_is() {
    let distinct = |count: usize| {
        let names: Vec<Term> = (0..count).map(|n| Term::atom(format!("atom{n}"))).collect();
        encoded(&Term::list(vec![Term::List(names); 8]))
    };
    assert_eq!(check(&distinct(255)).unwrap().atoms.len(), 255);
    assert_eq!(check(&distinct(256)), None);
    let times = |count| encoded(&Term::list(vec![Term::atom("as often"); count]));
    assert!(check(&times(256)).is_some());
    assert_eq!(check(&times(255)), None);
    // Each once, thrice, four times.
    let names: Vec<Term> = (0..200).map(|n| Term::atom(format!("atom{n}"))).collect();
    let thrice = Term::list(vec![Term::List(names.clone()); 3]);
    assert_eq!(check(&encoded(&thrice)), None);
    let four = Term::list(vec![Term::List(names); 4]);
    assert!(check(&encoded(&four)).is_some());
}

#[test]
fn what_the_vm_would_make_atoms_of_or_take_long_for_stays_as_it_is() {
    let map = |pairs: usize| Term::map((0..pairs).map(|n| (Term::atom(format!("key{n}")), Term::from(1))));
    let part = |term: &Term| encoded(term).split_off(1);
    assert!(check(&with(&[part(&map(32))])).is_some());
    assert!(check(&with(&[part(&Term::binary(vec![0; 1024]))])).is_some());
    let node = utf8("a@b");
    let id = |tag: u8, rest: &[u8]| [&[tag][..], &node, rest].concat();
    for refused in [
        part(&map(33)),
        part(&Term::map([(Term::from(1), Term::from(2))])),
        part(&Term::map([(Term::list([Term::atom("a")]), Term::from(2))])),
        part(&Term::binary(vec![0; 1025])),
        id(88, &[0; 12]),
        id(103, &[0; 9]),
        id(120, &[0; 12]),
        id(102, &[0; 5]),
        [&[90, 0, 1][..], &node, &[0; 8]].concat(),
        [&[113][..], &node, &node, &[97, 1]].concat(),
    ] {
        assert_eq!(check(&with(std::slice::from_ref(&refused))), None, "{refused:?}");
    }
    // What takes longer than a millisecond, and a megabyte.
    let rows = |count| encoded(&Term::list(vec![map(32); count]));
    assert!(check(&rows(200)).is_some());
    assert_eq!(check(&rows(400)), None);
    let ints = |count: usize| with(&vec![vec![97, 1]; count]);
    assert!(check(&ints(190_000)).is_some());
    assert_eq!(check(&ints(210_000)), None);
    let mut text = b"\x631.5".to_vec();
    text.resize(32, 0);
    let floats = |count: usize| with(&vec![text.clone(); count]);
    assert!(check(&floats(12_000)).is_some());
    assert_eq!(check(&floats(13_000)), None);
    let bytes = |count: usize| with(&vec![part(&Term::binary(vec![0; 1000])); count]);
    assert!(check(&bytes(1_000)).is_some());
    assert_eq!(check(&bytes(1_100)), None);
}
