//! Maps.

use std::cmp::Ordering;
use std::{slice, vec};

use crate::order::compare_maps;
use crate::term::Term;

/// A map: pairs sorted by key, each key once.
///
/// Sorting gives equality, lookup and the check for keys that occur twice without hashing, and at a cost that a
/// peer can't drive up by nesting maps in keys. The order is that of [`Term`]; the BEAM's own order of pairs is not
/// defined and is not kept.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Map {
    /// A key, its value, the next key...
    parts: Vec<Term>,
}

/// A key occurs twice.
pub(crate) struct Duplicate;

impl Map {
    /// A map without pairs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes pairs in any order, a key, its value, the next key and so on; refuses a key that occurs twice.
    #[inline]
    pub(crate) fn from_parts(mut parts: Vec<Term>) -> Result<Self, Duplicate> {
        let (pairs, _) = parts.as_chunks_mut::<2>();
        let mut twice = false;
        // Keys that are equal end up side by side, and whichever way of sorting brought them there has compared them.
        pairs.sort_unstable_by(|[a, _], [b, _]| {
            let order = compare_keys(a, b);
            twice |= order.is_eq();
            order
        });
        if twice { Err(Duplicate) } else { Ok(Self { parts }) }
    }

    /// The value of `key`. `1` and `1.0` are different keys.
    pub fn get(&self, key: &Term) -> Option<&Term> {
        let index = self.pairs().binary_search_by(|[k, _]| k.cmp(key)).ok()?;
        self.pairs().get(index).map(|[_, value]| value)
    }

    /// The value of an atom key.
    pub fn get_atom(&self, key: &str) -> Option<&Term> {
        // Only numbers sort below atoms.
        let index = self.pairs().binary_search_by(|[k, _]| match k {
            Term::Atom(atom) => atom.as_bytes().cmp(key.as_bytes()),
            Term::Int(_) | Term::BigInt(_) | Term::Float(_) => Ordering::Less,
            _ => Ordering::Greater,
        });
        self.pairs().get(index.ok()?).map(|[_, value]| value)
    }

    /// Sets the value of `key`; returns the one it replaces.
    pub fn insert(&mut self, key: Term, value: Term) -> Option<Term> {
        match self.pairs().binary_search_by(|[k, _]| k.cmp(&key)) {
            Ok(index) => self
                .parts
                .get_mut(2 * index + 1)
                .map(|old| std::mem::replace(old, value)),
            Err(index) => {
                self.parts.splice(2 * index..2 * index, [key, value]);
                None
            }
        }
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.parts.len() / 2
    }

    /// Whether it has no pairs.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Its pairs, sorted by key.
    pub fn pairs(&self) -> &[[Term; 2]] {
        self.parts.as_chunks().0
    }

    /// A key, its value, the next key and so on.
    pub(crate) fn parts(&self) -> &[Term] {
        &self.parts
    }

    /// Keys with their values, sorted by key.
    pub fn iter(&self) -> Pairs<'_> {
        Pairs(self.pairs().iter())
    }
}

/// Keys nearly always are atoms of few characters, which takes no more than two numbers to compare.
#[inline(always)]
fn compare_keys(a: &Term, b: &Term) -> Ordering {
    if let (Term::Atom(a), Term::Atom(b)) = (a, b)
        && let Some(order) = a.compare_short(b)
    {
        return order;
    }
    a.cmp(b)
}

/// By size, then all keys, then all values.
impl Ord for Map {
    fn cmp(&self, other: &Self) -> Ordering {
        compare_maps(self.pairs(), other.pairs())
    }
}

impl PartialOrd for Map {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Of equal keys the last one counts.
impl FromIterator<(Term, Term)> for Map {
    fn from_iter<I: IntoIterator<Item = (Term, Term)>>(pairs: I) -> Self {
        let mut pairs: Vec<_> = pairs.into_iter().collect();
        // A stable sort of the reversed pairs puts the last of equal keys first, which is the one kept.
        pairs.reverse();
        pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
        pairs.dedup_by(|(later, _), (earlier, _)| later == earlier);
        let parts = pairs.into_iter().flat_map(|(key, value)| [key, value]);
        Self {
            parts: parts.collect(),
        }
    }
}

impl IntoIterator for Map {
    type Item = (Term, Term);
    type IntoIter = IntoPairs;

    fn into_iter(self) -> IntoPairs {
        IntoPairs(self.parts.into_iter())
    }
}

impl<'a> IntoIterator for &'a Map {
    type Item = (&'a Term, &'a Term);
    type IntoIter = Pairs<'a>;

    fn into_iter(self) -> Pairs<'a> {
        self.iter()
    }
}

/// Keys with their values, of [`Map::iter`].
#[derive(Debug, Clone)]
pub struct Pairs<'a>(slice::Iter<'a, [Term; 2]>);

impl<'a> Iterator for Pairs<'a> {
    type Item = (&'a Term, &'a Term);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|[key, value]| (key, value))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl ExactSizeIterator for Pairs<'_> {}

/// The owned pairs of a map.
#[derive(Debug, Clone)]
pub struct IntoPairs(vec::IntoIter<Term>);

impl Iterator for IntoPairs {
    type Item = (Term, Term);

    fn next(&mut self) -> Option<(Term, Term)> {
        self.0.next().zip(self.0.next())
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let pairs = self.0.len() / 2;
        (pairs, Some(pairs))
    }
}

impl ExactSizeIterator for IntoPairs {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integer_and_float_keys_are_distinct() {
        let map: Map = [(Term::from(1), Term::from(2)), (Term::from(1.0), Term::from(3))]
            .into_iter()
            .collect();
        assert_eq!(map.len(), 2);
        assert_eq!(map.get(&Term::from(1)), Some(&Term::from(2)));
        assert_eq!(map.get(&Term::from(1.0)), Some(&Term::from(3)));
        assert_eq!(map.get(&Term::atom("1")), None);
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let map: Map = [("a", 1), ("b", 2), ("a", 3)]
            .map(|(k, v)| (Term::atom(k), Term::from(v)))
            .into_iter()
            .collect();
        assert_eq!(map.len(), 2);
        assert_eq!(map.get_atom("a"), Some(&Term::from(3)));
    }

    #[test]
    fn a_key_that_occurs_twice_is_found_wherever_it_is() {
        for len in 2..60usize {
            for (first, second) in [(0, 1), (0, len - 1), (len / 2, len - 1), (len - 2, len - 1)] {
                let key = |index: usize| match (index * 37) % 3 {
                    0 => Term::from(index as i64),
                    1 => Term::atom(format!("key {index}")),
                    _ => Term::binary(format!("a key of more characters {index}")),
                };
                let keys = |index| if index == second { key(first) } else { key(index) };
                let parts = |of: &dyn Fn(usize) -> Term| {
                    (0..len)
                        .flat_map(|index| [of((index * 7919) % len), Term::from(0)])
                        .collect()
                };
                let whole = Map::from_parts(parts(&key));
                // 7919 is prime: unless it divides the length, each key is there once.
                assert!(whole.is_ok_and(|map| map.pairs().is_sorted_by(|[a, _], [b, _]| a < b)));
                assert_eq!(Map::from_parts(parts(&keys)).is_err(), first != second);
            }
        }
    }

    #[test]
    fn insert_replaces_or_adds() {
        let mut map = Map::new();
        assert_eq!(map.insert(Term::from(2), Term::atom("two")), None);
        assert_eq!(map.insert(Term::from(1), Term::atom("one")), None);
        assert_eq!(
            map.insert(Term::from(2), Term::atom("zwei")),
            Some(Term::atom("two"))
        );
        assert_eq!(
            map.pairs(),
            [
                [Term::from(1), Term::atom("one")],
                [Term::from(2), Term::atom("zwei")]
            ]
        );
    }
}
