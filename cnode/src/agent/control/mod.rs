//! The control socket: framing, messages, sessions and commands.

mod args;
pub mod frame;
pub mod message;

/// Requests of one client that may be unanswered at a time.
pub const UNANSWERED_MAX: usize = 64;
