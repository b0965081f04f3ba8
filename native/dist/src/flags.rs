//! Capability flags that the two nodes exchange in the handshake (section "Distribution Flags").
//!
//! What is used on a link is the intersection of both sides' flags. Constants carry the names of the
//! specification without the prefix `DFLAG_`; the values are those of `dist.hrl` in OTP's kernel application.
//!
//! ```
//! use meshx_dist::flags::DistFlags;
//!
//! let agreed = DistFlags::c_node_default() & DistFlags::MANDATORY_26;
//! assert!(agreed.contains(DistFlags::BIG_CREATION));
//! assert!(!agreed.contains(DistFlags::FRAGMENTS));
//! ```

use std::fmt;
use std::ops::{BitAnd, BitOr};

/// A set of capability flags: 64 bits, sent big-endian.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct DistFlags(u64);

macro_rules! dist_flags {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        impl DistFlags {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// Every flag that has a name, with that name, in the order of the bits.
            const NAMED: &'static [(&'static str, Self)] = &[$((stringify!($name), Self::$name)),*];
        }
    };
}

dist_flags! {
    /// The node is to be published and is part of the global name space; without it the node is hidden.
    PUBLISHED = 1;
    /// Obsolete atom cache.
    ATOM_CACHE = 0x2;
    /// References of three 32-bit words.
    EXTENDED_REFERENCES = 0x4;
    /// Process monitors over the link. Without it a BEAM sends no `MONITOR_P`.
    DIST_MONITOR = 0x8;
    /// Separate tags for funs.
    FUN_TAGS = 0x10;
    /// Monitors by registered name.
    DIST_MONITOR_NAME = 0x20;
    /// Obsolete atom cache of hidden nodes.
    HIDDEN_ATOM_CACHE = 0x40;
    /// `NEW_FUN_EXT`.
    NEW_FUN_TAGS = 0x80;
    /// Extended pids and ports.
    EXTENDED_PIDS_PORTS = 0x100;
    /// `EXPORT_EXT`.
    EXPORT_PTR_TAG = 0x200;
    /// `BIT_BINARY_EXT`.
    BIT_BINARIES = 0x400;
    /// `NEW_FLOAT_EXT`.
    NEW_FLOATS = 0x800;
    /// Unicode in the I/O protocol.
    UNICODE_IO = 0x1000;
    /// Atom cache in the distribution header.
    DIST_HDR_ATOM_CACHE = 0x2000;
    /// `SMALL_ATOM_EXT`.
    SMALL_ATOM_TAGS = 0x4000;
    /// `ATOM_UTF8_EXT` and `SMALL_ATOM_UTF8_EXT`.
    UTF8_ATOMS = 0x1_0000;
    /// `MAP_EXT`.
    MAP_TAG = 0x2_0000;
    /// Creations of 32 bits: `NEW_PID_EXT`, `NEW_PORT_EXT`, `NEWER_REFERENCE_EXT`.
    BIG_CREATION = 0x4_0000;
    /// `SEND_SENDER` instead of `SEND`.
    SEND_SENDER = 0x8_0000;
    /// Any term as a sequential trace label.
    BIG_SEQTRACE_LABELS = 0x10_0000;
    /// Exit reasons travel as a payload behind the control message.
    EXIT_PAYLOAD = 0x40_0000;
    /// Large messages may come as fragments. Agreed, it also puts a distribution header before every message.
    FRAGMENTS = 0x80_0000;
    /// Handshake version 6.
    HANDSHAKE_23 = 0x100_0000;
    /// The link protocol with `UNLINK_ID` and `UNLINK_ID_ACK`.
    UNLINK_ID = 0x200_0000;
    /// Stands for all of [`DistFlags::MANDATORY_25`]. The chapter's text says bit 36; `dist.hrl` and every BEAM
    /// use bit 26.
    MANDATORY_25_DIGEST = 0x400_0000;
    /// `SPAWN_REQUEST` and `SPAWN_REPLY`.
    SPAWN = 1 << 32;
    /// Not a capability: the initiator asks to be given a node name.
    NAME_ME = 1 << 33;
    /// More bits in pids, ports and references (node container types version 4).
    V4_NC = 1 << 34;
    /// Process aliases: `ALIAS_SEND`.
    ALIAS = 1 << 35;
    /// Alternative action signals (OTP 28 and later): `ALTACT_SIG_SEND`, which takes the place of `ALIAS_SEND`.
    ALTACT_SIG = 1 << 37;
    /// Native records (OTP 29), external tag 67.
    NATIVE_RECORDS = 1 << 38;
}

impl DistFlags {
    /// What OTP 25 refuses to be without.
    pub const MANDATORY_25: Self = Self(0x107_0F94);
    /// What OTP 26 and later refuse to be without: [`Self::MANDATORY_25`], `V4_NC` and `UNLINK_ID`.
    pub const MANDATORY_26: Self = Self(0x4_0307_0F94);

    /// A set from its wire value; unknown bits are kept.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The wire value.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// What a hidden node made with this crate says of itself: everything mandatory in OTP 25 to 29, monitors,
    /// aliases, exit payloads and spawn requests (a BEAM that gets no `SPAWN_REPLY` waits for ever, so a node
    /// says it understands them and may answer `notsup`), alternative action signals, and fragments, so that one
    /// large message does not hold up the small ones behind it. Not native records: a peer then sends none, or
    /// its message ends the link. Add [`Self::PUBLISHED`] for a visible node.
    #[must_use]
    pub const fn c_node_default() -> Self {
        Self::MANDATORY_26
            .with(Self::MANDATORY_25_DIGEST)
            .with(Self::DIST_MONITOR)
            .with(Self::DIST_MONITOR_NAME)
            .with(Self::SMALL_ATOM_TAGS)
            .with(Self::EXIT_PAYLOAD)
            .with(Self::FRAGMENTS)
            .with(Self::SPAWN)
            .with(Self::ALIAS)
            .with(Self::ALTACT_SIG)
    }

    /// Whether every flag of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// This set with the flags of `other` added.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// This set with the flags of `other` taken out.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// What the digest bit stands for, written out: with it, all of [`Self::MANDATORY_25`] holds whatever the
    /// single bits say (comment at `DFLAG_MANDATORY_25_DIGEST` in `dist.hrl`).
    #[must_use]
    pub const fn expand_digest(self) -> Self {
        if self.contains(Self::MANDATORY_25_DIGEST) {
            self.with(Self::MANDATORY_25)
        } else {
            self
        }
    }

    /// The flags of `required` that this set, its digest bit written out, lacks.
    #[must_use]
    pub const fn missing(self, required: Self) -> Self {
        required.without(self.expand_digest())
    }
}

impl BitOr for DistFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        self.with(other)
    }
}

impl BitAnd for DistFlags {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// The names joined by `|`, bits without a name as one hexadecimal number.
impl fmt::Display for DistFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut first = true;
        for (name, flag) in Self::NAMED {
            if self.contains(*flag) {
                f.write_str(if first { "" } else { "|" })?;
                f.write_str(name)?;
                rest = rest.without(*flag);
                first = false;
            }
        }
        if rest.0 != 0 || first {
            write!(f, "{}{:#x}", if first { "" } else { "|" }, rest.0)?;
        }
        Ok(())
    }
}

impl fmt::Debug for DistFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DistFlags({:#x}: {self})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mandatory_sets_are_those_of_dist_hrl() {
        let m25 = DistFlags::EXTENDED_REFERENCES
            | DistFlags::FUN_TAGS
            | DistFlags::EXTENDED_PIDS_PORTS
            | DistFlags::UTF8_ATOMS
            | DistFlags::NEW_FUN_TAGS
            | DistFlags::BIG_CREATION
            | DistFlags::NEW_FLOATS
            | DistFlags::MAP_TAG
            | DistFlags::EXPORT_PTR_TAG
            | DistFlags::BIT_BINARIES
            | DistFlags::HANDSHAKE_23;
        assert_eq!(m25, DistFlags::MANDATORY_25);
        assert_eq!(
            m25 | DistFlags::V4_NC | DistFlags::UNLINK_ID,
            DistFlags::MANDATORY_26
        );
        assert_eq!(DistFlags::MANDATORY_25_DIGEST.bits(), 1 << 26);
    }

    #[test]
    fn the_default_of_a_c_node_is_hidden_and_complete() {
        let flags = DistFlags::c_node_default();
        assert_eq!(flags.missing(DistFlags::MANDATORY_26), DistFlags::default());
        assert!(!flags.contains(DistFlags::PUBLISHED));
        assert!(!flags.contains(DistFlags::DIST_HDR_ATOM_CACHE));
        assert!(!flags.contains(DistFlags::NAME_ME));
        assert!(flags.contains(DistFlags::ALTACT_SIG));
        assert!(!flags.contains(DistFlags::NATIVE_RECORDS));
    }

    #[test]
    fn missing_flags_are_named() {
        let flags = DistFlags::MANDATORY_26.without(DistFlags::V4_NC | DistFlags::MAP_TAG);
        assert_eq!(
            flags.missing(DistFlags::MANDATORY_26).to_string(),
            "MAP_TAG|V4_NC"
        );
    }

    #[test]
    fn the_digest_stands_for_the_flags_of_otp_25_only() {
        let flags = DistFlags::MANDATORY_25_DIGEST;
        assert_eq!(flags.missing(DistFlags::MANDATORY_25), DistFlags::default());
        assert_eq!(
            flags.missing(DistFlags::MANDATORY_26),
            DistFlags::V4_NC | DistFlags::UNLINK_ID
        );
        assert_eq!(
            DistFlags::default().missing(DistFlags::MAP_TAG),
            DistFlags::MAP_TAG
        );
    }

    #[test]
    fn unknown_bits_are_kept_and_shown() {
        let flags = DistFlags::from_bits(1 << 63 | 1);
        assert_eq!(flags.to_string(), "PUBLISHED|0x8000000000000000");
        assert_eq!(flags.bits(), 1 << 63 | 1);
        assert_eq!(DistFlags::default().to_string(), "0x0");
    }

    #[test]
    fn the_flags_of_real_systems_pass() {
        for bits in [0xD_07DF_7FBC, 0x6D_07DF_7FBC] {
            assert_eq!(
                DistFlags::from_bits(bits).missing(DistFlags::MANDATORY_26),
                DistFlags::default()
            );
        }
    }
}
