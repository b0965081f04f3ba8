//! Bytes to owned terms.

use crate::atom::Atom;
use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::ids::{Export, Fun, Pid, Port, Reference};
use crate::inflate::{Inflated, inflate_prefix};
use crate::limits::Limits;
use crate::map::{Duplicate, Map};
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

/// Decodes the term at `pos`, which has no version byte; also returns where it ends.
#[cfg(feature = "eetf")]
pub(crate) fn decode_bare(bytes: &[u8], pos: usize, limits: &Limits) -> Result<(Term, usize), DecodeError> {
    Decoder::new(bytes, pos, limits).run()
}

/// Builds terms from a cursor. A container that is being filled is a [`Frame`]; those around it wait on a stack, so
/// that nesting costs no recursion.
struct Decoder<'a> {
    cursor: Cursor<'a>,
    max_depth: usize,
    atoms: AtomCache,
    /// Keys of maps whose values are not complete yet, innermost last.
    keys: Vec<Term>,
}

/// A container that waits for more of its parts.
struct Frame {
    kind: Kind,
    /// Parts still to come, the tail of a list counted.
    left: usize,
    /// Parts of a list or tuple so far.
    items: Vec<Term>,
    /// Whether the last of them is the tail of a list, and not `[]`.
    tail: bool,
    /// Parts of a map so far.
    pairs: Vec<(Term, Term)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    List,
    Tuple,
    Map,
}

impl<'a> Decoder<'a> {
    fn new(bytes: &'a [u8], pos: usize, limits: &Limits) -> Self {
        Self {
            cursor: Cursor::new(bytes, pos, limits),
            max_depth: limits.depth(),
            atoms: AtomCache::new(),
            keys: Vec::new(),
        }
    }

    /// The term and the offset where it ends.
    fn run(mut self) -> Result<(Term, usize), DecodeError> {
        // A local, so that it stays in registers as far as possible.
        let mut cursor = self.cursor;
        let mut stack: Vec<Frame> = Vec::new();
        // The whole term is the one part of this.
        let mut top = Frame::new(Kind::Tuple, 1, 1);
        loop {
            let keys = &mut self.keys;
            let complete = if let Some(value) = cursor.next_int() {
                top.put(Term::Int(value), keys)
            } else if let Some(text) = cursor.next_short_atom() {
                top.put(Term::Atom(self.atoms.get(text)), keys)
            } else {
                let at = cursor.pos();
                let token = cursor.token()?;
                // What containers reserve was checked by the cursor: all open ones together announce no more terms
                // than bytes are left, nor than the limit.
                let (kind, left, count) = match token {
                    Token::List { len } => (Kind::List, len.saturating_add(1), len),
                    Token::Tuple { arity } if arity > 0 => (Kind::Tuple, arity, arity),
                    Token::Map { pairs } if pairs > 0 => (Kind::Map, pairs.saturating_mul(2), pairs),
                    _ => (Kind::Tuple, 0, 0),
                };
                if left > 0 {
                    if kind == Kind::List && top.kind == Kind::List && top.left == 1 {
                        // A list whose tail is a list is one longer list: see `Outer::enter`.
                        top.items.reserve(count);
                        top.left = left;
                        continue;
                    }
                    if stack.len() >= self.max_depth {
                        return Err(DecodeError::TooDeep {
                            limit: self.max_depth,
                            offset: at,
                        });
                    }
                    stack.push(std::mem::replace(&mut top, Frame::new(kind, left, count)));
                    continue;
                }
                // Each arm puts its own kind of term: to build any term first and put it then costs another copy.
                match token {
                    Token::Float(value) => top.put(Term::Float(value), keys),
                    Token::Binary(bytes) => top.put(Term::Binary(bytes.to_vec()), keys),
                    Token::Nil => top.put(Term::List(Vec::new()), keys),
                    token => {
                        let term = self.rare(&mut cursor, at, token, stack.len())?;
                        top.put(term, &mut self.keys)
                    }
                }
            };
            if !complete {
                continue;
            }
            // And those around it that waited for it alone.
            loop {
                let Some(outer) = stack.pop() else {
                    let term = top.items.pop().unwrap_or_else(|| Term::List(Vec::new()));
                    return Ok((term, cursor.pos()));
                };
                let whole = std::mem::replace(&mut top, outer);
                let term = whole.finish().map_err(|_| duplicate_key(cursor.pos()))?;
                if !top.put(term, &mut self.keys) {
                    break;
                }
            }
        }
    }

    /// A term without parts of its own, of a kind that is seldom met.
    #[inline(never)]
    fn rare(
        &mut self,
        cursor: &mut Cursor<'a>,
        at: usize,
        token: Token<'a>,
        depth: usize,
    ) -> Result<Term, DecodeError> {
        Ok(match token {
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
            Token::Port(port) => Term::Port(Port::from_ref(&port, |atom| self.atoms.any(atom))),
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
                skip_fun(cursor, &token, at, self.max_depth.saturating_sub(depth))?;
                Term::Fun(Fun::from_checked(fun.body))
            }
            Token::Int(value) => Term::Int(value),
            Token::Float(value) => Term::Float(value),
            Token::Atom(atom) => Term::Atom(self.atoms.any(atom)),
            Token::Binary(bytes) => Term::Binary(bytes.to_vec()),
            Token::Nil | Token::List { .. } => Term::List(Vec::new()),
        })
    }
}

impl Frame {
    #[inline(always)]
    fn new(kind: Kind, left: usize, count: usize) -> Self {
        let (items, pairs) = match kind {
            // Nearly every tail is the empty list, which is not kept: `put` makes room for any other.
            Kind::List | Kind::Tuple => (Vec::with_capacity(count), Vec::new()),
            Kind::Map => (Vec::new(), Vec::with_capacity(count)),
        };
        Self {
            kind,
            left,
            items,
            tail: false,
            pairs,
        }
    }

    /// Adds the next part; true when it was the last.
    #[inline(always)]
    fn put(&mut self, term: Term, keys: &mut Vec<Term>) -> bool {
        self.left -= 1;
        match self.kind {
            Kind::Map if self.left % 2 == 1 => keys.push(term),
            Kind::Map => {
                if let Some(key) = keys.pop() {
                    self.pairs.push((key, term));
                }
            }
            Kind::List if self.left == 0 => {
                if !matches!(&term, Term::List(rest) if rest.is_empty()) {
                    self.tail = true;
                    self.items.push(term);
                }
            }
            Kind::List | Kind::Tuple => self.items.push(term),
        }
        self.left == 0
    }

    /// The container, which has all its parts.
    #[inline(always)]
    fn finish(mut self) -> Result<Term, Duplicate> {
        Ok(match self.kind {
            Kind::List if self.tail => match self.items.pop() {
                Some(tail) => Term::list_with_tail(self.items, tail),
                None => Term::List(self.items),
            },
            Kind::Tuple => Term::Tuple(self.items),
            Kind::List => Term::List(self.items),
            Kind::Map => Term::Map(Map::from_pairs(self.pairs)?),
        })
    }
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

    /// The atom of a text that is ASCII.
    #[inline(always)]
    fn get(&mut self, text: &[u8]) -> Atom {
        match Atom::short(text) {
            Some(atom) => atom,
            None => self.any(AtomRef::ascii(text)),
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
