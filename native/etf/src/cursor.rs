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
/// Size field, arity, uniq, index, number of free variables: what a fun has before its parts.
const FUN_HEAD: usize = 4 + 1 + 16 + 4 + 4;

#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
    owed: usize,
    seen: usize,
    max_terms: usize,
    max_integer_bytes: usize,
}

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
            bytes,
            pos,
            owed,
            seen,
            max_terms,
            max_integer_bytes,
        }
    }

    pub(crate) fn pos(&self) -> usize {
        self.pos
    }

    /// Terms that open containers still wait for; 0 when the term is complete.
    pub(crate) fn owed(&self) -> usize {
        self.owed
    }

    /// Terms read so far, the elements of strings counted.
    pub(crate) fn seen(&self) -> usize {
        self.seen
    }

    fn remaining(&self) -> usize {
        self.bytes.len().saturating_sub(self.pos)
    }

    #[inline]
    pub(crate) fn token(&mut self) -> Result<Token<'a>, DecodeError> {
        let at = self.pos;
        let tag = self.u8()?;
        self.owed = self.owed.saturating_sub(1);
        self.seen = self.seen.saturating_add(1);
        Ok(match tag {
            tag::SMALL_INTEGER => Token::Int(i64::from(self.u8()?)),
            tag::INTEGER => Token::Int(i64::from(i32::from_be_bytes(self.array()?))),
            tag::SMALL_BIG => {
                let len = usize::from(self.u8()?);
                self.integer(at, len)?
            }
            tag::LARGE_BIG => {
                let len = self.length()?;
                self.integer(at, len)?
            }
            tag::NEW_FLOAT => finite(at, f64::from_be_bytes(self.array()?))?,
            tag::FLOAT => float_text(at, self.take(31)?)?,
            tag::ATOM | tag::SMALL_ATOM | tag::ATOM_UTF8 | tag::SMALL_ATOM_UTF8 => {
                Token::Atom(self.atom_body(at, tag)?)
            }
            tag::BINARY => {
                let len = self.length()?;
                Token::Binary(self.take(len)?)
            }
            tag::BIT_BINARY => {
                let len = self.length()?;
                let bits = self.u8()?;
                if bits > 8 || (bits == 0) != (len == 0) {
                    return Err(DecodeError::BitCount {
                        len,
                        bits,
                        offset: at,
                    });
                }
                let bytes = self.take(len)?;
                if bits % 8 == 0 {
                    Token::Binary(bytes)
                } else {
                    Token::BitBinary { bytes, bits }
                }
            }
            tag::NIL => Token::Nil,
            tag::STRING => {
                let len = usize::from(u16::from_be_bytes(self.array()?));
                let bytes = self.take(len)?;
                self.seen = self.seen.saturating_add(len);
                self.check_terms(at)?;
                if bytes.is_empty() {
                    Token::Nil
                } else {
                    Token::ByteList(bytes)
                }
            }
            tag::LIST => {
                let len = self.length()?;
                self.open(at, len, Token::List { len })?
            }
            tag::SMALL_TUPLE => {
                let arity = usize::from(self.u8()?);
                self.open(at, arity, Token::Tuple { arity })?
            }
            tag::LARGE_TUPLE => {
                let arity = self.length()?;
                self.open(at, arity, Token::Tuple { arity })?
            }
            tag::MAP => {
                let pairs = self.length()?;
                self.open(at, pairs, Token::Map { pairs })?
            }
            tag::PID | tag::NEW_PID => {
                let node = self.atom()?;
                let (id, serial) = (self.u32()?, self.u32()?);
                Token::Pid(PidRef {
                    node,
                    id,
                    serial,
                    creation: self.creation(tag == tag::PID)?,
                })
            }
            tag::PORT | tag::NEW_PORT | tag::V4_PORT => {
                let node = self.atom()?;
                let id = if tag == tag::V4_PORT {
                    u64::from_be_bytes(self.array()?)
                } else {
                    u64::from(self.u32()?)
                };
                Token::Port(PortRef {
                    node,
                    id,
                    creation: self.creation(tag == tag::PORT)?,
                })
            }
            tag::REFERENCE => {
                let node = self.atom()?;
                let words = self.take(4)?;
                Token::Reference(ReferenceRef {
                    node,
                    words,
                    creation: self.creation(true)?,
                })
            }
            tag::NEW_REFERENCE | tag::NEWER_REFERENCE => {
                let count = usize::from(u16::from_be_bytes(self.array()?));
                if count == 0 || count > MAX_REFERENCE_WORDS {
                    return Err(DecodeError::ReferenceWords { count, offset: at });
                }
                let node = self.atom()?;
                let creation = self.creation(tag == tag::NEW_REFERENCE)?;
                Token::Reference(ReferenceRef {
                    node,
                    creation,
                    words: self.take(count * 4)?,
                })
            }
            tag::NEW_FUN => self.fun(at)?,
            tag::EXPORT => {
                let (module, function) = (self.atom()?, self.atom()?);
                let offset = self.pos;
                match self.u8()? {
                    tag::SMALL_INTEGER => Token::Export {
                        module,
                        function,
                        arity: self.u8()?,
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
        })
    }

    /// Adds a container's parts to what is owed, or refuses it.
    fn open(&mut self, at: usize, count: usize, token: Token<'a>) -> Result<Token<'a>, DecodeError> {
        self.owed = self.owed.saturating_add(token.children());
        let remaining = self.remaining();
        if self.owed > remaining {
            return Err(DecodeError::CountPastEnd {
                count,
                offset: at,
                remaining,
            });
        }
        self.check_terms(at)?;
        Ok(token)
    }

    fn check_terms(&self, offset: usize) -> Result<(), DecodeError> {
        let terms = self.seen.saturating_add(self.owed);
        if terms > self.max_terms {
            return Err(DecodeError::TooManyTerms {
                terms,
                limit: self.max_terms,
                offset,
            });
        }
        Ok(())
    }

    fn integer(&mut self, at: usize, len: usize) -> Result<Token<'a>, DecodeError> {
        if len > self.max_integer_bytes {
            return Err(DecodeError::IntegerTooLong {
                len,
                limit: self.max_integer_bytes,
                offset: at,
            });
        }
        // Any byte but 0 means negative to the BEAM.
        let negative = self.u8()? != 0;
        let magnitude = trim_zeros(self.take(len)?);
        Ok(match small_integer(negative, magnitude) {
            Some(value) => Token::Int(value),
            None => Token::BigInt { negative, magnitude },
        })
    }

    fn fun(&mut self, at: usize) -> Result<Token<'a>, DecodeError> {
        let start = self.pos;
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
        if left > self.remaining() {
            return Err(self.truncated(left));
        }
        let body = self.bytes.get(start..end).unwrap_or_default();
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
            return Err(DecodeError::CountPastEnd {
                count: num_free as usize,
                offset: at,
                remaining: size - FUN_HEAD,
            });
        }
        self.open(at, num_free as usize, token)
    }

    /// An atom that is part of another term: a node, a module, a function.
    fn atom(&mut self) -> Result<AtomRef<'a>, DecodeError> {
        let at = self.pos;
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
        if latin1 && !bytes.is_ascii() {
            return match len {
                0..=MAX_ATOM_CHARS => Ok(AtomRef::Latin1(bytes)),
                chars => Err(DecodeError::AtomTooLong { chars, offset: at }),
            };
        }
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::AtomUtf8 { offset: at })?;
        // Fewer bytes than the limit can't be more characters: most atoms are never counted.
        let chars = if len <= MAX_ATOM_CHARS {
            len
        } else {
            text.chars().count()
        };
        if chars > MAX_ATOM_CHARS {
            return Err(DecodeError::AtomTooLong { chars, offset: at });
        }
        Ok(AtomRef::Utf8(text))
    }

    fn creation(&mut self, one_byte: bool) -> Result<u32, DecodeError> {
        if one_byte {
            self.u8().map(u32::from)
        } else {
            self.u32()
        }
    }

    /// A 32-bit length or count.
    fn length(&mut self) -> Result<usize, DecodeError> {
        // Lossless: no supported target has a usize below 32 bits.
        self.u32().map(|n| n as usize)
    }

    #[inline]
    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[b]| b)
    }

    #[inline]
    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        match self
            .bytes
            .get(self.pos..)
            .and_then(|rest| rest.first_chunk::<N>())
        {
            Some(chunk) => {
                self.pos += N;
                Ok(*chunk)
            }
            None => Err(self.truncated(N)),
        }
    }

    #[cold]
    fn truncated(&self, needed: usize) -> DecodeError {
        DecodeError::Truncated {
            offset: self.pos,
            needed,
            remaining: self.remaining(),
        }
    }

    #[inline]
    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        match self.bytes.get(self.pos..).and_then(|rest| rest.get(..len)) {
            Some(taken) => {
                self.pos += len;
                Ok(taken)
            }
            None => Err(self.truncated(len)),
        }
    }
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
    if negative {
        0i64.checked_sub_unsigned(value)
    } else {
        i64::try_from(value).ok()
    }
}

fn finite<'a>(offset: usize, value: f64) -> Result<Token<'a>, DecodeError> {
    if value.is_finite() {
        Ok(Token::Float(value))
    } else {
        Err(DecodeError::Float { offset })
    }
}

/// `FLOAT_EXT`: the number as text, `sprintf("%.20e")`, filled up with zero bytes.
fn float_text<'a>(offset: usize, bytes: &[u8]) -> Result<Token<'a>, DecodeError> {
    let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
    // Rust also parses "inf" and "nan", which `finite` refuses.
    let value = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse::<f64>().ok());
    value.map_or(Err(DecodeError::Float { offset }), |value| finite(offset, value))
}
