//! Whatever recurses over an owned term fits a small stack at the deepest nesting that is accepted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::thread;

use meshx_etf::{DEPTH_CEILING, DecodeError, Limits, decode, encode};

/// Half of what a Rust thread gets by default (2 MiB).
const STACK: usize = 1024 << 10;

/// `levels` containers inside one another, each kind in turn, also in the key of a map.
fn nested(levels: u32) -> Vec<u8> {
    let (mut head, mut tail) = (vec![131], vec![]);
    for level in 0..levels {
        match level % 5 {
            0 => head.extend_from_slice(&[104, 1]),
            1 => {
                head.extend_from_slice(&[108, 0, 0, 0, 1]);
                tail.push(vec![106]);
            }
            2 => {
                head.extend_from_slice(&[108, 0, 0, 0, 1]);
                tail.push(vec![97, 1]);
            }
            3 => head.extend_from_slice(&[116, 0, 0, 0, 1, 97, 1]),
            _ => {
                head.extend_from_slice(&[116, 0, 0, 0, 1]);
                tail.push(vec![97, 1]);
            }
        }
    }
    head.push(106);
    head.extend(tail.into_iter().rev().flatten());
    head
}

fn on_small_stack(test: impl FnOnce() + Send + 'static) {
    thread::Builder::new()
        .stack_size(STACK)
        .spawn(test)
        .unwrap()
        .join()
        .unwrap();
}

#[test]
fn recursion_fits_a_small_stack() {
    let limits = Limits {
        max_depth: u32::MAX,
        ..Limits::default()
    };
    let decoded = decode(&nested(DEPTH_CEILING), &limits);
    on_small_stack(move || {
        let term = decoded.unwrap();
        let copy = term.clone();
        assert_eq!(term, copy);
        assert!(!term.to_string().is_empty());
        assert!(!format!("{term:?}").is_empty());
        let mut bytes = Vec::new();
        encode(&term, &mut bytes).unwrap();
        assert_eq!(
            decode(
                &bytes,
                &Limits {
                    max_depth: u32::MAX,
                    ..Limits::default()
                }
            )
            .unwrap(),
            copy
        );
        assert!(HashSet::from([term]).contains(&copy));
    });
    assert_eq!(
        decode(&nested(DEPTH_CEILING + 1), &limits).map(|_| ()),
        Err(DecodeError::TooDeep {
            limit: DEPTH_CEILING as usize,
            offset: nested_offset()
        })
    );
}

/// Where the container begins that is one too deep.
fn nested_offset() -> usize {
    let heads = (0..DEPTH_CEILING)
        .map(|level| [2, 5, 5, 7, 5][level as usize % 5])
        .sum::<usize>();
    1 + heads
}

/// The check for keys that occur twice compares keys, which may be maps with maps as keys.
#[test]
fn comparing_keys_fits_a_small_stack() {
    let limits = Limits {
        max_depth: u32::MAX,
        ..Limits::default()
    };
    let mut bytes = vec![131];
    (0..DEPTH_CEILING).for_each(|_| bytes.extend_from_slice(&[116, 0, 0, 0, 2]));
    bytes.push(106);
    (0..DEPTH_CEILING).for_each(|_| bytes.extend_from_slice(&[97, 1, 97, 2, 97, 3]));
    on_small_stack(move || {
        let term = decode(&bytes, &limits).unwrap();
        assert!(HashSet::from([term.clone()]).contains(&term));
    });
}

#[cfg(feature = "eetf")]
#[test]
fn conversion_fits_a_small_stack() {
    let limits = Limits {
        max_depth: u32::MAX,
        ..Limits::default()
    };
    let term = decode(&nested(DEPTH_CEILING), &limits).unwrap();
    on_small_stack(move || {
        let theirs = eetf::Term::try_from(&term).unwrap();
        assert_eq!(meshx_etf::Term::try_from(&theirs).unwrap(), term);
    });
}

/// A fun that captured `parts`, without a version byte.
#[cfg(feature = "eetf")]
fn fun(parts: &[u8]) -> Vec<u8> {
    // Module m, old index, old uniq, pid.
    let head = [
        119, 1, b'm', 97, 0, 97, 0, 88, 119, 1, b'n', 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9,
    ];
    let size = (29 + head.len() + parts.len()) as u32;
    [
        &[112],
        &size.to_be_bytes()[..],
        &[1],
        &[7; 16],
        &0u32.to_be_bytes(),
        &1u32.to_be_bytes(),
        &head,
        parts,
    ]
    .concat()
}

#[cfg(feature = "eetf")]
#[test]
fn conversion_of_funs_fits_a_small_stack() {
    let limits = Limits {
        max_depth: u32::MAX,
        ..Limits::default()
    };
    let bytes = (0..DEPTH_CEILING).fold(vec![106], |inner, _| fun(&inner));
    let term = decode(&[vec![131], bytes].concat(), &limits).unwrap();
    on_small_stack(move || {
        let theirs = eetf::Term::try_from(&term).unwrap();
        assert_eq!(meshx_etf::Term::try_from(&theirs).unwrap(), term);
    });
}
