//! Bytes to owned terms.

use std::ops::Range;
use std::sync::Arc;

use crate::atom::{self, Atom};
use crate::binary::Binary;
use crate::cursor::{Container, Cursor};
use crate::error::DecodeError;
use crate::ids::{Export, Fun, Pid, Port, Reference};
use crate::inflate::{Inflated, inflate_prefix};
use crate::limits::Limits;
use crate::map::Map;
use crate::term::Term;
use crate::token::{AtomRef, Token};
use crate::walk::skip_fun;

/// Decodes one term: a version byte, the term, and nothing after it.
///
/// # Errors
/// Any [`DecodeError`].
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Term, DecodeError> {
    let (term, rest) = decode_prefix(bytes, limits)?;
    if !rest.is_empty() {
        return Err(DecodeError::Trailing {
            offset: bytes.len() - rest.len(),
            remaining: rest.len(),
        });
    }
    Ok(term)
}

/// Decodes the term at the start of `bytes` and returns it with what follows it.
///
/// # Errors
/// Any [`DecodeError`] but [`DecodeError::Trailing`] (which a compressed term that holds more than a term still
/// causes).
pub fn decode_prefix<'a>(bytes: &'a [u8], limits: &Limits) -> Result<(Term, &'a [u8]), DecodeError> {
    match inflate_prefix(bytes, limits)? {
        Some(Inflated {
            bytes: inflated,
            rest,
        }) => {
            let (term, end) = Decoder::new(&inflated, 1, limits).run()?;
            if end != inflated.len() {
                return Err(DecodeError::Trailing {
                    offset: end,
                    remaining: inflated.len() - end,
                });
            }
            Ok((term, rest))
        }
        None => {
            let (term, end) = Decoder::new(bytes, 1, limits).run()?;
            Ok((term, bytes.get(end..).unwrap_or_default()))
        }
    }
}

/// Decodes the term at the start of `bytes`, which has no version byte, and returns it with what follows it: as terms
/// stand behind a distribution header. Such a term is never compressed.
///
/// # Errors
/// Any [`DecodeError`] but [`DecodeError::Trailing`] and [`DecodeError::Version`].
pub fn decode_bare_prefix<'a>(bytes: &'a [u8], limits: &Limits) -> Result<(Term, &'a [u8]), DecodeError> {
    let (term, end) = Decoder::new(bytes, 0, limits).run()?;
    Ok((term, bytes.get(end..).unwrap_or_default()))
}

/// Decodes the term that these bytes of `whole` are, without a version byte. Binaries that are at least a sixteenth of
/// `whole` share its memory, and keep it alive, instead of being copied.
///
/// ```
/// use std::sync::Arc;
/// use meshx_etf::{Limits, decode_shared};
///
/// let whole = Arc::new(vec![109, 0, 0, 0, 40].into_iter().chain([7; 40]).collect::<Vec<u8>>());
/// let term = decode_shared(&whole, 0..45, &Limits::default())?;
/// assert_eq!((term.as_binary(), Arc::strong_count(&whole)), (Some(&[7; 40][..]), 2));
/// # Ok::<(), meshx_etf::DecodeError>(())
/// ```
///
/// # Errors
/// Any [`DecodeError`] but [`DecodeError::Version`]; of bytes that `whole` does not have, [`DecodeError::Truncated`].
/// Offsets count from the start of the range.
pub fn decode_shared(
    whole: &Arc<Vec<u8>>,
    range: Range<usize>,
    limits: &Limits,
) -> Result<Term, DecodeError> {
    let bytes = whole.get(range.clone()).unwrap_or_default();
    let decoder = Decoder {
        shared: Some((whole, range.start)),
        ..Decoder::new(bytes, 0, limits)
    };
    match decoder.run()? {
        (term, end) if end == bytes.len() => Ok(term),
        (_, end) => Err(DecodeError::Trailing {
            offset: end,
            remaining: bytes.len() - end,
        }),
    }
}

/// Decodes the term at `pos`, which has no version byte; also returns where it ends.
#[cfg(feature = "eetf")]
pub(crate) fn decode_bare(bytes: &[u8], pos: usize, limits: &Limits) -> Result<(Term, usize), DecodeError> {
    Decoder::new(bytes, pos, limits).run()
}

/// Builds terms from a cursor. The container that is being filled is a local of [`Decoder::run`]; those around it wait
/// on a stack as [`Frame`]s, so that nesting costs no recursion.
struct Decoder<'a> {
    cursor: Cursor<'a>,
    max_depth: usize,
    atoms: AtomCache,
    /// What large binaries may share, and where in it the input begins.
    shared: Option<(&'a Arc<Vec<u8>>, usize)>,
}

/// A container that waits for more of its parts.
struct Frame {
    kind: Kind,
    /// Terms that the whole input still owes once all parts of this have come.
    until: usize,
    /// Parts so far; of a map a key, its value, the next key and so on.
    items: Vec<Term>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// What holds the whole term.
    Whole,
    Tuple,
    /// Elements of a list; its tail is owed as well.
    List,
    /// A list that all elements have come of, and a tail is to come that is not `[]`.
    Tail,
    Map,
}

impl<'a> Decoder<'a> {
    fn new(bytes: &'a [u8], pos: usize, limits: &Limits) -> Self {
        Self {
            cursor: Cursor::new(bytes, pos, limits),
            max_depth: limits.depth(),
            atoms: AtomCache::new(),
            shared: None,
        }
    }

    /// The term and the offset where it ends.
    fn run(mut self) -> Result<(Term, usize), DecodeError> {
        // A local, so that it stays in registers as far as possible.
        let mut cursor = self.cursor;
        let mut stack: Vec<Frame> = Vec::new();
        let mut top = Frame {
            kind: Kind::Whole,
            until: 0,
            items: Vec::with_capacity(1),
        };
        loop {
            // A loop of its own for what has no parts: it needs few registers. Each arm puts its own kind of term: to
            // build any term first and put it then costs another copy.
            while cursor.owed() != top.until {
                if let Some((text, padded)) = cursor.next_short_atom() {
                    if text.len() <= atom::SHORT {
                        top.put(|| Term::Atom(Atom::padded(text.len(), padded)));
                    } else {
                        top.put(|| Term::Atom(self.atoms.any(AtomRef::ascii(text))));
                    }
                } else if let Some(value) = cursor.next_int() {
                    top.put(|| Term::Int(value));
                } else if let Some(bytes) = cursor.next_binary() {
                    match Binary::short(bytes) {
                        Some(short) => top.put(|| Term::Binary(short)),
                        None => top.put(|| Term::Binary(self.long(bytes, cursor.pos()))),
                    }
                } else if let Some(value) = cursor.next_float() {
                    top.put(|| Term::Float(value));
                } else {
                    break;
                }
            }
            if cursor.owed() != top.until {
                let (at, until) = (cursor.pos(), cursor.owed() - 1);
                // The tail of a list is owed beyond its elements.
                let (kind, until, count) = match cursor.next_container() {
                    Some((Container::List, len)) => (Kind::List, until + 1, len),
                    Some((Container::Map, pairs)) => (Kind::Map, until, pairs.saturating_mul(2)),
                    Some((Container::Tuple, arity)) => (Kind::Tuple, until, arity),
                    None => match cursor.token()? {
                        Token::List { len: 0 } => (Kind::Tail, until, 0),
                        Token::List { len } => (Kind::List, until + 1, len),
                        Token::Tuple { arity } if arity > 0 => (Kind::Tuple, until, arity),
                        Token::Map { pairs } if pairs > 0 => (Kind::Map, until, pairs.saturating_mul(2)),
                        token => {
                            let (term, after) = self.rare(cursor, at, token, stack.len())?;
                            cursor = after;
                            top.put(|| term);
                            (Kind::Whole, until, 0)
                        }
                    },
                };
                if kind != Kind::Whole {
                    if top.kind == Kind::Tail && matches!(kind, Kind::List | Kind::Tail) {
                        // A list whose tail is a list is one longer list: see `Outer::enter`.
                        top.items = with_room(top.items, count);
                        (top.kind, top.until) = (kind, until);
                        continue;
                    }
                    if stack.len() >= self.max_depth {
                        return Err(DecodeError::TooDeep {
                            limit: self.max_depth,
                            offset: at,
                        });
                    }
                    // What is reserved was checked by the cursor: all open containers together announce no more terms
                    // than bytes are left, nor than the limit.
                    let items = Vec::with_capacity(count);
                    stack.push(std::mem::replace(&mut top, Frame { kind, until, items }));
                    continue;
                }
            }
            // The container may be complete now, and those around it that waited for it alone.
            while cursor.owed() == top.until {
                if top.kind == Kind::List && !cursor.next_nil() {
                    (top.kind, top.until) = (Kind::Tail, top.until - 1);
                    break;
                }
                let Some(outer) = stack.pop() else {
                    let term = top.items.pop().unwrap_or_else(|| Term::List(Vec::new()));
                    return Ok((term, cursor.pos()));
                };
                let Frame { kind, mut items, .. } = std::mem::replace(&mut top, outer);
                match kind {
                    Kind::Tuple => top.put(|| Term::Tuple(items)),
                    Kind::Map => {
                        let map = Map::from_parts(items).map_err(|_| duplicate_key(cursor.pos()))?;
                        top.put(|| Term::Map(map));
                    }
                    Kind::Whole | Kind::List => top.put(|| Term::List(items)),
                    Kind::Tail => {
                        let tail = items.pop().unwrap_or_else(|| Term::List(Vec::new()));
                        top.put(|| Term::list_with_tail(items, tail));
                    }
                }
            }
        }
    }

    /// A binary whose bytes end at `end`.
    #[inline(never)]
    fn long(&self, bytes: &[u8], end: usize) -> Binary {
        match self.shared {
            Some((whole, start)) => Binary::part(whole, start + end - bytes.len(), bytes),
            None => Binary::long(bytes),
        }
    }

    /// A term without parts of its own, of a kind that is seldom met.
    #[inline(never)]
    fn rare(
        &mut self,
        mut cursor: Cursor<'a>,
        at: usize,
        token: Token<'a>,
        depth: usize,
    ) -> Result<(Term, Cursor<'a>), DecodeError> {
        let term = match token {
            Token::BigInt { negative, magnitude } => Term::integer_from_le_bytes(negative, magnitude),
            Token::BitBinary { bytes, bits } => match Term::bit_string(bytes, bits) {
                Some(term) => term,
                None => {
                    return Err(DecodeError::BitCount {
                        len: bytes.len(),
                        bits,
                        offset: at,
                    });
                }
            },
            Token::ByteList(bytes) => Term::List(bytes.iter().map(|&b| Term::from(b)).collect()),
            Token::Map { .. } => Term::Map(Map::new()),
            Token::Tuple { .. } => Term::Tuple(Vec::new()),
            Token::Pid(pid) => Term::Pid(Pid::from_ref(&pid, |atom| self.atoms.any(atom))),
            Token::Port(port) => Term::from(Port::from_ref(&port, |atom| self.atoms.any(atom))),
            Token::Reference(reference) => {
                Term::from(Reference::from_ref(&reference, |atom| self.atoms.any(atom)))
            }
            Token::Export {
                module,
                function,
                arity,
            } => Term::from(Export {
                module: self.atoms.any(module),
                function: self.atoms.any(function),
                arity,
            }),
            Token::Fun(fun) => {
                skip_fun(&mut cursor, &token, at, self.max_depth.saturating_sub(depth))?;
                Term::Fun(Fun::from_checked(fun.body))
            }
            Token::Int(value) => Term::Int(value),
            Token::Float(value) => Term::Float(value),
            Token::Atom(atom) => Term::Atom(self.atoms.any(atom)),
            Token::Binary(bytes) => Term::binary(bytes),
            Token::Nil | Token::List { .. } => Term::List(Vec::new()),
        };
        Ok((term, cursor))
    }
}

impl Frame {
    /// Adds a part. There is room for all, but for a tail that is seldom met.
    #[inline(always)]
    fn put(&mut self, term: impl FnOnce() -> Term) {
        if self.items.len() == self.items.capacity() {
            // Given away and taken back, as nothing else may hold the address of what shall stay in registers.
            self.items = with_room(std::mem::take(&mut self.items), 1);
            self.items.push(term());
        } else {
            self.items.push(term());
        }
    }
}

#[cold]
#[inline(never)]
fn with_room(mut items: Vec<Term>, count: usize) -> Vec<Term> {
    items.reserve(count);
    items
}

#[cold]
#[inline(never)]
fn duplicate_key(offset: usize) -> DecodeError {
    DecodeError::DuplicateKey { offset }
}

/// Long atoms that were just made: a list of structs names the same module over and over.
struct AtomCache {
    atoms: [Option<Atom>; Self::ENTRIES],
}

impl AtomCache {
    const ENTRIES: usize = 8;

    fn new() -> Self {
        Self {
            atoms: [const { None }; Self::ENTRIES],
        }
    }

    #[inline(never)]
    fn any(&mut self, atom: AtomRef<'_>) -> Atom {
        let Some(text) = atom.utf8_bytes() else {
            return Atom::from(atom);
        };
        if let Some(atom) = Atom::short(text) {
            return atom;
        }
        // Names in one input often begin alike and end differently.
        let last = text.last().map_or(0, |&b| usize::from(b));
        match self.atoms.get_mut((last ^ text.len()) % Self::ENTRIES) {
            Some(Some(known)) if known.as_bytes() == text => known.clone(),
            Some(slot) => slot.insert(Atom::from(atom)).clone(),
            None => Atom::from(atom),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::encode::encode;

    fn ok(bytes: &[u8]) -> Term {
        decode(bytes, &Limits::default()).unwrap()
    }

    #[test]
    fn one_list_however_encoded() {
        let list = Term::list([1, 2, 3].map(Term::from));
        assert_eq!(ok(&[131, 107, 0, 3, 1, 2, 3]), list);
        assert_eq!(ok(&[131, 108, 0, 0, 0, 3, 97, 1, 97, 2, 97, 3, 106]), list);
        assert_eq!(ok(&[131, 108, 0, 0, 0, 1, 97, 1, 107, 0, 2, 2, 3]), list);
        assert_eq!(
            ok(&[131, 108, 0, 0, 0, 1, 97, 1, 108, 0, 0, 0, 2, 97, 2, 97, 3, 106]),
            list
        );
        assert_eq!(ok(&[131, 108, 0, 0, 0, 0, 107, 0, 3, 1, 2, 3]), list);
        assert_eq!(ok(&[131, 108, 0, 0, 0, 0, 97, 5]), Term::from(5));
    }

    #[test]
    fn a_list_written_element_by_element_is_not_nested() {
        let mut bytes = vec![131];
        for _ in 0..10_000 {
            bytes.extend_from_slice(&[108, 0, 0, 0, 1, 106]);
        }
        bytes.push(106);
        assert_eq!(ok(&bytes).as_list().unwrap().len(), 10_000);
        assert_eq!(crate::term_len(&bytes, &Limits::default()), Ok(bytes.len()));
    }

    #[test]
    fn integers_have_one_form_of_their_own() {
        assert_eq!(ok(&[131, 110, 1, 0, 5]), Term::from(5));
        assert_eq!(ok(&[131, 110, 1, 1, 0]), Term::from(0));
        assert_eq!(ok(&[131, 110, 9, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0]), Term::from(5));
        assert_eq!(
            ok(&[131, 111, 0, 0, 0, 8, 1, 0, 0, 0, 0, 0, 0, 0, 128]),
            Term::from(i64::MIN)
        );
        assert_eq!(
            ok(&[131, 110, 8, 0, 0, 0, 0, 0, 0, 0, 0, 128]),
            Term::from(1u64 << 63)
        );
        for value in [
            i64::MIN,
            i64::MAX,
            -1,
            0,
            255,
            256,
            -(1 << 31),
            1 << 31,
            -(1 << 31) - 1,
            1 << 56,
        ] {
            let mut bytes = Vec::new();
            encode(&Term::from(value), &mut bytes).unwrap();
            assert_eq!(ok(&bytes), Term::from(value));
        }
    }

    #[test]
    fn latin1_atoms_become_utf8() {
        assert_eq!(ok(&[131, 100, 0, 2, 0xE9, b'a']), Term::atom("éa"));
        assert_eq!(ok(&[131, 115, 1, 0xE9]), ok(&[131, 119, 2, 0xC3, 0xA9]));
    }

    #[test]
    fn prefixes_of_a_stream_of_terms() {
        let bytes = [131, 104, 1, 97, 1, 131, 106, 7];
        let (control, rest) = decode_prefix(&bytes, &Limits::default()).unwrap();
        assert_eq!(control, Term::tuple([Term::from(1)]));
        let (message, rest) = decode_prefix(rest, &Limits::default()).unwrap();
        assert_eq!((message, rest), (Term::list([]), &[7][..]));
        assert_eq!(
            decode(&bytes, &Limits::default()),
            Err(DecodeError::Trailing {
                offset: 5,
                remaining: 3
            })
        );
    }

    #[test]
    fn keys_twice_are_refused_but_1_and_1_0_are_two_keys() {
        let twice = [131, 116, 0, 0, 0, 2, 97, 1, 97, 2, 98, 0, 0, 0, 1, 97, 3];
        assert_eq!(
            decode(&twice, &Limits::default()),
            Err(DecodeError::DuplicateKey { offset: 17 })
        );
        let mut both = vec![131, 116, 0, 0, 0, 2, 97, 1, 97, 2, 70];
        both.extend_from_slice(&1.0f64.to_be_bytes());
        both.extend_from_slice(&[97, 3]);
        assert_eq!(
            ok(&both),
            Term::map([(Term::from(1), Term::from(2)), (Term::from(1.0), Term::from(3))])
        );
    }
}
