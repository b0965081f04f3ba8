use std::time::Duration;

use meshx_frame::{Checksum, Decoder, Event, Failure, Options, Output, Role};

use super::choice;

const OPTIONS: Options = Options {
    role: Role::Server,
    max_message: 20_000,
    max_bytes: 30_000,
    max_streams: 4,
    stream_window: 8_192,
    connection_window: 40_000,
};
/// Frames after which the owner of the decoder does its part.
const AT_ONCE: usize = 1;

/// RPC frames at either side: any split of the stream gives the same events, answers and end, and the decoder holds
/// no more than its budget. The first byte says: role (bit 0), checksums agreed (1), small blocks (2), size of the
/// reads (the rest).
pub fn rpc(data: &[u8]) {
    let Some((choice, stream)) = choice(data) else {
        return;
    };
    let whole = run(choice, stream, usize::MAX);
    assert_eq!(run(choice, stream, usize::from(choice >> 3) * 7 + 1), whole);
}

type Seen = (Vec<Event>, Vec<u8>, Option<Failure>);

fn run(choice: u8, stream: &[u8], read: usize) -> Seen {
    let role = if choice & 1 == 0 {
        Role::Server
    } else {
        Role::Client
    };
    let (checksum, block) = (
        (choice & 2 != 0).then_some(Checksum::Crc32),
        if choice & 4 == 0 { 16_384 } else { 64 },
    );
    let mut decoder = Decoder::new(Options { role, ..OPTIONS }).unwrap();
    let mut all: Seen = Default::default();
    for bytes in stream.chunks(read.min(stream.len().max(1))) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut output = Output::default();
            let fed = decoder.feed_some(Duration::ZERO, rest, AT_ONCE, &mut output);
            let stats = decoder.stats();
            assert!(stats.reserved <= OPTIONS.max_bytes && stats.open <= OPTIONS.max_streams);
            for event in &output.events {
                owner(&mut decoder, event, checksum, block);
            }
            all.0.append(&mut output.events);
            all.1.append(&mut output.bytes);
            match fed {
                Ok(used) => {
                    assert!(used > 0, "no progress");
                    rest = &rest[used..];
                }
                Err(failure) => {
                    assert_eq!(decoder.stats().reserved, 0);
                    all.2 = Some(failure);
                    return all;
                }
            }
        }
    }
    all
}

/// What a connection's owner does: agrees, opens streams, and is done with every second message.
fn owner(decoder: &mut Decoder, event: &Event, checksum: Option<Checksum>, block: usize) {
    match event {
        Event::Auth(_) => decoder.agree(checksum, block),
        Event::HelloAck(_) => decoder.agree(checksum, block),
        Event::Ready => (1..=4).for_each(|stream| decoder.open(stream)),
        Event::Request { stream, .. } | Event::Response { stream, .. } if stream % 2 == 0 => {
            decoder.release(*stream);
        }
        Event::StreamError { stream, .. } | Event::Reset { stream, .. } => decoder.release(*stream),
        _ => {}
    }
}
