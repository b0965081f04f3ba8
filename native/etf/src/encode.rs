//! Owned terms to bytes, in the forms that OTP 25 and later write or read.

use std::{mem, slice};

use crate::atom::Atom;
use crate::cursor::{MAX_ATOM_CHARS, MAX_REFERENCE_WORDS};
use crate::error::EncodeError;
use crate::limits::DEPTH_CEILING;
use crate::tag;
use crate::term::Term;

/// Appends a version byte and the term to `out`.
///
/// # Errors
/// Any [`EncodeError`]; `out` is then as it was.
pub fn encode(term: &Term, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let start = out.len();
    out.push(tag::VERSION);
    encode_bare(term, out).inspect_err(|_| out.truncate(start))
}

/// Appends the term to `out` without a version byte.
///
/// # Errors
/// Any [`EncodeError`]; `out` is then as it was.
pub fn encode_bare(term: &Term, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let start = out.len();
    write_all(term, out).inspect_err(|_| out.truncate(start))
}

/// What is left to write of a container.
enum Rest<'a> {
    Terms(slice::Iter<'a, Term>),
    /// Elements of a list, then its tail (`None` for `[]`).
    List(slice::Iter<'a, Term>, Option<&'a Term>),
    /// What comes after the last element of a list.
    Tail(Option<&'a Term>),
    /// The value of the pair whose key was written, and the pairs after it.
    Pairs(Option<&'a Term>, slice::Iter<'a, [Term; 2]>),
}

fn write_all(term: &Term, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let mut open: Vec<Rest<'_>> = Vec::new();
    // The innermost container is a local: only beginning and ending one touches the stack.
    let mut top = Rest::Terms(slice::from_ref(term).iter());
    loop {
        let next = match &mut top {
            Rest::Terms(items) => items.next(),
            Rest::List(items, tail) => match items.next() {
                Some(item) => Some(item),
                None => {
                    let tail = *tail;
                    if tail.is_none() {
                        out.push(tag::NIL);
                    }
                    top = Rest::Tail(None);
                    tail
                }
            },
            Rest::Tail(tail) => tail.take(),
            Rest::Pairs(value, pairs) => match value.take() {
                Some(value) => Some(value),
                None => pairs.next().map(|[key, next]| {
                    *value = Some(next);
                    key
                }),
            },
        };
        match next {
            Some(term) => {
                if let Some(rest) = write_one(term, out)? {
                    // The outermost of them is no container but holds the whole term.
                    if open.len() >= DEPTH_CEILING as usize {
                        return Err(EncodeError::TooDeep {
                            limit: DEPTH_CEILING as usize,
                        });
                    }
                    open.push(mem::replace(&mut top, rest));
                }
            }
            None => match open.pop() {
                Some(outer) => top = outer,
                None => return Ok(()),
            },
        }
    }
}

/// Writes the first `len` bytes of a small array. To write all of it and take some back is several times as fast as
/// to copy a number of bytes that is known only here.
#[inline(always)]
fn write_some<const N: usize>(bytes: &[u8; N], len: usize, out: &mut Vec<u8>) {
    let end = out.len() + len;
    out.extend_from_slice(bytes);
    out.truncate(end);
}

/// Writes a term that has no parts, or the head of one that has.
#[inline(always)]
fn write_one<'a>(term: &'a Term, out: &mut Vec<u8>) -> Result<Option<Rest<'a>>, EncodeError> {
    match term {
        Term::Int(value) => write_int(*value, out),
        Term::Atom(atom) => match atom.short_parts() {
            Some((len, text)) => {
                out.extend_from_slice(&[tag::SMALL_ATOM_UTF8, len]);
                write_some(text, usize::from(len), out);
            }
            None => write_atom(atom, out)?,
        },
        Term::Float(value) => {
            if !value.is_finite() {
                return Err(EncodeError::Float);
            }
            out.push(tag::NEW_FLOAT);
            out.extend_from_slice(&value.to_be_bytes());
        }
        Term::Binary(bytes) => {
            out.extend_from_slice(&head("a binary", tag::BINARY, bytes.len())?);
            match bytes.short_parts() {
                Some((len, bytes)) => write_some(bytes, usize::from(len), out),
                None => out.extend_from_slice(bytes),
            }
        }
        Term::List(items) => {
            if items.is_empty() {
                out.push(tag::NIL);
            } else if !write_string(items, out) {
                out.extend_from_slice(&head("a list", tag::LIST, items.len())?);
                return Ok(Some(Rest::List(items.iter(), None)));
            }
        }
        Term::Tuple(items) => {
            match u8::try_from(items.len()) {
                Ok(arity) => out.extend_from_slice(&[tag::SMALL_TUPLE, arity]),
                Err(_) => out.extend_from_slice(&head("a tuple", tag::LARGE_TUPLE, items.len())?),
            }
            return Ok(Some(Rest::Terms(items.iter())));
        }
        Term::Map(map) => {
            out.extend_from_slice(&head("a map", tag::MAP, map.len())?);
            return Ok(Some(Rest::Pairs(None, map.pairs().iter())));
        }
        Term::ImproperList(items, tail) => {
            if items.is_empty() {
                return Err(EncodeError::EmptyImproperList);
            }
            out.extend_from_slice(&head("a list", tag::LIST, items.len())?);
            return Ok(Some(Rest::List(items.iter(), Some(tail))));
        }
        rare => write_rare(rare, out)?,
    }
    Ok(None)
}

/// A tag and a 32-bit length.
#[inline(always)]
fn head(what: &'static str, tag: u8, len: usize) -> Result<[u8; 5], EncodeError> {
    let word = u32::try_from(len).map_err(|_| EncodeError::TooLong { what, len })?;
    let [a, b, c, d] = word.to_be_bytes();
    Ok([tag, a, b, c, d])
}

/// A term without parts, of a kind that is seldom met.
#[inline(never)]
fn write_rare(term: &Term, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    match term {
        Term::BigInt(value) => write_big(value.is_negative(), value.magnitude_le(), out)?,
        Term::BitBinary { bytes, bits } => write_bit_binary(bytes, *bits, out)?,
        Term::Pid(pid) => {
            out.push(tag::NEW_PID);
            write_atom(&pid.node, out)?;
            for word in [pid.id, pid.serial, pid.creation] {
                out.extend_from_slice(&word.to_be_bytes());
            }
        }
        Term::Port(port) => {
            out.push(tag::V4_PORT);
            write_atom(&port.node, out)?;
            out.extend_from_slice(&port.id.to_be_bytes());
            out.extend_from_slice(&port.creation.to_be_bytes());
        }
        Term::Reference(reference) => {
            let count = reference.ids.len();
            if count == 0 || count > MAX_REFERENCE_WORDS {
                return Err(EncodeError::ReferenceWords { count });
            }
            out.extend_from_slice(&[tag::NEWER_REFERENCE, 0, count as u8]);
            write_atom(&reference.node, out)?;
            for word in std::iter::once(&reference.creation).chain(&reference.ids) {
                out.extend_from_slice(&word.to_be_bytes());
            }
        }
        Term::Fun(fun) => {
            out.push(tag::NEW_FUN);
            out.extend_from_slice(fun.body());
        }
        Term::Export(export) => {
            out.push(tag::EXPORT);
            write_atom(&export.module, out)?;
            write_atom(&export.function, out)?;
            out.extend_from_slice(&[tag::SMALL_INTEGER, export.arity]);
        }
        // All others are written by `write_one`.
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn write_int(value: i64, out: &mut Vec<u8>) {
    if let Ok(small) = u8::try_from(value) {
        out.extend_from_slice(&[tag::SMALL_INTEGER, small]);
    } else if let Ok(word) = i32::try_from(value) {
        let [a, b, c, d] = word.to_be_bytes();
        out.extend_from_slice(&[tag::INTEGER, a, b, c, d]);
    } else {
        let magnitude = value.unsigned_abs();
        let len = 8 - magnitude.leading_zeros() as usize / 8;
        out.extend_from_slice(&[tag::SMALL_BIG, len as u8, u8::from(value < 0)]);
        write_some(&magnitude.to_le_bytes(), len, out);
    }
}

fn write_big(negative: bool, magnitude: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    match u8::try_from(magnitude.len()) {
        Ok(len) => out.extend_from_slice(&[tag::SMALL_BIG, len]),
        Err(_) => {
            out.push(tag::LARGE_BIG);
            write_len("an integer", magnitude.len(), out)?;
        }
    }
    out.push(u8::from(negative));
    out.extend_from_slice(magnitude);
    Ok(())
}

#[inline]
fn write_atom(atom: &Atom, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let text = atom.as_bytes();
    match u8::try_from(text.len()) {
        Ok(len) => out.extend_from_slice(&[tag::SMALL_ATOM_UTF8, len]),
        Err(_) => {
            let chars = atom.as_str().chars().count();
            if chars > MAX_ATOM_CHARS {
                return Err(EncodeError::AtomTooLong { chars });
            }
            out.push(tag::ATOM_UTF8);
            // At most 255 characters of at most 4 bytes.
            out.extend_from_slice(&(text.len() as u16).to_be_bytes());
        }
    }
    out.extend_from_slice(text);
    Ok(())
}

fn write_bit_binary(bytes: &[u8], bits: u8, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let Some((last, whole)) = bytes.split_last().filter(|_| (1..=7).contains(&bits)) else {
        return Err(EncodeError::BitCount {
            len: bytes.len(),
            bits,
        });
    };
    out.push(tag::BIT_BINARY);
    write_len("a bit string", bytes.len(), out)?;
    out.push(bits);
    out.extend_from_slice(whole);
    out.push(last & (0xFF << (8 - bits)));
    Ok(())
}

/// Writes a list of at most 65,535 integers 0 to 255 in the short form; false, and nothing written, for others.
fn write_string(items: &[Term], out: &mut Vec<u8>) -> bool {
    let Ok(len) = u16::try_from(items.len()) else {
        return false;
    };
    let start = out.len();
    out.push(tag::STRING);
    out.extend_from_slice(&len.to_be_bytes());
    for item in items {
        let Term::Int(value @ 0..=255) = *item else {
            out.truncate(start);
            return false;
        };
        out.push(value as u8);
    }
    true
}

fn write_len(what: &'static str, len: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let word = u32::try_from(len).map_err(|_| EncodeError::TooLong { what, len })?;
    out.extend_from_slice(&word.to_be_bytes());
    Ok(())
}
