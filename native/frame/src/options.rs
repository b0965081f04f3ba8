//! What a decoder may spend on its peer.

use thiserror::Error;

/// Our side of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We send requests.
    Client,
    /// We answer them.
    Server,
}

/// Limits of one connection's decoder. A peer can make it hold at most `max_bytes` plus one frame, and
/// `max_streams` entries of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Our side.
    pub role: Role,
    /// Largest message in bytes. Larger ones are answered `too_large`.
    pub max_message: u64,
    /// Bytes of messages that are being reassembled or used. What does not fit is answered `full`.
    pub max_bytes: u64,
    /// Requests that may be open at once. More are answered `full`.
    pub max_streams: usize,
    /// What our hello grants each stream, in bytes.
    pub stream_window: u32,
    /// What our hello grants the connection, in bytes.
    pub connection_window: u32,
}

/// A window that cannot be granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{name} is {value}, 1 to {} wanted", crate::MAX_WINDOW)]
pub struct OptionsError {
    /// The field.
    pub name: &'static str,
    /// Its value.
    pub value: u32,
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        for (name, value) in [
            ("stream_window", self.stream_window),
            ("connection_window", self.connection_window),
        ] {
            if value == 0 || value > crate::MAX_WINDOW {
                return Err(OptionsError { name, value });
            }
        }
        Ok(())
    }
}
