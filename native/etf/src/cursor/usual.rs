//! Tokens in the forms that nearly all have.
//!
//! These are for loops over tokens: from [`Cursor::token`] they get a token that went through memory. Where one is not
//! taken, nothing has changed, and [`Cursor::token`] says what it is or what is wrong with it.

use super::Cursor;
use super::integer::signed;
use crate::tag;

/// Most characters of an atom that are read at once.
const WINDOW: usize = 16;
/// The bits that no ASCII character has.
const NOT_ASCII: u128 = 0x8080_8080_8080_8080_8080_8080_8080_8080;
/// By how many they are, the bits of the first bytes of a window.
const FIRST: [u128; WINDOW + 1] = {
    let mut masks = [0; WINDOW + 1];
    let mut len = 1;
    while len <= WINDOW {
        masks[len] = masks[len - 1] << 8 | 0xFF;
        len += 1;
    }
    masks
};

/// What [`Cursor::next_container`] opens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Container {
    List,
    Map,
    Tuple,
}

impl<'a> Cursor<'a> {
    /// The next token if it is an atom of at most [`WINDOW`] ASCII characters, as most are, with its text filled up with
    /// zeros. `None` also close to the end of the input.
    #[inline(always)]
    pub(crate) fn next_short_atom(&mut self) -> Option<(&'a [u8], u128)> {
        let (len, after) = match *self.rest {
            [tag::SMALL_ATOM_UTF8, len, ref after @ ..] => (len, after),
            // OTP 25 writes all atoms that it can so.
            [tag::ATOM, 0, len, ref after @ ..] => (len, after),
            _ => return None,
        };
        // Read at once with what follows it, and that taken off.
        let window = u128::from_le_bytes(*after.first_chunk::<WINDOW>()?);
        let text = window & FIRST.get(usize::from(len))?;
        if text & NOT_ASCII != 0 {
            return None;
        }
        let (bytes, after) = after.split_at_checked(usize::from(len))?;
        self.leaf(after);
        Some((bytes, text))
    }

    /// The next token if it is a binary.
    #[inline(always)]
    pub(crate) fn next_binary(&mut self) -> Option<&'a [u8]> {
        let (&[tag, a, b, c, d], after) = self.rest.split_first_chunk()?;
        if tag != tag::BINARY {
            return None;
        }
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        let (bytes, after) = after.split_at_checked(len)?;
        self.leaf(after);
        Some(bytes)
    }

    /// The next token if it is a finite float.
    #[inline(always)]
    pub(crate) fn next_float(&mut self) -> Option<f64> {
        let (&tag, after) = self.rest.split_first()?;
        if tag != tag::NEW_FLOAT {
            return None;
        }
        let (bytes, after) = after.split_first_chunk()?;
        let value = f64::from_be_bytes(*bytes);
        if !value.is_finite() {
            return None;
        }
        self.leaf(after);
        Some(value)
    }

    /// The next token if it opens a container that is not empty, in its usual form, and may do so: the container, and how
    /// many elements or pairs it has. Its parts are owed from then on.
    #[inline(always)]
    pub(crate) fn next_container(&mut self) -> Option<(Container, usize)> {
        let (&[tag, a, b, c, d], after) = self.rest.split_first_chunk()?;
        let count = u32::from_be_bytes([a, b, c, d]) as usize;
        let (container, count, parts, after) = match tag {
            tag::LIST => (Container::List, count, count.checked_add(1)?, after),
            tag::MAP => (Container::Map, count, count.checked_mul(2)?, after),
            tag::SMALL_TUPLE => (
                Container::Tuple,
                usize::from(a),
                usize::from(a),
                self.rest.get(2..)?,
            ),
            _ => return None,
        };
        let owed = self.owed.wrapping_sub(1).checked_add(parts)?;
        let announced = self.announced.checked_add(parts)?;
        if count == 0 || owed > after.len() || announced > self.max_terms {
            return None;
        }
        (self.rest, self.owed, self.announced) = (after, owed, announced);
        Some((container, count))
    }

    /// The next token if it is the empty list.
    #[inline(always)]
    pub(crate) fn next_nil(&mut self) -> bool {
        match self.rest.split_first() {
            Some((&tag::NIL, after)) => {
                self.leaf(after);
                true
            }
            _ => false,
        }
    }

    /// The next token if it is an integer in one of its usual forms.
    #[inline(always)]
    pub(crate) fn next_int(&mut self) -> Option<i64> {
        let (&tag, after) = self.rest.split_first()?;
        let (value, after) = match tag {
            tag::SMALL_INTEGER => {
                let (&byte, after) = after.split_first()?;
                (i64::from(byte), after)
            }
            tag::INTEGER => {
                let (word, after) = after.split_first_chunk()?;
                (i64::from(i32::from_be_bytes(*word)), after)
            }
            tag::SMALL_BIG if self.max_integer_bytes >= 8 => {
                let (&[len, sign], after) = after.split_first_chunk()?;
                if len != 8 {
                    return None;
                }
                let (magnitude, after) = after.split_first_chunk()?;
                (signed(sign != 0, u64::from_le_bytes(*magnitude))?, after)
            }
            _ => return None,
        };
        self.leaf(after);
        Some(value)
    }

    #[inline(always)]
    fn leaf(&mut self, after: &'a [u8]) {
        self.rest = after;
        self.owed = self.owed.wrapping_sub(1);
    }
}
