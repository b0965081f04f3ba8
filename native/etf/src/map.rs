//! Maps.

use std::cmp::Ordering;

use crate::term::Term;

/// A map: pairs sorted by key, each key once.
///
/// Sorting gives equality, lookup and the check for keys that occur twice without hashing, and at a cost that a
/// peer can't drive up by nesting maps in keys. The order is that of [`Term`]; the BEAM's own order of pairs is not
/// defined and is not kept.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Map {
    pairs: Vec<(Term, Term)>,
}

/// A key occurs twice.
pub(crate) struct Duplicate;

impl Map {
    /// A map without pairs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes pairs in any order; refuses a key that occurs twice.
    pub(crate) fn from_pairs(mut pairs: Vec<(Term, Term)>) -> Result<Self, Duplicate> {
        // What a BEAM sends is often sorted already.
        if pairs.is_sorted_by(|(a, _), (b, _)| a < b) {
            return Ok(Self { pairs });
        }
        pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
        if pairs
            .windows(2)
            .any(|pair| matches!(pair, [(a, _), (b, _)] if a == b))
        {
            return Err(Duplicate);
        }
        Ok(Self { pairs })
    }

    /// The value of `key`. `1` and `1.0` are different keys.
    pub fn get(&self, key: &Term) -> Option<&Term> {
        let index = self.pairs.binary_search_by(|(k, _)| k.cmp(key)).ok()?;
        self.pairs.get(index).map(|(_, value)| value)
    }

    /// The value of an atom key.
    pub fn get_atom(&self, key: &str) -> Option<&Term> {
        // Only numbers sort below atoms.
        let index = self.pairs.binary_search_by(|(k, _)| match k {
            Term::Atom(atom) => atom.as_bytes().cmp(key.as_bytes()),
            Term::Int(_) | Term::BigInt(_) | Term::Float(_) => Ordering::Less,
            _ => Ordering::Greater,
        });
        self.pairs.get(index.ok()?).map(|(_, value)| value)
    }

    /// Sets the value of `key`; returns the one it replaces.
    pub fn insert(&mut self, key: Term, value: Term) -> Option<Term> {
        match self.pairs.binary_search_by(|(k, _)| k.cmp(&key)) {
            Ok(index) => self
                .pairs
                .get_mut(index)
                .map(|(_, old)| std::mem::replace(old, value)),
            Err(index) => {
                self.pairs.insert(index, (key, value));
                None
            }
        }
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether it has no pairs.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Its pairs, sorted by key.
    pub fn pairs(&self) -> &[(Term, Term)] {
        &self.pairs
    }

    /// Its pairs, sorted by key.
    pub fn iter(&self) -> std::slice::Iter<'_, (Term, Term)> {
        self.pairs.iter()
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
        Self { pairs }
    }
}

impl IntoIterator for Map {
    type Item = (Term, Term);
    type IntoIter = std::vec::IntoIter<(Term, Term)>;

    fn into_iter(self) -> Self::IntoIter {
        self.pairs.into_iter()
    }
}

impl<'a> IntoIterator for &'a Map {
    type Item = &'a (Term, Term);
    type IntoIter = std::slice::Iter<'a, (Term, Term)>;

    fn into_iter(self) -> Self::IntoIter {
        self.pairs.iter()
    }
}

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
                (Term::from(1), Term::atom("one")),
                (Term::from(2), Term::atom("zwei"))
            ]
        );
    }
}
