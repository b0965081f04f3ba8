//! How single fields are written, for `#[serde(with = "...")]`.
//!
//! ```
//! use meshx_etf::{term, to_term};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Request {
//!     #[serde(with = "meshx_etf::with::atom")]
//!     table: String,
//!     #[serde(with = "meshx_etf::with::charlist")]
//!     host: String,
//!     #[serde(with = "meshx_etf::with::bytes")]
//!     body: Vec<u8>,
//!     #[serde(with = "meshx_etf::with::keyword")]
//!     options: Options,
//! }
//!
//! #[derive(Serialize, Deserialize)]
//! struct Options {
//!     timeout: u32,
//! }
//!
//! let request = Request { table: "items".into(), host: "h1".into(), body: vec![1, 2], options: Options { timeout: 5 } };
//! assert_eq!(
//!     to_term(&request)?.to_string(),
//!     r#"#{body => <<1,2>>,host => "h1",options => [{timeout,5}],table => items}"#
//! );
//! # Ok::<(), meshx_etf::DataError>(())
//! ```

/// Text as an atom.
pub mod atom {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the text as an atom.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(text: &impl AsRef<str>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(crate::data::ATOM, text.as_ref())
    }

    /// Reads an atom, or other text.
    ///
    /// # Errors
    /// Those of the deserializer.
    pub fn deserialize<'de, D: Deserializer<'de>, T: From<String>>(deserializer: D) -> Result<T, D::Error> {
        String::deserialize(deserializer).map(T::from)
    }
}

/// Text as a list of code points, which Erlang's own libraries mostly want.
pub mod charlist {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the text as a charlist.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(text: &impl AsRef<str>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(crate::data::CHARLIST, text.as_ref())
    }

    /// Reads a charlist, or other text.
    ///
    /// # Errors
    /// Those of the deserializer.
    pub fn deserialize<'de, D: Deserializer<'de>, T: From<String>>(deserializer: D) -> Result<T, D::Error> {
        String::deserialize(deserializer).map(T::from)
    }
}

/// A vector of bytes as a binary. Without it `Vec<u8>` is written as a list, and read from either.
pub mod bytes {
    use std::fmt;

    use serde::de::{Error, SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    /// Elements that are reserved on the word of a deserializer that may not be ours.
    const RESERVED: usize = 4096;

    /// Writes the bytes as a binary.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(bytes: &impl AsRef<[u8]>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes.as_ref())
    }

    /// Reads a binary, or a list of bytes.
    ///
    /// # Errors
    /// Those of the deserializer.
    pub fn deserialize<'de, D: Deserializer<'de>, T: From<Vec<u8>>>(deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_byte_buf(Bytes).map(T::from)
    }

    struct Bytes;

    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }

        // Below `flatten`, serde holds on to a binary as text when it can be text.
        fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
            self.visit_bytes(text.as_bytes())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<u8>, A::Error> {
            let mut bytes = Vec::with_capacity(items.size_hint().unwrap_or(0).min(RESERVED));
            while let Some(byte) = items.next_element()? {
                bytes.push(byte);
            }
            Ok(bytes)
        }
    }
}

/// A struct or map as a keyword list, `[{key, value}, ...]`, in the order in which it is written.
pub mod keyword {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes a keyword list; what is neither a struct nor a map is written as ever.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(value: &impl Serialize, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(crate::data::KEYWORD, value)
    }

    /// Reads a keyword list, or a map.
    ///
    /// # Errors
    /// Those of the deserializer.
    pub fn deserialize<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        T::deserialize(deserializer)
    }
}
