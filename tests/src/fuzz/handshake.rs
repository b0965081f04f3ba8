use meshx_dist::flags::DistFlags;
use meshx_dist::framing::HandshakeDecoder;
use meshx_dist::handshake::{
    Admission, AfterStatus, AwaitName, Cookie, Established, HandshakeError, Initiator, LocalNode, Refusal,
};
use meshx_dist::name_frame::{clear_published, peek_name_frame, peek_status_frame};

use super::{choice, stays};

/// The challenge that we put in every run, so that seeds can answer it.
const CHALLENGE: u32 = 0x0102_0304;
const COOKIE: &str = "monster";

/// The handshake, both roles, and the name frame as a relay reads it. The first byte chooses role and answers. An
/// established link proves the cookie, so it needs a seed that holds the digest.
pub fn handshake(data: &[u8]) {
    let Some((choice, stream)) = choice(data) else {
        return;
    };
    match run(choice, stream) {
        Some(Ok(established)) => {
            assert!(!established.peer_name.is_empty() && established.peer_name.len() <= 1021);
            assert!(established.peer_flags.missing(DistFlags::MANDATORY_26) == DistFlags::default());
        }
        Some(Err(error)) => {
            std::hint::black_box(error.to_string());
        }
        None => {}
    }
    relay(stream);
}

/// How the handshake ended; none when it waits.
fn run(choice: u8, stream: &[u8]) -> Option<Result<Established, HandshakeError>> {
    let mut decoder = HandshakeDecoder::new();
    decoder.push(stream);
    let mut messages = Vec::new();
    while let Ok(Some(message)) = decoder.next_frame() {
        messages.push(message.to_vec());
    }
    let mut sent = Vec::new();
    let messages = messages.iter().map(Vec::as_slice);
    if choice & 1 == 0 {
        accept(choice, messages, &mut sent)
    } else {
        initiate(choice, messages, &mut sent)
    }
}

fn accept<'a>(
    choice: u8,
    mut messages: impl Iterator<Item = &'a [u8]>,
    sent: &mut Vec<u8>,
) -> Option<Result<Established, HandshakeError>> {
    let cookie = || Cookie::new(COOKIE);
    let run = |message: &[u8], rest: &mut dyn Iterator<Item = &'a [u8]>, sent: &mut Vec<u8>| {
        let given = AwaitName::new(LocalNode::hidden("b@h2", 22)).on_name(message)?;
        assert!(!given.peer_name().is_empty());
        let reply = match (given.wants_name(), choice >> 1 & 3) {
            (true, _) => {
                let admission = Admission::Named {
                    name: "x1@h1",
                    creation: 9,
                };
                given.admit(admission, cookie(), CHALLENGE, sent)?
            }
            (false, 0) => given.admit(Admission::Ok, cookie(), CHALLENGE, sent)?,
            (false, 1) => given.admit(Admission::OkSimultaneous, cookie(), CHALLENGE, sent)?,
            (false, 2) => {
                let alive = given.alive(sent)?;
                let Some(answer) = rest.next() else {
                    return Ok(None);
                };
                alive.on_answer(answer, cookie(), CHALLENGE, sent)?
            }
            (false, _) => {
                given.refuse(Refusal::NotAllowed, sent)?;
                return Ok(None);
            }
        };
        let Some(message) = rest.next() else {
            return Ok(None);
        };
        let before = sent.len();
        let proved = reply.on_reply(message, sent);
        assert_eq!(
            proved.is_ok(),
            sent.len() > before,
            "a digest goes only to who knows the cookie"
        );
        proved.map(Some)
    };
    let first = messages.next()?;
    run(first, &mut messages, sent).transpose()
}

fn initiate<'a>(
    choice: u8,
    mut messages: impl Iterator<Item = &'a [u8]>,
    sent: &mut Vec<u8>,
) -> Option<Result<Established, HandshakeError>> {
    let mut local = LocalNode::hidden("a@h1", 11);
    if choice & 2 != 0 {
        local.name = "h1".into();
        local.flags = local.flags.with(DistFlags::NAME_ME);
    }
    let status = Initiator::start(local, "b@h2", Cookie::new(COOKIE), sent).unwrap();
    let run = || {
        let Some(message) = messages.next() else {
            return Ok(None);
        };
        let challenge = match status.on_status(message)? {
            AfterStatus::Challenge(challenge) => challenge,
            AfterStatus::Alive(decide) if choice & 4 == 0 => decide.proceed(sent)?,
            AfterStatus::Alive(decide) => {
                decide.give_up(sent)?;
                return Ok(None);
            }
        };
        let Some(message) = messages.next() else {
            return Ok(None);
        };
        let ack = challenge.on_challenge(message, CHALLENGE, sent)?;
        let Some(message) = messages.next() else {
            return Ok(None);
        };
        ack.on_ack(message).map(Some)
    };
    run().transpose()
}

/// A relay judges the stream as it comes, and rewrites no more than one flag.
fn relay(stream: &[u8]) {
    stays(stream, |bytes| {
        peek_name_frame(bytes).map(|frame| frame.map(|frame| (frame.consumed, frame.name.to_owned())))
    });
    stays(stream, |bytes| {
        peek_status_frame(bytes).map(|frame| frame.map(|frame| frame.consumed))
    });
    let mut hidden = stream.to_vec();
    let cleared = clear_published(&mut hidden);
    match peek_name_frame(stream) {
        Ok(Some(frame)) => {
            cleared.unwrap();
            let now = peek_name_frame(&hidden).unwrap().unwrap();
            assert_eq!(now.flags, frame.flags.without(DistFlags::PUBLISHED));
            assert_eq!(
                (now.name, now.creation, now.consumed),
                (frame.name, frame.creation, frame.consumed)
            );
            assert_eq!(hidden[frame.consumed..], stream[frame.consumed..]);
        }
        _ => {
            cleared.unwrap_err();
            assert_eq!(hidden, stream);
        }
    }
}

#[cfg(test)]
mod tests {
    /// Only who knows the cookie gets to the end: the seeds do, so that what lies there is tried as well.
    #[test]
    fn seeds_reach_the_end_in_both_roles() {
        for seed in [
            "accept_0",
            "accept_1",
            "accept_2",
            "accept_named",
            "initiate_ok",
            "initiate_alive",
            "initiate_named",
        ] {
            let path = crate::repository().join("fuzz/seeds/handshake").join(seed);
            let bytes = std::fs::read(path).unwrap();
            let end = super::run(bytes[0], &bytes[1..]);
            assert!(matches!(end, Some(Ok(_))), "{seed}: {end:?}");
        }
    }
}
