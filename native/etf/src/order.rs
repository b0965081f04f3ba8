//! Equality, order and hash of terms.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::iter;

use crate::term::Term;

impl Ord for Term {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Int(a), Self::Int(b)) => a.cmp(b),
            (Self::BigInt(a), Self::BigInt(b)) => a.cmp(b),
            // A BigInt lies outside the range of Int, on the side of its sign.
            (Self::BigInt(a), Self::Int(_)) if a.is_negative() => Ordering::Less,
            (Self::BigInt(_), Self::Int(_)) => Ordering::Greater,
            (Self::Int(_), Self::BigInt(_)) => other.cmp(self).reverse(),
            (Self::Float(a), Self::Float(b)) => a.total_cmp(b),
            (Self::Atom(a), Self::Atom(b)) => a.cmp(b),
            (Self::Reference(a), Self::Reference(b)) => a.cmp(b),
            (Self::Fun(a), Self::Fun(b)) => a.cmp(b),
            (Self::Export(a), Self::Export(b)) => a.cmp(b),
            (Self::Port(a), Self::Port(b)) => a.cmp(b),
            (Self::Pid(a), Self::Pid(b)) => a.cmp(b),
            (Self::Tuple(a), Self::Tuple(b)) => a.len().cmp(&b.len()).then_with(|| compare_items(a, b)),
            (Self::Map(a), Self::Map(b)) => a.cmp(b),
            (Self::List(_) | Self::ImproperList(..), Self::List(_) | Self::ImproperList(..)) => {
                compare_lists(self, other)
            }
            (Self::Binary(_) | Self::BitBinary { .. }, Self::Binary(_) | Self::BitBinary { .. }) => {
                bits(self).cmp(&bits(other))
            }
            _ => rank(self).cmp(&rank(other)),
        }
    }
}

// Comparing goes as deep as terms are nested, so what recurses is kept to plain loops: adapters on iterators cost
// several frames per level in a build without optimisation.

/// Element by element, as far as both go.
fn compare_items(a: &[Term], b: &[Term]) -> Ordering {
    for (a, b) in a.iter().zip(b) {
        let order = a.cmp(b);
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

/// By size, then all keys, then all values.
pub(crate) fn compare_maps(a: &[[Term; 2]], b: &[[Term; 2]]) -> Ordering {
    if a.len() != b.len() {
        return a.len().cmp(&b.len());
    }
    for ([a, _], [b, _]) in a.iter().zip(b) {
        let order = a.cmp(b);
        if order.is_ne() {
            return order;
        }
    }
    for ([_, a], [_, b]) in a.iter().zip(b) {
        let order = a.cmp(b);
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

/// Element by element; then `[]` or an improper tail stands against what the other list has there.
fn compare_lists(a: &Term, b: &Term) -> Ordering {
    let (a_items, a_tail) = list_parts(a);
    let (b_items, b_tail) = list_parts(b);
    let common = compare_items(a_items, b_items);
    if common.is_ne() {
        return common;
    }
    match (a_items.len().cmp(&b_items.len()), a_tail, b_tail) {
        (Ordering::Equal, Some(a), Some(b)) => a.cmp(b),
        // `[]` sorts below a non-empty list, and both above all but bit strings.
        (Ordering::Equal, None, Some(tail)) => LIST_RANK.cmp(&rank(tail)),
        (Ordering::Equal, Some(tail), None) => rank(tail).cmp(&LIST_RANK),
        (Ordering::Less, Some(tail), _) => rank(tail).cmp(&LIST_RANK),
        (Ordering::Greater, _, Some(tail)) => LIST_RANK.cmp(&rank(tail)),
        (order, None, None) | (order @ Ordering::Less, None, _) | (order @ Ordering::Greater, _, None) => {
            order
        }
    }
}

fn list_parts(list: &Term) -> (&[Term], Option<&Term>) {
    match list {
        Term::List(items) => (items, None),
        Term::ImproperList(items, tail) => (items, Some(tail)),
        _ => (&[], None),
    }
}

/// The bytes of a binary or a bit string, and how many bits count of the last.
fn bits(term: &Term) -> (&[u8], u8) {
    match term {
        Term::Binary(bytes) => (bytes, 8),
        Term::BitBinary { bytes, bits } => (bytes, *bits),
        _ => (&[], 8),
    }
}

const LIST_RANK: u8 = 10;

/// Erlang's order of types, with integers and floats apart as they are in map keys.
fn rank(term: &Term) -> u8 {
    match term {
        Term::Int(_) | Term::BigInt(_) => 0,
        Term::Float(_) => 1,
        Term::Atom(_) => 2,
        Term::Reference(_) => 3,
        Term::Fun(_) => 4,
        Term::Export(_) => 5,
        Term::Port(_) => 6,
        Term::Pid(_) => 7,
        Term::Tuple(_) => 8,
        Term::Map(_) => 9,
        Term::List(_) | Term::ImproperList(..) => LIST_RANK,
        Term::Binary(_) | Term::BitBinary { .. } => 11,
    }
}

impl PartialOrd for Term {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Term {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Term {}

impl Hash for Term {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u8(rank(self));
        match self {
            Self::Int(value) => value.hash(state),
            Self::BigInt(value) => value.hash(state),
            Self::Float(value) => value.to_bits().hash(state),
            Self::Atom(atom) => atom.hash(state),
            Self::Reference(reference) => reference.hash(state),
            Self::Fun(fun) => fun.hash(state),
            Self::Export(export) => export.hash(state),
            Self::Port(port) => port.hash(state),
            Self::Pid(pid) => pid.hash(state),
            Self::Tuple(items) => items.hash(state),
            Self::Map(map) => map.hash(state),
            Self::List(items) => items.hash(state),
            Self::ImproperList(items, tail) => iter::once(&**tail)
                .chain(items.iter())
                .for_each(|term| term.hash(state)),
            Self::Binary(_) | Self::BitBinary { .. } => bits(self).hash(state),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_as_erlang_sorts_map_keys() {
        // lists:sort/1 of these on OTP 25 gives the same order.
        let sorted = [
            Term::from(i128::MIN),
            Term::from(-1),
            Term::from(2),
            Term::from(u64::MAX),
            Term::from(-0.5),
            Term::from(1.5),
            Term::atom("a"),
            Term::atom("b"),
            Term::tuple([]),
            Term::tuple([Term::from(9)]),
            Term::tuple([Term::from(1), Term::from(1)]),
            Term::map([]),
            Term::map([(Term::from(1), Term::from(2))]),
            Term::list([]),
            Term::list_with_tail(vec![Term::from(1)], Term::from(2)),
            Term::list([Term::from(1)]),
            Term::list_with_tail(vec![Term::from(1), Term::from(2)], Term::from(0)),
            Term::list([Term::from(1), Term::from(2)]),
            Term::list_with_tail(vec![Term::from(1)], Term::binary("x")),
            Term::binary(""),
            Term::BitBinary {
                bytes: [0b1000_0000].into(),
                bits: 1,
            },
            Term::binary([0b1000_0000]),
            Term::binary([0b1000_0001]),
        ];
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!(a.cmp(b), i.cmp(&j), "{a} against {b}");
            }
        }
    }

    #[test]
    fn a_term_takes_32_bytes() {
        // What `Limits` says of memory counts on it.
        assert_eq!(size_of::<Term>(), 32);
    }

    #[test]
    fn zero_and_minus_zero_differ() {
        assert_ne!(Term::from(0.0), Term::from(-0.0));
        assert_ne!(Term::from(1), Term::from(1.0));
    }
}
