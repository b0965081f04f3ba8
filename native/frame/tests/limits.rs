//! What a peer may not do, and what it costs it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::*;
use meshx_frame::frame_type::*;
use meshx_frame::{Budget, Cause, Checksum, Decoder, Event, MAX_SKIPPED, Memory, Options, Role, Status};

fn header(len: u32, frame_type: u8, flags: u8, stream: u32) -> Vec<u8> {
    let mut out = Vec::new();
    meshx_frame::Header {
        len,
        frame_type,
        flags,
        seq: 0,
        stream,
    }
    .write(&mut out);
    out
}

#[test]
fn lengths_are_refused_from_the_header_alone() {
    ends(
        &mut server(),
        &header(65_537, 0x80, 0, 0),
        Cause::TooLarge,
        "65537 bytes, at most 65536",
    );
    ends(
        &mut server(),
        &header(16_385, DATA, 0x80, 1),
        Cause::TooLarge,
        "16385 bytes, at most 16384",
    );
    ends(
        &mut server(),
        &header(16_384 + 271, REQUEST, 0x80, 1),
        Cause::TooLarge,
        "a block of",
    );
    ends(
        &mut client(),
        &header(16_384 + 11, RESPONSE, 0x80, 1),
        Cause::TooLarge,
        "a block of",
    );
    let mut fresh = Decoder::new(OPTIONS).unwrap();
    ends(
        &mut fresh,
        &header(4_097, HELLO, 0, 0),
        Cause::Protocol,
        "4097 bytes, 0 to 4096",
    );
    for (frame_type, len) in [
        (PING, 9),
        (WINDOW, 5),
        (RESET, 1_027),
        (RESET, 1),
        (GOAWAY, 5),
        (CANCEL, 1),
    ] {
        let stream = if frame_type == RESET || frame_type == CANCEL {
            1
        } else {
            0
        };
        ends(
            &mut server(),
            &header(len, frame_type, 0, stream),
            Cause::Protocol,
            "wanted",
        );
    }
}

#[test]
fn a_block_beyond_the_agreed_size_cannot_hide_behind_a_short_name() {
    let wire = block(REQUEST, 1, 0, true, &request_payload(16_400, &[0; 16_400]));
    ends(
        &mut server(),
        &wire,
        Cause::TooLarge,
        "16400 bytes, at most 16384",
    );
}

#[test]
fn headers_that_make_no_sense_end_the_connection() {
    for (wire, text) in [
        (header(0, 0x30, 0, 0), "frame type 48 is unknown"),
        (header(8, PING, 0x01, 0), "flags 1 on frame type 33"),
        (header(0, DATA, 0x02, 1), "flags 2 on frame type 18"),
        (header(8, PING, 0, 1), "frame type 33 on stream 1"),
        (header(16, REQUEST, 0x80, 0), "frame type 16 on stream 0"),
        (header(0, HELLO_ACK, 0, 0), "not for a client to send"),
        (header(10, RESPONSE, 0, 1), "not for a client to send"),
        (header(0, HELLO, 0, 0), "at the wrong time"),
    ] {
        ends(&mut server(), &wire, Cause::Protocol, text);
    }
    ends(
        &mut client(),
        &header(16, REQUEST, 0x80, 1),
        Cause::Protocol,
        "not for a server to send",
    );
    ends(
        &mut client(),
        &header(0, CANCEL, 0, 1),
        Cause::Protocol,
        "not for a server to send",
    );
    let mut wire = header(8, PING, 0, 0);
    wire[7] = 1;
    ends(&mut server(), &wire, Cause::Protocol, "sequence number 1");
}

#[test]
fn before_the_handshake_is_done_nothing_else_is_taken() {
    for frame_type in [REQUEST, DATA, CANCEL, RESET, WINDOW, PING, PONG, GOAWAY, 0x80] {
        let len = match frame_type {
            REQUEST => 16,
            PING | PONG => 8,
            WINDOW => 4,
            RESET => 2,
            GOAWAY => 6,
            _ => 0,
        };
        let stream = u32::from((REQUEST..=RESET).contains(&frame_type));
        let mut decoder = Decoder::new(OPTIONS).unwrap();
        ends(
            &mut decoder,
            &header(len, frame_type, 0, stream),
            Cause::Protocol,
            "at the wrong time",
        );
        // Nor between HELLO and agree().
        let mut decoder = Decoder::new(OPTIONS).unwrap();
        feed(&mut decoder, &control(HELLO, 0, b"")).2.unwrap();
        feed(&mut decoder, &control(AUTH, 0, &[0; 32])).2.unwrap();
        ends(
            &mut decoder,
            &header(len, frame_type, 0, stream),
            Cause::Protocol,
            "at the wrong time",
        );
    }
    let mut client = Decoder::new(Options {
        role: Role::Client,
        ..OPTIONS
    })
    .unwrap();
    ends(
        &mut client,
        &control(READY, 0, b""),
        Cause::Protocol,
        "at the wrong time",
    );
    let mut twice = Decoder::new(OPTIONS).unwrap();
    let hellos = [control(HELLO, 0, b""), control(HELLO, 0, b"")].concat();
    ends(&mut twice, &hellos, Cause::Protocol, "at the wrong time");
}

#[test]
fn nothing_is_read_after_refused() {
    let mut decoder = Decoder::new(OPTIONS).unwrap();
    let wire = [control(REFUSED, 0, b"\x00\x09no"), vec![0xFF; 100]].concat();
    let (events, out, result) = feed(&mut decoder, &wire);
    result.unwrap();
    assert_eq!(
        events,
        [Event::Refused {
            cause: 9,
            text: b"no".to_vec()
        }]
    );
    assert!(out.is_empty());
    assert!(feed(&mut decoder, &[0xFF; 50]).0.is_empty());
}

#[test]
fn a_corrupt_byte_of_a_block_costs_only_its_stream() {
    let good = request(1, b"argument");
    for at in 12..good.len() {
        let mut wire = good.clone();
        wire[at] ^= 0x10;
        let mut decoder = server();
        resets(&mut decoder, &wire, 1, Cause::InvalidCks, "does not fit");
        let (events, _, result) = feed(&mut decoder, &request(2, b"argument"));
        result.unwrap();
        assert!(
            matches!(&events[..], [Event::Request { stream: 2, .. }]),
            "{events:?}"
        );
    }
}

#[test]
fn a_checksum_is_there_exactly_when_agreed() {
    let mut without = Vec::new();
    meshx_frame::encode::block(&mut without, REQUEST, 1, 0, true, None, &request_payload(0, b""));
    resets(&mut server(), &without, 1, Cause::InvalidCks, "no checksum");
    resets(
        &mut up(OPTIONS, None, 16_384),
        &request(1, b""),
        1,
        Cause::InvalidCks,
        "none was agreed",
    );
}

#[test]
fn gaps_in_a_message_end_its_stream() {
    let first = block(REQUEST, 1, 0, false, &request_payload(10, b"01234"));
    for (seq, text) in [
        (0, "block 0, block 1"),
        (2, "block 2, block 1"),
        (0xFF_FFFF, "block 16777215"),
    ] {
        let mut decoder = server();
        feed(&mut decoder, &first).2.unwrap();
        assert_eq!(decoder.stats().reserved, 10);
        resets(
            &mut decoder,
            &block(DATA, 1, seq, true, b"56789"),
            1,
            Cause::Sequence,
            text,
        );
        assert_eq!((decoder.stats().reserved, decoder.stats().open), (0, 0));
    }
    let late = block(REQUEST, 1, 1, true, &request_payload(0, b""));
    resets(&mut server(), &late, 1, Cause::Sequence, "block 1, block 0");
}

#[test]
fn a_message_is_exactly_as_long_as_announced() {
    let open = block(REQUEST, 1, 0, false, &request_payload(10, b"01234"));
    for (tail, text) in [
        (block(DATA, 1, 1, false, b"567890"), "11 bytes of a message of 10"),
        (block(DATA, 1, 1, true, b"5678"), "ended after 9 of 10"),
        (block(DATA, 1, 1, false, b""), "empty block"),
    ] {
        let mut decoder = server();
        feed(&mut decoder, &open).2.unwrap();
        resets(&mut decoder, &tail, 1, Cause::Protocol, text);
    }
    // The end may come by itself.
    let mut decoder = server();
    let wire = [
        open,
        block(DATA, 1, 1, false, b"56789"),
        block(DATA, 1, 2, true, b""),
    ]
    .concat();
    assert!(
        matches!(&feed(&mut decoder, &wire).0[..], [Event::Request { argument, .. }] if argument.len() == 10)
    );
    resets(
        &mut decoder,
        &block(DATA, 1, 3, true, b"x"),
        1,
        Cause::Protocol,
        "without an open message",
    );
    assert_eq!(
        decoder.stats().reserved,
        10,
        "something still works with the request"
    );
    decoder.release(1);
    assert_eq!(decoder.stats().reserved, 0);
}

#[test]
fn malformed_heads_end_their_stream() {
    for at in [(0, 3), (14, 0), (14, 200)] {
        let mut payload = request_payload(0, b"");
        payload[at.0] = at.1;
        let wire = block(REQUEST, 1, 0, true, &payload);
        resets(
            &mut server(),
            &wire,
            1,
            Cause::Protocol,
            "head of a request is malformed",
        );
    }
    let mut payload = response_payload(Status::Result, 0, b"");
    payload[0] = 3;
    let mut decoder = client();
    decoder.open(1);
    let wire = block(RESPONSE, 1, 0, true, &payload);
    resets(
        &mut decoder,
        &wire,
        1,
        Cause::Protocol,
        "response status 3 is unknown",
    );
}

#[test]
fn messages_beyond_the_limits_are_not_kept() {
    let mut decoder = server();
    let huge = block(REQUEST, 1, 0, false, &request_payload(u64::MAX, b""));
    resets(&mut decoder, &huge, 1, Cause::TooLarge, "at most 100000");
    let half = |stream| block(REQUEST, stream, 0, false, &request_payload(80_000, b""));
    feed(&mut decoder, &half(2)).2.unwrap();
    resets(&mut decoder, &half(3), 3, Cause::Full, "byte budget");
    assert_eq!(decoder.stats().reserved, 80_000);
    decoder.release(2);
    feed(&mut decoder, &half(4)).2.unwrap();
    for stream in 5..8 {
        feed(&mut decoder, &request(stream, b"")).2.unwrap();
    }
    resets(&mut decoder, &request(8, b""), 8, Cause::Full, "too many streams");
}

#[test]
fn an_id_is_used_once_and_one_that_was_left_out_may_come_later() {
    let mut decoder = server();
    feed(&mut decoder, &request(5, b"")).2.unwrap();
    feed(&mut decoder, &request(4, b"")).2.unwrap();
    assert_eq!(decoder.skipped(), [1, 2, 3]);
    for stream in [5, 4] {
        let mut decoder = server();
        feed(&mut decoder, &request(5, b"")).2.unwrap();
        feed(&mut decoder, &request(4, b"")).2.unwrap();
        let text = format!("request {stream} after request 5");
        ends(&mut decoder, &request(stream, b""), Cause::Protocol, &text);
    }
}

#[test]
fn cancel_and_reset_take_an_id_that_was_left_out() {
    for stream in [2, 9] {
        for wire in [control(CANCEL, stream, b""), control(RESET, stream, b"\0\x05")] {
            let mut decoder = server();
            feed(&mut decoder, &request(5, b"")).2.unwrap();
            assert_eq!(feed(&mut decoder, &wire), (vec![], vec![], Ok(())));
            assert!(!decoder.skipped().contains(&stream));
            ends(
                &mut decoder,
                &request(stream, b""),
                Cause::Protocol,
                "after request",
            );
        }
    }
}

#[test]
fn ids_that_are_left_out_are_limited() {
    let most = MAX_SKIPPED as u32;
    let mut decoder = server();
    feed(&mut decoder, &request(most + 1, b"")).2.unwrap();
    assert_eq!(decoder.skipped().len(), MAX_SKIPPED);
    feed(&mut decoder, &request(most + 2, b"")).2.unwrap();
    let text = "1025 request ids were left out";
    ends(&mut decoder, &request(most + 4, b""), Cause::Protocol, text);
    for wire in [request(u32::MAX, b""), control(CANCEL, u32::MAX, b"")] {
        ends(&mut server(), &wire, Cause::Protocol, "at most 1024 wanted");
    }
}

#[test]
fn a_shared_budget_binds_all_and_comes_back() {
    let budget = Arc::new(Budget::new(100));
    let shared = || {
        let mut decoder = server();
        decoder.share(Arc::clone(&budget));
        decoder
    };
    let (mut one, mut other) = (shared(), shared());
    let half = block(REQUEST, 1, 0, false, &request_payload(60, b"x"));
    feed(&mut one, &half).2.unwrap();
    resets(&mut other, &half, 1, Cause::Full, "byte budget");
    feed(&mut other, &request(2, &[7; 40])).2.unwrap();
    assert_eq!(budget.used(), 100);
    other.release(2);
    assert_eq!(budget.used(), 60);
    drop(one);
    assert_eq!(budget.used(), 0);
}

#[test]
fn frames_of_streams_that_never_were_end_the_connection() {
    for wire in [block(DATA, 1, 1, true, b"x"), control(WINDOW, 1, b"\0\0\0\x01")] {
        let text = "stream 1 was never opened, the last is";
        ends(&mut server(), &wire, Cause::UnknownStream, text);
        let mut decoder = server();
        feed(&mut decoder, &request(2, b"")).2.unwrap();
        ends(&mut decoder, &wire, Cause::UnknownStream, text);
    }
    let wire = block(RESPONSE, 1, 0, true, &response_payload(Status::Result, 0, b""));
    ends(&mut client(), &wire, Cause::UnknownStream, "never opened");
}

#[test]
fn windows_bind_the_peer() {
    let options = Options {
        stream_window: 100,
        ..OPTIONS
    };
    let mut decoder = up(options, Some(Checksum::Crc32), 16_384);
    let wire = block(REQUEST, 1, 0, false, &request_payload(1_000, &[0; 101]));
    ends(
        &mut decoder,
        &wire,
        Cause::Protocol,
        "101 bytes sent, the stream's window held 100",
    );
    let options = Options {
        connection_window: 100,
        ..OPTIONS
    };
    let mut decoder = up(options, Some(Checksum::Crc32), 16_384);
    let wire = block(REQUEST, 1, 0, false, &request_payload(1_000, &[0; 101]));
    ends(
        &mut decoder,
        &wire,
        Cause::Protocol,
        "101 bytes sent, the connection's window held 100",
    );
    for increment in [[0; 4], [0x80, 0, 0, 0]] {
        ends(
            &mut server(),
            &control(WINDOW, 0, &increment),
            Cause::Protocol,
            "a window grows by",
        );
    }
}

#[test]
fn windows_are_granted_in_halves_and_never_late() {
    let options = Options {
        stream_window: 100,
        connection_window: 400,
        ..OPTIONS
    };
    let mut decoder = up(options, Some(Checksum::Crc32), 16_384);
    let first = block(REQUEST, 1, 0, false, &request_payload(180, &[0; 49]));
    assert!(feed(&mut decoder, &first).1.is_empty());
    let out = feed(&mut decoder, &block(DATA, 1, 1, false, &[0; 1])).1;
    assert_eq!(out, control(WINDOW, 1, &50u32.to_be_bytes()));
    // 130 of 180 are left, and 100 of window: one more grant, then enough for the rest.
    let out = feed(&mut decoder, &block(DATA, 1, 2, false, &[0; 50])).1;
    assert_eq!(out, control(WINDOW, 1, &50u32.to_be_bytes()));
    let out = feed(&mut decoder, &block(DATA, 1, 3, false, &[0; 60])).1;
    assert!(out.is_empty(), "{out:?}");
    let (events, out, _) = feed(&mut decoder, &block(DATA, 1, 4, true, &[0; 20]));
    assert_eq!(events.len(), 1);
    assert!(out.is_empty(), "{out:?}");
    let out = feed(&mut decoder, &request(2, &[0; 20])).1;
    assert_eq!(out, control(WINDOW, 0, &200u32.to_be_bytes()));
}

#[test]
fn windows_that_cannot_be_are_refused() {
    for options in [
        Options {
            stream_window: 0,
            ..OPTIONS
        },
        Options {
            connection_window: 1 << 31,
            ..OPTIONS
        },
    ] {
        assert!(
            Decoder::new(options)
                .unwrap_err()
                .to_string()
                .contains("1 to 2147483647 wanted")
        );
    }
}

#[test]
fn what_a_connection_held_is_given_back_at_once_when_it_ends() {
    use std::sync::Mutex;
    static GIVEN: Mutex<Vec<Vec<usize>>> = Mutex::new(Vec::new());
    fn discard(messages: Vec<Vec<u8>>) {
        GIVEN
            .lock()
            .unwrap()
            .push(messages.iter().map(Vec::len).collect());
    }
    let begun = |fail: bool| {
        let mut decoder = Decoder::with_memory(
            OPTIONS,
            Memory {
                discard,
                ..Memory::default()
            },
        )
        .unwrap();
        feed(&mut decoder, &control(HELLO, 0, b"")).2.unwrap();
        decoder.agree(Some(Checksum::Crc32), 16_384);
        for stream in 1..=3 {
            let payload = request_payload(50, &[7; 10]);
            feed(&mut decoder, &block(REQUEST, stream, 0, false, &payload))
                .2
                .unwrap();
        }
        if fail {
            feed(&mut decoder, &control(HELLO, 0, b"")).2.unwrap_err();
        }
        drop(decoder);
        std::mem::take(&mut *GIVEN.lock().unwrap())
    };
    assert_eq!(begun(true), [[10; 3]]);
    assert_eq!(begun(false), [[10; 3]]);
}
