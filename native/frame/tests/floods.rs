//! Frames that bring nothing: what may be on its way, and how many are too many.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::*;
use meshx_frame::frame_type::*;
use meshx_frame::{CONTROL_BURST, CONTROL_PER_SECOND, Cause, Checksum, Options, Output, Role, Status};

#[test]
fn what_was_on_its_way_to_a_released_stream_is_ignored_and_nothing_beyond() {
    let options = Options {
        role: Role::Client,
        stream_window: 100,
        connection_window: 100_000,
        ..OPTIONS
    };
    let mut decoder = up(options, Some(Checksum::Crc32), 16_384);
    decoder.open(1);
    decoder.release(1);
    let first = block(
        RESPONSE,
        1,
        0,
        false,
        &response_payload(Status::Result, 500, &[0; 60]),
    );
    assert_eq!(feed(&mut decoder, &first), (vec![], vec![], Ok(())));
    assert_eq!(
        feed(&mut decoder, &block(DATA, 1, 1, false, &[0; 40])),
        (vec![], vec![], Ok(()))
    );
    ends(
        &mut decoder,
        &block(DATA, 1, 2, false, &[0]),
        Cause::Protocol,
        "1 bytes on a stream that is over",
    );
}

#[test]
fn completed_streams_leave_no_room_for_strays() {
    let mut decoder = server();
    for stream in 1..=10 {
        feed(&mut decoder, &request(stream, b"x")).2.unwrap();
        decoder.release(stream);
    }
    ends(
        &mut decoder,
        &block(DATA, 3, 1, false, &[0]),
        Cause::Protocol,
        "0 can be on their way",
    );
}

#[test]
fn a_stream_that_was_reset_is_over_though_its_budget_is_held() {
    let mut decoder = server();
    feed(&mut decoder, &request(1, b"x")).2.unwrap();
    feed(&mut decoder, &control(RESET, 1, b"\0\x05")).2.unwrap();
    assert_eq!(decoder.stats().reserved, 1);
    let empty = block(DATA, 1, 1, true, b"");
    assert_eq!(feed(&mut decoder, &empty), (vec![], vec![], Ok(())));
    ends(
        &mut decoder,
        &block(DATA, 1, 1, true, b"x"),
        Cause::Protocol,
        "0 can be on their way",
    );
}

#[test]
fn floods_end_the_connection_and_time_forgives() {
    let ping = control(PING, 0, b"12345678");
    let cancel = control(CANCEL, 1, b"");
    let reset = control(RESET, 1, b"\0\x05");
    let late = control(WINDOW, 1, b"\0\0\0\x01");
    let stray = block(DATA, 1, 1, true, b"");
    let unknown = control(0x99, 7, b"what");
    for frame in [
        ping,
        cancel,
        reset,
        late,
        stray,
        unknown,
        control(PONG, 0, b"12345678"),
    ] {
        let mut decoder = server();
        feed(&mut decoder, &request(1, b"")).2.unwrap();
        decoder.release(1);
        let mut output = Output::default();
        let burst = frame.repeat(CONTROL_BURST as usize);
        decoder.feed(Duration::ZERO, &burst, &mut output).unwrap();
        assert!(output.bytes.len() <= burst.len());
        let second = Duration::from_secs(1);
        let more = frame.repeat(CONTROL_PER_SECOND as usize);
        decoder.feed(second, &more, &mut output).unwrap();
        let failure = decoder.feed(second, &frame, &mut output).unwrap_err();
        assert!(failure.text.contains("control frames"), "{failure}");
    }
}

#[test]
fn cancels_of_live_streams_are_not_counted() {
    let mut decoder = server();
    for stream in 1..=2 * CONTROL_BURST {
        let wire = [request(stream, b""), control(CANCEL, stream, b"")].concat();
        let (events, _, result) = feed(&mut decoder, &wire);
        result.unwrap();
        assert_eq!(events.len(), 2);
        decoder.release(stream);
    }
}

#[test]
fn a_second_answer_is_ignored_and_counted() {
    let mut decoder = client();
    decoder.open(1);
    let answer = block(RESPONSE, 1, 0, true, &response_payload(Status::Result, 2, b"ok"));
    assert_eq!(feed(&mut decoder, &answer).0.len(), 1);
    assert_eq!(decoder.stats().open, 0);
    for _ in 0..CONTROL_BURST {
        let (events, _, result) = feed(&mut decoder, &answer);
        result.unwrap();
        assert_eq!(events, []);
    }
    ends(&mut decoder, &answer, Cause::Protocol, "control frames");
}

#[test]
fn streams_in_error_are_limited_and_overload_is_not() {
    let payload = request_payload(0, b"");
    let bad = |stream| block(REQUEST, stream, 1, true, &payload);
    let mut decoder = server();
    for stream in 1..=CONTROL_BURST {
        feed(&mut decoder, &bad(stream)).2.unwrap();
    }
    ends(
        &mut decoder,
        &bad(CONTROL_BURST + 1),
        Cause::Protocol,
        "control frames",
    );

    let mut decoder = up(
        Options {
            max_streams: 1,
            ..OPTIONS
        },
        Some(Checksum::Crc32),
        16_384,
    );
    for stream in 1..=CONTROL_BURST + 2 {
        feed(&mut decoder, &request(stream, b"")).2.unwrap();
    }
}

#[test]
fn resets_that_answer_requests_are_not_counted() {
    let mut decoder = client();
    for stream in 1..=CONTROL_BURST + 2 {
        decoder.open(stream);
        let (events, _, result) = feed(&mut decoder, &control(RESET, stream, b"\0\x03"));
        result.unwrap();
        assert_eq!(events.len(), 1);
    }
    let mut output = Output::default();
    let again = control(RESET, 1, b"\0\x03").repeat(CONTROL_BURST as usize);
    decoder.feed(Duration::ZERO, &again, &mut output).unwrap();
    ends(
        &mut decoder,
        &control(RESET, 1, b"\0\x03"),
        Cause::Protocol,
        "control frames",
    );
}
