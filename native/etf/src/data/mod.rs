//! Rust values as terms and back, with `serde`.
//!
//! | Rust | term | also read |
//! |---|---|---|
//! | `bool` | `true`, `false` | |
//! | integers, `i128` and `u128` too | integer | |
//! | `f32`, `f64` | float | an integer that a float holds exactly |
//! | `str`, `String`, `char` | binary | charlist, atom but `nil` |
//! | [`with::bytes`], `&[u8]` | binary | list of bytes |
//! | `Vec`, slices | list | binary, for bytes |
//! | tuples, arrays, tuple structs | tuple | list of that length |
//! | `Option` | `nil` or the value | `undefined` |
//! | `()` | `nil` | |
//! | maps | map | keyword list |
//! | structs | map with atom keys ([`Keys`]) | binary keys, keyword list |
//! | structs renamed to `Elixir.Some.Module` | that Elixir struct | |
//! | enums | `variant`, `{variant, value}`, `{variant, a, b}`, `{variant, map}` | binary for the atom |
//! | `Result` | `{ok, value}`, `{error, reason}` | `ok`, `error` |
//! | [`Term`], [`Atom`](crate::Atom), [`Pid`](crate::Pid), [`Port`](crate::Port), [`Reference`](crate::Reference) | itself | |
//!
//! Rename variants as Erlang names them: `#[serde(rename_all = "snake_case")]`. [`with`] has what one attribute on a
//! field changes.
//!
//! ```
//! use meshx_etf::{Term, from_term, term, to_term};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Debug, PartialEq, Serialize, Deserialize)]
//! #[serde(rename = "Elixir.Shop.Item")]
//! struct Item {
//!     id: u64,
//!     name: String,
//!     note: Option<String>,
//!     state: State,
//! }
//!
//! #[derive(Debug, PartialEq, Serialize, Deserialize)]
//! #[serde(rename_all = "snake_case")]
//! enum State {
//!     InStock,
//!     Sold { to: String },
//! }
//!
//! let item = Item { id: 7, name: "lamp".into(), note: None, state: State::Sold { to: "ann".into() } };
//! let term = to_term(&item)?;
//! let same = term!(#{
//!     __struct__ => @"Elixir.Shop.Item", id => 7, name => "lamp", note => nil, state => {sold, #{to => "ann"}},
//! });
//! assert_eq!(term, same);
//! assert_eq!(from_term::<Item>(&term)?, item);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What a peer can do
//! Nothing is reserved for more than a term has, values are at most [`DATA_DEPTH`] deep (what a value holds as a
//! [`Term`] does not count), and errors quote at most a few characters of what was sent.

mod de;
mod error;
mod ser;
pub mod with;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use error::DataError;

use crate::decode::decode;
use crate::encode::encode;
use crate::limits::Limits;
use crate::term::Term;

/// The name of a newtype that carries an encoded term through serde's data model: to a serializer that is not ours
/// it is just its bytes.
pub(crate) const TERM: &str = "$meshx_etf::Term";
pub(crate) const ATOM: &str = "$meshx_etf::atom";
pub(crate) const CHARLIST: &str = "$meshx_etf::charlist";
pub(crate) const KEYWORD: &str = "$meshx_etf::keyword";

/// The deepest nesting of values that become terms or come from them. Generated code takes several frames of stack
/// for every level: at this depth that fits half of the stack that a Rust thread gets by default (2 MiB), in a build
/// without optimisation.
pub const DATA_DEPTH: u32 = 128;

/// What the field names of structs become as keys of maps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keys {
    /// Atoms, as Elixir's `%{name: 1}` has them.
    #[default]
    Atoms,
    /// Binaries, as decoded JSON has them.
    Binaries,
}

/// The value as a term, field names as atoms.
///
/// # Errors
/// [`DataError`], with the path to what cannot be a term.
pub fn to_term<T: Serialize + ?Sized>(value: &T) -> Result<Term, DataError> {
    to_term_with(value, Keys::Atoms)
}

/// The value as a term, with a choice of keys.
///
/// ```
/// use meshx_etf::{Keys, to_term_with};
///
/// #[derive(serde::Serialize)]
/// struct Point {
///     x: i128,
/// }
///
/// let term = to_term_with(&Point { x: 1 << 100 }, Keys::Binaries)?;
/// assert_eq!(term.to_string(), r#"#{<<"x">> => 1267650600228229401496703205376}"#);
/// # Ok::<(), meshx_etf::DataError>(())
/// ```
///
/// # Errors
/// As [`to_term`].
pub fn to_term_with<T: Serialize + ?Sized>(value: &T, keys: Keys) -> Result<Term, DataError> {
    value.serialize(ser::Serializer::new(keys))
}

/// The value that a term stands for. Strings and bytes may borrow from the term.
///
/// ```
/// use meshx_etf::{from_term, term};
///
/// #[derive(Debug, serde::Deserialize)]
/// struct Order<'a> {
///     #[serde(borrow)]
///     names: Vec<&'a str>,
/// }
///
/// let term = term!([{names, ["lamp", "desk"]}]); // a keyword list
/// let order: Order<'_> = from_term(&term)?;
/// assert_eq!(order.names, ["lamp", "desk"]);
///
/// let error = from_term::<Order<'_>>(&term!(#{names => ["lamp", 7]})).unwrap_err();
/// assert_eq!(error.to_string(), "at names[1]: invalid type: integer `7`, expected a borrowed string");
/// # Ok::<(), meshx_etf::DataError>(())
/// ```
///
/// # Errors
/// [`DataError`], with the path to what does not fit.
pub fn from_term<'de, T: Deserialize<'de>>(term: &'de Term) -> Result<T, DataError> {
    T::deserialize(de::Deserializer::new(term))
}

/// The value in the external term format, version byte first.
///
/// # Errors
/// As [`to_term`].
pub fn to_bytes<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    encode(&to_term(value)?, &mut bytes)?;
    Ok(bytes)
}

/// The value from the external term format.
///
/// ```
/// use meshx_etf::{Limits, from_bytes, to_bytes};
///
/// let reply: Result<(u8, String), String> = Ok((1, "one".to_owned()));
/// let bytes = to_bytes(&reply)?; // {ok, {1, <<"one">>}}
/// assert_eq!(from_bytes::<Result<(u8, String), String>>(&bytes, &Limits::default())?, reply);
/// # Ok::<(), meshx_etf::DataError>(())
/// ```
///
/// # Errors
/// [`DataError`]: the bytes are no term within the limits, or it does not fit.
pub fn from_bytes<T: DeserializeOwned>(bytes: &[u8], limits: &Limits) -> Result<T, DataError> {
    from_term(&decode(bytes, limits)?)
}
