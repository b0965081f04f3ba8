//! Generated terms, shared by the tests.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub(crate) mod agreement;
pub(crate) mod libei;

use meshx_etf::{Export, Pid, Port, Reference, Term};
use proptest::collection::vec;
use proptest::prelude::*;

/// Integers on both sides of every boundary of an encoding, a BEAM's or ours, and any others.
fn integer() -> impl Strategy<Value = Term> {
    let boundary = (0u32..127, -2i128..=2, any::<bool>()).prop_map(|(shift, offset, negative)| {
        let value = (1i128 << shift) + offset;
        Term::from(if negative { -value } else { value })
    });
    let long = (
        any::<bool>(),
        prop_oneof![vec(any::<u8>(), 0..20), vec(any::<u8>(), 250..260)],
    );
    prop_oneof![
        boundary,
        any::<i64>().prop_map(Term::from),
        any::<i128>().prop_map(Term::from),
        long.prop_map(|(negative, magnitude)| Term::integer_from_le_bytes(negative, &magnitude)),
    ]
}

/// Finite floats; not minus zero, which OTP 25 takes for zero in comparisons.
fn float() -> impl Strategy<Value = Term> {
    let any = any::<u64>()
        .prop_map(f64::from_bits)
        .prop_filter("finite", |f| f.is_finite() && *f != 0.0);
    prop_oneof![
        any,
        Just(0.0),
        Just(1.0),
        Just(f64::MIN_POSITIVE),
        Just(f64::MAX),
        Just(5e-324)
    ]
    .prop_map(Term::from)
}

/// ASCII, Latin-1, any Unicode, of every length class.
fn atom_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z][a-zA-Z0-9_@]{0,8}",
        Just(String::new()),
        vec(any::<u8>().prop_map(char::from), 0..12).prop_map(String::from_iter),
        vec(any::<char>(), 0..12).prop_map(String::from_iter),
        Just("x".repeat(255)),
        Just("ÿ".repeat(255)),
        Just("日".repeat(255)),
        Just("end".to_owned()),
    ]
}

fn node() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("shop@h1".to_owned()),
        "[a-z]{1,5}@[a-z]{1,5}",
        Just("é@h".to_owned())
    ]
}

/// Process, port and reference numbers as OTP 25 makes them, with creations above 3 and never 0.
fn id() -> impl Strategy<Value = Term> {
    let creation = 4u32..;
    let pid =
        (node(), 0u32..1 << 28, 0u32..1 << 13, creation.clone()).prop_map(|(node, id, serial, creation)| {
            Term::from(Pid {
                node: node.into(),
                id,
                serial,
                creation,
            })
        });
    let port = (node(), prop_oneof![0u64..1 << 28, any::<u64>()], creation.clone()).prop_map(
        |(node, id, creation)| {
            Term::from(Port {
                node: node.into(),
                id,
                creation,
            })
        },
    );
    let reference = (node(), 0u32..1 << 18, vec(any::<u32>(), 2..=4), creation).prop_map(
        |(node, first, rest, creation)| {
            let ids = [first].into_iter().chain(rest).collect();
            Term::from(Reference {
                node: node.into(),
                creation,
                ids,
            })
        },
    );
    prop_oneof![pid, port, reference]
}

fn export() -> impl Strategy<Value = Term> {
    (atom_text(), atom_text(), any::<u8>()).prop_map(|(module, function, arity)| {
        Term::from(Export {
            module: module.into(),
            function: function.into(),
            arity,
        })
    })
}

fn binary() -> impl Strategy<Value = Term> {
    let bytes = prop_oneof![
        vec(any::<u8>(), 0..10),
        vec(any::<u8>(), 60..70),
        "\\PC{0,6}".prop_map(String::into_bytes)
    ];
    (bytes, 1u8..=8).prop_map(|(bytes, bits)| Term::bit_string(bytes, bits).unwrap())
}

fn string() -> impl Strategy<Value = Term> {
    prop_oneof![
        "\\PC{0,8}".prop_map(|text| Term::charlist(&text)),
        vec(any::<u8>(), 0..8).prop_map(|bytes| Term::list(bytes.into_iter().map(Term::from))),
        vec(-1i64..=256, 0..8).prop_map(|ints| Term::list(ints.into_iter().map(Term::from))),
    ]
}

fn leaf(with_ids: bool) -> BoxedStrategy<Term> {
    let plain = prop_oneof![
        3 => integer(),
        1 => float(),
        3 => atom_text().prop_map(Term::atom),
        2 => binary(),
        2 => string(),
        1 => any::<bool>().prop_map(Term::from),
    ];
    if with_ids {
        prop_oneof![6 => plain, 1 => id(), 1 => export()].boxed()
    } else {
        plain.boxed()
    }
}

fn nested(leaf: BoxedStrategy<Term>) -> impl Strategy<Value = Term> {
    leaf.prop_recursive(5, 60, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Term::List),
            vec(inner.clone(), 0..6).prop_map(Term::Tuple),
            (vec(inner.clone(), 1..5), inner.clone())
                .prop_map(|(items, tail)| Term::list_with_tail(items, tail)),
            vec((inner.clone(), inner), 0..5).prop_map(Term::map),
        ]
    })
}

/// Terms of every kind but funs with code, whose bytes only a BEAM can make.
pub(crate) fn term() -> impl Strategy<Value = Term> {
    nested(leaf(true))
}

/// Terms whose text reads back as the same term on any node: no pids, ports or references.
pub(crate) fn readable_term() -> impl Strategy<Value = Term> {
    nested(leaf(false))
}

/// No pids, ports, references or funs, and no maps.
pub(crate) fn plain_value() -> impl Strategy<Value = Term> {
    leaf(false).prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Term::List),
            vec(inner.clone(), 0..4).prop_map(Term::Tuple),
            (vec(inner.clone(), 1..4), inner).prop_map(|(items, tail)| Term::list_with_tail(items, tail)),
        ]
    })
}

/// Calls `see` with the term and all its parts.
pub(crate) fn each(term: &Term, see: &mut impl FnMut(&Term)) {
    see(term);
    match term {
        Term::List(items) | Term::Tuple(items) => items.iter().for_each(|item| each(item, see)),
        Term::ImproperList(items, tail) => {
            items.iter().for_each(|item| each(item, see));
            each(tail, see);
        }
        Term::Map(map) => map.iter().for_each(|(key, value)| {
            each(key, see);
            each(value, see);
        }),
        _ => {}
    }
}

pub(crate) fn encoded(term: &Term) -> Vec<u8> {
    let mut bytes = Vec::new();
    meshx_etf::encode(term, &mut bytes).unwrap();
    bytes
}
