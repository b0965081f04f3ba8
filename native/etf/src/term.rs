//! Owned terms: the type, its constructors and its accessors.

use crate::atom::Atom;
use crate::bigint::BigInt;
use crate::binary::Binary;
use crate::cursor::{small_integer, trim_zeros};
use crate::ids::{Export, Fun, Pid, Port, Reference};
use crate::map::Map;

/// An owned Erlang term.
///
/// Two terms are equal here when `=:=` holds between them in the BEAM, however they were encoded; floats are
/// compared by bits, so `0.0` and `-0.0` differ (as they do from OTP 27 on). The order is that of map keys: all
/// integers before all floats, else Erlang's (pids, ports, references and funs are ordered among themselves in a
/// fixed way that is not Erlang's).
///
/// Comparing, hashing, printing and dropping recurse. Decoded terms are never nested deeper than
/// [`DEPTH_CEILING`](crate::DEPTH_CEILING), which bounds the stack that takes; whoever builds a term by hand keeps
/// to that as well.
#[derive(Clone)]
pub enum Term {
    /// An integer of at most 64 bits.
    Int(i64),
    /// An integer that does not fit [`Term::Int`].
    BigInt(BigInt),
    /// A finite float.
    Float(f64),
    /// An atom.
    Atom(Atom),
    /// A binary.
    Binary(Binary),
    /// A bit string that does not fill its last byte.
    BitBinary {
        /// Its bytes, at least one; the unused low bits of the last are zero.
        bytes: Box<[u8]>,
        /// Bits used of the last byte, from the top: 1 to 7.
        bits: u8,
    },
    /// A proper list; empty for `[]`. Strings are lists of integers.
    List(Vec<Term>),
    /// A list with a tail that is not a list; at least one element before it.
    ImproperList(Box<[Term]>, Box<Term>),
    /// A tuple.
    Tuple(Vec<Term>),
    /// A map.
    Map(Map),
    /// A process identifier.
    Pid(Pid),
    /// A port identifier. Boxed, as references and [`Term::Export`] are, so that they do not widen every other term.
    Port(Box<Port>),
    /// A reference.
    Reference(Box<Reference>),
    /// A fun with code and captured values.
    Fun(Fun),
    /// A fun by name.
    Export(Box<Export>),
}

// === Constructors ===

impl Term {
    /// An atom.
    pub fn atom(text: impl Into<Atom>) -> Self {
        Self::Atom(text.into())
    }

    /// A binary.
    pub fn binary(bytes: impl Into<Binary>) -> Self {
        Self::Binary(bytes.into())
    }

    /// A proper list.
    pub fn list(items: impl IntoIterator<Item = Self>) -> Self {
        Self::List(items.into_iter().collect())
    }

    /// A string as Erlang has it: the list of its code points.
    pub fn charlist(text: &str) -> Self {
        Self::List(text.chars().map(|c| Self::Int(i64::from(u32::from(c)))).collect())
    }

    /// A tuple.
    pub fn tuple(items: impl IntoIterator<Item = Self>) -> Self {
        Self::Tuple(items.into_iter().collect())
    }

    /// A map. Of equal keys the last one counts, as in an Erlang map expression.
    pub fn map(pairs: impl IntoIterator<Item = (Self, Self)>) -> Self {
        Self::Map(pairs.into_iter().collect())
    }

    /// `[items | tail]` in the form that fits: a tail that is a list makes one longer list.
    pub fn list_with_tail(mut items: Vec<Self>, tail: Self) -> Self {
        match tail {
            Self::List(mut more) => {
                items.append(&mut more);
                Self::List(items)
            }
            Self::ImproperList(more, last) => {
                items.extend(more);
                Self::ImproperList(items.into(), last)
            }
            tail if items.is_empty() => tail,
            tail => Self::ImproperList(items.into(), Box::new(tail)),
        }
    }

    /// An integer of any size from its sign and its magnitude, least byte first.
    pub fn integer_from_le_bytes(negative: bool, magnitude: &[u8]) -> Self {
        let magnitude = trim_zeros(magnitude);
        match small_integer(negative, magnitude) {
            Some(value) => Self::Int(value),
            None => Self::BigInt(BigInt::from_trimmed(negative, magnitude)),
        }
    }

    /// The first bits of `bytes`: all of them but the last byte's, of which `bits` count. Eight bits, or no bytes,
    /// make a binary. `None` if `bits` is not 1 to 8 for a byte that is there.
    pub fn bit_string(bytes: impl Into<Vec<u8>>, bits: u8) -> Option<Self> {
        let mut bytes = bytes.into();
        match (bytes.last_mut(), bits) {
            (None, _) | (Some(_), 8) => Some(Self::binary(bytes)),
            (Some(last), 1..=7) => {
                *last &= 0xFF << (8 - bits);
                Some(Self::BitBinary {
                    bytes: bytes.into(),
                    bits,
                })
            }
            _ => None,
        }
    }
}

// === Accessors ===

impl Term {
    /// The text, if this is an atom.
    pub fn as_atom(&self) -> Option<&str> {
        match self {
            Self::Atom(atom) => Some(atom.as_str()),
            _ => None,
        }
    }

    /// The boolean, if this is the atom `true` or `false`.
    pub fn as_bool(&self) -> Option<bool> {
        match self.as_atom()? {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        }
    }

    /// The integer, if this is one of at most 64 bits.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The float, if this is one (an integer is not).
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// The bytes, if this is a binary.
    pub fn as_binary(&self) -> Option<&[u8]> {
        match self {
            Self::Binary(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The text, if this is a binary that holds UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(self.as_binary()?).ok()
    }

    /// The elements, if this is a tuple.
    pub fn as_tuple(&self) -> Option<&[Self]> {
        match self {
            Self::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// The elements, if this is a proper list.
    pub fn as_list(&self) -> Option<&[Self]> {
        match self {
            Self::List(items) => Some(items),
            _ => None,
        }
    }

    /// The text, if this is a list of Unicode code points. The empty list is the empty string.
    pub fn as_charlist(&self) -> Option<String> {
        let code_point = |item: &Self| char::from_u32(u32::try_from(item.as_int()?).ok()?);
        self.as_list()?.iter().map(code_point).collect()
    }

    /// The map, if this is one.
    pub fn as_map(&self) -> Option<&Map> {
        match self {
            Self::Map(map) => Some(map),
            _ => None,
        }
    }

    /// The value of an atom key, if this is a map that has it.
    pub fn map_get(&self, key: &str) -> Option<&Self> {
        self.as_map()?.get_atom(key)
    }

    /// The pid, if this is one.
    pub fn as_pid(&self) -> Option<&Pid> {
        match self {
            Self::Pid(pid) => Some(pid),
            _ => None,
        }
    }

    /// The reference, if this is one.
    pub fn as_reference(&self) -> Option<&Reference> {
        match self {
            Self::Reference(reference) => Some(reference),
            _ => None,
        }
    }
}

// === Conversions ===

macro_rules! from_small_int {
    ($($int:ty),*) => {$(
        impl From<$int> for Term {
            fn from(value: $int) -> Self {
                Self::Int(i64::from(value))
            }
        }
    )*};
}
from_small_int!(i8, i16, i32, i64, u8, u16, u32);

impl From<u64> for Term {
    fn from(value: u64) -> Self {
        Self::integer_from_le_bytes(false, &value.to_le_bytes())
    }
}

impl From<u128> for Term {
    fn from(value: u128) -> Self {
        Self::integer_from_le_bytes(false, &value.to_le_bytes())
    }
}

impl From<i128> for Term {
    fn from(value: i128) -> Self {
        Self::integer_from_le_bytes(value < 0, &value.unsigned_abs().to_le_bytes())
    }
}

/// A binary.
impl From<&str> for Term {
    fn from(text: &str) -> Self {
        Self::binary(text)
    }
}

/// A binary.
impl From<String> for Term {
    fn from(text: String) -> Self {
        Self::binary(text)
    }
}

/// A binary.
impl<const N: usize> From<&[u8; N]> for Term {
    fn from(bytes: &[u8; N]) -> Self {
        Self::binary(*bytes)
    }
}

impl From<Binary> for Term {
    fn from(bytes: Binary) -> Self {
        Self::Binary(bytes)
    }
}

impl From<f64> for Term {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<bool> for Term {
    fn from(value: bool) -> Self {
        Self::atom(if value { "true" } else { "false" })
    }
}

impl From<Atom> for Term {
    fn from(atom: Atom) -> Self {
        Self::Atom(atom)
    }
}

impl From<Map> for Term {
    fn from(map: Map) -> Self {
        Self::Map(map)
    }
}

impl From<Pid> for Term {
    fn from(pid: Pid) -> Self {
        Self::Pid(pid)
    }
}

impl From<Port> for Term {
    fn from(port: Port) -> Self {
        Self::Port(Box::new(port))
    }
}

impl From<Reference> for Term {
    fn from(reference: Reference) -> Self {
        Self::Reference(Box::new(reference))
    }
}

impl From<Export> for Term {
    fn from(export: Export) -> Self {
        Self::Export(Box::new(export))
    }
}
