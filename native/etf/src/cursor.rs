//! Reads one token at a time from a slice that a peer wrote.
//!
//! The cursor can run short but not overrun, and it keeps one number that makes every announced count harmless:
//! how many terms are still owed by all open containers together. Each takes at least one byte, so a container
//! that makes the number exceed the bytes left is refused before anything is reserved for it.

use crate::error::DecodeError;
use crate::limits::Limits;
use crate::tag;
use crate::token::{AtomRef, FunRef, PidRef, PortRef, ReferenceRef, Token};

/// Most characters an atom can have in the BEAM.
pub(crate) const MAX_ATOM_CHARS: usize = 255;
/// Most 32-bit words a reference can have in the BEAM.
pub(crate) const MAX_REFERENCE_WORDS: usize = 5;
/// Most characters of an atom that are read at once.
pub(crate) const WINDOW: usize = 16;
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
/// Size field, arity, uniq, index, number of free variables: what a fun has before its parts.
const FUN_HEAD: usize = 4 + 1 + 16 + 4 + 4;

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

/// What [`Cursor::next_container`] opens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Container {
    List,
    Map,
    Tuple,
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

    /// The next token if it is an atom of at most [`WINDOW`] ASCII characters, as most are, with its text filled up with
    /// zeros. `None` also close to the end of the input. This and its like are for loops over tokens: from
    /// [`Cursor::token`] they get a token that went through memory.
    #[inline(always)]
    pub(crate) fn next_short_atom(&mut self) -> Option<(&'a [u8], u128)> {
        let (&[tag, len], after) = self.rest.split_first_chunk()?;
        if tag != tag::SMALL_ATOM_UTF8 {
            return None;
        }
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

    fn fun(&mut self, at: usize) -> Result<Token<'a>, DecodeError> {
        let (start, whole) = (self.pos(), self.rest);
        let size = self.length()?;
        let head_end = start.saturating_add(FUN_HEAD);
        let end = start.saturating_add(size);
        if size < FUN_HEAD {
            return Err(DecodeError::FunSize {
                announced: end,
                actual: head_end,
            });
        }
        let left = size - 4;
        if left > self.rest.len() {
            return Err(truncated(self.len, self.rest, left));
        }
        let body = whole.get(..size).unwrap_or_default();
        let arity = self.u8()?;
        let uniq = self.take(16)?;
        let (index, num_free) = (self.u32()?, self.u32()?);
        let token = Token::Fun(FunRef {
            arity,
            uniq,
            index,
            num_free,
            body,
        });
        if token.children() > size - FUN_HEAD {
            return Err(count_past_end(num_free as usize, at, size - FUN_HEAD));
        }
        self.open(at, num_free as usize, token.children())?;
        Ok(token)
    }

    /// An atom that is part of another term: a node, a module, a function.
    fn atom(&mut self) -> Result<AtomRef<'a>, DecodeError> {
        let at = self.pos();
        let tag = self.u8()?;
        self.atom_body(at, tag)
    }

    fn atom_body(&mut self, at: usize, tag: u8) -> Result<AtomRef<'a>, DecodeError> {
        let (len, latin1) = match tag {
            tag::SMALL_ATOM_UTF8 => (usize::from(self.u8()?), false),
            tag::ATOM_UTF8 => (usize::from(u16::from_be_bytes(self.array()?)), false),
            tag::SMALL_ATOM => (usize::from(self.u8()?), true),
            tag::ATOM => (usize::from(u16::from_be_bytes(self.array()?)), true),
            tag => {
                return Err(match tag::refused_name(tag) {
                    Some(name) => DecodeError::Refused {
                        tag,
                        name,
                        offset: at,
                    },
                    None => DecodeError::Expected {
                        wanted: "an atom",
                        tag,
                        offset: at,
                    },
                });
            }
        };
        let bytes = self.take(len)?;
        atom_text(at, bytes, latin1)
    }

    fn creation(&mut self, one_byte: bool) -> Result<u32, DecodeError> {
        if one_byte {
            self.u8().map(u32::from)
        } else {
            self.u32()
        }
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

/// The tokens that are seldom met. `cursor` is behind the tag; returns it behind the token.
#[inline(never)]
fn rare_token<'a>(
    mut cursor: Cursor<'a>,
    at: usize,
    tag: u8,
) -> Result<(Token<'a>, Cursor<'a>), DecodeError> {
    let c = &mut cursor;
    let token = match tag {
        tag::LARGE_BIG => {
            let len = c.length()?;
            c.integer(at, len)?
        }
        tag::FLOAT => float_text(at, c.take(31)?)?,
        tag::ATOM | tag::SMALL_ATOM | tag::ATOM_UTF8 => Token::Atom(c.atom_body(at, tag)?),
        tag::BIT_BINARY => {
            let len = c.length()?;
            let bits = c.u8()?;
            if bits > 8 || (bits == 0) != (len == 0) {
                return Err(DecodeError::BitCount {
                    len,
                    bits,
                    offset: at,
                });
            }
            let bytes = c.take(len)?;
            if bits % 8 == 0 {
                Token::Binary(bytes)
            } else {
                Token::BitBinary { bytes, bits }
            }
        }
        tag::PID | tag::NEW_PID => {
            let node = c.atom()?;
            let (id, serial) = (c.u32()?, c.u32()?);
            Token::Pid(PidRef {
                node,
                id,
                serial,
                creation: c.creation(tag == tag::PID)?,
            })
        }
        tag::PORT | tag::NEW_PORT | tag::V4_PORT => {
            let node = c.atom()?;
            let id = if tag == tag::V4_PORT {
                u64::from_be_bytes(c.array()?)
            } else {
                u64::from(c.u32()?)
            };
            Token::Port(PortRef {
                node,
                id,
                creation: c.creation(tag == tag::PORT)?,
            })
        }
        tag::REFERENCE => {
            let node = c.atom()?;
            let words = c.take(4)?;
            Token::Reference(ReferenceRef {
                node,
                words,
                creation: c.creation(true)?,
            })
        }
        tag::NEW_REFERENCE | tag::NEWER_REFERENCE => {
            let count = usize::from(u16::from_be_bytes(c.array()?));
            if count == 0 || count > MAX_REFERENCE_WORDS {
                return Err(DecodeError::ReferenceWords { count, offset: at });
            }
            let node = c.atom()?;
            let creation = c.creation(tag == tag::NEW_REFERENCE)?;
            Token::Reference(ReferenceRef {
                node,
                creation,
                words: c.take(count * 4)?,
            })
        }
        tag::NEW_FUN => c.fun(at)?,
        tag::EXPORT => {
            let (module, function) = (c.atom()?, c.atom()?);
            let offset = c.pos();
            match c.u8()? {
                tag::SMALL_INTEGER => Token::Export {
                    module,
                    function,
                    arity: c.u8()?,
                },
                tag => {
                    return Err(DecodeError::Expected {
                        wanted: "a small integer",
                        tag,
                        offset,
                    });
                }
            }
        }
        tag => {
            return Err(match tag::refused_name(tag) {
                Some(name) => DecodeError::Refused {
                    tag,
                    name,
                    offset: at,
                },
                None => DecodeError::UnknownTag { tag, offset: at },
            });
        }
    };
    Ok((token, cursor))
}

/// An integer with `len` bytes of magnitude; `rest` begins with its sign and is the end of `input` bytes. Returns what
/// follows it.
#[inline(never)]
fn any_integer(
    rest: &[u8],
    input: usize,
    limit: usize,
    at: usize,
    len: usize,
) -> Result<(Token<'_>, &[u8]), DecodeError> {
    if len > limit {
        return Err(DecodeError::IntegerTooLong {
            len,
            limit,
            offset: at,
        });
    }
    let Some((&sign, rest)) = rest.split_first() else {
        return Err(truncated(input, rest, 1));
    };
    let Some((magnitude, rest)) = rest.split_at_checked(len) else {
        return Err(truncated(input, rest, len));
    };
    // Any byte but 0 means negative to the BEAM.
    let negative = sign != 0;
    let magnitude = trim_zeros(magnitude);
    let token = match small_integer(negative, magnitude) {
        Some(value) => Token::Int(value),
        None => Token::BigInt { negative, magnitude },
    };
    Ok((token, rest))
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

#[inline(never)]
fn atom_text(at: usize, bytes: &[u8], latin1: bool) -> Result<AtomRef<'_>, DecodeError> {
    let too_long = |chars| DecodeError::AtomTooLong { chars, offset: at };
    if bytes.is_ascii() {
        return match bytes.len() {
            0..=MAX_ATOM_CHARS => Ok(AtomRef::ascii(bytes)),
            chars => Err(too_long(chars)),
        };
    }
    if latin1 {
        return match bytes.len() {
            0..=MAX_ATOM_CHARS => Ok(AtomRef::latin1(bytes)),
            chars => Err(too_long(chars)),
        };
    }
    let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::AtomUtf8 { offset: at })?;
    // Fewer bytes than the limit can't be more characters.
    let chars = if bytes.len() <= MAX_ATOM_CHARS {
        bytes.len()
    } else {
        text.chars().count()
    };
    if chars > MAX_ATOM_CHARS {
        return Err(too_long(chars));
    }
    Ok(AtomRef::utf8(text))
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

/// Magnitude bytes without the zero bytes at their high end.
pub(crate) fn trim_zeros(magnitude: &[u8]) -> &[u8] {
    let len = magnitude.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    magnitude.get(..len).unwrap_or_default()
}

/// The integer, if it fits 64 bits. `magnitude` is little-endian and trimmed.
pub(crate) fn small_integer(negative: bool, magnitude: &[u8]) -> Option<i64> {
    if magnitude.len() > 8 {
        return None;
    }
    let value = magnitude
        .iter()
        .rev()
        .fold(0u64, |acc, &b| acc << 8 | u64::from(b));
    signed(negative, value)
}

#[inline(always)]
fn signed(negative: bool, value: u64) -> Option<i64> {
    if negative {
        0i64.checked_sub_unsigned(value)
    } else {
        i64::try_from(value).ok()
    }
}

/// `FLOAT_EXT`: the number as text, `sprintf("%.20e")`, filled up with zero bytes.
fn float_text<'a>(offset: usize, bytes: &[u8]) -> Result<Token<'a>, DecodeError> {
    let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
    // Rust also parses "inf" and "nan".
    let value = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse::<f64>().ok())
        .filter(|value| value.is_finite());
    value.map(Token::Float).ok_or_else(|| not_finite(offset))
}
