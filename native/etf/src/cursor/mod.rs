//! Reads one token at a time from a slice that a peer wrote.
//!
//! The cursor can run short but not overrun, and it keeps one number that makes every announced count harmless:
//! how many terms are still owed by all open containers together. Each takes at least one byte, so a container
//! that makes the number exceed the bytes left is refused before anything is reserved for it.

mod integer;
mod rare;
mod text;
mod usual;

use crate::error::DecodeError;
use crate::limits::Limits;
use crate::tag;
use crate::token::{AtomRef, Token};

pub(crate) use integer::{small_integer, trim_zeros};
pub(crate) use rare::MAX_REFERENCE_WORDS;
pub(crate) use usual::Container;

use integer::{any_integer, signed};
use rare::rare_token;
use text::atom_text;

/// Most characters an atom can have in the BEAM.
pub(crate) const MAX_ATOM_CHARS: usize = 255;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    /// Bytes of the whole input.
    len: usize,
    /// Never 0 when a token is read.
    owed: usize,
    /// Terms read and owed, the elements of strings counted.
    announced: usize,
    max_terms: usize,
    max_integer_bytes: usize,
}

// What runs for every term is forced inline, so that a loop over tokens keeps the cursor in registers; the rest takes
// and returns values for the same reason, and errors are made in functions of their own.
impl<'a> Cursor<'a> {
    /// A cursor at `pos`, where exactly one term is owed.
    pub(crate) fn new(bytes: &'a [u8], pos: usize, limits: &Limits) -> Self {
        Self::resume(bytes, pos, 1, 0, limits.max_terms, limits.max_integer_bytes)
    }

    /// A cursor that goes on where another stopped.
    pub(crate) fn resume(
        bytes: &'a [u8],
        pos: usize,
        owed: usize,
        seen: usize,
        max_terms: usize,
        max_integer_bytes: usize,
    ) -> Self {
        Self {
            rest: bytes.get(pos..).unwrap_or_default(),
            len: bytes.len(),
            owed,
            announced: seen.saturating_add(owed),
            max_terms,
            max_integer_bytes,
        }
    }

    #[inline(always)]
    pub(crate) fn pos(&self) -> usize {
        self.len - self.rest.len()
    }

    /// Terms that open containers still wait for; 0 when the term is complete.
    #[inline(always)]
    pub(crate) fn owed(&self) -> usize {
        self.owed
    }

    /// Terms read so far, the elements of strings counted.
    pub(crate) fn seen(&self) -> usize {
        self.announced.saturating_sub(self.owed)
    }

    /// What follows.
    #[inline(always)]
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    #[inline(always)]
    pub(crate) fn token(&mut self) -> Result<Token<'a>, DecodeError> {
        let at = self.pos();
        let tag = self.u8()?;
        self.owed = self.owed.wrapping_sub(1);
        Ok(match tag {
            tag::SMALL_INTEGER => Token::Int(i64::from(self.u8()?)),
            tag::INTEGER => Token::Int(i64::from(i32::from_be_bytes(self.array()?))),
            tag::SMALL_ATOM_UTF8 => {
                let len = usize::from(self.u8()?);
                let bytes = self.take(len)?;
                if is_ascii(bytes) {
                    Token::Atom(AtomRef::ascii(bytes))
                } else {
                    Token::Atom(atom_text(at, bytes, false)?)
                }
            }
            tag::SMALL_BIG => {
                let len = usize::from(self.u8()?);
                self.integer(at, len)?
            }
            tag::NEW_FLOAT => {
                let value = f64::from_be_bytes(self.array()?);
                if !value.is_finite() {
                    return Err(not_finite(at));
                }
                Token::Float(value)
            }
            tag::BINARY => {
                let len = self.length()?;
                Token::Binary(self.take(len)?)
            }
            tag::NIL => Token::Nil,
            tag::STRING => {
                let len = usize::from(u16::from_be_bytes(self.array()?));
                let bytes = self.take(len)?;
                self.announced = self.announced.saturating_add(len);
                self.check_terms(at)?;
                if bytes.is_empty() {
                    Token::Nil
                } else {
                    Token::ByteList(bytes)
                }
            }
            tag::LIST => {
                let len = self.length()?;
                self.open(at, len, len.saturating_add(1))?;
                Token::List { len }
            }
            tag::SMALL_TUPLE => {
                let arity = usize::from(self.u8()?);
                self.open(at, arity, arity)?;
                Token::Tuple { arity }
            }
            tag::LARGE_TUPLE => {
                let arity = self.length()?;
                self.open(at, arity, arity)?;
                Token::Tuple { arity }
            }
            tag::MAP => {
                let pairs = self.length()?;
                self.open(at, pairs, pairs.saturating_mul(2))?;
                Token::Map { pairs }
            }
            tag => {
                let (token, after) = rare_token(*self, at, tag)?;
                *self = after;
                token
            }
        })
    }

    /// Adds a container's parts to what is owed, or refuses it.
    #[inline(always)]
    fn open(&mut self, at: usize, count: usize, parts: usize) -> Result<(), DecodeError> {
        self.owed = self.owed.saturating_add(parts);
        self.announced = self.announced.saturating_add(parts);
        if self.owed > self.rest.len() {
            return Err(count_past_end(count, at, self.rest.len()));
        }
        self.check_terms(at)
    }

    #[inline(always)]
    fn check_terms(&self, offset: usize) -> Result<(), DecodeError> {
        if self.announced > self.max_terms {
            return Err(too_many_terms(self.announced, self.max_terms, offset));
        }
        Ok(())
    }

    #[inline(always)]
    fn integer(&mut self, at: usize, len: usize) -> Result<Token<'a>, DecodeError> {
        // What an i64 mostly takes, read at once.
        if len == 8
            && self.max_integer_bytes >= 8
            && let Some((sign, after)) = self.rest.split_first()
            && let Some((magnitude, after)) = after.split_first_chunk::<8>()
            && let Some(value) = signed(*sign != 0, u64::from_le_bytes(*magnitude))
        {
            self.rest = after;
            return Ok(Token::Int(value));
        }
        let (token, rest) = any_integer(self.rest, self.len, self.max_integer_bytes, at, len)?;
        self.rest = rest;
        Ok(token)
    }

    /// A 32-bit length or count.
    #[inline(always)]
    fn length(&mut self) -> Result<usize, DecodeError> {
        // Lossless: no supported target has a usize below 32 bits.
        self.u32().map(|n| n as usize)
    }

    #[inline(always)]
    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[b]| b)
    }

    #[inline(always)]
    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    #[inline(always)]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        match self.rest.split_first_chunk::<N>() {
            Some((chunk, rest)) => {
                self.rest = rest;
                Ok(*chunk)
            }
            None => Err(truncated(self.len, self.rest, N)),
        }
    }

    #[inline(always)]
    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        match self.rest.split_at_checked(len) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => Err(truncated(self.len, self.rest, len)),
        }
    }
}

/// Whether all bytes are below 128. Most atoms are a few bytes long: they are read in one or two pieces.
#[inline(always)]
fn is_ascii(bytes: &[u8]) -> bool {
    let word = |chunk: Option<&[u8; 8]>| chunk.map_or(0, |c| u64::from_ne_bytes(*c));
    let half = |chunk: Option<&[u8; 4]>| chunk.map_or(0, |c| u32::from_ne_bytes(*c));
    match bytes.len() {
        0..=3 => bytes.iter().fold(0, |all, &b| all | b) < 128,
        4..=7 => (half(bytes.first_chunk()) | half(bytes.last_chunk())) & 0x8080_8080 == 0,
        8..=16 => (word(bytes.first_chunk()) | word(bytes.last_chunk())) & 0x8080_8080_8080_8080 == 0,
        _ => bytes.is_ascii(),
    }
}

#[cold]
#[inline(never)]
fn truncated(len: usize, rest: &[u8], needed: usize) -> DecodeError {
    DecodeError::Truncated {
        offset: len - rest.len(),
        needed,
        remaining: rest.len(),
    }
}

#[cold]
#[inline(never)]
fn count_past_end(count: usize, offset: usize, remaining: usize) -> DecodeError {
    DecodeError::CountPastEnd {
        count,
        offset,
        remaining,
    }
}

#[cold]
#[inline(never)]
fn too_many_terms(terms: usize, limit: usize, offset: usize) -> DecodeError {
    DecodeError::TooManyTerms { terms, limit, offset }
}

#[cold]
#[inline(never)]
fn not_finite(offset: usize) -> DecodeError {
    DecodeError::Float { offset }
}
