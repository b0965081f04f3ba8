//! A peer that writes what the tests want, and a decoder for it to write to.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

use std::time::Duration;

use meshx_frame::{
    Cause, Checksum, Decoder, Event, Failure, Kind, Options, Output, Role, Status, encode, frame_type,
};

pub const OPTIONS: Options = Options {
    role: Role::Server,
    max_message: 100_000,
    max_bytes: 150_000,
    max_streams: 4,
    stream_window: 65_536,
    connection_window: 200_000,
};

/// A decoder after the handshake.
pub fn up(options: Options, checksum: Option<Checksum>, block: usize) -> Decoder {
    let mut decoder = Decoder::new(options).unwrap();
    let mut wire = Vec::new();
    if options.role == Role::Client {
        encode::control(&mut wire, frame_type::HELLO_ACK, 0, &[]);
        encode::control(&mut wire, frame_type::READY, 0, &[]);
    } else {
        encode::control(&mut wire, frame_type::HELLO, 0, &[]);
    }
    decoder
        .feed(Duration::ZERO, &wire, &mut Output::default())
        .unwrap();
    decoder.agree(checksum, block);
    decoder
}

pub fn server() -> Decoder {
    up(OPTIONS, Some(Checksum::Crc32), 16_384)
}

pub fn client() -> Decoder {
    up(
        Options {
            role: Role::Client,
            ..OPTIONS
        },
        Some(Checksum::Crc32),
        16_384,
    )
}

/// Events, bytes to send and how it ended.
pub fn feed(decoder: &mut Decoder, wire: &[u8]) -> (Vec<Event>, Vec<u8>, Result<(), Failure>) {
    let mut output = Output::default();
    let result = decoder.feed(Duration::ZERO, wire, &mut output);
    (output.events, output.bytes, result)
}

pub fn control(frame_type: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode::control(&mut out, frame_type, stream, &[payload]);
    out
}

pub fn block(frame_type: u8, stream: u32, seq: u32, end: bool, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode::block(
        &mut out,
        frame_type,
        stream,
        seq,
        end,
        Some(Checksum::Crc32),
        payload,
    );
    out
}

pub fn request_payload(total: u64, data: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    encode::request_head(&mut payload, Kind::Call, Some(500), total, 1, b"echo");
    payload.extend_from_slice(data);
    payload
}

/// A request in one frame.
pub fn request(stream: u32, argument: &[u8]) -> Vec<u8> {
    block(
        frame_type::REQUEST,
        stream,
        0,
        true,
        &request_payload(argument.len() as u64, argument),
    )
}

pub fn response_payload(status: Status, total: u64, data: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    encode::response_head(&mut payload, status, 1, total);
    payload.extend_from_slice(data);
    payload
}

/// A message as frames of at most `size` bytes each.
pub fn message(
    role: Role,
    stream: u32,
    fun: &[u8],
    bytes: &[u8],
    size: usize,
    checksum: Option<Checksum>,
) -> Vec<Vec<u8>> {
    let mut blocks: Vec<&[u8]> = bytes.chunks(size).collect();
    if blocks.is_empty() {
        blocks.push(&[]);
    }
    let last = blocks.len() - 1;
    let frame = |(seq, data): (usize, &&[u8])| {
        let mut payload = Vec::new();
        let total = bytes.len() as u64;
        let frame_type = match (seq, role) {
            (0, Role::Server) => {
                encode::request_head(&mut payload, Kind::Cast, None, total, 0, fun);
                frame_type::REQUEST
            }
            (0, Role::Client) => {
                encode::response_head(&mut payload, Status::Result, 0, total);
                frame_type::RESPONSE
            }
            _ => frame_type::DATA,
        };
        payload.extend_from_slice(data);
        let mut out = Vec::new();
        encode::block(
            &mut out,
            frame_type,
            stream,
            seq as u32,
            seq == last,
            checksum,
            &payload,
        );
        out
    };
    blocks.iter().enumerate().map(frame).collect()
}

/// Feeds and expects the connection to end with this cause and a text that holds `text`.
#[track_caller]
pub fn ends(decoder: &mut Decoder, wire: &[u8], cause: Cause, text: &str) {
    let (_, out, result) = feed(decoder, wire);
    let failure = result.expect_err("the connection must end");
    assert_eq!(failure.cause, cause, "{failure}");
    assert!(failure.text.contains(text), "{failure}");
    let last_words = failure.text.as_bytes();
    assert!(out.ends_with(last_words), "a GOAWAY or REFUSED must say why");
    assert_eq!(decoder.stats().reserved, 0);
    let (events, out, again) = feed(decoder, b"more");
    assert_eq!((events.len(), out.len(), again.unwrap_err()), (0, 0, failure));
}

/// Feeds and expects this stream alone to end.
#[track_caller]
pub fn resets(decoder: &mut Decoder, wire: &[u8], stream: u32, cause: Cause, text: &str) {
    let (events, out, result) = feed(decoder, wire);
    result.unwrap();
    let Some(Event::StreamError {
        stream: s,
        cause: c,
        text: t,
    }) = events.last()
    else {
        panic!("a stream error wanted, got {events:?}")
    };
    assert_eq!((*s, *c), (stream, cause), "{t}");
    assert!(t.contains(text), "{t}");
    let mut reset = Vec::new();
    meshx_frame::encode::reset(&mut reset, stream, cause, t);
    assert!(out.ends_with(&reset), "the RESET must be sent");
}
