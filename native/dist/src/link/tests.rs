//! Exact bytes, both forms of a link, every limit.
#![allow(clippy::unwrap_used, clippy::panic)]

use meshx_etf::{Atom, Limits, Pid, Reference, Term, decode};
use proptest::prelude::*;

use super::*;
use crate::control::{Control, Op, Target};
use crate::framing::{Frame, FrameDecoder};

const HEADERS: DistFlags = DistFlags::FRAGMENTS;
const PASS: DistFlags = DistFlags::MANDATORY_26;

fn pid() -> Pid {
    Pid {
        node: Atom::from("a@h"),
        id: 1,
        serial: 0,
        creation: 2,
    }
}

fn to_name() -> Control {
    Control::RegSend {
        from: pid(),
        to: Atom::from("b"),
        token: None,
    }
}

fn sent(flags: DistFlags, control: Control, payload: Option<&Term>) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    Sender::new(flags).send(control, payload, &mut out).unwrap();
    frames(&out)
}

fn frames(stream: &[u8]) -> Vec<Vec<u8>> {
    let mut decoder = FrameDecoder::new(usize::MAX);
    decoder.push(stream);
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame().unwrap() {
        let Frame::Data(data) = frame else {
            panic!("a message is no tick")
        };
        frames.push(data.to_vec());
    }
    assert_eq!(decoder.buffered(), 0);
    frames
}

/// What OTP 29.1 sends for `Alias ! {to_alias, 1}` to a node with `ALTACT_SIG`, without headers and with them.
#[test]
fn a_message_to_an_alias_as_otp_29_sends_it() {
    let control = "68046125610458770f6f74703239403132372e302e302e310000000a000000006b083c1d\
                   5a0003770c7079403132372e302e302e3100000007000000010000000200000003";
    let payload = "68027708746f5f616c6961736101";
    let frames = [
        (PASS, format!("7083{control}83{payload}")),
        (HEADERS, format!("834400{control}{payload}")),
    ];
    for (flags, frame) in frames {
        let digits: Vec<u32> = frame.chars().filter_map(|c| c.to_digit(16)).collect();
        let frame: Vec<u8> = digits
            .chunks(2)
            .map(|pair| (pair[0] * 16 + pair[1]) as u8)
            .collect();
        let mut receiver = Receiver::new(flags, LinkLimits::default());
        let message = receiver.receive(&frame).unwrap().unwrap();
        let from = Pid {
            node: Atom::from("otp29@127.0.0.1"),
            id: 10,
            serial: 0,
            creation: 0x6B08_3C1D,
        };
        let alias = Reference {
            node: Atom::from("py@127.0.0.1"),
            creation: 7,
            ids: vec![1, 2, 3],
        };
        let wanted = Control::AltactSig {
            from,
            to: Target::Alias(alias),
            priority: false,
            exit: false,
            token: None,
        };
        assert_eq!(message.control, wanted);
        let payload = decode(&message.payload.unwrap().to_vec(), &Limits::default());
        assert_eq!(payload, Ok(Term::tuple([Term::atom("to_alias"), Term::from(1)])));
        // And what we send is the same.
        assert_eq!(sent(flags, wanted, payload.ok().as_ref()), [frame]);
    }
}

fn message_bytes(receiver: &mut Receiver, frame: &[u8]) -> Vec<u8> {
    receiver
        .receive(frame)
        .unwrap()
        .unwrap()
        .payload
        .unwrap()
        .to_vec()
}

fn fragment(tag: u8, sequence: u64, number: u64, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![131, tag];
    frame.extend_from_slice(&sequence.to_be_bytes());
    frame.extend_from_slice(&number.to_be_bytes());
    if tag == 69 {
        frame.push(0);
    }
    frame.extend_from_slice(body);
    frame
}

/// `{5}` (NODE_LINK), the shortest control message, without version byte.
const NODE_LINK: &[u8] = &[104, 1, 97, 5];

#[test]
fn exact_bytes() {
    let control = [
        &[104, 4, 97, 6, 88, 119, 3][..],
        b"a@h",
        &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 119, 0, 119, 1, b'b'],
    ]
    .concat();
    let payload = [97, 7];
    let pass = [&[112, 131], &control[..], &[131], &payload].concat();
    let header = [&[131, 68, 0], &control[..], &payload].concat();
    for (flags, frame) in [(PASS, pass), (HEADERS, header)] {
        assert_eq!(
            sent(flags, to_name(), Some(&Term::Int(7))),
            std::slice::from_ref(&frame)
        );
        let mut receiver = Receiver::new(flags, LinkLimits::default());
        let message = receiver.receive(&frame).unwrap().unwrap();
        assert_eq!(
            message,
            Message {
                control: to_name(),
                payload: Some(Encoded(&payload))
            }
        );
        let bytes = message_bytes(&mut receiver, &frame);
        assert_eq!(bytes, [131, 97, 7]);
    }
}

#[test]
fn a_large_payload_is_cut_and_put_together_again() {
    let payload = Term::binary((0..300_000u32).map(|i| i as u8).collect::<Vec<_>>());
    let pieces = sent(HEADERS, to_name(), Some(&payload));
    assert_eq!(pieces.len(), 5);
    assert_eq!(&pieces[0][..19], &fragment(69, 1, 5, &[])[..]);
    assert_eq!(&pieces[4][..18], &fragment(70, 1, 1, &[])[..]);
    let mut receiver = Receiver::new(HEADERS, LinkLimits::default());
    for piece in &pieces[..4] {
        assert_eq!(receiver.receive(piece), Ok(None));
        // What comes in between is not held up.
        let small = [&[131, 68, 0], NODE_LINK].concat();
        let message = Message {
            control: Control::NodeLink,
            payload: None,
        };
        assert_eq!(receiver.receive(&small), Ok(Some(message)));
    }
    assert!(receiver.waiting() > 200_000);
    let message = receiver.receive(&pieces[4]).unwrap().unwrap();
    assert_eq!(message.control, to_name());
    assert_eq!(
        decode(&message.payload.unwrap().to_vec(), &Limits::default()),
        Ok(payload)
    );
    assert_eq!(receiver.waiting(), 0);
}

#[test]
fn a_payload_of_one_fragment_is_not_cut_and_one_byte_more_is() {
    // Tag and length of a binary take 5 bytes.
    let fits = Term::binary(vec![1; FRAGMENT_SIZE - 5]);
    let cut = Term::binary(vec![1; FRAGMENT_SIZE - 4]);
    assert_eq!(sent(HEADERS, to_name(), Some(&fits)).len(), 1);
    assert_eq!(sent(HEADERS, to_name(), Some(&cut)).len(), 2);
    assert_eq!(sent(PASS, to_name(), Some(&cut)).len(), 1);
}

#[test]
fn a_prepared_control_message_makes_the_same_frames() {
    let prepared = Prepared::new(to_name()).unwrap();
    for flags in [PASS, HEADERS] {
        for payload in [Term::Int(7), Term::binary(vec![1; 200_000])] {
            let mut out = vec![9];
            Sender::new(flags)
                .send_prepared(&prepared, &payload, &mut out)
                .unwrap();
            assert_eq!(frames(&out[1..]), sent(flags, to_name(), Some(&payload)));
            let bad = Sender::new(flags).send_prepared(&prepared, &Term::Float(f64::NAN), &mut vec![]);
            assert!(matches!(bad, Err(SendError::Term(_))));
        }
    }
    assert!(matches!(
        Prepared::new(Control::NodeLink),
        Err(SendError::WrongPayload { given: true, .. })
    ));
}

#[test]
fn the_bytes_of_a_small_message_are_those_of_the_documentation() {
    let pid = Pid {
        node: Atom::from("cart@127.0.0.1"),
        ..pid()
    };
    let control = Control::SendSender {
        from: pid.clone(),
        to: pid,
        token: None,
    };
    let frame = &sent(HEADERS, control, Some(&Term::binary(vec![1; 64])))[0];
    assert_eq!(
        frame.len() + 4,
        138,
        "docs/c-node.md says what an atom cache would save"
    );
}

#[test]
fn native_records_are_no_terms() {
    let record = [131, 67, 0, 0, 0, 1];
    assert!(decode(&record, &Limits::default()).is_err());
    assert!(meshx_etf::term_len(&record, &Limits::default()).is_err());
}

#[test]
fn one_fragment_alone_is_a_message() {
    let mut receiver = Receiver::new(HEADERS, LinkLimits::default());
    let message = receiver
        .receive(&fragment(69, 9, 1, NODE_LINK).clone())
        .unwrap()
        .map(|m| m.control);
    assert_eq!(message, Some(Control::NodeLink));
    assert_eq!(receiver.waiting(), 0);
}

#[test]
fn fragments_out_of_order_are_refused() {
    let order = |sequence, got, wanted| {
        Err(LinkError::FragmentOrder {
            sequence,
            got,
            wanted,
        })
    };
    let fresh = || Receiver::new(HEADERS, LinkLimits::default());
    assert_eq!(
        fresh().receive(&fragment(70, 1, 1, b"")),
        order(1, 1, "a first fragment")
    );
    assert_eq!(
        fresh().receive(&fragment(69, 1, 0, b"")),
        order(1, 0, "a number above 0")
    );
    for wrong in [0, 1, 3, 4, u64::MAX] {
        let mut receiver = fresh();
        assert_eq!(receiver.receive(&fragment(69, 7, 3, b"")), Ok(None));
        let wanted = "the number below that of the fragment before";
        assert_eq!(
            receiver.receive(&fragment(70, 7, wrong, b"")),
            order(7, wrong, wanted)
        );
    }
    let mut receiver = fresh();
    assert_eq!(receiver.receive(&fragment(69, 7, 3, b"")), Ok(None));
    let wanted = "the rest of the message that this sequence is in";
    assert_eq!(receiver.receive(&fragment(69, 7, 3, b"")), order(7, 3, wanted));
}

#[test]
fn reassembly_keeps_to_its_limits() {
    let limits = LinkLimits {
        max_message: 10,
        max_sequences: 2,
        max_reassembly: 15,
        ..LinkLimits::default()
    };
    let fresh = || Receiver::new(HEADERS, limits);
    let mut receiver = fresh();
    assert_eq!(receiver.receive(&fragment(69, 1, 9, &[0; 10])), Ok(None));
    assert_eq!(
        receiver.receive(&fragment(70, 1, 8, &[0])),
        Err(LinkError::MessageTooLarge { len: 11, max: 10 })
    );
    let mut receiver = fresh();
    assert_eq!(receiver.receive(&fragment(69, 1, 9, &[0; 10])), Ok(None));
    assert_eq!(receiver.receive(&fragment(69, 2, 9, &[0; 5])), Ok(None));
    assert_eq!(receiver.waiting(), 15);
    assert_eq!(receiver.receive(&fragment(70, 2, 8, &[])), Ok(None));
    assert_eq!(
        receiver.receive(&fragment(70, 2, 7, &[0])),
        Err(LinkError::ReassemblyFull { len: 16, max: 15 })
    );
    assert_eq!(
        receiver.receive(&fragment(69, 3, 9, &[])),
        Err(LinkError::TooManySequences { max: 2 })
    );
}

#[test]
fn what_was_not_agreed_is_refused() {
    let mut receiver = Receiver::new(HEADERS, LinkLimits::default());
    assert_eq!(
        receiver.receive(&[131, 68, 1]),
        Err(LinkError::AtomCache { refs: 1 })
    );
    let mut first = fragment(69, 1, 1, NODE_LINK);
    first[18] = 3;
    assert_eq!(receiver.receive(&first), Err(LinkError::AtomCache { refs: 3 }));
    for frame in [&[112, 131, 104, 1][..], &[131, 80], &[0, 0]] {
        assert!(matches!(
            receiver.receive(frame),
            Err(LinkError::UnknownFrame { .. })
        ));
    }
    let mut receiver = Receiver::new(PASS, LinkLimits::default());
    for frame in [&[131, 68, 0][..], &[131, 69], &[112], &[112, 130], &[]] {
        assert!(matches!(
            receiver.receive(frame),
            Err(LinkError::UnknownFrame {
                wanted: "112 131",
                ..
            })
        ));
    }
}

#[test]
fn payloads_come_exactly_where_they_belong() {
    let mut receiver = Receiver::new(PASS, LinkLimits::default());
    let node_link = [&[112, 131], NODE_LINK, &[131, 97, 1]].concat();
    let unexpected = LinkError::UnexpectedPayload {
        op: Op::NODE_LINK,
        len: 2,
    };
    assert_eq!(receiver.receive(&node_link), Err(unexpected));
    let bare = [&[112, 131], NODE_LINK, &[97, 1]].concat();
    let no_version = meshx_etf::DecodeError::Version { found: Some(97) };
    assert_eq!(receiver.receive(&bare), Err(LinkError::Term(no_version)));
    for flags in [PASS, HEADERS] {
        let frame = &sent(flags, to_name(), Some(&Term::Int(7)))[0];
        // Without the payload: 2 bytes, and its version byte on a pass-through link.
        let cut = frame.len() - if flags == PASS { 3 } else { 2 };
        let mut receiver = Receiver::new(flags, LinkLimits::default());
        assert_eq!(
            receiver.receive(&frame[..cut]),
            Err(LinkError::MissingPayload { op: Op::REG_SEND })
        );
        let mut out = vec![1];
        let given = Sender::new(flags).send(Control::NodeLink, Some(&Term::Int(1)), &mut out);
        assert_eq!(
            given,
            Err(SendError::WrongPayload {
                op: Op::NODE_LINK,
                given: true
            })
        );
        let missing = Sender::new(flags).send(to_name(), None, &mut out).unwrap_err();
        assert_eq!(missing.to_string(), "REG_SEND (6) without a payload");
        let bad = Sender::new(flags).send(to_name(), Some(&Term::Float(f64::NAN)), &mut out);
        assert!(matches!(bad, Err(SendError::Term(_))));
        assert_eq!(out, [1], "what failed leaves nothing behind");
    }
}

#[test]
fn every_truncation_is_an_error_or_leaves_a_shorter_payload() {
    for flags in [PASS, HEADERS] {
        let frame = &sent(flags, to_name(), Some(&Term::binary(vec![1; 9])))[0];
        for end in 0..frame.len() {
            let mut receiver = Receiver::new(flags, LinkLimits::default());
            if let Ok(message) = receiver.receive(&frame[..end]) {
                let payload = message.unwrap().payload.unwrap();
                assert!(decode(&payload.to_vec(), &Limits::default()).is_err());
            }
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..10),
        kind in 67u8..72,
        sequence in 0u64..3,
        number in 0u64..4,
    ) {
        let mut pass = Receiver::new(PASS, LinkLimits::default());
        let mut headers = Receiver::new(HEADERS, LinkLimits::default());
        for frame in frames {
            let _ = pass.receive(&[&[112, 131], &frame[..]].concat());
            let _ = headers.receive(&frame);
            let _ = headers.receive(&[&[131, kind, 0], &frame[..]].concat());
            let _ = headers.receive(&fragment(kind, sequence, number, &frame));
        }
    }

    #[test]
    fn messages_go_round(lens in prop::collection::vec(0usize..200_000, 1..4), fragments: bool) {
        let flags = if fragments { HEADERS } else { PASS };
        let (mut sender, mut receiver) = (Sender::new(flags), Receiver::new(flags, LinkLimits::default()));
        let mut out = Vec::new();
        for len in &lens {
            sender.send(to_name(), Some(&Term::binary(vec![7; *len])), &mut out).unwrap();
        }
        let mut seen = Vec::new();
        for frame in frames(&out) {
            if let Some(message) = receiver.receive(&frame).unwrap() {
                let payload = decode(&message.payload.unwrap().to_vec(), &Limits::default()).unwrap();
                seen.push(payload.as_binary().unwrap().len());
            }
        }
        prop_assert_eq!(seen, lens);
    }
}
