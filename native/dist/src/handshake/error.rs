use crate::flags::DistFlags;

/// Why a handshake ended without a link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// A message that this state doesn't wait for.
    #[error("got a message with tag {got:#04x}, waiting for {waiting_for}")]
    Unexpected {
        /// Name of the message that should have come.
        waiting_for: &'static str,
        /// First byte of the one that came.
        got: u8,
    },
    /// A message that ends before its fields do, or goes on where it may not.
    #[error("{message} message of {len} bytes has a wrong length")]
    WrongLength {
        /// Name of the message.
        message: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// `send_name` in the old form, which nodes before OTP 23 send, and OTP 23 and 24 without EPMD.
    #[error("peer sent the old name message 'n', wanted 'N': the peer must run OTP 25 or later")]
    OldName,
    /// A name longer than [`super::MAX_NAME_LEN`].
    #[error("node name of {len} bytes, at most {max} are taken")]
    NameTooLong {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// A name that no node can have.
    #[error("{name:?} is no node name, wanted {wanted}")]
    BadName {
        /// The name, bytes that are no UTF-8 replaced.
        name: String,
        /// `name@host` or the host alone.
        wanted: &'static str,
    },
    /// A status that the specification doesn't list, or not in this place.
    #[error("got status {status:?}, wanted {wanted}")]
    BadStatus {
        /// The status, shortened.
        status: String,
        /// What is possible in this state.
        wanted: &'static str,
    },
    /// The peer lacks capabilities that this node requires.
    #[error("peer lacks the mandatory flags {missing}")]
    MissingFlags {
        /// What it lacks.
        missing: DistFlags,
    },
    /// Another node answered than was dialled.
    #[error("peer says it is {got:?}, wanted {wanted:?}")]
    WrongName {
        /// The name that was dialled.
        wanted: String,
        /// The name in the peer's challenge.
        got: String,
    },
    /// The peer's digest doesn't prove our cookie.
    #[error("cookie of {peer:?} differs from ours: set the same one on both nodes")]
    CookieMismatch {
        /// The name the peer gave itself.
        peer: String,
    },
    /// The peer refused with a status, or withdrew.
    #[error("peer refused with status {status:?}")]
    Refused {
        /// `nok`, `not_allowed` or `false`.
        status: &'static str,
    },
    /// The caller's answer doesn't fit the peer's name message: a name is given exactly when `NAME_ME` asks.
    #[error("node {peer:?} was {given}, its flag NAME_ME says otherwise")]
    WrongAdmission {
        /// The name in its message.
        peer: String,
        /// `given a name` or `not given a name`.
        given: &'static str,
    },
}
