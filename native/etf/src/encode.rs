//! Owned terms to bytes, in the forms that OTP 25 and later write or read.

use std::slice;

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
    Pairs(slice::Iter<'a, (Term, Term)>),
    /// The value of the pair whose key is being written, and the pairs after it.
    Value(&'a Term, slice::Iter<'a, (Term, Term)>),
}

fn write_all(term: &Term, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let mut open: Vec<Rest<'_>> = Vec::new();
    let mut next = Some(term);
    loop {
        if let Some(term) = next.take()
            && let Some(rest) = write_one(term, out)?
        {
            if open.len() >= DEPTH_CEILING as usize {
                return Err(EncodeError::TooDeep {
                    limit: DEPTH_CEILING as usize,
                });
            }
            open.push(rest);
        }
        next = match open.pop() {
            None => return Ok(()),
            Some(Rest::Terms(mut items)) => items.next().inspect(|_| open.push(Rest::Terms(items))),
            Some(Rest::List(mut items, tail)) => match (items.next(), tail) {
                (Some(item), _) => {
                    open.push(Rest::List(items, tail));
                    Some(item)
                }
                (None, Some(tail)) => Some(tail),
                (None, None) => {
                    out.push(tag::NIL);
                    None
                }
            },
            Some(Rest::Pairs(mut pairs)) => pairs.next().map(|(key, value)| {
                open.push(Rest::Value(value, pairs));
                key
            }),
            Some(Rest::Value(value, pairs)) => {
                open.push(Rest::Pairs(pairs));
                Some(value)
            }
        };
    }
}

/// Writes a term that has no parts, or the head of one that has.
fn write_one<'a>(term: &'a Term, out: &mut Vec<u8>) -> Result<Option<Rest<'a>>, EncodeError> {
    match term {
        Term::Int(value) => write_int(*value, out),
        Term::BigInt(value) => write_big(value.is_negative(), value.magnitude_le(), out)?,
        Term::Float(value) => {
            if !value.is_finite() {
                return Err(EncodeError::Float);
            }
            out.push(tag::NEW_FLOAT);
            out.extend_from_slice(&value.to_be_bytes());
        }
        Term::Atom(atom) => write_atom(atom, out)?,
        Term::Binary(bytes) => {
            out.push(tag::BINARY);
            write_len("a binary", bytes.len(), out)?;
            out.extend_from_slice(bytes);
        }
        Term::BitBinary { bytes, bits } => write_bit_binary(bytes, *bits, out)?,
        Term::List(items) => {
            if items.is_empty() {
                out.push(tag::NIL);
            } else if !write_string(items, out) {
                out.push(tag::LIST);
                write_len("a list", items.len(), out)?;
                return Ok(Some(Rest::List(items.iter(), None)));
            }
        }
        Term::ImproperList(items, tail) => {
            if items.is_empty() {
                return Err(EncodeError::EmptyImproperList);
            }
            out.push(tag::LIST);
            write_len("a list", items.len(), out)?;
            return Ok(Some(Rest::List(items.iter(), Some(tail))));
        }
        Term::Tuple(items) => {
            match u8::try_from(items.len()) {
                Ok(arity) => out.extend_from_slice(&[tag::SMALL_TUPLE, arity]),
                Err(_) => {
                    out.push(tag::LARGE_TUPLE);
                    write_len("a tuple", items.len(), out)?;
                }
            }
            return Ok(Some(Rest::Terms(items.iter())));
        }
        Term::Map(map) => {
            out.push(tag::MAP);
            write_len("a map", map.len(), out)?;
            return Ok(Some(Rest::Pairs(map.iter())));
        }
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
    }
    Ok(None)
}

fn write_int(value: i64, out: &mut Vec<u8>) {
    if let Ok(small) = u8::try_from(value) {
        out.extend_from_slice(&[tag::SMALL_INTEGER, small]);
    } else if let Ok(word) = i32::try_from(value) {
        out.push(tag::INTEGER);
        out.extend_from_slice(&word.to_be_bytes());
    } else {
        let magnitude = value.unsigned_abs();
        let len = 8 - magnitude.leading_zeros() as usize / 8;
        out.extend_from_slice(&[tag::SMALL_BIG, len as u8, u8::from(value < 0)]);
        out.extend(magnitude.to_le_bytes().iter().take(len));
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
