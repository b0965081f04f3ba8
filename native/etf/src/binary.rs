//! The bytes of a binary.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// A binary shares the memory that it was decoded from only if it is at least this part of it.
const LEAST_PART: usize = 16;

/// Most bytes that are kept in place: it makes a binary 24 bytes wide.
pub(crate) const SHORT: usize = 22;

/// The bytes of a [`Term::Binary`](crate::Term::Binary): those of a short one lie in it, without an allocation.
///
/// One that [`decode_shared`](crate::decode_shared) made may share the memory that it was decoded from; it takes at most
/// sixteen times its own length then, however long it is kept. A clone of it shares that memory too.
///
/// Reads like a slice of bytes, and is made of whatever holds some:
/// ```
/// use meshx_etf::Binary;
///
/// let name = Binary::from("lamp");
/// assert_eq!((name.len(), &name[1..]), (4, b"amp".as_slice()));
/// assert_eq!(name.into_vec(), b"lamp");
/// ```
#[derive(Clone)]
pub struct Binary(Repr);

/// A binary that is short enough is always `Short`; what lies behind its bytes means nothing.
#[derive(Clone)]
enum Repr {
    Short {
        len: u8,
        bytes: [u8; SHORT],
    },
    Long(Box<[u8]>),
    /// Bytes of what a term was decoded from.
    Part {
        whole: Arc<Vec<u8>>,
        start: u32,
        len: u32,
    },
}

impl Binary {
    /// A binary of so few bytes that they are kept in place.
    #[inline(always)]
    pub(crate) fn short(text: &[u8]) -> Option<Self> {
        let len = text.len();
        let mut bytes = [0; SHORT];
        bytes.get_mut(..len)?.copy_from_slice(text);
        Some(Self(Repr::Short {
            len: len as u8,
            bytes,
        }))
    }

    /// A binary of more bytes than are kept in place.
    pub(crate) fn long(bytes: &[u8]) -> Self {
        Self(Repr::Long(bytes.into()))
    }

    /// A binary of more bytes than are kept in place, which are those of `whole` from `start` on. It keeps all of `whole`
    /// alive, so it is copied when it is a small part of that.
    pub(crate) fn part(whole: &Arc<Vec<u8>>, start: usize, bytes: &[u8]) -> Self {
        match (u32::try_from(start), u32::try_from(bytes.len())) {
            (Ok(start), Ok(len)) if bytes.len() >= whole.capacity() / LEAST_PART => Self(Repr::Part {
                whole: Arc::clone(whole),
                start,
                len,
            }),
            _ => Self::long(bytes),
        }
    }

    /// Its bytes.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Repr::Short { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Repr::Long(bytes) => bytes,
            Repr::Part { whole, start, len } => {
                let rest = whole.get(*start as usize..).unwrap_or_default();
                rest.get(..*len as usize).unwrap_or_default()
            }
        }
    }

    /// Those of a short one, with how many of them count.
    #[inline(always)]
    pub(crate) fn short_parts(&self) -> Option<(u8, &[u8; SHORT])> {
        match &self.0 {
            Repr::Short { len, bytes } => Some((*len, bytes)),
            Repr::Long(_) | Repr::Part { .. } => None,
        }
    }

    /// Its bytes; copies those of a short one, and of one that shares what it was decoded from.
    #[must_use]
    pub fn into_vec(self) -> Vec<u8> {
        match self.0 {
            Repr::Short { .. } | Repr::Part { .. } => self.as_slice().to_vec(),
            Repr::Long(bytes) => bytes.into_vec(),
        }
    }
}

impl Default for Binary {
    fn default() -> Self {
        Self(Repr::Short {
            len: 0,
            bytes: [0; SHORT],
        })
    }
}

impl Deref for Binary {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AsRef<[u8]> for Binary {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Borrow<[u8]> for Binary {
    fn borrow(&self) -> &[u8] {
        self
    }
}

impl From<&[u8]> for Binary {
    #[inline]
    fn from(bytes: &[u8]) -> Self {
        Self::short(bytes).unwrap_or_else(|| Self::long(bytes))
    }
}

impl<const N: usize> From<&[u8; N]> for Binary {
    fn from(bytes: &[u8; N]) -> Self {
        bytes.as_slice().into()
    }
}

impl<const N: usize> From<[u8; N]> for Binary {
    fn from(bytes: [u8; N]) -> Self {
        bytes.as_slice().into()
    }
}

/// Takes the memory over if it is more than fits in place.
impl From<Vec<u8>> for Binary {
    fn from(bytes: Vec<u8>) -> Self {
        Self::short(&bytes).unwrap_or_else(|| Self(Repr::Long(bytes.into())))
    }
}

impl From<&str> for Binary {
    fn from(text: &str) -> Self {
        text.as_bytes().into()
    }
}

impl From<String> for Binary {
    fn from(text: String) -> Self {
        text.into_bytes().into()
    }
}

impl PartialEq for Binary {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Binary {}

impl PartialOrd for Binary {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Binary {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_slice().cmp(other.as_slice())
    }
}

/// As a slice, which it can be looked up by.
impl Hash for Binary {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_slice().hash(state);
    }
}

impl fmt::Debug for Binary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_part_shares_what_it_is_a_good_part_of() {
        let whole: Arc<Vec<u8>> = Arc::new((0..1600).map(|n| n as u8).collect());
        let part = |range: std::ops::Range<usize>| Binary::part(&whole, range.start, &whole[range]);
        let (large, small) = (part(10..110), part(10..109));
        assert_eq!(Arc::strong_count(&whole), 2);
        assert_eq!((&large[..99], &*small), (&whole[10..109], &whole[10..109]));
        assert_eq!(large.as_slice().as_ptr(), whole[10..].as_ptr());
        assert_eq!(large.clone().into_vec(), whole[10..110]);
        assert_eq!(large, Binary::from(&whole[10..110]));
        drop(large);
        assert_eq!(Arc::strong_count(&whole), 1);
    }

    #[test]
    fn short_and_long_ones_behave_alike() {
        let bytes: Vec<u8> = (1..=60).collect();
        let binaries: Vec<Binary> = (0..=60).map(|len| Binary::from(&bytes[..len])).collect();
        let set: HashSet<Binary> = binaries.iter().cloned().collect();
        for (len, binary) in binaries.iter().enumerate() {
            assert_eq!(**binary, bytes[..len]);
            assert_eq!(binary.short_parts().is_some(), len <= SHORT);
            assert!(set.contains(&bytes[..len]));
            assert_eq!(Binary::from(bytes[..len].to_vec()), *binary);
            assert_eq!(binary.clone().into_vec(), bytes[..len]);
            for (other_len, other) in binaries.iter().enumerate() {
                assert_eq!(binary.cmp(other), len.cmp(&other_len));
                assert_eq!(binary == other, len == other_len);
            }
        }
        assert_eq!(Binary::default(), binaries[0]);
        assert_eq!(size_of::<Binary>(), 24);
    }
}
