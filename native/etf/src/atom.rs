//! Atoms as text.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::token::AtomRef;

/// An atom's text. Never an entry of a BEAM's atom table: a peer may send as many as it likes.
///
/// Cheap to clone. At most 255 characters can be encoded.
#[derive(Clone, PartialEq, Eq)]
pub struct Atom(Text);

/// Most bytes that are kept in place: it makes an atom 16 bytes wide.
pub(crate) const SHORT: usize = 14;

/// Text is always UTF-8. A text that is short enough is always `Short`, with zeros behind it, so that equal texts are
/// equal values.
#[derive(Clone, PartialEq, Eq)]
enum Text {
    Short { len: u8, bytes: [u8; SHORT] },
    Long(Arc<Box<str>>),
}

impl Atom {
    /// An atom with this text.
    pub fn new(text: impl AsRef<str>) -> Self {
        let text = text.as_ref();
        Self::short(text.as_bytes()).unwrap_or_else(|| Self(Text::Long(Arc::new(text.into()))))
    }

    /// An atom with this text, if it is short. `text` is UTF-8.
    pub(crate) fn short(text: &[u8]) -> Option<Self> {
        let mut padded = [0; 16];
        padded.get_mut(..text.len())?.copy_from_slice(text);
        (text.len() <= SHORT).then(|| Self::padded(text.len(), u128::from_le_bytes(padded)))
    }

    /// An atom with a text of `len` bytes, at most [`SHORT`]; `text` is filled up with zeros.
    #[inline(always)]
    pub(crate) fn padded(len: usize, text: u128) -> Self {
        let [bytes @ .., _, _] = text.to_le_bytes();
        Self(Text::Short {
            len: len as u8,
            bytes,
        })
    }

    /// The order of two texts that are both short.
    #[inline(always)]
    pub(crate) fn compare_short(&self, other: &Self) -> Option<Ordering> {
        // The zeros behind a text sort below all that another has there; the length tells texts apart that end with them.
        let key = |atom: &Self| {
            let (len, bytes) = atom.short_parts()?;
            let (first, last) = (bytes.first_chunk::<8>()?, bytes.last_chunk::<8>()?);
            let (first, last) = (u64::from_be_bytes(*first), u64::from_be_bytes(*last));
            Some((first, u128::from(last) << 8 | u128::from(len)))
        };
        Some(key(self)?.cmp(&key(other)?))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        match &self.0 {
            // It is UTF-8: nothing else gets here.
            Text::Short { .. } => std::str::from_utf8(self.as_bytes()).unwrap_or_default(),
            Text::Long(text) => text,
        }
    }

    /// A short text, with how many of these bytes it takes.
    #[inline(always)]
    pub(crate) fn short_parts(&self) -> Option<(u8, &[u8; SHORT])> {
        match &self.0 {
            Text::Short { len, bytes } => Some((*len, bytes)),
            Text::Long(_) => None,
        }
    }

    /// The bytes of its text, without a look at them.
    #[inline]
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Text::Short { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Text::Long(text) => text.as_bytes(),
        }
    }
}

/// By code points, as Erlang's: UTF-8 keeps their order.
impl Ord for Atom {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl PartialOrd for Atom {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// As its text, which it can be looked up by.
impl Hash for Atom {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
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
        Self::new(atom.to_str())
    }
}

impl AsRef<str> for Atom {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl Borrow<str> for Atom {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl PartialEq<str> for Atom {
    fn eq(&self, other: &str) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl PartialEq<&str> for Atom {
    fn eq(&self, other: &&str) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl fmt::Debug for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn short_and_long_texts_behave_alike() {
        let texts = [
            "",
            "a",
            "a\0",
            "a\0\0",
            "ab",
            "same first 8 a",
            "same first 8",
            "exactly14bytes",
            "exactly15 bytes",
            "日本日本",
            "日本日本日",
            "日本日本日本",
        ];
        let atoms = texts.map(Atom::from);
        let set: HashSet<Atom> = atoms.iter().cloned().collect();
        for (i, a) in texts.into_iter().enumerate() {
            let atom = Atom::from(a);
            assert_eq!(atom.as_str(), a);
            assert_eq!(atom, *a);
            assert!(set.contains(a));
            for (j, b) in texts.into_iter().enumerate() {
                assert_eq!(atom == *b, i == j);
                assert_eq!(atom == atoms[j], i == j);
                assert_eq!(atom.cmp(&Atom::from(b)), a.cmp(b));
                let order = atom.compare_short(&atoms[j]);
                assert!(order.is_none_or(|order| order == a.cmp(b)));
                assert_eq!(order.is_some(), a.len() <= SHORT && b.len() <= SHORT);
            }
        }
        assert_eq!(size_of::<Atom>(), 16);
    }
}
