//! Owned terms to bytes, in the forms that OTP 25 and later write or read.

use std::{mem, slice};

use crate::atom::Atom;
use crate::binary;
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
struct Rest<'a> {
    /// Its parts: of a map a key, its value, the next key and so on.
    items: slice::Iter<'a, Term>,
    end: End<'a>,
}

/// What comes after the last part.
#[derive(Clone, Copy)]
enum End<'a> {
    Nothing,
    Nil,
    Tail(&'a Term),
}

/// Bytes that are collected before they go to the output.
const PIECE: usize = 512;
/// Most bytes of a term that is written into the piece: the head of a binary, and the bytes of a short one.
const ROOM: usize = 5 + binary::SHORT;

fn write_all(term: &Term, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let mut open: Vec<Rest<'_>> = Vec::new();
    // The innermost container is a local: only beginning and ending one touches the stack.
    let mut top = Rest {
        items: slice::from_ref(term).iter(),
        end: End::Nothing,
    };
    // Terms are small: each is written to a place of a known size, of which only `len` moves on, by what counts.
    let mut piece = [0; PIECE];
    let mut len = 0;
    loop {
        let place = match piece.get_mut(len..).and_then(|rest| rest.first_chunk_mut()) {
            Some(place) => place,
            None => {
                len = flush(&piece, len, out);
                continue;
            }
        };
        let Some(term) = top.items.next() else {
            match top.end {
                End::Nothing => match open.pop() {
                    Some(outer) => top = outer,
                    None => break,
                },
                End::Nil => {
                    put(place, [tag::NIL]);
                    len += 1;
                    top.end = End::Nothing;
                }
                End::Tail(tail) => {
                    top = Rest {
                        items: slice::from_ref(tail).iter(),
                        end: End::Nothing,
                    }
                }
            }
            continue;
        };
        // Each arm goes on by itself: what they have in common would have to be carried there.
        let (head, items, end) = match term {
            Term::Int(value) => {
                len += write_int(*value, place);
                continue;
            }
            Term::Atom(atom) => {
                if let Some((count, text)) = atom.short_parts() {
                    put(place, [tag::SMALL_ATOM_UTF8, count]);
                    put_at::<2, _>(place, text);
                    len += 2 + usize::from(count);
                    continue;
                }
                len = flush(&piece, len, out);
                write_atom(atom, out)?;
                continue;
            }
            Term::Binary(bytes) => {
                if let Some((count, bytes)) = bytes.short_parts() {
                    put(place, [tag::BINARY, 0, 0, 0, count]);
                    put_at::<5, _>(place, bytes);
                    len += 5 + usize::from(count);
                    continue;
                }
                len = flush(&piece, len, out);
                out.extend_from_slice(&head("a binary", tag::BINARY, bytes.len())?);
                out.extend_from_slice(bytes);
                continue;
            }
            Term::Float(value) => {
                if !value.is_finite() {
                    return Err(EncodeError::Float);
                }
                put(place, [tag::NEW_FLOAT]);
                put_at::<1, _>(place, &value.to_be_bytes());
                len += 9;
                continue;
            }
            Term::List(items) => match items.first() {
                None => {
                    put(place, [tag::NIL]);
                    len += 1;
                    continue;
                }
                Some(Term::Int(0..=255)) if is_string(items) => {
                    len = flush(&piece, len, out);
                    write_string(items, out);
                    continue;
                }
                Some(_) => (head("a list", tag::LIST, items.len())?, &**items, End::Nil),
            },
            Term::Tuple(items) => match u8::try_from(items.len()) {
                Ok(arity) => ([tag::SMALL_TUPLE, arity, 0, 0, 0], &**items, End::Nothing),
                Err(_) => (
                    head("a tuple", tag::LARGE_TUPLE, items.len())?,
                    &**items,
                    End::Nothing,
                ),
            },
            Term::Map(map) => (head("a map", tag::MAP, map.len())?, map.parts(), End::Nothing),
            Term::ImproperList(items, tail) => {
                if items.is_empty() {
                    return Err(EncodeError::EmptyImproperList);
                }
                (head("a list", tag::LIST, items.len())?, &**items, End::Tail(tail))
            }
            rare => {
                len = flush(&piece, len, out);
                write_rare(rare, out)?;
                continue;
            }
        };
        put(place, head);
        len += if head[0] == tag::SMALL_TUPLE {
            2
        } else {
            head.len()
        };
        // The outermost of them is no container but holds the whole term.
        if open.len() >= DEPTH_CEILING as usize {
            return Err(EncodeError::TooDeep {
                limit: DEPTH_CEILING as usize,
            });
        }
        let items = items.iter();
        open.push(mem::replace(&mut top, Rest { items, end }));
    }
    flush(&piece, len, out);
    Ok(())
}

/// Moves what was collected to the output; returns how much is collected then.
fn flush(piece: &[u8; PIECE], len: usize, out: &mut Vec<u8>) -> usize {
    out.extend_from_slice(piece.get(..len).unwrap_or_default());
    0
}

/// Puts bytes at the start of the place.
#[inline(always)]
fn put<const N: usize>(place: &mut [u8; ROOM], bytes: [u8; N]) {
    if let Some(start) = place.first_chunk_mut() {
        *start = bytes;
    }
}

/// Puts bytes behind the first `AT`.
#[inline(always)]
fn put_at<const AT: usize, const N: usize>(place: &mut [u8; ROOM], bytes: &[u8; N]) {
    if let Some(to) = place.get_mut(AT..).and_then(|rest| rest.first_chunk_mut()) {
        *to = *bytes;
    }
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
        // All others are written by `write_all`.
        _ => {}
    }
    Ok(())
}

/// Returns how many bytes it takes.
#[inline(always)]
fn write_int(value: i64, place: &mut [u8; ROOM]) -> usize {
    if let Ok(small) = u8::try_from(value) {
        put(place, [tag::SMALL_INTEGER, small]);
        2
    } else if let Ok(word) = i32::try_from(value) {
        put(place, [tag::INTEGER]);
        put_at::<1, _>(place, &word.to_be_bytes());
        5
    } else {
        let magnitude = value.unsigned_abs();
        let len = 8 - magnitude.leading_zeros() as usize / 8;
        put(place, [tag::SMALL_BIG, len as u8, u8::from(value < 0)]);
        put_at::<3, _>(place, &magnitude.to_le_bytes());
        3 + len
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

/// Whether a list has the short form: at most 65,535 integers 0 to 255.
fn is_string(items: &[Term]) -> bool {
    u16::try_from(items.len()).is_ok() && items.iter().all(|item| matches!(item, Term::Int(0..=255)))
}

fn write_string(items: &[Term], out: &mut Vec<u8>) {
    out.push(tag::STRING);
    // `is_string` has looked at the length, and at each item.
    out.extend_from_slice(&(items.len() as u16).to_be_bytes());
    out.extend(items.iter().filter_map(Term::as_int).map(|byte| byte as u8));
}

fn write_len(what: &'static str, len: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let word = u32::try_from(len).map_err(|_| EncodeError::TooLong { what, len })?;
    out.extend_from_slice(&word.to_be_bytes());
    Ok(())
}
