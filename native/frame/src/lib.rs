//! The MeshxRpc wire protocol, receiving side: frames, checksums, reassembly, flow control, limits.
//!
//! [`Decoder`] turns what a socket delivered into [`Event`]s and into bytes to send back. It does no I/O, knows no
//! clock and never panics on what a peer sent. `docs/rpc-protocol.md` is the protocol; [`encode`] writes its
//! frames.
//!
//! # Limits
//! | | Default | When passed |
//! |---|---|---|
//! | [`MAX_PAYLOAD`] | 65,536 bytes | the connection ends, before the payload is kept |
//! | agreed block size | | the connection ends, before the payload is kept |
//! | [`MAX_HELLO`], [`MAX_TEXT`] | 4,096 and 1,024 bytes | the connection ends, before the payload is kept |
//! | [`Options::max_message`] | set by the owner | the stream is reset, `too_large` |
//! | [`Options::max_bytes`], [`Options::max_streams`] | set by the owner | the stream is reset, `full` |
//! | [`Budget`] | set by the owner | the stream is reset, `full` |
//! | [`MAX_SKIPPED`] | 1,024 | the connection ends |
//! | windows | set by the owner | the connection ends |
//! | [`CONTROL_BURST`], [`CONTROL_PER_SECOND`] | 10,000 and 5,000 | the connection ends |
//!
//! # Not offered
//! Queues and the sending order, send windows, the hello's fields and proofs: they belong to the connection's
//! owner. A decoder does not know time limits either.
//!
//! # Example
//! ```
//! use std::time::Duration;
//! use meshx_frame::{Checksum, Decoder, Event, Options, Output, Role, Status, encode, frame_type};
//!
//! let mut decoder = Decoder::new(Options {
//!     role: Role::Client,
//!     max_message: 1 << 20,
//!     max_bytes: 4 << 20,
//!     max_streams: 100,
//!     stream_window: 1 << 20,
//!     connection_window: 4 << 20,
//! })?;
//! let mut wire = Vec::new();
//! encode::control(&mut wire, frame_type::HELLO_ACK, 0, &[b"fields"]);
//! encode::control(&mut wire, frame_type::READY, 0, &[]);
//! let mut output = Output::default();
//! decoder.feed(Duration::ZERO, &wire, &mut output)?;
//! assert_eq!(output.events.pop(), Some(Event::Ready));
//!
//! decoder.agree(Some(Checksum::Crc32), 16_384);
//! decoder.open(1);
//! let mut payload = Vec::new();
//! encode::response_head(&mut payload, Status::Result, 0, 5);
//! payload.extend_from_slice(b"hello");
//! wire.clear();
//! encode::block(&mut wire, frame_type::RESPONSE, 1, 0, true, Some(Checksum::Crc32), &payload);
//! decoder.feed(Duration::ZERO, &wire, &mut output)?;
//! let Some(Event::Response { result, .. }) = output.events.pop() else { unreachable!() };
//! assert_eq!(result, b"hello");
//! decoder.release(1);
//! assert_eq!(decoder.stats().reserved, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod assembly;
mod budget;
mod cause;
mod checksum;
mod contain;
mod control_rate;
mod copy;
mod decoder;
pub mod encode;
mod event;
mod header;
mod memory;
mod options;
mod stream;
mod streams;
mod window;

pub use budget::Budget;
pub use cause::Cause;
pub use checksum::Checksum;
pub use contain::contain;
pub use decoder::{Decoder, Stats};
pub use event::{Event, Failure, Kind, Output, Status};
pub use header::{FLAG_CKS, FLAG_END, Header, frame_type};
pub use memory::{Memory, Pool};
pub use options::{Options, OptionsError, Role};

/// Largest payload of one frame in bytes, heads included.
pub const MAX_PAYLOAD: usize = 65_536;
/// Largest payload of a HELLO or HELLO_ACK in bytes.
pub const MAX_HELLO: usize = 4_096;
/// Longest text of a RESET, REFUSED or GOAWAY in bytes.
pub const MAX_TEXT: usize = 1_024;
/// Largest window in bytes.
pub const MAX_WINDOW: u32 = 0x7FFF_FFFF;
/// Request ids that may be left out below the largest: callers of one client race for the socket.
pub const MAX_SKIPPED: usize = 1_024;
/// Frames that bring no message and may come at once.
pub const CONTROL_BURST: u32 = 10_000;
/// Frames that bring no message and may come each second, after the burst.
pub const CONTROL_PER_SECOND: u32 = 5_000;
