//! What a decoder may spend on one term.

/// The deepest nesting any decoder or encoder of this crate accepts, whatever [`Limits::max_depth`] says.
///
/// An owned [`Term`](crate::Term) is compared, printed, converted and dropped by recursion. At this ceiling those
/// fit half of the stack that a Rust thread gets by default (2 MiB), in a build without optimisation.
pub const DEPTH_CEILING: u32 = 512;

/// Limits on one encoded term. Every field is something that the peer who wrote the bytes chooses.
///
/// Memory: an owned term takes at most `max_terms` times the size of [`Term`](crate::Term) (32 bytes), twice that
/// for lists that were announced in pieces, plus the bytes of its binaries, atoms and integers, which are never
/// more than the (inflated) input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Containers inside one another. Default 256; values above [`DEPTH_CEILING`] count as that ceiling.
    pub max_depth: u32,
    /// Terms in all, each element of a list, tuple, map or string counted. Default 4,194,304.
    pub max_terms: usize,
    /// Bytes handed to the decoder, before inflation. Default 128 MiB.
    pub max_bytes: usize,
    /// Bytes that a compressed term may inflate to. Default 64 MiB.
    pub max_inflated: usize,
    /// Bytes of one integer's magnitude. Default 64 KiB.
    pub max_integer_bytes: usize,
    /// Whether a compressed term is taken at all. Default true.
    pub allow_compressed: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_depth: 256,
            max_terms: 4 << 20,
            max_bytes: 128 << 20,
            max_inflated: 64 << 20,
            max_integer_bytes: 64 << 10,
            allow_compressed: true,
        }
    }
}

impl Limits {
    pub(crate) fn depth(&self) -> usize {
        self.max_depth.min(DEPTH_CEILING) as usize
    }
}
