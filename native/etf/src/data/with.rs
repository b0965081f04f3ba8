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
    use serde::{Deserialize, Deserializer, Serializer};

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
        Vec::<u8>::deserialize(deserializer).map(T::from)
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
