//! Every operation there and back, and every way to be wrong.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn pid(id: u32) -> Pid {
    Pid {
        node: Atom::from("a@h"),
        id,
        serial: 0,
        creation: 7,
    }
}

fn reference(id: u32) -> Reference {
    Reference {
        node: Atom::from("a@h"),
        creation: 7,
        ids: vec![id, 2, 3],
    }
}

fn samples(token: Option<Term>) -> Vec<(i64, usize, Control)> {
    let (from, to) = (pid(1), pid(2));
    let name = Proc::Name(Atom::from("name"));
    let reason = Term::atom("boom");
    let plain = token.is_none();
    let either = |plain_op: i64, traced: i64| if plain { plain_op } else { traced };
    let extra = usize::from(!plain);
    vec![
        (
            1,
            2,
            Control::Link {
                from: from.clone(),
                to: to.clone(),
            },
        ),
        (
            either(2, 12),
            2 + extra,
            Control::Send {
                to: to.clone(),
                token: token.clone(),
            },
        ),
        (
            either(3, 13),
            3 + extra,
            Control::Exit {
                from: from.clone(),
                to: to.clone(),
                reason: reason.clone(),
                token: token.clone(),
            },
        ),
        (
            4,
            2,
            Control::Unlink {
                from: from.clone(),
                to: to.clone(),
            },
        ),
        (5, 0, Control::NodeLink),
        (
            either(6, 16),
            3 + extra,
            Control::RegSend {
                from: from.clone(),
                to: Atom::from("name"),
                token: token.clone(),
            },
        ),
        (
            7,
            2,
            Control::GroupLeader {
                from: from.clone(),
                to: to.clone(),
            },
        ),
        (
            either(8, 18),
            3 + extra,
            Control::Exit2 {
                from: from.clone(),
                to: to.clone(),
                reason: reason.clone(),
                token: token.clone(),
            },
        ),
        (
            19,
            3,
            Control::MonitorP {
                from: from.clone(),
                to: name.clone(),
                reference: reference(1),
            },
        ),
        (
            20,
            3,
            Control::DemonitorP {
                from: from.clone(),
                to: Proc::Pid(to.clone()),
                reference: reference(1),
            },
        ),
        (
            21,
            4,
            Control::MonitorPExit {
                from: name.clone(),
                to: to.clone(),
                reference: reference(1),
                reason,
            },
        ),
        (
            either(22, 23),
            2 + extra,
            Control::SendSender {
                from: from.clone(),
                to: to.clone(),
                token: token.clone(),
            },
        ),
        (
            either(24, 25),
            2 + extra,
            Control::PayloadExit {
                from: from.clone(),
                to: to.clone(),
                token: token.clone(),
            },
        ),
        (
            either(26, 27),
            2 + extra,
            Control::PayloadExit2 {
                from: from.clone(),
                to: to.clone(),
                token: token.clone(),
            },
        ),
        (
            28,
            3,
            Control::PayloadMonitorPExit {
                from: name,
                to: to.clone(),
                reference: reference(1),
            },
        ),
        (
            either(29, 30),
            5 + extra,
            Control::SpawnRequest {
                id: reference(4),
                from: from.clone(),
                group_leader: to.clone(),
                module: Atom::from("m"),
                function: Atom::from("f"),
                arity: 255,
                options: vec![Term::atom("link")],
                token: token.clone(),
            },
        ),
        (
            either(31, 32),
            4 + extra,
            Control::SpawnReply {
                id: reference(4),
                to: to.clone(),
                flags: 3,
                result: SpawnResult::Error(Atom::from("notsup")),
                token: token.clone(),
            },
        ),
        (
            either(33, 34),
            2 + extra,
            Control::AliasSend {
                from: from.clone(),
                alias: reference(9),
                token: token.clone(),
            },
        ),
        (
            35,
            3,
            Control::UnlinkId {
                id: u64::MAX,
                from: from.clone(),
                to: to.clone(),
            },
        ),
        (
            36,
            3,
            Control::UnlinkIdAck {
                id: 1,
                from: from.clone(),
                to: to.clone(),
            },
        ),
        altact(Target::Pid(to.clone()), true, false, &token),
        altact(Target::Pid(to), false, true, &token),
        altact(Target::Name(Atom::from("name")), true, false, &token),
        altact(Target::Alias(reference(5)), false, false, &token),
        altact(Target::Alias(reference(5)), true, true, &token),
        (
            99,
            1,
            Control::Unknown {
                op: 99,
                fields: vec![Term::Int(1)],
            },
        ),
    ]
}

fn altact(to: Target, priority: bool, exit: bool, token: &Option<Term>) -> (i64, usize, Control) {
    let control = Control::AltactSig {
        from: pid(1),
        to,
        priority,
        exit,
        token: token.clone(),
    };
    (37, 3 + usize::from(token.is_some()), control)
}

fn all_samples() -> Vec<(i64, usize, Control)> {
    let mut all = samples(None);
    all.extend(samples(Some(Term::tuple([Term::Int(1), Term::atom("token")]))));
    all
}

#[test]
fn every_operation_goes_round_with_its_number_and_arity() {
    let mut seen = std::collections::BTreeSet::new();
    for (op, arity, control) in all_samples() {
        let term = Term::from(control.clone());
        let tuple = term.as_tuple().unwrap();
        assert_eq!(
            (tuple[0].as_int(), tuple.len()),
            (Some(op), arity + 1),
            "{control:?}"
        );
        assert_eq!(Control::try_from(term), Ok(control));
        seen.insert(op);
    }
    for (name, op) in Op::NAMED {
        assert!(seen.contains(&op.0), "{name} is not among the samples");
    }
}

#[test]
fn the_short_way_writes_what_the_general_way_writes() {
    let long = Atom::from("ä".repeat(200));
    let with_long_names = [
        Control::Send {
            to: Pid {
                node: long.clone(),
                ..pid(1)
            },
            token: None,
        },
        Control::RegSend {
            from: pid(1),
            to: long,
            token: None,
        },
    ];
    let all = all_samples().into_iter().map(|(_, _, control)| control);
    for control in all.chain(with_long_names) {
        let (mut general, mut short) = (vec![1], vec![1]);
        meshx_etf::encode_bare(&Term::from(control.clone()), &mut general).unwrap();
        control.clone().encode(&mut short).unwrap();
        assert_eq!(short, general, "{control:?}");
    }
    let no_words = Control::AliasSend {
        from: pid(1),
        alias: Reference {
            ids: Vec::new(),
            ..reference(1)
        },
        token: None,
    };
    let mut out = vec![1];
    assert!(no_words.encode(&mut out).is_err());
    assert_eq!(out, [1]);
}

#[test]
fn a_wrong_arity_is_refused_for_every_known_operation() {
    for (op, arity, control) in all_samples().into_iter().filter(|(op, ..)| *op < 37) {
        let Term::Tuple(tuple) = Term::from(control) else {
            unreachable!("a control message is a tuple")
        };
        let mut longer = tuple.clone();
        longer.push(Term::Int(0));
        let wrong = |got| {
            Err(ControlError::Arity {
                op: Op(op),
                got,
                wanted: arity,
            })
        };
        assert_eq!(Control::try_from(Term::Tuple(longer)), wrong(arity + 1));
        for len in 1..tuple.len() {
            assert_eq!(
                Control::try_from(Term::Tuple(tuple[..len].to_vec())),
                wrong(len - 1)
            );
        }
    }
}

#[test]
fn a_field_of_another_type_is_refused_with_its_place() {
    for (op, _, control) in all_samples().into_iter().filter(|(op, ..)| *op < 37) {
        let Term::Tuple(tuple) = Term::from(control.clone()) else {
            unreachable!("a control message is a tuple")
        };
        for place in 1..tuple.len() {
            let mut changed = tuple.clone();
            // No operation takes a float where a type is asked for.
            changed[place] = Term::Float(1.5);
            match Control::try_from(Term::Tuple(changed)) {
                Err(ControlError::Field {
                    op: at,
                    position,
                    got,
                    ..
                }) => {
                    assert_eq!((at, position, got), (Op(op), place + 1, "a float"));
                }
                Ok(_) => {
                    let any = [Term::atom(""), Term::atom("boom")].contains(&tuple[place])
                        || tuple[place].as_tuple().is_some_and(|t| t.len() == 2);
                    assert!(any, "field {place} of {control:?} takes anything");
                }
                Err(other) => unreachable!("{other}"),
            }
        }
    }
}

#[test]
fn flags_of_an_altact_sig_fit_its_fields() {
    let token = Term::tuple([Term::Int(1)]);
    let message = |flags: i64, to: Term, token: Option<&Term>| {
        let mut tuple = vec![Term::Int(37), Term::Int(flags), pid(1).into(), to];
        tuple.extend(token.cloned());
        Control::try_from(Term::Tuple(tuple))
    };
    let (name, alias) = (Term::atom("name"), Term::from(reference(5)));
    assert!(message(0b01001, name.clone(), None).is_ok());
    assert!(message(0b10110, alias.clone(), Some(&token)).is_ok());
    // A token announced and not there, and the other way about; two kinds of target; exit/2 by name; unknown bits.
    for (flags, to, token) in [
        (0b01010, &name, None),
        (0b01000, &name, Some(&token)),
        (0b01100, &alias, None),
        (0b11000, &name, None),
        (0b100000, &name, None),
        (-1, &name, None),
    ] {
        let refused = message(flags, to.clone(), token);
        assert!(
            matches!(refused, Err(ControlError::Field { position: 2, .. })),
            "{flags}: {refused:?}"
        );
    }
    for (flags, to) in [(0, &name), (0b100, &name), (0b1000, &alias)] {
        let refused = message(flags, to.clone(), None);
        assert!(
            matches!(refused, Err(ControlError::Field { position: 4, .. })),
            "{flags}: {refused:?}"
        );
    }
    let short = Term::tuple([Term::Int(37), Term::Int(0), pid(1).into()]);
    assert!(matches!(
        Control::try_from(short),
        Err(ControlError::Arity { wanted: 3, .. })
    ));
}

#[test]
fn numbers_out_of_range_are_refused() {
    let unlink = |id: Term| Term::tuple([Term::Int(35), id, pid(1).into(), pid(2).into()]);
    for id in [Term::Int(0), Term::Int(-1), Term::from(u128::from(u64::MAX) + 1)] {
        assert!(matches!(
            Control::try_from(unlink(id)),
            Err(ControlError::Field { position: 2, .. })
        ));
    }
    let id = 1 << 63;
    assert_eq!(
        Control::try_from(unlink(Term::from(id))),
        Ok(Control::UnlinkId {
            id,
            from: pid(1),
            to: pid(2)
        })
    );
    let spawn = |arity| {
        let entry = Term::tuple([Term::atom("m"), Term::atom("f"), Term::Int(arity)]);
        let options = Term::List(Vec::new());
        Term::tuple([
            Term::Int(29),
            reference(1).into(),
            pid(1).into(),
            pid(1).into(),
            entry,
            options,
        ])
    };
    assert!(Control::try_from(spawn(255)).is_ok());
    for arity in [-1, 256] {
        assert!(matches!(
            Control::try_from(spawn(arity)),
            Err(ControlError::Field { position: 5, .. })
        ));
    }
}

#[test]
fn what_is_no_control_message_is_refused() {
    let cases = [
        (
            Term::Int(1),
            "control message is an integer, wanted a tuple that begins with an operation",
        ),
        (
            Term::tuple([]),
            "control message is an empty tuple, wanted a tuple that begins with an operation",
        ),
        (
            Term::tuple([Term::atom("a")]),
            "control message is an atom, wanted a tuple that begins with an operation",
        ),
        (
            Term::tuple([Term::Int(19)]),
            "MONITOR_P (19) has 0 fields behind the operation, wanted 3",
        ),
    ];
    for (term, message) in cases {
        assert_eq!(Control::try_from(term).unwrap_err().to_string(), message);
    }
    let link = Term::tuple([Term::Int(1), pid(1).into(), Term::atom("x")]);
    let message = "field 3 of LINK (1) is an atom, wanted a pid";
    assert_eq!(Control::try_from(link).unwrap_err().to_string(), message);
}

fn any_term() -> impl Strategy<Value = Term> {
    prop_oneof![
        any::<i64>().prop_map(Term::Int),
        any::<u128>().prop_map(Term::from),
        "[a-z]{0,5}".prop_map(Term::atom),
        any::<u32>().prop_map(|id| pid(id).into()),
        any::<u32>().prop_map(|id| reference(id).into()),
        Just(Term::List(Vec::new())),
        Just(Term::tuple([Term::atom("m"), Term::atom("f"), Term::Int(1)])),
    ]
}

proptest! {
    #[test]
    fn whatever_is_taken_is_written_back_the_same(
        op in 0i64..40,
        fields in prop::collection::vec(any_term(), 0..8),
    ) {
        let mut tuple = vec![Term::Int(op)];
        tuple.extend(fields);
        if let Ok(control) = Control::try_from(Term::Tuple(tuple)) {
            prop_assert_eq!(control.op(), Op(op));
            prop_assert_eq!(Control::try_from(Term::from(control.clone())), Ok(control));
        }
    }
}
