//! Why bytes are not a term, or a term can't become bytes.

use thiserror::Error;

/// Why bytes were not taken as a term. The peer who wrote them is at fault in every case but a limit set too low.
///
/// Offsets count from the first byte handed in (the version byte), or from the first inflated byte when the term
/// was compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The first byte is not the version byte 131, or there is no byte.
    #[error("a term begins with byte 131, got {}", found.map_or_else(|| "no bytes".to_owned(), |b| b.to_string()))]
    Version {
        /// The byte that was there.
        found: Option<u8>,
    },
    /// The input ends inside a term.
    #[error("the term is cut short: {needed} bytes wanted at offset {offset}, {remaining} left")]
    Truncated {
        /// Where the missing piece begins.
        offset: usize,
        /// Bytes that piece needs.
        needed: usize,
        /// Bytes that are left.
        remaining: usize,
    },
    /// Bytes follow the term.
    #[error("{remaining} bytes follow the term, which ends at offset {offset}")]
    Trailing {
        /// Where the term ends.
        offset: usize,
        /// Bytes after it.
        remaining: usize,
    },
    /// A tag that the format knows, but that is not taken inside a term.
    #[error("tag {tag} ({name}) at offset {offset} is not accepted in a term")]
    Refused {
        /// The tag byte.
        tag: u8,
        /// Its name in the format.
        name: &'static str,
        /// Where it is.
        offset: usize,
    },
    /// A tag that the format does not know.
    #[error("unknown tag {tag} at offset {offset}")]
    UnknownTag {
        /// The tag byte.
        tag: u8,
        /// Where it is.
        offset: usize,
    },
    /// One particular kind of term must be here (an atom as a node name, say), and it is another.
    #[error("{wanted} wanted at offset {offset}, got tag {tag}")]
    Expected {
        /// What the format has at this place.
        wanted: &'static str,
        /// The tag byte found.
        tag: u8,
        /// Where it is.
        offset: usize,
    },
    /// A container announces more elements than bytes are left for them.
    #[error("{count} elements announced at offset {offset}, but only {remaining} bytes are left")]
    CountPastEnd {
        /// Elements announced (pairs for a map, captured values for a fun).
        count: usize,
        /// Where the container's tag is.
        offset: usize,
        /// Bytes that are left.
        remaining: usize,
    },
    /// Containers are nested deeper than the limit.
    #[error("terms are nested deeper than {limit} at offset {offset} (max_depth)")]
    TooDeep {
        /// The limit in force.
        limit: usize,
        /// Where the container that is one too deep begins.
        offset: usize,
    },
    /// More terms than the limit.
    #[error("{terms} terms announced by offset {offset}, the limit is {limit} (max_terms)")]
    TooManyTerms {
        /// Terms seen or announced so far.
        terms: usize,
        /// The limit in force.
        limit: usize,
        /// Where the container that passes it begins.
        offset: usize,
    },
    /// The input is longer than the limit.
    #[error("{len} bytes of input, the limit is {limit} (max_bytes)")]
    TooLong {
        /// Bytes handed in.
        len: usize,
        /// The limit in force.
        limit: usize,
    },
    /// An integer is longer than the limit.
    #[error("an integer of {len} bytes at offset {offset}, the limit is {limit} (max_integer_bytes)")]
    IntegerTooLong {
        /// Bytes of magnitude announced.
        len: usize,
        /// The limit in force.
        limit: usize,
        /// Where the integer begins.
        offset: usize,
    },
    /// An atom has more than 255 characters, which no BEAM accepts.
    #[error("an atom of {chars} characters at offset {offset}, at most 255 are possible")]
    AtomTooLong {
        /// Characters it has.
        chars: usize,
        /// Where the atom begins.
        offset: usize,
    },
    /// An atom's text is not UTF-8 though its tag says so.
    #[error("the atom at offset {offset} is not valid utf-8")]
    AtomUtf8 {
        /// Where the atom begins.
        offset: usize,
    },
    /// A float is not a finite number, or its text form is not a number.
    #[error("the float at offset {offset} is not a finite number")]
    Float {
        /// Where the float begins.
        offset: usize,
    },
    /// A bit string whose count of bits in the last byte does not fit its length.
    #[error("a bit string of {len} bytes at offset {offset} has {bits} bits in its last byte, 1 to 8 wanted")]
    BitCount {
        /// Bytes announced.
        len: usize,
        /// Bits announced for the last byte.
        bits: u8,
        /// Where the bit string begins.
        offset: usize,
    },
    /// A reference with no id words, or with more than five.
    #[error("a reference of {count} words at offset {offset}, 1 to 5 wanted")]
    ReferenceWords {
        /// Words announced.
        count: usize,
        /// Where the reference begins.
        offset: usize,
    },
    /// A fun's announced size differs from what its parts take up.
    #[error("a fun announces its end at offset {announced}, its parts end at {actual}")]
    FunSize {
        /// Where it should end by its size field.
        announced: usize,
        /// Where its last part ends, or the least offset it could end at.
        actual: usize,
    },
    /// A map has the same key twice.
    #[error("the map that ends at offset {offset} has a key twice")]
    DuplicateKey {
        /// Where the map ends.
        offset: usize,
    },
    /// The term is compressed, and compressed terms are not allowed here.
    #[error("compressed terms are not allowed here")]
    CompressedNotAllowed,
    /// A compressed term announces more bytes than may be inflated.
    #[error("a compressed term of {announced} bytes, the limit is {limit} (max_inflated)")]
    InflatedTooLong {
        /// Bytes announced.
        announced: usize,
        /// The limit in force.
        limit: usize,
    },
    /// A compressed term inflates to another length than it announces.
    #[error("a compressed term announces {announced} bytes but holds {}{actual}", if *.more { "more than " } else { "" })]
    InflatedLength {
        /// Bytes announced.
        announced: usize,
        /// Bytes inflated.
        actual: usize,
        /// Whether inflating stopped there with more to come.
        more: bool,
    },
    /// A compressed term is not valid zlib data.
    #[error("a compressed term is not valid zlib data after {offset} bytes")]
    Zlib {
        /// Bytes of zlib data read before the fault.
        offset: usize,
    },
}

/// Why a term could not be written. The program that built the term is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// An atom of more than 255 characters.
    #[error("an atom of {chars} characters, at most 255 are possible")]
    AtomTooLong {
        /// Characters it has.
        chars: usize,
    },
    /// A float that is infinite or not a number: the BEAM has neither.
    #[error("a float must be finite to be a term")]
    Float,
    /// More elements or bytes than the format's 32-bit count can say.
    #[error("{what} of length {len}, at most 4294967295 can be written")]
    TooLong {
        /// The kind of term.
        what: &'static str,
        /// Its length.
        len: usize,
    },
    /// A bit string whose last byte has no bits, eight, or more, or which has no bytes.
    #[error(
        "a bit string of {len} bytes with {bits} bits in the last, at least 1 byte and 1 to 7 bits wanted"
    )]
    BitCount {
        /// Its bytes.
        len: usize,
        /// Bits of the last byte.
        bits: u8,
    },
    /// A reference with no id words, or with more than five.
    #[error("a reference of {count} words, 1 to 5 wanted")]
    ReferenceWords {
        /// Words it has.
        count: usize,
    },
    /// An improper list without an element before its tail.
    #[error("an improper list needs an element before its tail")]
    EmptyImproperList,
    /// Nested deeper than [`DEPTH_CEILING`](crate::DEPTH_CEILING).
    #[error("terms are nested deeper than {limit}")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
}
