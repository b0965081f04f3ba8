//! Values to terms.

use serde::ser::{self, Serialize};

use super::error::DataError;
use super::{ATOM, CHARLIST, DATA_DEPTH, KEYWORD, Keys, TERM};
use crate::decode::decode;
use crate::limits::{DEPTH_CEILING, Limits};
use crate::map::Map;
use crate::term::Term;

/// What an Elixir module's name begins with as an atom.
const ELIXIR: &str = "Elixir.";

#[derive(Clone, Copy)]
pub(super) struct Serializer {
    keys: Keys,
    depth: u32,
    /// Whether the next struct or map becomes a keyword list.
    keyword: bool,
}

impl Serializer {
    pub(super) fn new(keys: Keys) -> Self {
        Self {
            keys,
            depth: 0,
            keyword: false,
        }
    }

    /// For the parts of a container.
    fn inner(self) -> Result<Self, DataError> {
        if self.depth >= DATA_DEPTH {
            return Err(DataError::new(format_args!(
                "values are nested deeper than {DATA_DEPTH}"
            )));
        }
        Ok(Self {
            depth: self.depth + 1,
            keyword: false,
            ..self
        })
    }

    fn key(self, name: &str) -> Term {
        match self.keys {
            Keys::Atoms => Term::atom(name),
            Keys::Binaries => Term::binary(name),
        }
    }

    fn items(self, shape: Shape, len: Option<usize>) -> Result<Items, DataError> {
        // The hint is the program's own, but may be wrong.
        Ok(Items {
            inner: self.inner()?,
            items: Vec::with_capacity(len.unwrap_or(0).min(4096)),
            shape,
        })
    }

    fn pairs(self, tag: Option<&'static str>) -> Result<Pairs, DataError> {
        Ok(Pairs {
            inner: self.inner()?,
            pairs: Vec::new(),
            key: None,
            keyword: self.keyword,
            tag,
        })
    }
}

/// Erlang's names for the variants of `Result`, which derives cannot rename.
fn variant_name(enumeration: &str, variant: &'static str) -> &'static str {
    match (enumeration, variant) {
        ("Result", "Ok") => "ok",
        ("Result", "Err") => "error",
        _ => variant,
    }
}

macro_rules! integers {
    ($($method:ident: $int:ty),*) => {$(
        fn $method(self, value: $int) -> Result<Term, DataError> {
            Ok(Term::from(value))
        }
    )*};
}

impl ser::Serializer for Serializer {
    type Ok = Term;
    type Error = DataError;
    type SerializeSeq = Items;
    type SerializeTuple = Items;
    type SerializeTupleStruct = Items;
    type SerializeTupleVariant = Items;
    type SerializeMap = Pairs;
    type SerializeStruct = Pairs;
    type SerializeStructVariant = Pairs;

    integers! {
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64, serialize_i128: i128,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_u128: u128,
        serialize_bool: bool
    }

    fn serialize_f32(self, value: f32) -> Result<Term, DataError> {
        self.serialize_f64(f64::from(value))
    }

    fn serialize_f64(self, value: f64) -> Result<Term, DataError> {
        if value.is_finite() {
            Ok(Term::Float(value))
        } else {
            Err(DataError::new("a float must be finite to be a term"))
        }
    }

    fn serialize_char(self, value: char) -> Result<Term, DataError> {
        Ok(Term::binary(value.to_string()))
    }

    fn serialize_str(self, value: &str) -> Result<Term, DataError> {
        Ok(Term::binary(value))
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<Term, DataError> {
        Ok(Term::binary(value))
    }

    fn serialize_none(self) -> Result<Term, DataError> {
        Ok(Term::atom("nil"))
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Term, DataError> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<Term, DataError> {
        Ok(Term::atom("nil"))
    }

    fn serialize_unit_struct(self, name: &'static str) -> Result<Term, DataError> {
        Ok(Term::atom(name))
    }

    fn serialize_unit_variant(
        self,
        name: &'static str,
        _: u32,
        variant: &'static str,
    ) -> Result<Term, DataError> {
        Ok(Term::atom(variant_name(name, variant)))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<Term, DataError> {
        match name {
            KEYWORD => value.serialize(Self {
                keyword: true,
                ..self
            }),
            TERM | ATOM | CHARLIST => match (name, value.serialize(self)?) {
                (TERM, Term::Binary(bytes)) => Ok(decode(&bytes, &unlimited(DEPTH_CEILING - self.depth))?),
                (ATOM, Term::Binary(bytes)) => match String::from_utf8(bytes.into_vec()) {
                    Ok(text) if text.chars().count() <= crate::cursor::MAX_ATOM_CHARS => Ok(Term::atom(text)),
                    _ => Err(DataError::new("an atom has at most 255 characters")),
                },
                (CHARLIST, Term::Binary(bytes)) => Ok(Term::charlist(&String::from_utf8_lossy(&bytes))),
                _ => Err(DataError::new("text wanted")),
            },
            _ => value.serialize(self),
        }
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Term, DataError> {
        let tag = variant_name(name, variant);
        let value = value
            .serialize(self.inner()?)
            .map_err(|error| error.in_key(tag))?;
        Ok(Term::Tuple(vec![Term::atom(tag), value]))
    }

    fn serialize_seq(self, len: Option<usize>) -> Result<Items, DataError> {
        self.items(Shape::List, len)
    }

    fn serialize_tuple(self, len: usize) -> Result<Items, DataError> {
        self.items(Shape::Tuple, Some(len))
    }

    fn serialize_tuple_struct(self, _: &'static str, len: usize) -> Result<Items, DataError> {
        self.items(Shape::Tuple, Some(len))
    }

    fn serialize_tuple_variant(
        self,
        name: &'static str,
        _: u32,
        variant: &'static str,
        len: usize,
    ) -> Result<Items, DataError> {
        let tag = variant_name(name, variant);
        let mut items = self.items(Shape::Variant(tag), Some(len + 1))?;
        items.items.push(Term::atom(tag));
        Ok(items)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Pairs, DataError> {
        self.pairs(None)
    }

    fn serialize_struct(self, name: &'static str, _: usize) -> Result<Pairs, DataError> {
        let mut pairs = self.pairs(None)?;
        if name.starts_with(ELIXIR) {
            pairs.pairs.push((Term::atom("__struct__"), Term::atom(name)));
        }
        Ok(pairs)
    }

    fn serialize_struct_variant(
        self,
        name: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Pairs, DataError> {
        self.pairs(Some(variant_name(name, variant)))
    }

    fn is_human_readable(&self) -> bool {
        false
    }
}

/// For bytes that this program wrote a moment ago.
fn unlimited(max_depth: u32) -> Limits {
    Limits {
        max_depth,
        max_terms: usize::MAX,
        max_bytes: usize::MAX,
        max_integer_bytes: usize::MAX,
        ..Limits::default()
    }
}

#[derive(Clone, Copy)]
enum Shape {
    List,
    Tuple,
    /// A tuple whose first element is the variant's name.
    Variant(&'static str),
}

pub(super) struct Items {
    inner: Serializer,
    items: Vec<Term>,
    shape: Shape,
}

impl Items {
    fn push<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), DataError> {
        let index = self.items.len();
        let item = value.serialize(self.inner).map_err(|error| match self.shape {
            Shape::Variant(tag) => error.at_index(index - 1).in_key(tag),
            Shape::List | Shape::Tuple => error.at_index(index),
        })?;
        self.items.push(item);
        Ok(())
    }

    fn finish(self) -> Term {
        match self.shape {
            Shape::List => Term::List(self.items),
            Shape::Tuple | Shape::Variant(_) => Term::Tuple(self.items),
        }
    }
}

macro_rules! items {
    ($($kind:ident: $method:ident),*) => {$(
        impl ser::$kind for Items {
            type Ok = Term;
            type Error = DataError;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), DataError> {
                self.push(value)
            }

            fn end(self) -> Result<Term, DataError> {
                Ok(self.finish())
            }
        }
    )*};
}
items! {
    SerializeSeq: serialize_element, SerializeTuple: serialize_element,
    SerializeTupleStruct: serialize_field, SerializeTupleVariant: serialize_field
}

pub(super) struct Pairs {
    inner: Serializer,
    pairs: Vec<(Term, Term)>,
    key: Option<Term>,
    keyword: bool,
    tag: Option<&'static str>,
}

impl Pairs {
    fn field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), DataError> {
        let value = value
            .serialize(self.inner)
            .map_err(|error| self.within(error.in_key(name)))?;
        // A keyword list has atoms for keys whatever maps have.
        let key = if self.keyword {
            Term::atom(name)
        } else {
            self.inner.key(name)
        };
        self.pairs.push((key, value));
        Ok(())
    }

    fn within(&self, error: DataError) -> DataError {
        match self.tag {
            Some(tag) => error.in_key(tag),
            None => error,
        }
    }

    fn finish(self) -> Term {
        let term = if self.keyword {
            Term::list(
                self.pairs
                    .into_iter()
                    .map(|(key, value)| Term::tuple([key, value])),
            )
        } else {
            Term::Map(self.pairs.into_iter().collect::<Map>())
        };
        match self.tag {
            Some(tag) => Term::Tuple(vec![Term::atom(tag), term]),
            None => term,
        }
    }
}

impl ser::SerializeMap for Pairs {
    type Ok = Term;
    type Error = DataError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), DataError> {
        let key = key.serialize(self.inner)?;
        self.key = Some(match key {
            Term::Binary(text) if self.keyword => match String::from_utf8(text.into_vec()) {
                Ok(text) => Term::atom(text),
                Err(_) => return Err(DataError::new("a key of a keyword list must be text")),
            },
            key => key,
        });
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), DataError> {
        let Some(key) = self.key.take() else {
            return Err(DataError::new("a map's value came before its key"));
        };
        let value = value.serialize(self.inner).map_err(|error| error.in_key(&key))?;
        self.pairs.push((key, value));
        Ok(())
    }

    fn end(self) -> Result<Term, DataError> {
        Ok(self.finish())
    }
}

macro_rules! fields {
    ($($kind:ident),*) => {$(
        impl ser::$kind for Pairs {
            type Ok = Term;
            type Error = DataError;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                name: &'static str,
                value: &T,
            ) -> Result<(), DataError> {
                self.field(name, value)
            }

            fn end(self) -> Result<Term, DataError> {
                Ok(self.finish())
            }
        }
    )*};
}
fields!(SerializeStruct, SerializeStructVariant);

// === Terms as parts of other values ===

struct Encoded(Vec<u8>);

impl Serialize for Encoded {
    fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl Serialize for Term {
    fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::new();
        crate::encode::encode(self, &mut bytes).map_err(ser::Error::custom)?;
        serializer.serialize_newtype_struct(TERM, &Encoded(bytes))
    }
}

macro_rules! as_term {
    ($($kind:ident),*) => {$(
        impl Serialize for crate::$kind {
            fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                Term::from(self.clone()).serialize(serializer)
            }
        }
    )*};
}
as_term!(Pid, Port, Reference, Export);

impl Serialize for crate::Atom {
    fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(ATOM, self.as_str())
    }
}
