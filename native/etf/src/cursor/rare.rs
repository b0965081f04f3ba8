//! The tokens that are seldom met, out of the way of those that are met all the time.

use super::text::{atom_text, float_text};
use super::{Cursor, count_past_end, truncated};
use crate::error::DecodeError;
use crate::tag;
use crate::token::{AtomRef, FunRef, PidRef, PortRef, ReferenceRef, Token};

/// Most 32-bit words a reference can have in the BEAM.
pub(crate) const MAX_REFERENCE_WORDS: usize = 5;
/// Size field, arity, uniq, index, number of free variables: what a fun has before its parts.
const FUN_HEAD: usize = 4 + 1 + 16 + 4 + 4;

/// The tokens that are seldom met. `cursor` is behind the tag; returns it behind the token.
#[inline(never)]
pub(super) fn rare_token<'a>(
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
            // By its source, OTP 27.3.4.1 would allocate 2^61 bytes for an empty one, and end. None writes it.
            if bits == 0 || bits > 8 || len == 0 {
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

impl<'a> Cursor<'a> {
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
}
