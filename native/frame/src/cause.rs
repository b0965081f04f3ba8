//! Why a stream or a connection ended.

/// A cause on the wire ("Causes" in `docs/rpc-protocol.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Cause {
    /// The peer broke the protocol.
    Protocol = 1,
    /// A block's checksum is missing or wrong.
    InvalidCks = 2,
    /// No room: streams, bytes or executions.
    Full = 3,
    /// A frame or message is larger than taken.
    TooLarge = 4,
    /// Nobody waits any more.
    Cancelled = 5,
    /// A gap in a message's blocks.
    Sequence = 6,
    /// A frame for a stream that was never opened.
    UnknownStream = 7,
    /// No common version.
    Version = 8,
    /// The peer did not prove that it has the key.
    Auth = 9,
    /// No common settings.
    Settings = 10,
    /// Too slow.
    Timeout = 11,
    /// The sender stops.
    Shutdown = 12,
    /// The sender failed; not the receiver's fault.
    Internal = 13,
    /// A term that may not be decoded.
    RefusedTerm = 14,
    /// The request has run; its result found no room.
    Unread = 15,
}

impl Cause {
    /// All causes, in the order of their numbers from 1.
    pub const ALL: [Self; 15] = [
        Self::Protocol,
        Self::InvalidCks,
        Self::Full,
        Self::TooLarge,
        Self::Cancelled,
        Self::Sequence,
        Self::UnknownStream,
        Self::Version,
        Self::Auth,
        Self::Settings,
        Self::Timeout,
        Self::Shutdown,
        Self::Internal,
        Self::RefusedTerm,
        Self::Unread,
    ];

    /// Its number on the wire.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The cause of a number; `None` when this version does not know it.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}
