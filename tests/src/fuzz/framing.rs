use std::ops::Range;
use std::sync::Arc;

use meshx_dist::control::Control;
use meshx_dist::flags::DistFlags;
use meshx_dist::framing::{Frame, FrameDecoder, FrameError};
use meshx_dist::link::{Encoded, LinkLimits, Receiver, Sender};
use meshx_etf::{Limits, decode};

use super::choice;

/// Small, so that few bytes reach each of them.
fn limits() -> LinkLimits {
    LinkLimits {
        max_message: 4 << 10,
        max_sequences: 4,
        max_reassembly: 8 << 10,
        ..LinkLimits::default()
    }
}

const MAX_FRAME: usize = 8 << 10;

/// Connected distribution: any split of the stream gives the same messages, what waits stays within its limits,
/// and a message that was understood is understood again when we send it. The first byte says which flags were
/// agreed (lowest bit) and how large the reads are.
pub fn framing(data: &[u8]) {
    let Some((choice, stream)) = choice(data) else {
        return;
    };
    let mut flags = DistFlags::c_node_default();
    if choice & 1 == 0 {
        flags = flags
            .without(DistFlags::FRAGMENTS)
            .without(DistFlags::DIST_HDR_ATOM_CACHE);
    } else {
        flags = flags
            .with(DistFlags::FRAGMENTS)
            .with(DistFlags::DIST_HDR_ATOM_CACHE);
    }
    let frames = split(stream, usize::MAX);
    assert_eq!(split(stream, usize::from(choice >> 1) + 1), frames);
    assert_eq!(keep(stream, usize::from(choice >> 1) + 1), frames);

    let mut receiver = Receiver::new(flags, limits());
    for frame in &frames.0 {
        let message = match receiver.receive(frame) {
            Ok(Some(message)) => (message.control.clone(), message.payload.map(Encoded::to_vec)),
            Ok(None) => {
                assert!(receiver.waiting() <= limits().max_reassembly);
                continue;
            }
            Err(error) => {
                std::hint::black_box(error.to_string());
                return;
            }
        };
        again(flags, message.0, message.1.as_deref());
    }
}

/// All frames that are no ticks, and how the stream ended.
fn split(stream: &[u8], read: usize) -> (Vec<Vec<u8>>, Option<FrameError>) {
    let mut decoder = FrameDecoder::new(MAX_FRAME);
    let mut frames = Vec::new();
    for bytes in stream.chunks(read.min(stream.len().max(1))) {
        decoder.push(bytes);
        loop {
            match decoder.next_frame() {
                Ok(Some(Frame::Data(frame))) => frames.push(frame.to_vec()),
                Ok(Some(Frame::Tick)) => {}
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

/// As `split`, by somebody who keeps the buffers of some frames, and looks into them at the end.
fn keep(stream: &[u8], read: usize) -> (Vec<Vec<u8>>, Option<FrameError>) {
    let mut decoder = FrameDecoder::new(MAX_FRAME);
    let mut frames = Vec::new();
    let mut failed = None;
    'all: for bytes in stream.chunks(read.min(stream.len().max(1))) {
        decoder.push(bytes);
        loop {
            match decoder.next_shared() {
                Ok(Some((Frame::Data(frame), buffer))) => frames.push(match buffer {
                    Some(buffer) if frame.len() % 3 > 0 => {
                        let start = frame.as_ptr().addr() - buffer.as_ptr().addr();
                        Ok((Arc::clone(buffer), start..start + frame.len()))
                    }
                    _ => Err(frame.to_vec()),
                }),
                Ok(Some((Frame::Tick, _))) => {}
                Ok(None) => break,
                Err(error) => {
                    failed = Some(error);
                    break 'all;
                }
            }
        }
        // Some come back.
        if frames.len() % 7 == 6 {
            for frame in &mut frames {
                *frame = Err(bytes_of(frame));
            }
        }
    }
    (frames.iter().map(bytes_of).collect(), failed)
}

type Kept = Result<(Arc<Vec<u8>>, Range<usize>), Vec<u8>>;

fn bytes_of(frame: &Kept) -> Vec<u8> {
    match frame {
        Ok((buffer, range)) => buffer[range.clone()].to_vec(),
        Err(bytes) => bytes.clone(),
    }
}

fn again(flags: DistFlags, control: Control, payload: Option<&[u8]>) {
    let payload = match payload.map(|bytes| decode(bytes, &Limits::default())) {
        Some(Err(_)) => return,
        Some(Ok(term)) => Some(term),
        None => None,
    };
    let mut out = Vec::new();
    Sender::new(flags)
        .send(control.clone(), payload.as_ref(), &mut out)
        .unwrap();
    let mut receiver = Receiver::new(flags, LinkLimits::default());
    let mut decoder = FrameDecoder::new(usize::MAX);
    decoder.push(&out);
    let mut received = None;
    while let Some(Frame::Data(frame)) = decoder.next_frame().unwrap() {
        assert!(received.is_none());
        received = receiver.receive(frame).unwrap().map(|message| {
            let payload = message
                .payload
                .map(|bytes| decode(&bytes.to_vec(), &Limits::default()).unwrap());
            (message.control, payload)
        });
    }
    assert_eq!(received, Some((control, payload)));
}
