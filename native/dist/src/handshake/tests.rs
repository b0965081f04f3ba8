//! Both roles against each other, every refusal, and the messages' exact bytes.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

const CHALLENGE_A: u32 = 0xAAAA_0001;
const CHALLENGE_B: u32 = 0xBBBB_0002;

fn cookie() -> Cookie {
    Cookie::new("chocolate")
}

/// Takes the one message in `out`, without its length.
fn sent(out: &mut Vec<u8>) -> Vec<u8> {
    let mut messages = all_sent(out);
    assert_eq!(messages.len(), 1, "one message at a time");
    messages.remove(0)
}

fn all_sent(out: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let mut decoder = crate::framing::HandshakeDecoder::new();
    decoder.push(&std::mem::take(out));
    let mut messages = Vec::new();
    while let Some(message) = decoder.next_frame().unwrap() {
        messages.push(message.to_vec());
    }
    messages
}

fn started(local: LocalNode) -> (AwaitStatus, Vec<u8>) {
    let mut out = Vec::new();
    let state = Initiator::start(local, "b@h2", cookie(), &mut out).unwrap();
    (state, sent(&mut out))
}

fn named(local: LocalNode) -> (AwaitStatus, NameGiven) {
    let (a, name) = started(local);
    (
        a,
        AwaitName::new(LocalNode::hidden("b@h2", 22))
            .on_name(&name)
            .unwrap(),
    )
}

fn challenged(state: AfterStatus) -> AwaitChallenge {
    let AfterStatus::Challenge(state) = state else {
        panic!("alive is not what was sent")
    };
    state
}

fn finish(a: AwaitChallenge, b: AwaitReply, challenge: &[u8]) -> (Established, Established) {
    let mut out = Vec::new();
    let a = a.on_challenge(challenge, CHALLENGE_A, &mut out).unwrap();
    let b = b.on_reply(&sent(&mut out), &mut out).unwrap();
    (a.on_ack(&sent(&mut out)).unwrap(), b)
}

#[test]
fn two_nodes_meet() {
    let (a, b) = named(LocalNode::hidden("a@h1", 11));
    assert_eq!((b.peer_name(), b.wants_name()), ("a@h1", false));
    let mut out = Vec::new();
    let b = b.admit(Admission::Ok, cookie(), CHALLENGE_B, &mut out).unwrap();
    let messages = all_sent(&mut out);
    let a = challenged(a.on_status(&messages[0]).unwrap());
    let (a, b) = finish(a, b, &messages[1]);
    assert_eq!(
        (
            &a.local_name[..],
            a.local_creation,
            &a.peer_name[..],
            a.peer_creation
        ),
        ("a@h1", 11, "b@h2", 22)
    );
    assert_eq!(
        (
            &b.local_name[..],
            b.local_creation,
            &b.peer_name[..],
            b.peer_creation
        ),
        ("b@h2", 22, "a@h1", 11)
    );
    assert_eq!(
        (a.flags, b.flags),
        (DistFlags::c_node_default(), DistFlags::c_node_default())
    );
}

#[test]
fn flags_agreed_are_those_of_both() {
    let mut local = LocalNode::hidden("a@h1", 11);
    local.flags =
        DistFlags::MANDATORY_25_DIGEST | DistFlags::V4_NC | DistFlags::UNLINK_ID | DistFlags::UNICODE_IO;
    let (a, b) = named(local);
    let mut out = Vec::new();
    let b = b
        .admit(Admission::OkSimultaneous, cookie(), CHALLENGE_B, &mut out)
        .unwrap();
    let messages = all_sent(&mut out);
    let a = challenged(a.on_status(&messages[0]).unwrap());
    let (a, b) = finish(a, b, &messages[1]);
    let agreed = DistFlags::MANDATORY_26 | DistFlags::MANDATORY_25_DIGEST;
    assert_eq!((a.flags, b.flags), (agreed, agreed));
    assert!(
        !b.peer_flags.contains(DistFlags::MAP_TAG),
        "what was sent is kept as it was sent"
    );
}

#[test]
fn a_link_believed_alive_is_replaced_or_the_attempt_given_up() {
    for go_on in [true, false] {
        let (a, b) = named(LocalNode::hidden("a@h1", 11));
        let mut out = Vec::new();
        let b = b.alive(&mut out).unwrap();
        let AfterStatus::Alive(a) = a.on_status(&sent(&mut out)).unwrap() else {
            panic!("alive was sent")
        };
        if go_on {
            let a = a.proceed(&mut out).unwrap();
            let b = b
                .on_answer(&sent(&mut out), cookie(), CHALLENGE_B, &mut out)
                .unwrap();
            let challenge = sent(&mut out);
            assert_eq!(finish(a, b, &challenge).0.peer_name, "b@h2");
        } else {
            a.give_up(&mut out).unwrap();
            let refused = b
                .on_answer(&sent(&mut out), cookie(), CHALLENGE_B, &mut out)
                .unwrap_err();
            assert_eq!(
                (refused, out.len()),
                (HandshakeError::Refused { status: "false" }, 0)
            );
        }
    }
}

#[test]
fn a_node_without_a_name_is_given_one() {
    let mut local = LocalNode::hidden("h1", 0);
    local.flags = local.flags.with(DistFlags::NAME_ME);
    let (a, b) = named(local.clone());
    assert_eq!((b.peer_name(), b.wants_name()), ("h1", true));
    let mut out = Vec::new();
    let b = b
        .admit(
            Admission::Named {
                name: "x7@h1",
                creation: 77,
            },
            cookie(),
            CHALLENGE_B,
            &mut out,
        )
        .unwrap();
    let messages = all_sent(&mut out);
    let a = challenged(a.on_status(&messages[0]).unwrap());
    let (a, b) = finish(a, b, &messages[1]);
    assert_eq!((&a.local_name[..], a.local_creation), ("x7@h1", 77));
    assert!(
        a.peer_flags.contains(DistFlags::NAME_ME),
        "a BEAM takes the name only with this"
    );
    assert!(!a.flags.contains(DistFlags::NAME_ME) && !b.flags.contains(DistFlags::NAME_ME));
    assert_eq!((&b.peer_name[..], b.peer_creation), ("x7@h1", 77));

    let (a, b) = named(local);
    assert!(matches!(
        a.on_status(b"sok"),
        Err(HandshakeError::BadStatus { wanted: "named:", .. })
    ));
    let refused = b.admit(Admission::Ok, cookie(), 1, &mut out).unwrap_err();
    assert!(matches!(
        refused,
        HandshakeError::WrongAdmission {
            given: "not given a name",
            ..
        }
    ));
    let (a, b) = named(LocalNode::hidden("a@h1", 1));
    assert!(
        b.admit(
            Admission::Named {
                name: "x@y",
                creation: 1
            },
            cookie(),
            1,
            &mut out
        )
        .is_err()
    );
    assert!(a.on_status(b"snamed:\x00\x03x@y\x00\x00\x00\x01").is_err());
}

#[test]
fn a_refusal_reaches_the_initiator() {
    for (refusal, status) in [(Refusal::Nok, "nok"), (Refusal::NotAllowed, "not_allowed")] {
        let (a, b) = named(LocalNode::hidden("a@h1", 11));
        let mut out = Vec::new();
        b.refuse(refusal, &mut out).unwrap();
        assert_eq!(
            a.on_status(&sent(&mut out)).unwrap_err(),
            HandshakeError::Refused { status }
        );
    }
}

#[test]
fn another_cookie_is_refused_by_both_roles() {
    let (a, b) = named(LocalNode::hidden("a@h1", 11));
    let mut out = Vec::new();
    let b = b
        .admit(Admission::Ok, Cookie::new("vanilla"), CHALLENGE_B, &mut out)
        .unwrap();
    let messages = all_sent(&mut out);
    let a = challenged(a.on_status(&messages[0]).unwrap());
    let a = a.on_challenge(&messages[1], CHALLENGE_A, &mut out).unwrap();
    let reply = sent(&mut out);
    let refused = b.on_reply(&reply, &mut out).unwrap_err();
    assert_eq!(
        (refused, out.len()),
        (HandshakeError::CookieMismatch { peer: "a@h1".into() }, 0)
    );
    let forged = [&b"a"[..], &Cookie::new("vanilla").digest(CHALLENGE_A)].concat();
    assert_eq!(
        a.on_ack(&forged).unwrap_err(),
        HandshakeError::CookieMismatch { peer: "b@h2".into() }
    );
}

#[test]
fn the_initiators_own_digest_is_no_proof() {
    let (a, _) = named(LocalNode::hidden("a@h1", 11));
    let mut out = Vec::new();
    Challenge {
        flags: DistFlags::c_node_default(),
        challenge: 9,
        creation: 1,
        name: "b@h2",
    }
    .encode(&mut out)
    .unwrap();
    let challenge = sent(&mut out);
    let a = challenged(a.on_status(b"sok").unwrap());
    let a = a.on_challenge(&challenge, CHALLENGE_A, &mut out).unwrap();
    let reflected = [&b"a"[..], &sent(&mut out)[5..]].concat();
    assert!(matches!(
        a.on_ack(&reflected),
        Err(HandshakeError::CookieMismatch { .. })
    ));
}

#[test]
fn missing_flags_are_refused_by_both_roles() {
    let lacking = DistFlags::MANDATORY_26.without(DistFlags::BIG_CREATION);
    let missing = HandshakeError::MissingFlags {
        missing: DistFlags::BIG_CREATION,
    };
    let mut local = LocalNode::hidden("a@h1", 11);
    local.flags = lacking;
    let (_, name) = started(local);
    let refused = AwaitName::new(LocalNode::hidden("b@h2", 22))
        .on_name(&name)
        .unwrap_err();
    assert_eq!(refused, missing);
    assert_eq!(refused.to_string(), "peer lacks the mandatory flags BIG_CREATION");

    let (a, _) = named(LocalNode::hidden("a@h1", 11));
    let mut out = Vec::new();
    Challenge {
        flags: lacking,
        challenge: 1,
        creation: 1,
        name: "b@h2",
    }
    .encode(&mut out)
    .unwrap();
    let challenge = sent(&mut out);
    let a = challenged(a.on_status(b"sok").unwrap());
    assert_eq!(
        a.on_challenge(&challenge, CHALLENGE_A, &mut out).unwrap_err(),
        missing
    );
    assert!(out.is_empty(), "nothing is proven to such a node");
}

#[test]
fn another_node_than_was_dialled_gets_no_digest() {
    let (a, _) = named(LocalNode::hidden("a@h1", 11));
    let mut out = Vec::new();
    Challenge {
        flags: DistFlags::c_node_default(),
        challenge: 1,
        creation: 1,
        name: "c@h2",
    }
    .encode(&mut out)
    .unwrap();
    let challenge = sent(&mut out);
    let a = challenged(a.on_status(b"sok").unwrap());
    let refused = a.on_challenge(&challenge, CHALLENGE_A, &mut out).unwrap_err();
    assert_eq!(
        refused,
        HandshakeError::WrongName {
            wanted: "b@h2".into(),
            got: "c@h2".into()
        }
    );
    assert!(out.is_empty());
}

#[test]
fn exact_bytes() {
    let mut out = Vec::new();
    SendName {
        flags: DistFlags::MANDATORY_26,
        creation: 0x0102_0304,
        name: "a@b",
    }
    .encode(&mut out)
    .unwrap();
    assert_eq!(
        out,
        b"\x00\x12N\x00\x00\x00\x04\x03\x07\x0f\x94\x01\x02\x03\x04\x00\x03a@b"
    );
    out.clear();
    Challenge {
        flags: DistFlags::PUBLISHED,
        challenge: 0xFFFF_FFFE,
        creation: 4,
        name: "c@d",
    }
    .encode(&mut out)
    .unwrap();
    assert_eq!(
        out,
        b"\x00\x16N\x00\x00\x00\x00\x00\x00\x00\x01\xff\xff\xff\xfe\x00\x00\x00\x04\x00\x03c@d"
    );
    out.clear();
    Status::Named {
        name: "x@y",
        creation: 5,
    }
    .encode(&mut out)
    .unwrap();
    assert_eq!(out, b"\x00\x10snamed:\x00\x03x@y\x00\x00\x00\x05");
    out.clear();
    ChallengeReply {
        challenge: 1,
        digest: [7; 16],
    }
    .encode(&mut out);
    assert_eq!(out, [&b"\x00\x15r\x00\x00\x00\x01"[..], &[7; 16]].concat());
    out.clear();
    ChallengeAck { digest: [8; 16] }.encode(&mut out);
    assert_eq!(out, [&b"\x00\x11a"[..], &[8; 16]].concat());
}

#[test]
fn what_newer_nodes_append_behind_a_name_is_ignored() {
    let (_, mut name) = started(LocalNode::hidden("a@h1", 11));
    name.extend_from_slice(b"more");
    assert_eq!(SendName::decode(&name).unwrap().name, "a@h1");
    let status = Status::decode(b"snamed:\x00\x03x@y\x00\x00\x00\x05more").unwrap();
    assert_eq!(
        status,
        Status::Named {
            name: "x@y",
            creation: 5
        }
    );
}

#[test]
fn every_truncation_is_an_error_and_digests_take_no_trailing_byte() {
    let mut out = Vec::new();
    SendName {
        flags: DistFlags::MANDATORY_26,
        creation: 1,
        name: "a@b",
    }
    .encode(&mut out)
    .unwrap();
    let name = sent(&mut out);
    Challenge {
        flags: DistFlags::MANDATORY_26,
        challenge: 1,
        creation: 1,
        name: "a@b",
    }
    .encode(&mut out)
    .unwrap();
    let challenge = sent(&mut out);
    Status::Named {
        name: "a@b",
        creation: 5,
    }
    .encode(&mut out)
    .unwrap();
    let status = sent(&mut out);
    ChallengeReply {
        challenge: 1,
        digest: [1; 16],
    }
    .encode(&mut out);
    let mut reply = sent(&mut out);
    ChallengeAck { digest: [1; 16] }.encode(&mut out);
    let mut ack = sent(&mut out);
    for end in 0..name.len() {
        assert!(SendName::decode(&name[..end]).is_err());
    }
    for end in 0..challenge.len() {
        assert!(Challenge::decode(&challenge[..end]).is_err());
    }
    for end in 0..status.len() {
        assert!(Status::decode(&status[..end]).is_err());
    }
    for end in 0..reply.len() {
        assert!(ChallengeReply::decode(&reply[..end]).is_err());
    }
    for end in 0..ack.len() {
        assert!(ChallengeAck::decode(&ack[..end]).is_err());
    }
    reply.push(0);
    ack.push(0);
    assert!(ChallengeReply::decode(&reply).is_err());
    assert!(ChallengeAck::decode(&ack).is_err());
}

#[test]
fn messages_out_of_turn_say_what_was_waited_for() {
    let (a, b) = named(LocalNode::hidden("a@h1", 11));
    let refused = a.on_status(b"r").unwrap_err();
    assert_eq!(
        refused.to_string(),
        "got a message with tag 0x72, waiting for status"
    );
    let mut out = Vec::new();
    let b = b.admit(Admission::Ok, cookie(), CHALLENGE_B, &mut out).unwrap();
    let refused = b.on_reply(b"strue", &mut out).unwrap_err();
    assert_eq!(
        refused,
        HandshakeError::Unexpected {
            waiting_for: "challenge_reply",
            got: b's'
        }
    );
    let (a, b) = named(LocalNode::hidden("a@h1", 11));
    assert!(matches!(
        a.on_status(b"strue"),
        Err(HandshakeError::BadStatus { .. })
    ));
    out.clear();
    let refused = b
        .alive(&mut out)
        .unwrap()
        .on_answer(b"sok", cookie(), 1, &mut out)
        .unwrap_err();
    assert_eq!(refused.to_string(), "got status \"ok\", wanted true or false");
    let old = AwaitName::new(LocalNode::hidden("b@h2", 1)).on_name(b"n\x00\x05\x00\x00\x00\x00a@h1");
    assert_eq!(old.unwrap_err(), HandshakeError::OldName);
    let long = [b"s".as_slice(), &[b'x'; 3000]].concat();
    assert!(
        Status::decode(&long).unwrap_err().to_string().len() < 120,
        "a peer can't fill the log"
    );
}

#[test]
fn no_secret_is_shown() {
    let (a, b) = named(LocalNode::hidden("a@h1", 11));
    let b = b
        .admit(Admission::Ok, cookie(), CHALLENGE_B, &mut Vec::new())
        .unwrap();
    assert!(!format!("{a:?}{b:?}").contains("chocolate"));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), tag in "[Nnsra]") {
        for bytes in [bytes.clone(), [tag.as_bytes(), &bytes].concat()] {
            let _ = SendName::decode(&bytes);
            let _ = Status::decode(&bytes);
            let _ = Challenge::decode(&bytes);
            let _ = ChallengeReply::decode(&bytes);
            let _ = ChallengeAck::decode(&bytes);
        }
    }

    #[test]
    fn a_challenge_goes_round(name in "[a-z]{1,20}@[a-z.]{1,20}", bits: u64, challenge: u32, creation: u32) {
        let message = Challenge {
            flags: DistFlags::from_bits(bits),
            challenge,
            creation,
            name: &name,
        };
        let mut out = Vec::new();
        message.encode(&mut out).unwrap();
        let bytes = sent(&mut out);
        prop_assert_eq!(Challenge::decode(&bytes), Ok(message));
    }
}
