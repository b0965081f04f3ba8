//! Bytes to owned terms.

use crate::atom::Atom;
use crate::cursor::Cursor;
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

/// Decodes the term at `pos`, which has no version byte; also returns where it ends.
#[cfg(feature = "eetf")]
pub(crate) fn decode_bare(bytes: &[u8], pos: usize, limits: &Limits) -> Result<(Term, usize), DecodeError> {
    Decoder::new(bytes, pos, limits).run()
}

/// Atoms that were just made, by a cheap hash: a list of maps names the same keys over and over.
const CACHED_ATOMS: usize = 64;

struct Decoder<'a> {
    cursor: Cursor<'a>,
    open: Vec<Open>,
    max_depth: usize,
    atoms: [Option<Atom>; CACHED_ATOMS],
}

/// A container that waits for more of its parts.
enum Open {
    /// `left` counts the tail.
    List {
        items: Vec<Term>,
        left: usize,
    },
    Tuple {
        items: Vec<Term>,
        left: usize,
    },
    Map {
        pairs: Vec<(Term, Term)>,
        key: Option<Term>,
        left: usize,
    },
}

impl<'a> Decoder<'a> {
    fn new(bytes: &'a [u8], pos: usize, limits: &Limits) -> Self {
        Self {
            cursor: Cursor::new(bytes, pos, limits),
            open: Vec::new(),
            max_depth: limits.depth(),
            atoms: [const { None }; CACHED_ATOMS],
        }
    }

    /// The term and the offset where it ends.
    fn run(mut self) -> Result<(Term, usize), DecodeError> {
        loop {
            let at = self.cursor.pos();
            let token = self.cursor.token()?;
            let Some(mut term) = self.begin(at, token)? else {
                continue;
            };
            loop {
                match self.open.last_mut() {
                    None => return Ok((term, self.cursor.pos())),
                    Some(top) => match top.put(term) {
                        false => break,
                        true => term = self.close()?,
                    },
                }
            }
        }
    }

    /// A term that is complete with its token, or `None` when a container was opened.
    fn begin(&mut self, at: usize, token: Token<'a>) -> Result<Option<Term>, DecodeError> {
        Ok(Some(match token {
            Token::Int(value) => Term::Int(value),
            Token::BigInt { negative, magnitude } => Term::integer_from_le_bytes(negative, magnitude),
            Token::Float(value) => Term::Float(value),
            Token::Atom(atom) => Term::Atom(self.atom(atom)),
            Token::Binary(bytes) => Term::Binary(bytes.to_vec()),
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
            Token::Nil => Term::List(Vec::new()),
            Token::Tuple { arity: 0 } => Term::Tuple(Vec::new()),
            Token::Map { pairs: 0 } => Term::Map(Map::new()),
            // What these reserve was checked by the cursor: all open containers together announce no more terms
            // than bytes are left, nor than the limit.
            Token::List { .. } => {
                let left = token.children();
                if let Some(Open::List {
                    items,
                    left: tail @ 1,
                }) = self.open.last_mut()
                {
                    // A list whose tail is a list is one longer list: see `Nesting::advance`.
                    items.reserve(left);
                    *tail = left;
                } else {
                    self.push(
                        at,
                        Open::List {
                            items: Vec::with_capacity(left),
                            left,
                        },
                    )?;
                }
                return Ok(None);
            }
            Token::Tuple { arity } => {
                self.push(
                    at,
                    Open::Tuple {
                        items: Vec::with_capacity(arity),
                        left: arity,
                    },
                )?;
                return Ok(None);
            }
            Token::Map { pairs } => {
                let left = token.children();
                self.push(
                    at,
                    Open::Map {
                        pairs: Vec::with_capacity(pairs),
                        key: None,
                        left,
                    },
                )?;
                return Ok(None);
            }
            Token::Pid(pid) => Term::Pid(Pid::from_ref(&pid, |atom| self.atom(atom))),
            Token::Port(port) => Term::Port(Port::from_ref(&port, |atom| self.atom(atom))),
            Token::Reference(reference) => {
                Term::from(Reference::from_ref(&reference, |atom| self.atom(atom)))
            }
            Token::Export {
                module,
                function,
                arity,
            } => Term::from(Export {
                module: self.atom(module),
                function: self.atom(function),
                arity,
            }),
            Token::Fun(fun) => {
                skip_fun(
                    &mut self.cursor,
                    &token,
                    at,
                    self.max_depth.saturating_sub(self.open.len()),
                )?;
                Term::Fun(Fun::from_checked(fun.body))
            }
        }))
    }

    fn push(&mut self, at: usize, container: Open) -> Result<(), DecodeError> {
        if self.open.len() >= self.max_depth {
            return Err(DecodeError::TooDeep {
                limit: self.max_depth,
                offset: at,
            });
        }
        self.open.push(container);
        Ok(())
    }

    /// Takes the innermost container, which has all its parts.
    fn close(&mut self) -> Result<Term, DecodeError> {
        match self.open.pop() {
            Some(Open::Tuple { items, .. }) => Ok(Term::Tuple(items)),
            Some(Open::List { mut items, .. }) => match items.pop() {
                Some(tail) => Ok(Term::list_with_tail(items, tail)),
                None => Ok(Term::List(items)),
            },
            Some(Open::Map { pairs, .. }) => {
                Map::from_pairs(pairs)
                    .map(Term::Map)
                    .map_err(|_| DecodeError::DuplicateKey {
                        offset: self.cursor.pos(),
                    })
            }
            None => Ok(Term::List(Vec::new())),
        }
    }

    fn atom(&mut self, atom: AtomRef<'_>) -> Atom {
        let Some(text) = atom.utf8_bytes() else {
            return Atom::from(atom);
        };
        let byte = |index: usize| text.get(index).map_or(0, |&b| usize::from(b));
        let hash = text.len() ^ byte(0) ^ (byte(text.len() / 2) * 3) ^ (byte(text.len().wrapping_sub(1)) * 7);
        match self.atoms.get_mut(hash % CACHED_ATOMS) {
            Some(Some(known)) if known.as_str().as_bytes() == text => known.clone(),
            Some(slot) => slot.insert(Atom::from(atom)).clone(),
            None => Atom::from(atom),
        }
    }
}

impl Open {
    /// Adds the next part; true when it was the last.
    fn put(&mut self, term: Term) -> bool {
        match self {
            Self::List { items, left } | Self::Tuple { items, left } => {
                items.push(term);
                *left -= 1;
                *left == 0
            }
            Self::Map { pairs, key, left } => {
                match key.take() {
                    None => *key = Some(term),
                    Some(key) => pairs.push((key, term)),
                }
                *left -= 1;
                *left == 0
            }
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
