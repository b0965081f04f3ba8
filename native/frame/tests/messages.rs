//! Whole messages, any split of the stream, random bytes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::*;
use meshx_frame::frame_type::*;
use meshx_frame::{Checksum, Event, Kind, Options, Output, Role, Status, encode};
use proptest::prelude::*;

#[test]
fn exact_bytes_of_a_request() {
    #[rustfmt::skip]
    let wire = [
        0, 0, 22, 0x10, 0x81, 0, 0, 0, 0, 0, 0, 7,
        1, 0, 0, 1, 0xF4, 0, 0, 0, 0, 0, 0, 0, 3, 1, 4, b'e', b'c', b'h', b'o', b'a', b'b', b'c',
        0x03, 0xA8, 0xB2, 0x8A,
    ];
    assert_eq!(request(7, b"abc"), wire);
    let (events, out, result) = feed(&mut server(), &wire);
    result.unwrap();
    assert!(out.is_empty());
    let request = Event::Request {
        stream: 7,
        kind: Kind::Call,
        deadline: Some(500),
        fun: b"echo".to_vec(),
        term: 1,
        argument: b"abc".to_vec(),
    };
    assert_eq!(events, [request]);
}

#[test]
fn control_frames_become_events() {
    let mut decoder = server();
    feed(&mut decoder, &request(1, b"")).2.unwrap();
    let wire = [
        control(WINDOW, 0, &1u32.to_be_bytes()),
        control(WINDOW, 1, &0x7FFF_FFFFu32.to_be_bytes()),
        control(PING, 0, b"12345678"),
        control(PONG, 0, b"abcdefgh"),
        control(0xFF, 9, b"an extension"),
        control(GOAWAY, 0, b"\0\0\0\x05\x00\x0Cbye"),
        control(RESET, 1, b"\x12\x34why"),
        control(CANCEL, 1, b""),
    ]
    .concat();
    let (events, out, result) = feed(&mut decoder, &wire);
    result.unwrap();
    assert_eq!(out, control(PONG, 0, b"12345678"));
    assert_eq!(
        events,
        [
            Event::Window {
                stream: 0,
                increment: 1
            },
            Event::Window {
                stream: 1,
                increment: 0x7FFF_FFFF
            },
            Event::Pong(b"abcdefgh".to_vec()),
            Event::Goaway {
                last: 5,
                cause: 12,
                text: b"bye".to_vec()
            },
            Event::Reset {
                stream: 1,
                cause: 0x1234,
                text: b"why".to_vec()
            },
        ],
        "and no CANCEL for a stream that was reset"
    );
}

#[test]
fn all_statuses_reach_the_client() {
    for (stream, status) in [(1, Status::Result), (2, Status::Error), (3, Status::Started)] {
        let mut decoder = client();
        decoder.open(stream);
        let wire = block(RESPONSE, stream, 0, true, &response_payload(status, 2, b"ok"));
        let (events, _, result) = feed(&mut decoder, &wire);
        result.unwrap();
        assert_eq!(
            events,
            [Event::Response {
                stream,
                status,
                term: 1,
                result: b"ok".to_vec()
            }]
        );
        // It is the caller's now.
        assert_eq!(
            decoder.stats(),
            meshx_frame::Stats {
                reserved: 0,
                open: 0,
                ..decoder.stats()
            }
        );
    }
}

#[test]
fn slices_stop_at_the_frame_limit_and_go_on() {
    let wire: Vec<u8> = (1..=4).flat_map(|stream| request(stream, b"x")).collect();
    let mut decoder = server();
    let mut output = Output::default();
    let used = decoder.feed_some(Duration::ZERO, &wire, 3, &mut output).unwrap();
    assert_eq!((output.events.len(), used), (3, wire.len() / 4 * 3));
    let rest = decoder
        .feed_some(Duration::ZERO, &wire[used..], 3, &mut output)
        .unwrap();
    assert_eq!((output.events.len(), used + rest), (4, wire.len()));
    assert_eq!(decoder.stats().bytes, wire.len() as u64 + 12);
}

/// Messages of several streams, their frames interleaved in the order that `picks` says.
fn interleave(messages: Vec<Vec<Vec<u8>>>, picks: &[usize]) -> Vec<u8> {
    let mut queues: Vec<_> = messages.into_iter().map(|frames| frames.into_iter()).collect();
    let mut wire = Vec::new();
    // First frames in order: request ids must grow.
    for queue in &mut queues {
        wire.extend(queue.next().unwrap());
    }
    for &pick in picks {
        let n = queues.len();
        wire.extend(queues[pick % n].next().unwrap_or_default());
    }
    wire.extend(queues.into_iter().flatten().flatten());
    wire
}

fn wide(role: Role) -> Options {
    Options {
        role,
        max_message: 1 << 20,
        max_bytes: 1 << 22,
        max_streams: 100,
        ..OPTIONS
    }
}

proptest! {
    #[test]
    fn what_was_sent_arrives_whatever_the_split(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 1..6),
        size in 1usize..700,
        checksum in prop::sample::select(vec![None, Some(Checksum::Crc32), Some(Checksum::Crc32c)]),
        server: bool,
        picks in prop::collection::vec(0usize..100, 0..60),
        cuts in prop::collection::vec(1usize..900, 1..40),
    ) {
        let role = if server { Role::Server } else { Role::Client };
        let messages = bodies.iter().zip(1..)
            .map(|(bytes, stream)| message(role, stream, b"fun", bytes, size, checksum)).collect();
        let wire = interleave(messages, &picks);
        let fresh = || {
            let mut decoder = up(wide(role), checksum, size);
            if role == Role::Client {
                (1..=bodies.len() as u32).for_each(|stream| decoder.open(stream));
            }
            decoder
        };
        let mut whole = fresh();
        let (events, out, result) = feed(&mut whole, &wire);
        prop_assert!(result.is_ok(), "{result:?}");
        let mut got = vec![None; bodies.len()];
        for event in &events {
            let (Event::Request { stream, argument: bytes, .. } | Event::Response { stream, result: bytes, .. }) = event
            else { panic!("{event:?}") };
            got[*stream as usize - 1] = Some(bytes.clone());
        }
        prop_assert_eq!(got.into_iter().flatten().collect::<Vec<_>>(), bodies.clone());

        let mut split = fresh();
        let mut output = Output::default();
        let mut rest = &wire[..];
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            split.feed(Duration::ZERO, now, &mut output).unwrap();
            rest = later;
            if rest.is_empty() { break }
        }
        prop_assert_eq!(&output.events, &events);
        prop_assert_eq!(&output.bytes, &out);
        prop_assert_eq!(split.stats(), whole.stats());
        // A server's arguments are in use until they are released.
        let used = if role == Role::Server { bodies.iter().map(|b| b.len() as u64).sum::<u64>() } else { 0 };
        prop_assert_eq!(whole.stats().reserved, used);
        (1..=bodies.len() as u32).for_each(|stream| whole.release(stream));
        prop_assert_eq!((whole.stats().reserved, whole.stats().open), (0, 0));
    }

    /// Valid frames with random damage: no panic, no more than the limits, and every budget comes back.
    #[test]
    fn damage_never_breaks_the_limits(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 1..8),
        size in 1usize..700,
        server: bool,
        picks in prop::collection::vec(0usize..100, 0..60),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let role = if server { Role::Server } else { Role::Client };
        let messages = bodies.iter().zip(1..)
            .map(|(bytes, stream)| message(role, stream, b"fun", bytes, size, Some(Checksum::Crc32))).collect();
        let mut wire = interleave(messages, &picks);
        for (at, xor) in damage {
            let at = at.index(wire.len());
            wire[at] ^= xor;
        }
        wire.extend(noise);
        let options = Options { role, max_message: 1500, max_bytes: 4000, ..OPTIONS };
        let mut decoder = up(options, Some(Checksum::Crc32), size);
        if role == Role::Client {
            (1..=bodies.len() as u32).for_each(|stream| decoder.open(stream));
        }
        for piece in wire.chunks(333) {
            let mut output = Output::default();
            let ended = decoder.feed(Duration::ZERO, piece, &mut output).is_err();
            let stats = decoder.stats();
            prop_assert!(stats.reserved <= 4000, "{stats:?}");
            prop_assert!(role == Role::Client || stats.open <= 4, "{stats:?}");
            prop_assert!(output.bytes.len() <= 8 * (piece.len() + 1000));
            for event in output.events {
                if let Event::Request { stream, .. } | Event::Response { stream, .. } = event {
                    decoder.release(stream);
                }
            }
            if ended { break }
        }
        (1..=bodies.len() as u32).for_each(|stream| decoder.release(stream));
        prop_assert!(decoder.stats().open > 0 || decoder.stats().reserved == 0);
    }

    #[test]
    fn random_bytes_are_refused_quietly(bytes in prop::collection::vec(any::<u8>(), 0..5000), up_first: bool) {
        let mut decoder = if up_first { server() } else { meshx_frame::Decoder::new(OPTIONS).unwrap() };
        let mut output = Output::default();
        let _ = decoder.feed(Duration::ZERO, &bytes, &mut output);
        prop_assert!(output.bytes.len() <= 2 * bytes.len() + 2000);
    }

    #[test]
    fn control_frames_take_any_text(text in ".{0,2000}", last: u32) {
        let mut wire = Vec::new();
        encode::goaway(&mut wire, last, meshx_frame::Cause::Shutdown, &text);
        let (events, _, result) = feed(&mut server(), &wire);
        prop_assert!(result.is_ok(), "{result:?}");
        let [Event::Goaway { text: got, .. }] = &events[..] else { panic!("{events:?}") };
        prop_assert!(text.as_bytes().starts_with(got));
        prop_assert!(std::str::from_utf8(got).is_ok());
    }
}
