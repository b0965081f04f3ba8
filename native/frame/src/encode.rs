//! Frames to be sent, appended to a buffer.

use crate::header::{FLAG_CKS, FLAG_END, Header, frame_type};
use crate::{Cause, Checksum, Kind, MAX_TEXT, Status};

/// Appends a frame without checksum and with sequence number 0: all but REQUEST, RESPONSE and DATA.
///
/// The payload must not be longer than the type allows (`docs/rpc-protocol.md`); a peer ends the connection
/// otherwise.
pub fn control(out: &mut Vec<u8>, frame_type: u8, stream: u32, payload: &[&[u8]]) {
    let len = payload.iter().map(|part| part.len()).sum::<usize>() as u32;
    Header {
        len,
        frame_type,
        flags: 0,
        seq: 0,
        stream,
    }
    .write(out);
    for part in payload {
        out.extend_from_slice(part);
    }
}

/// Appends RESET: this stream is over. Text beyond [`MAX_TEXT`] bytes is cut.
pub fn reset(out: &mut Vec<u8>, stream: u32, cause: Cause, text: &str) {
    control(
        out,
        frame_type::RESET,
        stream,
        &[&cause.number().to_be_bytes(), cut(text)],
    );
}

/// Appends REFUSED: the handshake ends here. Text beyond [`MAX_TEXT`] bytes is cut.
pub fn refused(out: &mut Vec<u8>, cause: Cause, text: &str) {
    control(
        out,
        frame_type::REFUSED,
        0,
        &[&cause.number().to_be_bytes(), cut(text)],
    );
}

/// Appends GOAWAY: streams above `last` are not run. Text beyond [`MAX_TEXT`] bytes is cut.
pub fn goaway(out: &mut Vec<u8>, last: u32, cause: Cause, text: &str) {
    let cause = cause.number().to_be_bytes();
    control(
        out,
        frame_type::GOAWAY,
        0,
        &[&last.to_be_bytes(), &cause, cut(text)],
    );
}

/// Appends WINDOW: `increment` more bytes are taken on `stream` (0 is the connection).
pub fn window(out: &mut Vec<u8>, stream: u32, increment: u32) {
    control(out, frame_type::WINDOW, stream, &[&increment.to_be_bytes()]);
}

/// Appends the head of a request. A name has 1 to 255 bytes; longer ones are cut.
pub fn request_head(out: &mut Vec<u8>, kind: Kind, deadline: Option<u32>, total: u64, term: u8, fun: &[u8]) {
    let fun = &fun[..fun.len().min(255)];
    out.push(match kind {
        Kind::Call => 1,
        Kind::Cast => 2,
    });
    out.extend_from_slice(&deadline.unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(&total.to_be_bytes());
    out.extend_from_slice(&[term, fun.len() as u8]);
    out.extend_from_slice(fun);
}

/// Appends the head of a response.
pub fn response_head(out: &mut Vec<u8>, status: Status, term: u8, total: u64) {
    let status = match status {
        Status::Result => 0,
        Status::Error => 1,
        Status::Started => 2,
    };
    out.extend_from_slice(&[status, term]);
    out.extend_from_slice(&total.to_be_bytes());
}

/// Appends one REQUEST, RESPONSE or DATA frame; `payload` begins with the head where the type has one.
pub fn block(
    out: &mut Vec<u8>,
    frame_type: u8,
    stream: u32,
    seq: u32,
    end: bool,
    checksum: Option<Checksum>,
    payload: &[u8],
) {
    let start = out.len();
    let flags = if end { FLAG_END } else { 0 } | if checksum.is_some() { FLAG_CKS } else { 0 };
    Header {
        len: payload.len() as u32,
        frame_type,
        flags,
        seq,
        stream,
    }
    .write(out);
    out.extend_from_slice(payload);
    if let Some(checksum) = checksum {
        let crc = checksum.of(&out[start..]);
        out.extend_from_slice(&crc.to_be_bytes());
    }
}

fn cut(text: &str) -> &[u8] {
    &text.as_bytes()[..text.floor_char_boundary(MAX_TEXT)]
}
