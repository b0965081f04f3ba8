//! Terms to values.

use std::slice;

use serde::de::{self, Deserialize, DeserializeSeed, IntoDeserializer, Unexpected, Visitor};

use super::error::DataError;
use super::{ATOM, DATA_DEPTH, TERM};
use crate::encode::encode;
use crate::ids::{Export, Pid, Port, Reference};
use crate::limits::DEPTH_CEILING;
use crate::term::Term;

/// The key that makes a map an Elixir struct.
const STRUCT: &str = "__struct__";
/// Integers up to this are floats exactly.
const EXACT: i64 = 1 << 53;

#[derive(Clone, Copy)]
pub(super) struct Deserializer<'de> {
    term: &'de Term,
    depth: u32,
}

impl<'de> Deserializer<'de> {
    pub(super) fn new(term: &'de Term) -> Self {
        Self { term, depth: 0 }
    }

    /// For a part of this term.
    fn part(self, term: &'de Term) -> Result<Self, DataError> {
        // Decoded terms never are; terms built by hand may be.
        if self.depth >= DATA_DEPTH {
            return Err(DataError::new(format_args!(
                "values are nested deeper than {DATA_DEPTH}"
            )));
        }
        Ok(Self {
            term,
            depth: self.depth + 1,
        })
    }

    fn wanted(self, what: &str) -> DataError {
        DataError::wanted(what, kind(self.term))
    }

    /// serde's own error for a value of another type.
    fn unexpected(self, visitor: &impl de::Expected) -> DataError {
        let seen = match self.term {
            Term::Int(value) => Unexpected::Signed(*value),
            Term::Float(value) => Unexpected::Float(*value),
            // Never the contents: they may be secret, or long.
            other => Unexpected::Other(kind(other)),
        };
        de::Error::invalid_type(seen, visitor)
    }

    fn items(self, items: &'de [Term]) -> Items<'de> {
        Items {
            of: self,
            items: items.iter(),
            index: 0,
        }
    }

    fn visit_items<V: Visitor<'de>>(self, items: &'de [Term], visitor: V) -> Result<V::Value, DataError> {
        let mut access = self.items(items);
        let value = visitor.visit_seq(&mut access)?;
        match access.items.len() {
            0 => Ok(value),
            left => Err(DataError::new(format_args!(
                "{} elements, {left} too many",
                items.len()
            ))),
        }
    }

    fn visit_pairs<V: Visitor<'de>>(self, fields: Fields, visitor: V) -> Result<V::Value, DataError> {
        let pairs = match self.term {
            Term::Map(map) => PairsOf::Map(map.iter()),
            Term::List(items) => PairsOf::Keyword(items.iter()),
            _ => return Err(self.unexpected(&visitor)),
        };
        visitor.visit_map(Pairs {
            of: self,
            pairs,
            next: None,
            fields,
        })
    }
}

/// What a term is, for errors.
fn kind(term: &Term) -> &'static str {
    match term {
        Term::Int(_) | Term::BigInt(_) => "an integer",
        Term::Float(_) => "a float",
        Term::Atom(_) if term.as_atom() == Some("nil") => "nil",
        Term::Atom(_) => "an atom",
        Term::Binary(_) => "a binary",
        Term::BitBinary { .. } => "a bit string",
        Term::List(_) => "a list",
        Term::ImproperList(..) => "an improper list",
        Term::Tuple(_) => "a tuple",
        Term::Map(_) => "a map",
        Term::Pid(_) => "a pid",
        Term::Port(_) => "a port",
        Term::Reference(_) => "a reference",
        Term::Fun(_) | Term::Export(_) => "a fun",
    }
}

/// What becomes of Elixir's `__struct__` key.
#[derive(Clone, Copy)]
enum Fields {
    /// It is a key like others.
    All,
    /// It says what a struct is, and is none of its fields.
    Skip,
}

macro_rules! integers {
    ($($method:ident),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
            match self.term {
                Term::Int(value) => visitor.visit_i64(*value),
                Term::BigInt(value) => match (value.to_u64(), value.to_i128(), value.to_u128()) {
                    (Some(value), ..) => visitor.visit_u64(value),
                    (_, Some(value), _) => visitor.visit_i128(value),
                    (_, _, Some(value)) => visitor.visit_u128(value),
                    _ => Err(DataError::new("an integer of more than 128 bits")),
                },
                _ => Err(self.unexpected(&visitor)),
            }
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Deserializer<'de> {
    type Error = DataError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term {
            Term::Int(_) | Term::BigInt(_) => self.deserialize_i64(visitor),
            Term::Float(value) => visitor.visit_f64(*value),
            Term::Atom(atom) => match (self.term.as_bool(), atom.as_str()) {
                (Some(value), _) => visitor.visit_bool(value),
                (None, "nil") => visitor.visit_unit(),
                (None, text) => visitor.visit_borrowed_str(text),
            },
            Term::Binary(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => visitor.visit_borrowed_str(text),
                Err(_) => visitor.visit_borrowed_bytes(bytes),
            },
            Term::List(items) | Term::Tuple(items) => self.visit_items(items, visitor),
            Term::Map(_) => self.visit_pairs(Fields::All, visitor),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    integers! {
        deserialize_i8, deserialize_i16, deserialize_i32, deserialize_i64, deserialize_i128,
        deserialize_u8, deserialize_u16, deserialize_u32, deserialize_u64, deserialize_u128
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term.as_bool() {
            Some(value) => visitor.visit_bool(value),
            None => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term {
            Term::Float(value) => visitor.visit_f64(*value),
            Term::Int(value) if (-EXACT..=EXACT).contains(value) => visitor.visit_f64(*value as f64),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term {
            Term::Binary(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => visitor.visit_borrowed_str(text),
                Err(_) => Err(DataError::new("a binary that is not valid utf-8, text wanted")),
            },
            Term::Atom(atom) if atom.as_str() != "nil" => visitor.visit_borrowed_str(atom.as_str()),
            Term::List(_) => match self.term.as_charlist() {
                Some(text) => visitor.visit_string(text),
                None => Err(self.wanted("text")),
            },
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term {
            // A field may well be called `nil`.
            Term::Atom(atom) => visitor.visit_borrowed_str(atom.as_str()),
            Term::Binary(bytes) => visitor.visit_borrowed_bytes(bytes),
            _ => self.deserialize_str(visitor),
        }
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term {
            Term::Binary(bytes) => visitor.visit_borrowed_bytes(bytes),
            Term::List(items) => {
                let byte = |item: &Term| u8::try_from(item.as_int()?).ok();
                match items.iter().map(byte).collect() {
                    Some(bytes) => visitor.visit_byte_buf(bytes),
                    None => Err(self.wanted("bytes")),
                }
            }
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term.as_atom() {
            Some("nil" | "undefined") => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term.as_atom() {
            Some("nil") => visitor.visit_unit(),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DataError> {
        match self.term.as_atom() {
            Some(atom) if atom == name => visitor.visit_unit(),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DataError> {
        match (name, self.term) {
            (TERM, term) => {
                let mut bytes = Vec::new();
                encode(term, &mut bytes)?;
                visitor.visit_byte_buf(bytes)
            }
            (ATOM, Term::Atom(atom)) => visitor.visit_borrowed_str(atom.as_str()),
            (ATOM, _) => Err(self.wanted("an atom")),
            _ => visitor.visit_newtype_struct(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        match self.term {
            Term::List(items) => self.visit_items(items, visitor),
            Term::Binary(bytes) => visitor.visit_seq(de::value::SeqDeserializer::new(bytes.iter().copied())),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, DataError> {
        match self.term {
            Term::Tuple(items) | Term::List(items) => self.visit_items(items, visitor),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, DataError> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        self.visit_pairs(Fields::All, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DataError> {
        let fields = if name.starts_with("Elixir.") {
            if self.term.map_get(STRUCT).and_then(Term::as_atom) != Some(name) {
                return Err(DataError::wanted(name, "another kind of struct, or none"));
            }
            Fields::Skip
        } else if fields.contains(&STRUCT) {
            Fields::All
        } else {
            Fields::Skip
        };
        self.visit_pairs(fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DataError> {
        let (tag, values): (&Term, &[Term]) = match self.term {
            Term::Atom(_) | Term::Binary(_) => (self.term, &[]),
            Term::Tuple(items) => match items.split_first() {
                Some((tag @ (Term::Atom(_) | Term::Binary(_)), values)) => (tag, values),
                _ => return Err(self.wanted("an atom, or a tuple that begins with one")),
            },
            _ => return Err(self.wanted("an atom, or a tuple that begins with one")),
        };
        let text = tag.as_atom().or_else(|| tag.as_str()).unwrap_or_default();
        // Derives give `Result` these names and no others.
        let text = match (name, variants, text) {
            ("Result", ["Ok", "Err"], "ok") => "Ok",
            ("Result", ["Ok", "Err"], "error") => "Err",
            (_, _, text) => text,
        };
        visitor.visit_enum(Variant {
            of: self,
            tag: text,
            values,
        })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DataError> {
        visitor.visit_unit()
    }

    fn is_human_readable(&self) -> bool {
        false
    }
}

// === Parts of containers ===

struct Items<'de> {
    of: Deserializer<'de>,
    items: slice::Iter<'de, Term>,
    index: usize,
}

impl<'de> de::SeqAccess<'de> for &mut Items<'de> {
    type Error = DataError;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, DataError> {
        let Some(item) = self.items.next() else {
            return Ok(None);
        };
        let index = self.index;
        self.index += 1;
        let value = seed.deserialize(self.of.part(item)?);
        value.map(Some).map_err(|error| error.at_index(index))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

enum PairsOf<'de> {
    Map(crate::map::Pairs<'de>),
    Keyword(slice::Iter<'de, Term>),
}

struct Pairs<'de> {
    of: Deserializer<'de>,
    pairs: PairsOf<'de>,
    next: Option<(&'de Term, &'de Term)>,
    fields: Fields,
}

impl<'de> Pairs<'de> {
    fn next(&mut self) -> Result<Option<(&'de Term, &'de Term)>, DataError> {
        loop {
            let pair = match &mut self.pairs {
                PairsOf::Map(pairs) => pairs.next(),
                PairsOf::Keyword(items) => match items.next().map(Term::as_tuple) {
                    Some(Some([key, value])) => Some((key, value)),
                    Some(_) => return Err(DataError::new("a keyword list wanted, got another list")),
                    None => None,
                },
            };
            let is_struct = pair.is_some_and(|(key, _)| key.as_atom() == Some(STRUCT));
            if !(is_struct && matches!(self.fields, Fields::Skip)) {
                return Ok(pair);
            }
        }
    }
}

impl<'de> de::MapAccess<'de> for Pairs<'de> {
    type Error = DataError;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, DataError> {
        let Some((key, value)) = self.next()? else {
            return Ok(None);
        };
        self.next = Some((key, value));
        let part = self.of.part(key)?;
        seed.deserialize(part)
            .map(Some)
            .map_err(|error| error.in_key(format_args!("key {}", Name(key))))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, DataError> {
        let Some((key, value)) = self.next.take() else {
            return Err(DataError::new("a map's value was asked for before its key"));
        };
        let part = self.of.part(value)?;
        seed.deserialize(part).map_err(|error| error.in_key(Name(key)))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(match &self.pairs {
            PairsOf::Map(pairs) => pairs.len(),
            PairsOf::Keyword(items) => items.len(),
        })
    }
}

/// A key in the path of an error: text as it is, other terms as Erlang prints them, if they are short.
struct Name<'a>(&'a Term);

impl std::fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Term::Atom(atom) => f.write_str(atom.as_str()),
            Term::Binary(bytes) => match std::str::from_utf8(bytes.get(..64).unwrap_or(bytes)) {
                Ok(text) => f.write_str(text),
                Err(_) => f.write_str("(binary)"),
            },
            term @ (Term::Int(_) | Term::Float(_)) => std::fmt::Display::fmt(term, f),
            term => write!(f, "({})", kind(term)),
        }
    }
}

struct Variant<'de> {
    of: Deserializer<'de>,
    tag: &'de str,
    values: &'de [Term],
}

impl<'de> de::EnumAccess<'de> for Variant<'de> {
    type Error = DataError;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), DataError> {
        let tag: de::value::BorrowedStrDeserializer<'de, DataError> =
            de::value::BorrowedStrDeserializer::new(self.tag);
        Ok((seed.deserialize(tag)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Variant<'de> {
    type Error = DataError;

    fn unit_variant(self) -> Result<(), DataError> {
        match self.values.len() {
            0 => Ok(()),
            more => Err(DataError::new(format_args!("no value wanted, got {more}")).in_key(self.tag)),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, DataError> {
        let value = match self.values {
            [value] => seed.deserialize(self.of.part(value)?),
            // `ok` alone for a `Result<(), E>`.
            [] => seed.deserialize(().into_deserializer()),
            more => Err(DataError::new(format_args!(
                "one value wanted, got {}",
                more.len()
            ))),
        };
        value.map_err(|error| error.in_key(self.tag))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, DataError> {
        self.of
            .visit_items(self.values, visitor)
            .map_err(|error| error.in_key(self.tag))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DataError> {
        let value = match self.values {
            [value] => self
                .of
                .part(value)
                .and_then(|part| part.visit_pairs(Fields::Skip, visitor)),
            more => Err(DataError::new(format_args!("one map wanted, got {}", more.len()))),
        };
        value.map_err(|error| error.in_key(self.tag))
    }
}

// === Terms as parts of other values ===

/// Takes what [`TERM`] carries.
struct Carried;

impl<'de> Visitor<'de> for Carried {
    type Value = Term;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a term")
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Term, E> {
        let limits = crate::limits::Limits {
            max_depth: DEPTH_CEILING,
            max_terms: usize::MAX,
            max_bytes: usize::MAX,
            max_integer_bytes: usize::MAX,
            allow_compressed: false,
            max_inflated: 0,
        };
        crate::decode::decode(bytes, &limits).map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Term {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct(TERM, Carried)
    }
}

macro_rules! from_term {
    ($($kind:ident: $pattern:pat => $value:expr, $what:literal;)*) => {$(
        impl<'de> Deserialize<'de> for $kind {
            fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                match Term::deserialize(deserializer)? {
                    $pattern => Ok($value),
                    other => Err(de::Error::custom(format_args!("{} wanted, got {}", $what, kind(&other)))),
                }
            }
        }
    )*};
}
from_term! {
    Pid: Term::Pid(pid) => pid, "a pid";
    Port: Term::Port(port) => *port, "a port";
    Reference: Term::Reference(reference) => *reference, "a reference";
    Export: Term::Export(export) => *export, "a fun by name";
}

struct AtomText;

impl Visitor<'_> for AtomText {
    type Value = crate::Atom;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an atom")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<crate::Atom, E> {
        Ok(crate::Atom::from(text))
    }
}

impl<'de> Deserialize<'de> for crate::Atom {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct(ATOM, AtomText)
    }
}
