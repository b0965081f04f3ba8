//! What a borrowed walk yields: one token per term header or leaf.

use std::borrow::Cow;
use std::fmt;

use crate::atom::Atom;

/// One step of a [`Walk`](crate::Walk). Containers are announced; their elements follow as further tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Token<'a> {
    /// An integer that fits 64 bits, however it was written.
    Int(i64),
    /// An integer that does not.
    BigInt {
        /// Whether it is below zero.
        negative: bool,
        /// Its absolute value, least byte first, without zero bytes at the end.
        magnitude: &'a [u8],
    },
    /// A finite float.
    Float(f64),
    /// An atom.
    Atom(AtomRef<'a>),
    /// A binary.
    Binary(&'a [u8]),
    /// A bit string that does not fill its last byte.
    BitBinary {
        /// Its bytes, at least one. The unused low bits of the last may hold anything.
        bytes: &'a [u8],
        /// Bits used of the last byte, from the top: 1 to 7.
        bits: u8,
    },
    /// A proper list of integers 0 to 255 (`STRING_EXT`); no tokens follow for it.
    ByteList(&'a [u8]),
    /// The empty list.
    Nil,
    /// A list: `len` elements follow, then the tail ([`Token::Nil`] for a proper list).
    List {
        /// Elements before the tail.
        len: usize,
    },
    /// A tuple: `arity` elements follow.
    Tuple {
        /// Elements.
        arity: usize,
    },
    /// A map: `pairs` times a key and its value follow.
    Map {
        /// Key-value pairs.
        pairs: usize,
    },
    /// A process identifier.
    Pid(PidRef<'a>),
    /// A port identifier.
    Port(PortRef<'a>),
    /// A reference.
    Reference(ReferenceRef<'a>),
    /// A fun with code and captured values: module, old index, old uniq, creator pid and then `num_free` captured
    /// values follow as tokens.
    Fun(FunRef<'a>),
    /// A fun by name, `fun module:function/arity`.
    Export {
        /// Module.
        module: AtomRef<'a>,
        /// Function.
        function: AtomRef<'a>,
        /// Arity.
        arity: u8,
    },
}

impl Token<'_> {
    /// How many terms follow as parts of this one (the tail of a list is one of them).
    pub fn children(&self) -> usize {
        match self {
            Self::List { len } => len.saturating_add(1),
            Self::Tuple { arity } => *arity,
            Self::Map { pairs } => pairs.saturating_mul(2),
            Self::Fun(fun) => (fun.num_free as usize).saturating_add(4),
            _ => 0,
        }
    }
}

/// An atom's text as it stands in the input: at most 255 characters.
#[derive(Clone, Copy)]
pub struct AtomRef<'a> {
    bytes: &'a [u8],
    /// Latin-1 with at least one byte above 127, else UTF-8.
    latin1: bool,
}

impl<'a> AtomRef<'a> {
    #[inline(always)]
    pub(crate) fn ascii(bytes: &'a [u8]) -> Self {
        Self { bytes, latin1: false }
    }

    pub(crate) fn utf8(text: &'a str) -> Self {
        Self {
            bytes: text.as_bytes(),
            latin1: false,
        }
    }

    /// At least one byte is above 127.
    pub(crate) fn latin1(bytes: &'a [u8]) -> Self {
        Self { bytes, latin1: true }
    }

    /// The text, borrowed; `None` if it came as Latin-1 with characters above ASCII (OTP 25 sends such atoms).
    #[inline]
    pub fn as_str(self) -> Option<&'a str> {
        if self.latin1 {
            None
        } else {
            std::str::from_utf8(self.bytes).ok()
        }
    }

    /// The text as UTF-8; copies only if it was Latin-1.
    pub fn to_str(self) -> Cow<'a, str> {
        match self.as_str() {
            Some(text) => Cow::Borrowed(text),
            // A Latin-1 byte is the Unicode code point of the same number.
            None => Cow::Owned(self.bytes.iter().map(|&b| char::from(b)).collect()),
        }
    }

    /// Bytes it takes in the input.
    pub fn encoded_len(self) -> usize {
        self.bytes.len()
    }

    /// The text as it stands in the input.
    #[inline(always)]
    pub(crate) fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// The bytes of the text if they are UTF-8.
    #[inline(always)]
    pub(crate) fn utf8_bytes(self) -> Option<&'a [u8]> {
        (!self.latin1).then_some(self.bytes)
    }
}

impl PartialEq for AtomRef<'_> {
    fn eq(&self, other: &Self) -> bool {
        if self.latin1 == other.latin1 {
            self.bytes == other.bytes
        } else {
            self.to_str() == other.to_str()
        }
    }
}

impl Eq for AtomRef<'_> {}

impl PartialEq<str> for AtomRef<'_> {
    fn eq(&self, other: &str) -> bool {
        if self.latin1 {
            self.bytes.iter().map(|&b| char::from(b)).eq(other.chars())
        } else {
            self.bytes == other.as_bytes()
        }
    }
}

impl PartialEq<&str> for AtomRef<'_> {
    fn eq(&self, other: &&str) -> bool {
        self == *other
    }
}

impl PartialEq<Atom> for AtomRef<'_> {
    fn eq(&self, other: &Atom) -> bool {
        match self.utf8_bytes() {
            Some(bytes) => bytes == other.as_bytes(),
            None => self == other.as_str(),
        }
    }
}

impl fmt::Debug for AtomRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Atom::from(*self), f)
    }
}

/// A borrowed pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PidRef<'a> {
    /// Node it belongs to.
    pub node: AtomRef<'a>,
    /// Process number.
    pub id: u32,
    /// Wraps of the process number.
    pub serial: u32,
    /// Creation of the node.
    pub creation: u32,
}

/// A borrowed port identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRef<'a> {
    /// Node it belongs to.
    pub node: AtomRef<'a>,
    /// Port number.
    pub id: u64,
    /// Creation of the node.
    pub creation: u32,
}

/// A borrowed reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReferenceRef<'a> {
    /// Node that made it.
    pub node: AtomRef<'a>,
    /// Creation of the node.
    pub creation: u32,
    /// 1 to 5 big-endian 32-bit words.
    pub(crate) words: &'a [u8],
}

impl<'a> ReferenceRef<'a> {
    /// Its id words, 1 to 5, in the order of the encoding.
    pub fn ids(self) -> impl ExactSizeIterator<Item = u32> + 'a {
        self.words
            .chunks_exact(4)
            .map(|w| w.iter().fold(0, |acc, &b| acc << 8 | u32::from(b)))
    }
}

/// The head of a borrowed fun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunRef<'a> {
    /// Arguments it takes.
    pub arity: u8,
    /// MD5 of the significant parts of its module.
    pub uniq: &'a [u8],
    /// Index in the module's fun table.
    pub index: u32,
    /// Captured values.
    pub num_free: u32,
    /// All that follows the tag, the size field included.
    pub body: &'a [u8],
}
