//! Frames to messages and back on an established link (section "Protocol between Connected Nodes", and
//! "Distribution Header" of the chapter "External Term Format").
//!
//! ```text
//! neither flag agreed   112 131 control [131 payload]                          pass-through
//! FRAGMENTS agreed      131 68 0 control [payload]                             distribution header
//!                       131 69 sequence:64 fragment:64 0 control payload...    first fragment
//!                       131 70 sequence:64 fragment:64 ...payload...           continuation
//! ```
//!
//! Fragment numbers count down to 1. The byte 0 is the number of atom cache references: this crate keeps no atom
//! cache, so `DIST_HDR_ATOM_CACHE` must not be among a node's own flags, and a reference is refused.
//!
//! Large messages are cut at [`FRAGMENT_SIZE`] when `FRAGMENTS` is agreed.

mod common;
mod receive;
mod send;

pub use receive::{Encoded, LinkError, LinkLimits, Message, Receiver};
pub use send::{FRAGMENT_SIZE, Prepared, SendError, Sender};

use crate::flags::DistFlags;

const PASS_THROUGH: u8 = 112;
const VERSION: u8 = 131;
const DIST_HEADER: u8 = 68;
const FIRST_FRAGMENT: u8 = 69;
const CONTINUATION: u8 = 70;

/// With either flag every message begins with a distribution header.
fn with_headers(agreed: DistFlags) -> bool {
    agreed.contains(DistFlags::FRAGMENTS) || agreed.contains(DistFlags::DIST_HDR_ATOM_CACHE)
}

#[cfg(test)]
mod tests;
