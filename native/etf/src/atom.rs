//! Atoms as text.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::sync::Arc;

use crate::token::AtomRef;

/// An atom's text. Never an entry of a BEAM's atom table: a peer may send as many as it likes.
///
/// Cheap to clone. At most 255 characters can be encoded.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Atom(Arc<str>);

impl Atom {
    /// An atom with this text.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Atom {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for Atom {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl From<AtomRef<'_>> for Atom {
    fn from(atom: AtomRef<'_>) -> Self {
        match atom.to_str() {
            Cow::Borrowed(text) => Self::new(text),
            Cow::Owned(text) => Self::new(text),
        }
    }
}

impl AsRef<str> for Atom {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Atom {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for Atom {
    fn eq(&self, other: &str) -> bool {
        &*self.0 == other
    }
}

impl PartialEq<&str> for Atom {
    fn eq(&self, other: &&str) -> bool {
        &*self.0 == *other
    }
}

impl fmt::Debug for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
