//! Erlang external term format: borrowed walk, owned terms, encoder, limits.
//!
//! The layouts are those of "External Term Format" in the ERTS user's guide; tag names here are the ones used
//! there. What is offered:
//!
//! - [`TermRef`] looks into an encoded term where it lies: fields, elements, keys of maps, without allocation.
//! - [`Walk`] goes through an encoded term and yields borrowed [`Token`]s: nothing is built.
//! - [`decode()`] and [`decode_prefix`] build an owned [`Term`]; [`encode()`] writes one; [`term!`] spells one out.
//! - [`to_term`] and [`from_term`] turn Rust values into terms and back, see [`data`] (feature `serde`, on by default).
//! - [`parse()`] reads Erlang's syntax, and `Display` writes it.
//! - [`guard`] looks through a term before a BEAM decodes it, and refuses what a policy does not allow.
//! - [`Limits`] bounds what any of them spends on bytes that a peer wrote.
//!
//! No input makes this crate panic, recurse, or reserve memory that the input does not back: containers are kept on
//! an explicit stack of bounded depth, and a count is believed only if the bytes left could hold that many terms.
//! Atoms are text here and never enter an atom table.
//!
//! # Why not only `eetf`
//! The [`eetf`](https://docs.rs/eetf) crate covers the format well for input one trusts, and the feature `eetf` (on by
//! default) converts to and from its terms. But it recurses once per nesting level and reserves room for whatever
//! count a term announces, so that a few bytes of hostile input abort the whole process; it does not read the
//! Latin-1 atoms that OTP 25 sends, and encodes some lists as other lists. A node that talks to strangers needs
//! the guarantees above.
//!
//! # Not offered
//! The distribution header and its atom cache, fragments (another crate's concern), the external form that only
//! the writing node itself can read (`LOCAL_EXT`), and tags that no supported OTP release sends.
//!
//! # Example
//! ```
//! use meshx_etf::{Limits, Term, decode, encode};
//!
//! let term = Term::tuple([Term::atom("ok"), Term::binary("hello"), Term::from(-7)]);
//! let mut bytes = Vec::new();
//! encode(&term, &mut bytes)?;
//! let back = decode(&bytes, &Limits::default())?;
//! assert_eq!(back, term);
//! assert_eq!(back.to_string(), r#"{ok,<<"hello">>,-7}"#);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod atom;
mod bigint;
mod binary;
mod cursor;
#[cfg(feature = "serde")]
pub mod data;
mod decode;
mod display;
mod encode;
mod error;
pub mod guard;
mod ids;
mod indexed;
mod inflate;
#[cfg(feature = "eetf")]
mod interop;
mod limits;
mod macros;
mod map;
mod order;
mod parse;
mod tag;
mod term;
mod term_ref;
mod token;
mod walk;

pub use atom::Atom;
pub use bigint::BigInt;
pub use binary::Binary;
#[cfg(feature = "serde")]
pub use data::{DATA_DEPTH, DataError, Keys, from_bytes, from_term, to_bytes, to_term, to_term_with, with};
pub use decode::{decode, decode_bare_prefix, decode_prefix, decode_shared};
pub use encode::{encode, encode_bare};
pub use error::{DecodeError, EncodeError};
pub use ids::{Export, Fun, Pid, Port, Reference};
pub use indexed::Indexed;
pub use inflate::inflate;
#[cfg(feature = "eetf")]
pub use interop::ConvertError;
pub use limits::{DEPTH_CEILING, Limits};
pub use map::{IntoPairs, Map, Pairs};
pub use parse::{ParseError, parse};
pub use term::Term;
pub use term_ref::{Elements, PairRefs, TermRef};
pub use token::{AtomRef, FunRef, PidRef, PortRef, ReferenceRef, Token};
pub use walk::{Walk, term_len};
