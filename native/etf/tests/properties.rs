//! What holds for every term and for every input.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use common::agreement::{check_agreement, form_only, step_through};
use common::{each, encoded, term};
use meshx_etf::guard::{self, Guard, GuardError, GuardPolicy, Step};
use meshx_etf::{DecodeError, Limits, Pid, Term, TermRef, Token, Walk, decode, decode_prefix, term_len};
use proptest::prelude::*;

/// The term, by the accessors of a borrowed look alone.
fn rebuilt(seen: TermRef<'_>) -> Term {
    match seen.token() {
        Token::Tuple { arity } => {
            let items: Vec<Term> = seen.elements().unwrap().map(rebuilt).collect();
            assert_eq!((items.len(), seen.size()), (arity, Some(arity)));
            assert!(seen.element(arity).is_none());
            Term::Tuple(items)
        }
        Token::List { .. } | Token::ByteList(_) | Token::Nil => {
            let mut elements = seen.elements().unwrap();
            let items: Vec<Term> = elements.by_ref().map(rebuilt).collect();
            match elements.tail() {
                Some(tail) => Term::list_with_tail(items, rebuilt(tail)),
                None => Term::List(items),
            }
        }
        Token::Map { .. } => {
            let pairs = seen.pairs().unwrap();
            assert_eq!(Some(pairs.len()), seen.size());
            Term::map(pairs.map(|(key, value)| (rebuilt(key), rebuilt(value))))
        }
        Token::Atom(atom) => match seen.as_bool() {
            Some(value) => Term::from(value),
            None => Term::atom(atom.to_str().into_owned()),
        },
        Token::Int(value) => Term::from(value),
        Token::Float(_) => Term::from(seen.as_float().unwrap()),
        Token::Binary(_) => Term::binary(seen.as_binary().unwrap()),
        _ => seen.to_term().unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn encode_then_decode_is_the_same_term(term in term()) {
        let bytes = encoded(&term);
        prop_assert_eq!(decode(&bytes, &Limits::default()), Ok(term.clone()));
        check_agreement(&bytes);
        // And the same as their decoder has it, part by part.
        let theirs = eetf::Term::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(Term::try_from(&theirs), Ok(term.clone()));
        prop_assert_eq!(Term::try_from(&eetf::Term::try_from(&term).unwrap()), Ok(term));
    }

    #[test]
    fn a_borrowed_look_sees_what_is_decoded(term in term()) {
        let bytes = encoded(&term);
        let seen = TermRef::new(&bytes, &Limits::default()).unwrap();
        prop_assert_eq!(rebuilt(seen), term.clone());
        prop_assert_eq!(seen.to_term(), Ok(term.clone()));
        if let Term::Map(map) = &term {
            for (key, value) in map {
                let found = match key {
                    Term::Atom(atom) => seen.key(atom.as_str()),
                    Term::Binary(bytes) => seen.binary_key(bytes),
                    _ => continue,
                };
                prop_assert_eq!(found.map(rebuilt), Some(value.clone()));
            }
            prop_assert!(seen.key("no such key").is_none());
        }
    }

    #[test]
    fn every_prefix_is_refused(term in term()) {
        let bytes = encoded(&term);
        for cut in 0..bytes.len() {
            prop_assert!(decode(&bytes[..cut], &Limits::default()).is_err());
            prop_assert!(guard::check(&bytes[..cut], &form_only()).is_err());
        }
    }

    #[test]
    fn terms_that_follow_one_another_come_apart(terms in prop::collection::vec(term(), 1..4), tail in any::<Vec<u8>>()) {
        let mut bytes: Vec<u8> = terms.iter().flat_map(encoded).collect();
        bytes.extend_from_slice(&tail);
        let mut rest = bytes.as_slice();
        for term in &terms {
            let len = term_len(rest, &Limits::default()).unwrap();
            let (decoded, after) = decode_prefix(rest, &Limits::default()).unwrap();
            prop_assert_eq!(&decoded, term);
            prop_assert_eq!(after, &rest[len..]);
            rest = after;
        }
        prop_assert_eq!(rest, tail.as_slice());
    }

    #[test]
    fn damaged_terms_never_panic(
        term in term(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        tags in any::<bool>(),
    ) {
        let mut bytes = encoded(&term);
        for (index, byte) in damage {
            let index = index.index(bytes.len());
            // Bytes that are tags reach further into the decoder than random ones.
            bytes[index] = if tags { [67, 70, 77, 80, 82].into_iter().chain(88..=121).nth(usize::from(byte) % 39).unwrap() } else { byte };
        }
        check_agreement(&bytes);
    }

    #[test]
    fn any_bytes_never_panic(mut bytes in any::<Vec<u8>>()) {
        check_agreement(&bytes);
        bytes.insert(0, 131);
        check_agreement(&bytes);
    }

    #[test]
    fn the_guard_accepts_what_the_policy_allows_and_nothing_else(
        term in term(),
        (allow_exports, allow_pids, allow_ports, allow_references) in any::<(bool, bool, bool, bool)>(),
        (max_atoms, max_atom_bytes, max_integer_bytes) in (0usize..12, 0usize..200, 0usize..20),
        (max_map_pairs, max_key_bytes, max_nodes) in (0usize..12, 0usize..300, 0usize..4),
    ) {
        let policy = GuardPolicy {
            allow_exports, allow_pids, allow_ports, allow_references, max_atoms, max_atom_bytes, max_integer_bytes,
            max_map_pairs, max_key_bytes, max_nodes,
            ..GuardPolicy::default()
        };
        let (mut kinds, mut atoms, mut integer_bytes) = (true, Vec::new(), 0);
        let (mut map_pairs, mut key_bytes, mut nodes) = (0, 0, BTreeSet::new());
        each(&term, &mut |part| match part {
            Term::Atom(atom) => atoms.push(atom.clone()),
            Term::Pid(pid) => { kinds &= allow_pids; atoms.push(pid.node.clone()); nodes.insert((pid.node.clone(), pid.creation)); }
            Term::Port(port) => { kinds &= allow_ports; atoms.push(port.node.clone()); nodes.insert((port.node.clone(), port.creation)); }
            Term::Reference(reference) => {
                kinds &= allow_references;
                atoms.push(reference.node.clone());
                nodes.insert((reference.node.clone(), reference.creation));
            }
            Term::Map(map) => {
                map_pairs += map.len();
                // Without the version byte.
                key_bytes += map.iter().map(|(key, _)| encoded(key).len() - 1).sum::<usize>();
            }
            Term::Export(export) => { kinds &= allow_exports; atoms.extend([export.module.clone(), export.function.clone()]); }
            Term::Int(value) if i32::try_from(*value).is_err() => {
                integer_bytes = integer_bytes.max(8 - value.unsigned_abs().leading_zeros() as usize / 8);
            }
            Term::BigInt(value) => integer_bytes = integer_bytes.max(value.magnitude_le().len()),
            _ => {}
        });
        let atom_bytes: usize = atoms.iter().map(|atom| atom.as_str().len()).sum();
        let allowed = kinds && atoms.len() <= max_atoms && atom_bytes <= max_atom_bytes && integer_bytes <= max_integer_bytes
            && map_pairs <= max_map_pairs && key_bytes <= max_key_bytes && nodes.len() <= max_nodes;
        let verdict = guard::check(&encoded(&term), &policy);
        prop_assert_eq!(verdict.is_ok(), allowed, "{:?}", verdict);
        if let Ok(stats) = verdict {
            prop_assert_eq!((stats.atoms, stats.atom_bytes), (atoms.len(), atom_bytes));
            prop_assert_eq!((stats.map_pairs, stats.key_bytes, stats.nodes), (map_pairs, key_bytes, nodes.len()));
        }
    }
}

#[test]
fn the_guard_refuses_by_name() {
    let refusal = |bytes: &[u8], policy: GuardPolicy| guard::check(bytes, &policy).unwrap_err();
    let default = GuardPolicy::default();
    let kind = |error| match error {
        GuardError::NotAllowed { kind, offset: 1 } => kind,
        other => panic!("{other}"),
    };
    let none = GuardPolicy {
        allow_pids: false,
        allow_ports: false,
        allow_references: false,
        ..default
    };
    assert_eq!(
        kind(refusal(&[131, 113, 119, 1, b'm', 119, 1, b'f', 97, 1], default)),
        "fun by name"
    );
    assert_eq!(
        kind(refusal(
            &[131, 88, 119, 1, b'n', 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9],
            none
        )),
        "pid"
    );
    assert_eq!(
        kind(refusal(&[131, 89, 119, 1, b'n', 0, 0, 0, 1, 0, 0, 0, 9], none)),
        "port"
    );
    assert_eq!(
        kind(refusal(
            &[131, 90, 0, 1, 119, 1, b'n', 0, 0, 0, 1, 0, 0, 0, 9],
            none
        )),
        "reference"
    );
    let mut fun = vec![131, 112, 0, 0, 0, 52, 1];
    fun.extend_from_slice(&[0; 20]);
    fun.extend_from_slice(&[0, 0, 0, 0, 119, 1, b'm', 97, 0, 97, 0]);
    fun.extend_from_slice(&[88, 119, 1, b'n', 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9]);
    assert_eq!(kind(refusal(&fun, default)), "fun");
    assert!(
        guard::check(
            &fun,
            &GuardPolicy {
                allow_funs: true,
                ..default
            }
        )
        .is_ok()
    );
    assert!(matches!(
        refusal(
            &[131, 104, 2, 106, 106],
            GuardPolicy {
                max_heap_words: 2,
                ..default
            }
        ),
        GuardError::TooManyHeapWords {
            words: 3,
            limit: 2,
            offset: 1
        }
    ));
    assert!(matches!(
        refusal(
            &[131, 116, 0, 0, 0, 1, 106, 106],
            GuardPolicy {
                max_map_pairs: 0,
                ..default
            }
        ),
        GuardError::TooManyMapPairs {
            pairs: 1,
            limit: 0,
            offset: 1
        }
    ));
    // The key is `{[]}`, the value of the map in a tuple is not in a key.
    let key = [131, 104, 2, 116, 0, 0, 0, 1, 104, 1, 106, 104, 1, 106, 106];
    let of_key = |max_key_bytes| GuardPolicy {
        max_key_bytes,
        ..default
    };
    assert!(matches!(
        refusal(&key, of_key(2)),
        GuardError::TooManyKeyBytes { limit: 2, offset: 10 }
    ));
    assert!(guard::check(&key, &of_key(3)).is_ok());
    for (policy, bytes) in [
        (
            GuardPolicy {
                max_depth: 1,
                ..default
            },
            &[131, 104, 1, 104, 1, 106][..],
        ),
        (
            GuardPolicy {
                max_terms: 2,
                ..default
            },
            &[131, 104, 2, 106, 106],
        ),
        (
            GuardPolicy {
                max_bytes: 2,
                ..default
            },
            &[131, 97, 1],
        ),
        (default, &[131, 106, 106]),
        (default, &[131, 80, 0, 0, 0, 1, 0]),
    ] {
        assert!(
            matches!(refusal(bytes, policy), GuardError::Decode(_)),
            "{bytes:?}"
        );
    }
}

#[test]
fn a_step_does_bounded_work() {
    // 300,000 small integers and a 16 MiB binary, whose contents are not looked at.
    let term = Term::tuple([
        Term::binary(vec![1; 16 << 20]),
        Term::list((0..300_000).map(|i| Term::from(i % 1000))),
    ]);
    let bytes = encoded(&term);
    let (whole, one) = step_through(&bytes, GuardPolicy::default(), usize::MAX);
    assert_eq!(one, 1);
    let work = 128 << 10;
    let (sliced, steps) = step_through(&bytes, GuardPolicy::default(), work);
    assert_eq!(sliced, whole);
    // No token here has more than the 8 bytes that each counts as at least.
    assert_eq!(steps, (whole.unwrap().terms * 8).div_ceil(work));
    let mut guard = Guard::new(GuardPolicy::default());
    let mut before = guard.offset();
    while guard.step(&bytes, work).unwrap() == Step::More {
        let passed = guard.offset() - before;
        assert!(passed <= work + (16 << 20) + 16, "{passed}");
        before = guard.offset();
    }
}

/// Identifiers of so many nodes that each has to be held against all the others.
#[test]
fn nodes_are_counted_and_cost_work() {
    let pid = |node: u32, creation| {
        Term::from(Pid {
            node: format!("n{node}@h").into(),
            id: 1,
            serial: 0,
            creation,
        })
    };
    let policy = |max_nodes| GuardPolicy {
        max_nodes,
        ..GuardPolicy::default()
    };
    let of_nodes = encoded(&Term::list((0..64).chain(0..64).map(|node| pid(node, 5))));
    assert_eq!(guard::check(&of_nodes, &policy(64)).unwrap().nodes, 64);
    let of_creations = encoded(&Term::list((0..65).map(|creation| pid(0, creation))));
    for bytes in [&of_nodes, &of_creations] {
        let limit = if bytes == &of_nodes { 63 } else { 64 };
        let error = guard::check(bytes, &policy(limit)).unwrap_err();
        assert!(
            matches!(error, GuardError::TooManyNodes { limit: l, .. } if l == limit),
            "{error}"
        );
        assert!(error.to_string().contains("max_nodes"));
    }
    let bytes = encoded(&Term::list((0..64 * 100).map(|n| pid(n % 64, 5))));
    let len_alone = bytes.len() / 1000;
    let (whole, steps) = step_through(&bytes, policy(64), 1000);
    assert!(whole.is_ok());
    assert!(
        steps > 3 * len_alone,
        "{steps} steps, by length alone {len_alone}"
    );
}

#[test]
fn later_steps_need_the_same_input() {
    let bytes = encoded(&Term::list((1000..2000).map(Term::from)));
    let mut guard = Guard::new(GuardPolicy::default());
    assert_eq!(guard.step(&bytes, 10), Ok(Step::More));
    let wanted = Err(GuardError::OtherInput {
        began: bytes.len(),
        now: 10,
    });
    assert_eq!(guard.step(&bytes[..10], 10), wanted);
    assert_eq!(guard.step(&bytes, 10), wanted);
}

#[test]
fn a_borrowed_look_takes_lists_in_pieces() {
    // [1, 2, 3, 4 | ok], written as [1 | [2 | "\3\4"]]; then with a tail that is no list.
    let limits = Limits::default();
    let bytes = [
        131, 108, 0, 0, 0, 1, 97, 1, 108, 0, 0, 0, 1, 97, 2, 107, 0, 2, 3, 4,
    ];
    let look = TermRef::new(&bytes, &limits).unwrap();
    let ints: Vec<_> = look.elements().unwrap().filter_map(TermRef::as_int).collect();
    assert_eq!(ints, [1, 2, 3, 4]);
    assert_eq!(look.element(3).unwrap().to_term(), Ok(Term::from(4)));
    let bytes = [
        131, 108, 0, 0, 0, 1, 97, 1, 108, 0, 0, 0, 1, 97, 2, 119, 2, b'o', b'k',
    ];
    let mut elements = TermRef::new(&bytes, &limits).unwrap().elements().unwrap();
    assert!(elements.tail().is_none());
    assert_eq!(elements.by_ref().count(), 2);
    assert!(elements.tail().unwrap().as_atom().unwrap() == "ok");
    assert!(TermRef::new(&[131, 106, 0], &limits).is_err());
    assert!(TermRef::new(&[131, 97, 1], &limits).unwrap().elements().is_none());
    // A key twice: the first is found, and copying shows the fault.
    let twice = [131, 116, 0, 0, 0, 2, 97, 1, 97, 2, 97, 1, 97, 3];
    let look = TermRef::new(&twice, &limits).unwrap();
    assert!(matches!(look.to_term(), Err(DecodeError::DuplicateKey { .. })));
}

#[test]
fn a_walk_borrows() {
    let bytes = [
        131, 104, 3, 109, 0, 0, 0, 2, 7, 8, 107, 0, 2, 1, 2, 108, 0, 0, 0, 1, 100, 0, 1, 0xE9, 106,
    ];
    let mut walk = Walk::new(&bytes, &Limits::default()).unwrap();
    let mut tokens = Vec::new();
    let mut depths = Vec::new();
    while let Some(token) = walk.next_token().unwrap() {
        tokens.push(token);
        depths.push(walk.depth());
    }
    assert!(matches!(
        tokens.as_slice(),
        [
            Token::Tuple { arity: 3 },
            Token::Binary([7, 8]),
            Token::ByteList([1, 2]),
            Token::List { len: 1 },
            Token::Atom(_),
            Token::Nil
        ]
    ));
    assert_eq!(depths, [1, 1, 1, 2, 2, 0]);
    assert_eq!(walk.offset(), bytes.len());
}
