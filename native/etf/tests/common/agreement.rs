//! All ways to read the same bytes come to the same result; held by the property tests and by the fuzz targets.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

use meshx_etf::guard::{self, Guard, GuardError, GuardPolicy, Step};
use meshx_etf::{DecodeError, Indexed, Limits, decode, decode_prefix, inflate, term_len};

/// The guard with no policy but form.
pub fn form_only() -> GuardPolicy {
    GuardPolicy {
        max_integer_bytes: Limits::default().max_integer_bytes,
        max_heap_words: usize::MAX,
        max_map_pairs: usize::MAX,
        max_key_bytes: usize::MAX,
        max_nodes: usize::MAX,
        allow_funs: true,
        allow_exports: true,
        ..GuardPolicy::default()
    }
}

/// Steps through with so much work at a time; also returns the number of steps.
pub fn step_through(
    bytes: &[u8],
    policy: GuardPolicy,
    max_work: usize,
) -> (Result<guard::GuardStats, GuardError>, usize) {
    let mut guard = Guard::new(policy);
    for steps in 1.. {
        match guard.step(bytes, max_work) {
            Ok(Step::More) => {}
            Ok(Step::Done(stats)) => return (Ok(stats), steps),
            Err(error) => {
                assert_eq!(guard.step(bytes, max_work), Err(error), "a refusal must last");
                return (Err(error), steps);
            }
        }
    }
    unreachable!()
}

/// All ways to read the same bytes come to the same result.
pub fn check_agreement(bytes: &[u8]) {
    let limits = Limits::default();
    let decoded = decode_prefix(bytes, &limits);
    if bytes.get(1) == Some(&80) {
        match inflate(bytes, &limits) {
            // Only the outermost term may be compressed.
            Ok(inflated) if inflated.get(1) == Some(&80) => {
                assert!(matches!(decoded, Err(DecodeError::Refused { tag: 80, .. })));
                assert!(guard::check(&inflated, &form_only()).is_err());
            }
            Ok(inflated) => assert_eq!(decoded.map(|(term, _)| term), decode(&inflated, &limits)),
            Err(error) => assert_eq!(decoded.map(|_| ()), Err(error)),
        }
        return;
    }
    let walked = term_len(bytes, &limits);
    match decoded {
        Ok((_, rest)) => assert_eq!(walked, Ok(bytes.len() - rest.len())),
        // What a walk has no way to see.
        Err(DecodeError::DuplicateKey { offset }) => assert!(walked.map_or(true, |len| len >= offset)),
        Err(error) => assert_eq!(walked, Err(error)),
    }
    let trailing = |len| match bytes.len() - len {
        0 => Ok(()),
        remaining => Err(GuardError::Decode(DecodeError::Trailing {
            offset: len,
            remaining,
        })),
    };
    let wanted = walked.map_err(GuardError::Decode).and_then(trailing);
    let whole = guard::check(bytes, &form_only());
    assert_eq!(whole.map(|_| ()), wanted);
    for max_work in [0, 1, 7, 100] {
        assert_eq!(step_through(bytes, form_only(), max_work).0, whole);
    }
}

/// What the guard writes of a term; its verdict has to be that of a guard that writes nothing.
pub fn indexed(bytes: &[u8], policy: GuardPolicy, max_work: usize) -> Option<Indexed> {
    let mut guard = Guard::indexing(policy);
    let verdict = loop {
        match guard.step(bytes, max_work) {
            Ok(Step::More) => assert_eq!(guard.indexed(bytes), None, "before the end"),
            Ok(Step::Done(stats)) => break Ok(stats),
            Err(error) => break Err(error),
        }
    };
    assert_eq!(verdict, step_through(bytes, policy, max_work).0);
    let indexed = guard.indexed(bytes);
    assert!(verdict.is_ok() || indexed.is_none(), "of a refused term");
    assert_eq!(guard.indexed(bytes), None, "twice");
    indexed
}

/// The term with its atoms as text again, read by the layouts in the manual of the format and not by our cursor.
fn expanded(indexed: &Indexed) -> Vec<u8> {
    const CACHE_REF: u8 = 82;
    assert_eq!(indexed.bytes[0], 131);
    let mut out = vec![131];
    let (mut owed, mut at) = (1, 1);
    while owed > 0 {
        owed -= 1;
        let rest = &indexed.bytes[at..];
        let count = |from: usize, len: usize| {
            rest[from..from + len]
                .iter()
                .fold(0, |all, &byte| all << 8 | usize::from(byte))
        };
        let (len, parts) = match rest[0] {
            CACHE_REF => {
                let text = indexed.atoms[count(1, 1)].as_str();
                out.push(118);
                out.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
                out.extend(text.bytes());
                at += 2;
                continue;
            }
            70 => (9, 0),
            77 => (6 + count(1, 4), 0),
            97 => (2, 0),
            98 => (5, 0),
            99 => (32, 0),
            104 => (2, count(1, 1)),
            105 => (5, count(1, 4)),
            106 => (1, 0),
            107 => (3 + count(1, 2), 0),
            108 => (5, count(1, 4) + 1),
            109 => (5 + count(1, 4), 0),
            110 => (3 + count(1, 1), 0),
            111 => (6 + count(1, 4), 0),
            116 => (5, 2 * count(1, 4)),
            tag => panic!("tag {tag} in {indexed:?}"),
        };
        out.extend(&rest[..len]);
        at += len;
        owed += parts;
    }
    assert_eq!(at, indexed.bytes.len());
    out
}

/// Holds what the guard writes of these bytes, if anything, against them.
pub fn check_indexed(bytes: &[u8]) -> Option<Indexed> {
    let whole = indexed(bytes, form_only(), usize::MAX);
    for max_work in [1, 100, 16 << 10] {
        assert_eq!(indexed(bytes, form_only(), max_work), whole);
    }
    let written = whole?;
    assert!(written.bytes.len() <= bytes.len() && written.atoms.len() <= 255);
    // Also what only a decoder sees: a key that a map has twice.
    let limits = Limits::default();
    match (decode(&expanded(&written), &limits), decode(bytes, &limits)) {
        (Ok(one), Ok(other)) => assert_eq!(one, other),
        (one, other) => assert!(one.is_err() && other.is_err(), "{one:?} {other:?}"),
    }
    Some(written)
}
