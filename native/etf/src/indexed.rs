//! A term's atoms as indexes into a table, as distribution sends them.
//!
//! A BEAM that decodes a term by itself looks up every occurrence of an atom by its text, 70 ns each: of 10,000 small
//! maps that is most of the time. With `ATOM_CACHE_REF` each different atom is looked up once. The [guard] writes this
//! form as it goes, when it was made by [`Guard::indexing`](crate::guard::Guard::indexing).
//!
//! [guard]: crate::guard

use crate::atom::Atom;
use crate::tag;
use crate::token::{AtomRef, Token};

/// A term that has no atom as text in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Indexed {
    /// The atoms, at most 255. One may be there twice if it came as Latin-1 and as UTF-8.
    pub atoms: Vec<Atom>,
    /// The term, version byte first: what it was but for atoms, which are `ATOM_CACHE_REF`. Never longer than it was.
    pub bytes: Vec<u8>,
}

/// Longest term that is written anew: it is held a second time.
const MAX_LEN: usize = 1 << 20;
/// Shortest.
const MIN_LEN: usize = 2 << 10;
/// Fewest atoms that make it worthwhile.
const MIN_ATOMS: usize = 256;
/// Of an atom that is as often there on average.
const MIN_REPEATS: usize = 4;
/// An index is one byte, and the BEAM's table has no place for a 256th.
const MAX_ATOMS: usize = 255;
/// Nanoseconds that a BEAM may take to decode it, see [`cost`]: it does so without yielding.
const MAX_COST: usize = 1_000_000;
/// Maps of more pairs are trees, and hashing their keys takes longer than all else.
const FLAT_MAP: usize = 32;

/// Longest binaries and strings in it: they are copied.
const MAX_BYTES: usize = 1024;
/// Bytes between two atoms that are copied at once.
const RUN: usize = 16;

const SLOTS: usize = 1024;
/// Slots that are looked at for an atom. Peers choose the texts.
const PROBES: usize = 16;

/// Writes an [`Indexed`] while it is shown the tokens of a term in turn.
#[derive(Debug)]
pub(crate) struct Indexer {
    atoms: Vec<(Key, Atom)>,
    /// 1 + the place in `atoms` by the hash of its text, 0 if there is none.
    slots: [u8; SLOTS],
    /// What is written, and room for more.
    bytes: Vec<u8>,
    written: usize,
    /// Bytes of the input that are in it.
    copied: usize,
    found: usize,
    cost: usize,
}

impl Indexer {
    /// `None` for a term of so many bytes that it would not be worthwhile.
    pub(crate) fn new(len: usize) -> Option<Box<Self>> {
        let indexer = || Self {
            atoms: Vec::new(),
            slots: [0; SLOTS],
            bytes: Vec::new(),
            written: 0,
            copied: 0,
            found: 0,
            cost: 0,
        };
        (MIN_LEN..=MAX_LEN).contains(&len).then(|| Box::new(indexer()))
    }

    /// Takes the token at `at..end` of the input; `None` if the term is to stay as it is. `short` is the text of an atom
    /// that [`Cursor::next_short_atom`](crate::cursor::Cursor::next_short_atom) found.
    ///
    /// Keys that are no atoms take long to compare or hash. Identifiers and functions have atoms inside, which the BEAM
    /// would make if they were not there.
    #[inline(always)]
    pub(crate) fn token(
        &mut self,
        input: &[u8],
        token: &Token<'_>,
        short: Option<u128>,
        at: usize,
        end: usize,
        is_key: bool,
    ) -> Option<()> {
        self.cost = self.cost.saturating_add(cost(token, end - at)?);
        if self.cost > MAX_COST {
            return None;
        }
        match token {
            Token::Atom(atom) => {
                let index = self.index(*atom, short)?;
                self.copy(input, at)?;
                *self.bytes.get_mut(self.written..)?.first_chunk_mut()? = [tag::ATOM_CACHE_REF, index];
                self.written += 2;
                self.copied = end;
                self.found += 1;
                Some(())
            }
            _ => (!is_key).then_some(()),
        }
    }

    /// After the last token.
    pub(crate) fn finish(mut self, input: &[u8]) -> Option<Indexed> {
        if self.found < MIN_ATOMS.max(self.atoms.len() * MIN_REPEATS) {
            return None;
        }
        self.copy(input, input.len())?;
        self.bytes.truncate(self.written);
        Some(Indexed {
            atoms: self.atoms.into_iter().map(|(_key, atom)| atom).collect(),
            bytes: self.bytes,
        })
    }

    /// Copies what is not yet copied of the first `end` bytes.
    #[inline(always)]
    fn copy(&mut self, input: &[u8], end: usize) -> Option<()> {
        let rest = input.get(self.copied..)?;
        let run = end.checked_sub(self.copied)?;
        if self.bytes.len() - self.written < run + RUN {
            self.grow(run + RUN);
        }
        let room = self.bytes.get_mut(self.written..)?;
        match (rest.first_chunk::<RUN>(), room.first_chunk_mut::<RUN>()) {
            // With what follows it, which is written over.
            (Some(from), Some(to)) if run <= RUN => *to = *from,
            _ => room.get_mut(..run)?.copy_from_slice(rest.get(..run)?),
        }
        self.written += run;
        Some(())
    }

    #[cold]
    fn grow(&mut self, by: usize) {
        let len = (2 * self.bytes.len()).max(self.written + by);
        self.bytes.resize(len, 0);
    }

    #[inline(always)]
    fn index(&mut self, atom: AtomRef<'_>, short: Option<u128>) -> Option<u8> {
        let key = match short.or_else(|| short_text(atom.bytes())) {
            Some(text) => Key::Short(text, atom.encoded_len()),
            None => Key::Hash(hash(atom.bytes())),
        };
        let first = key.slot();
        for probe in 0..PROBES {
            let slot = self.slots.get_mut((first + probe) % SLOTS)?;
            match slot.checked_sub(1) {
                Some(index) => {
                    let (known, name) = self.atoms.get(usize::from(index))?;
                    if *known == key && (matches!(key, Key::Short(..)) || atom == *name) {
                        return Some(index);
                    }
                }
                None if self.atoms.len() == MAX_ATOMS => return None,
                None => {
                    let index = u8::try_from(self.atoms.len()).ok()?;
                    *slot = index + 1;
                    self.atoms.push((key, atom.into()));
                    return Some(index);
                }
            }
        }
        None
    }
}

/// What an atom is found by.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Key {
    /// The text of one that is read at once, and its length: there is no other with these.
    Short(u128, usize),
    /// A hash of the text of any other.
    Hash(u64),
}

const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

impl Key {
    #[inline(always)]
    fn slot(self) -> usize {
        let word = match self {
            Self::Short(text, len) => (text as u64) ^ ((text >> 64) as u64).rotate_left(23) ^ len as u64,
            Self::Hash(hash) => hash,
        };
        // The high bits are those that depend on all others.
        (word.wrapping_mul(FACTOR) >> (64 - SLOTS.ilog2())) as usize
    }
}

/// What a cursor reads at once of such an atom, when it could not: close to the end of the input.
fn short_text(text: &[u8]) -> Option<u128> {
    let mut padded = [0; 16];
    padded.get_mut(..text.len())?.copy_from_slice(text);
    text.is_ascii().then_some(u128::from_le_bytes(padded))
}

fn hash(text: &[u8]) -> u64 {
    let (words, rest) = text.as_chunks::<8>();
    let rest = rest
        .iter()
        .fold(text.len() as u64, |all, &byte| all << 8 | u64::from(byte));
    words.iter().fold(rest, |hash, word| {
        (hash ^ u64::from_le_bytes(*word))
            .wrapping_mul(FACTOR)
            .rotate_left(29)
    })
}

/// Nanoseconds that a BEAM takes to decode one token of `len` bytes, as measured on OTP 25, 27 and 29, the slowest; `None`
/// for what may not be in the term.
#[inline(always)]
fn cost(token: &Token<'_>, len: usize) -> Option<usize> {
    /// Binaries of up to this size live on the heap.
    const HEAP_BINARY: usize = 64;
    /// Bytes of a float that is not text.
    const FLOAT: usize = 9;
    Some(match token {
        Token::Int(_) | Token::Atom(_) | Token::Nil | Token::List { .. } | Token::Tuple { .. } => 5,
        Token::Float(_) if len > FLOAT => 80,
        Token::Float(_) => 12,
        Token::BigInt { magnitude, .. } => 20 + magnitude.len(),
        Token::Binary(bytes) if bytes.len() <= HEAP_BINARY => 10,
        Token::Binary(bytes) | Token::BitBinary { bytes, .. } if bytes.len() <= MAX_BYTES => {
            80 + bytes.len() / 8
        }
        Token::ByteList(bytes) if bytes.len() <= MAX_BYTES => 6 + 4 * bytes.len(),
        // Keys are sorted by insertion. With long texts that begin alike, OTP 25 takes half as long again.
        Token::Map { pairs } if *pairs <= FLAT_MAP => 16 + 3 * pairs * pairs,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Texts that a peer chose to fall into the same place of the table.
    #[test]
    fn texts_that_collide_are_not_looked_for_any_longer() {
        let names: Vec<String> = (0..50_000).map(|n| format!("{n:020}")).collect();
        let slot = |name: &String| Key::Hash(hash(name.as_bytes())).slot() % SLOTS;
        let same: Vec<&String> = names
            .iter()
            .filter(|name| slot(name) == slot(&names[0]))
            .collect();
        assert!(same.len() > PROBES);
        let mut indexer = Indexer::new(MIN_LEN).unwrap();
        let mut index = |name: &str| indexer.index(AtomRef::utf8(name), None);
        for (at, name) in same.iter().take(PROBES).enumerate() {
            assert_eq!(index(name), u8::try_from(at).ok());
        }
        assert_eq!(index(same[0]), Some(0));
        assert_eq!(index(same[PROBES]), None);
    }

    #[test]
    fn a_table_that_is_full_takes_no_more() {
        let mut indexer = Indexer::new(MIN_LEN).unwrap();
        for _ in 0..2 {
            for n in 0..MAX_ATOMS {
                let text = n as u128;
                assert_eq!(
                    usize::from(indexer.index(AtomRef::ascii(b"12"), Some(text)).unwrap()),
                    n
                );
            }
        }
        assert_eq!(
            indexer.index(AtomRef::ascii(b"12"), Some(MAX_ATOMS as u128)),
            None
        );
    }
}
