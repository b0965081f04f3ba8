//! What must hold for any bytes a stranger sends: one body per protocol.
//!
//! Each body takes bytes and panics when something does not hold that should. `fuzz/` wraps them for libFuzzer;
//! `tests/fuzz.rs` runs the same bodies on stable over the seeds in `fuzz/seeds` and over edits of them.
//! docs/fuzzing.md says how.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agent;
mod data;
mod epmd;
mod etf;
#[path = "../../../native/etf/tests/common/agreement.rs"]
mod etf_agreement;
mod framing;
mod handshake;
mod mesh;
mod rpc;

pub use agent::control;
pub use data::data;
pub use epmd::epmd;
pub use etf::etf;
pub use framing::framing;
pub use handshake::handshake;
pub use mesh::mesh;
pub use rpc::rpc;

/// A body: panics when something does not hold for these bytes.
pub type Body = fn(&[u8]);

/// Every target: its name, which is also that of its directory of seeds, and its body.
pub const TARGETS: [(&str, Body); 8] = [
    ("etf", etf),
    ("data", data),
    ("framing", framing),
    ("handshake", handshake),
    ("epmd", epmd),
    ("rpc", rpc),
    ("mesh", mesh),
    ("control", control),
];

/// The first byte, which chooses among settings, and the rest.
fn choice(data: &[u8]) -> Option<(u8, &[u8])> {
    data.split_first().map(|(choice, rest)| (*choice, rest))
}

/// A decoder that is asked again with every byte more, as when they trickle in: what it once said of a
/// beginning stays so. `Ok(None)` is "more bytes are needed".
fn stays<T: PartialEq + std::fmt::Debug, E: PartialEq + std::fmt::Debug>(
    data: &[u8],
    decode: impl Fn(&[u8]) -> Result<Option<T>, E>,
) {
    const LONGEST: usize = 600;
    let mut before = None;
    for end in 0..=data.len().min(LONGEST) {
        let now = decode(&data[..end]);
        match (&before, &now) {
            (None, Ok(None)) => {}
            (None, _) => before = Some(now),
            (Some(before), now) => assert_eq!(before, now, "at {end} of {} bytes", data.len()),
        }
    }
}
