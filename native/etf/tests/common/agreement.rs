//! All ways to read the same bytes come to the same result; held by the property tests and by the fuzz targets.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

use meshx_etf::guard::{self, Guard, GuardError, GuardPolicy, Step};
use meshx_etf::{DecodeError, Limits, decode, decode_prefix, inflate, term_len};

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
