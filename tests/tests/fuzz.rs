//! The fuzz targets as property tests: every seed, and edits of seeds, which get further than random bytes do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use meshx_tests::fuzz::{Body, TARGETS};
use meshx_tests::repository;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;

/// Runs of each target; those that ask a running agent have a tenth.
const CASES: u32 = 20_000;

/// One change of a byte string.
#[derive(Debug, Clone)]
enum Edit {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Repeat(Index, usize),
    Cut(Index),
    /// Numbers on both sides of a limit, as lengths are written.
    Number(Index, u32, usize),
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let place = |at: &Index, len: usize| if len == 0 { 0 } else { at.index(len) };
        let len = bytes.len();
        match self {
            Self::Set(at, byte) if len > 0 => bytes[place(at, len)] = *byte,
            Self::Flip(at, bit) if len > 0 => bytes[place(at, len)] ^= 1 << (bit & 7),
            Self::Set(_, byte) | Self::Flip(_, byte) => bytes.push(*byte),
            Self::Insert(at, new) => {
                let at = at.index(len + 1);
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Remove(at, count) => {
                let at = place(at, len);
                bytes.drain(at..(at + count).min(len));
            }
            Self::Repeat(at, count) => {
                let at = place(at, len);
                let piece = bytes[at..(at + count).min(len)].to_vec();
                bytes.splice(at..at, piece);
            }
            Self::Cut(at) => bytes.truncate(place(at, len)),
            Self::Number(at, number, width) => {
                let at = place(at, len);
                let number = &number.to_be_bytes()[4 - width..];
                let end = (at + width).min(len);
                bytes.splice(at..end, number.iter().copied());
            }
        }
    }
}

fn edit() -> impl Strategy<Value = Edit> {
    let number = prop_oneof![
        0u32..4,
        250u32..260,
        65_530u32..65_540,
        Just(u32::MAX),
        Just(1 << 31),
        any::<u32>()
    ];
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (any::<Index>(), vec(any::<u8>(), 1..9)).prop_map(|(at, new)| Edit::Insert(at, new)),
        (any::<Index>(), 1usize..16).prop_map(|(at, count)| Edit::Remove(at, count)),
        (any::<Index>(), 1usize..64).prop_map(|(at, count)| Edit::Repeat(at, count)),
        any::<Index>().prop_map(Edit::Cut),
        (any::<Index>(), number, 1usize..=4).prop_map(|(at, number, width)| Edit::Number(at, number, width)),
    ]
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let dir = repository().join("fuzz/seeds").join(target);
    let mut paths: Vec<_> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn holds(target: &str, cases: u32) {
    let body: Body = TARGETS.iter().find(|(name, _)| *name == target).unwrap().1;
    let seeds = seeds(target);
    assert!(seeds.len() >= 3, "few seeds for {target}");
    seeds.iter().for_each(|seed| body(seed));
    let edited = (any::<Index>(), vec(edit(), 1..6)).prop_map(|(seed, edits)| {
        let mut bytes = seeds[seed.index(seeds.len())].clone();
        edits.iter().for_each(|edit| edit.apply(&mut bytes));
        bytes
    });
    let random = vec(any::<u8>(), 0..200);
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&prop_oneof![9 => edited, 1 => random], |bytes| {
            body(&bytes);
            Ok(())
        })
        .unwrap();
}

#[test]
fn etf() {
    holds("etf", CASES);
}

#[test]
fn data() {
    holds("data", CASES);
}

#[test]
fn framing() {
    holds("framing", CASES);
}

#[test]
fn handshake() {
    holds("handshake", CASES);
}

#[test]
fn epmd() {
    holds("epmd", CASES);
}

#[test]
fn rpc() {
    holds("rpc", CASES);
}

#[test]
fn mesh() {
    holds("mesh", CASES / 10);
}

#[test]
fn control() {
    holds("control", CASES / 10);
}

/// libFuzzer's wrappers are not built here: each must at least be there and call its body.
#[test]
fn every_target_has_a_wrapper() {
    for (name, _) in TARGETS {
        let wrapper = fs::read_to_string(repository().join(format!("fuzz/fuzz_targets/{name}.rs"))).unwrap();
        assert!(wrapper.contains(&format!("fuzz::{name}(data)")), "{wrapper}");
    }
}
