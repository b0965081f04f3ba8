//! Conversion to and from the terms of the `eetf` crate (feature `eetf`).
//!
//! `Term::try_from(&eetf_term)` and `eetf::Term::try_from(&term)`. Terms are converted part by part and never
//! through `eetf`'s encoder, which writes some lists wrongly.

use thiserror::Error;

use crate::atom::Atom;
use crate::decode::decode_bare;
use crate::encode::encode_bare;
use crate::ids::{Export, Fun, Pid, Port, Reference};
use crate::limits::{DEPTH_CEILING, Limits};
use crate::map::Map;
use crate::term::Term;

/// What a fun has before its parts. size: 4, arity: 1, uniq: 16, index: 4, num_free: 4.
const FUN_HEAD: usize = 29;

/// Why a term has no counterpart on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// Nested deeper than [`DEPTH_CEILING`].
    #[error("terms are nested deeper than {limit}")]
    TooDeep {
        /// The limit.
        limit: u32,
    },
    /// A float that is infinite or not a number.
    #[error("a float must be finite to be a term")]
    Float,
    /// A map in which two keys are the same term in two forms, such as a `FixInteger` and a `BigInteger`.
    #[error("a map has a key twice, in two forms")]
    DuplicateKey,
    /// A bit string with a count of bits that does not fit its bytes.
    #[error("a bit string of {len} bytes has {bits} bits in its last byte, 1 to 8 wanted")]
    BitCount {
        /// Its bytes.
        len: usize,
        /// Bits of the last byte.
        bits: u8,
    },
    /// A fun in the form that OTP dropped with release 23, or one that can't be taken apart or put together.
    #[error("a fun that has no counterpart")]
    Fun,
    /// An integer that can't be taken over.
    #[error("an integer that has no counterpart")]
    Integer,
}

impl TryFrom<&eetf::Term> for Term {
    type Error = ConvertError;

    fn try_from(term: &eetf::Term) -> Result<Self, ConvertError> {
        from_eetf(term, 0)
    }
}

impl TryFrom<&Term> for eetf::Term {
    type Error = ConvertError;

    fn try_from(term: &Term) -> Result<Self, ConvertError> {
        to_eetf(term, 0)
    }
}

/// Both directions recurse, so both stop at the ceiling.
fn deeper(depth: u32) -> Result<u32, ConvertError> {
    if depth >= DEPTH_CEILING {
        Err(ConvertError::TooDeep { limit: DEPTH_CEILING })
    } else {
        Ok(depth + 1)
    }
}

/// Kept apart from [`leaf_from`] so that a level of nesting costs little stack.
fn from_eetf(term: &eetf::Term, depth: u32) -> Result<Term, ConvertError> {
    match term {
        eetf::Term::List(list) => all_from(&list.elements, depth).map(Term::List),
        eetf::Term::Tuple(tuple) => all_from(&tuple.elements, depth).map(Term::Tuple),
        eetf::Term::ImproperList(list) => {
            let tail = from_eetf(&list.last, deeper(depth)?)?;
            Ok(Term::list_with_tail(all_from(&list.elements, depth)?, tail))
        }
        eetf::Term::Map(map) => map_from(map, depth),
        eetf::Term::InternalFun(fun) => fun_from(fun, depth),
        leaf => leaf_from(leaf),
    }
}

fn all_from(items: &[eetf::Term], depth: u32) -> Result<Vec<Term>, ConvertError> {
    let mut all = Vec::with_capacity(items.len());
    for item in items {
        all.push(from_eetf(item, deeper(depth)?)?);
    }
    Ok(all)
}

fn map_from(map: &eetf::Map, depth: u32) -> Result<Term, ConvertError> {
    let mut parts = Vec::with_capacity(2 * map.map.len());
    for (key, value) in &map.map {
        let depth = deeper(depth)?;
        parts.extend([from_eetf(key, depth)?, from_eetf(value, depth)?]);
    }
    Map::from_parts(parts)
        .map(Term::Map)
        .map_err(|_| ConvertError::DuplicateKey)
}

fn leaf_from(term: &eetf::Term) -> Result<Term, ConvertError> {
    Ok(match term {
        eetf::Term::Atom(atom) => Term::Atom(atom_from(atom)),
        eetf::Term::FixInteger(int) => Term::from(int.value),
        eetf::Term::BigInteger(int) => {
            // Compared this way because num-bigint, which has the type for a sign, is not our dependency.
            let negative = int.value < eetf::BigInteger::from(0).value;
            Term::integer_from_le_bytes(negative, &int.value.to_bytes_le().1)
        }
        eetf::Term::Float(float) if !float.value.is_finite() => return Err(ConvertError::Float),
        eetf::Term::Float(float) => Term::from(float.value),
        eetf::Term::Pid(pid) => Term::from(pid_from(pid)),
        eetf::Term::Port(port) => Term::from(Port {
            node: atom_from(&port.node),
            id: port.id,
            creation: port.creation,
        }),
        eetf::Term::Reference(reference) => Term::from(Reference {
            node: atom_from(&reference.node),
            creation: reference.creation,
            ids: reference.id.clone(),
        }),
        eetf::Term::ExternalFun(fun) => Term::from(Export {
            module: atom_from(&fun.module),
            function: atom_from(&fun.function),
            arity: fun.arity,
        }),
        eetf::Term::Binary(binary) => Term::binary(binary.bytes.as_slice()),
        eetf::Term::BitBinary(bit_binary) => {
            let (mut bytes, bits) = (bit_binary.bytes.clone(), bit_binary.tail_bits_size);
            // There the bits of the last byte are its low ones.
            if let (Some(last), 1..=7) = (bytes.last_mut(), bits) {
                *last <<= 8 - bits;
            }
            let len = bytes.len();
            Term::bit_string(bytes, bits).ok_or(ConvertError::BitCount { len, bits })?
        }
        eetf::Term::ByteList(list) => Term::list(list.bytes.iter().map(|&byte| Term::from(byte))),
        // The containers, which `from_eetf` has taken.
        eetf::Term::List(_)
        | eetf::Term::Tuple(_)
        | eetf::Term::ImproperList(_)
        | eetf::Term::Map(_)
        | eetf::Term::InternalFun(_) => return from_eetf(term, 0),
    })
}

/// Kept apart from [`leaf_to`] so that a level of nesting costs little stack.
fn to_eetf(term: &Term, depth: u32) -> Result<eetf::Term, ConvertError> {
    match term {
        Term::List(items) => all_to(items, depth).map(|elements| eetf::List { elements }.into()),
        Term::Tuple(items) => all_to(items, depth).map(|elements| eetf::Tuple { elements }.into()),
        Term::ImproperList(items, tail) => improper_to(items, tail, depth),
        Term::Map(map) => map_to(map, depth),
        Term::Fun(fun) => fun_to(fun, depth),
        leaf => leaf_to(leaf),
    }
}

fn all_to(items: &[Term], depth: u32) -> Result<Vec<eetf::Term>, ConvertError> {
    let mut all = Vec::with_capacity(items.len());
    for item in items {
        all.push(to_eetf(item, deeper(depth)?)?);
    }
    Ok(all)
}

fn improper_to(items: &[Term], tail: &Term, depth: u32) -> Result<eetf::Term, ConvertError> {
    let last = Box::new(to_eetf(tail, deeper(depth)?)?);
    let elements = all_to(items, depth)?;
    Ok(eetf::ImproperList { elements, last }.into())
}

fn map_to(map: &Map, depth: u32) -> Result<eetf::Term, ConvertError> {
    let mut pairs = Vec::with_capacity(map.len());
    for (key, value) in map {
        let depth = deeper(depth)?;
        pairs.push((to_eetf(key, depth)?, to_eetf(value, depth)?));
    }
    Ok(eetf::Map {
        map: pairs.into_iter().collect(),
    }
    .into())
}

fn leaf_to(term: &Term) -> Result<eetf::Term, ConvertError> {
    Ok(match term {
        Term::Int(value) => match i32::try_from(*value) {
            Ok(value) => eetf::FixInteger { value }.into(),
            Err(_) => eetf::BigInteger::from(*value).into(),
        },
        Term::BigInt(_) => big_to(term)?,
        Term::Float(value) => eetf::Float::try_from(*value)
            .map_err(|_| ConvertError::Float)?
            .into(),
        Term::Atom(atom) => atom_to(atom).into(),
        Term::Binary(bytes) => eetf::Binary {
            bytes: bytes.to_vec(),
        }
        .into(),
        Term::BitBinary { bytes, bits } => {
            let mut bytes = bytes.to_vec();
            match (bytes.last_mut(), *bits) {
                (Some(last), 1..=7) => *last >>= 8 - bits,
                _ => {
                    return Err(ConvertError::BitCount {
                        len: bytes.len(),
                        bits: *bits,
                    });
                }
            }
            eetf::BitBinary {
                bytes,
                tail_bits_size: *bits,
            }
            .into()
        }
        Term::Pid(pid) => pid_to(pid).into(),
        Term::Port(port) => eetf::Port {
            node: atom_to(&port.node),
            id: port.id,
            creation: port.creation,
        }
        .into(),
        Term::Reference(reference) => eetf::Reference {
            node: atom_to(&reference.node),
            id: reference.ids.clone(),
            creation: reference.creation,
        }
        .into(),
        Term::Export(export) => eetf::ExternalFun {
            module: atom_to(&export.module),
            function: atom_to(&export.function),
            arity: export.arity,
        }
        .into(),
        // The containers, which `to_eetf` has taken.
        Term::List(_) | Term::ImproperList(..) | Term::Tuple(_) | Term::Map(_) | Term::Fun(_) => {
            return to_eetf(term, 0);
        }
    })
}

fn atom_from(atom: &eetf::Atom) -> Atom {
    Atom::new(atom.name.as_str())
}

fn atom_to(atom: &Atom) -> eetf::Atom {
    eetf::Atom {
        name: atom.as_str().to_owned(),
    }
}

fn pid_from(pid: &eetf::Pid) -> Pid {
    Pid {
        node: atom_from(&pid.node),
        id: pid.id,
        serial: pid.serial,
        creation: pid.creation,
    }
}

fn pid_to(pid: &Pid) -> eetf::Pid {
    eetf::Pid {
        node: atom_to(&pid.node),
        id: pid.id,
        serial: pid.serial,
        creation: pid.creation,
    }
}

/// Their integer type is made by their own decoder, which is sound for this one term.
fn big_to(term: &Term) -> Result<eetf::Term, ConvertError> {
    let mut bytes = Vec::new();
    crate::encode::encode(term, &mut bytes).map_err(|_| ConvertError::Integer)?;
    eetf::Term::decode(bytes.as_slice()).map_err(|_| ConvertError::Integer)
}

fn fun_from(fun: &eetf::InternalFun, depth: u32) -> Result<Term, ConvertError> {
    deeper(depth)?;
    match fun {
        eetf::InternalFun::New { free_vars, .. } => fun_together(fun, &all_from(free_vars, depth)?),
        _ => Err(ConvertError::Fun),
    }
}

/// Kept apart from [`fun_from`], in every build, so that a level of nesting costs little stack.
#[inline(never)]
fn fun_together(fun: &eetf::InternalFun, captured: &[Term]) -> Result<Term, ConvertError> {
    let eetf::InternalFun::New {
        module,
        arity,
        pid,
        index,
        uniq,
        old_index,
        old_uniq,
        ..
    } = fun
    else {
        return Err(ConvertError::Fun);
    };
    let num_free = u32::try_from(captured.len()).map_err(|_| ConvertError::Fun)?;
    let mut body = vec![0; 4];
    body.push(*arity);
    body.extend_from_slice(uniq);
    body.extend_from_slice(&index.to_be_bytes());
    body.extend_from_slice(&num_free.to_be_bytes());
    let head = [
        Term::atom(module.name.as_str()),
        Term::from(*old_index),
        Term::from(*old_uniq),
        Term::from(pid_from(pid)),
    ];
    for part in head.iter().chain(captured) {
        encode_bare(part, &mut body).map_err(|_| ConvertError::Fun)?;
    }
    let size = u32::try_from(body.len()).map_err(|_| ConvertError::Fun)?;
    body.splice(..4, size.to_be_bytes());
    Ok(Term::Fun(Fun::from_checked(&body)))
}

fn fun_to(fun: &Fun, depth: u32) -> Result<eetf::Term, ConvertError> {
    deeper(depth)?;
    let parts = fun_parts(fun)?;
    let captured = all_to(parts.get(4..).unwrap_or_default(), depth)?;
    fun_apart(fun, &parts, captured)
}

/// The terms in a fun: module, old index, old uniq, pid, then what it captured. Kept apart as [`fun_together`] is.
#[inline(never)]
fn fun_parts(fun: &Fun) -> Result<Vec<Term>, ConvertError> {
    let parts = fun.body().get(FUN_HEAD..).ok_or(ConvertError::Fun)?;
    let mut pos = 0;
    let mut terms = Vec::new();
    while pos < parts.len() {
        // Checked against the decoder's limits when the fun came in.
        let limits = Limits {
            max_depth: DEPTH_CEILING,
            max_integer_bytes: usize::MAX,
            ..Limits::default()
        };
        let (term, end) = decode_bare(parts, pos, &limits).map_err(|_| ConvertError::Fun)?;
        terms.push(term);
        pos = end;
    }
    Ok(terms)
}

#[inline(never)]
fn fun_apart(fun: &Fun, parts: &[Term], free_vars: Vec<eetf::Term>) -> Result<eetf::Term, ConvertError> {
    let Some(&[_, _, _, _, arity, ref rest @ ..]) = fun.body().first_chunk::<FUN_HEAD>() else {
        return Err(ConvertError::Fun);
    };
    let (uniq, numbers) = rest.split_first_chunk::<16>().ok_or(ConvertError::Fun)?;
    let index = numbers
        .first_chunk::<4>()
        .map(|bytes| u32::from_be_bytes(*bytes))
        .ok_or(ConvertError::Fun)?;
    let [
        Term::Atom(module),
        Term::Int(old_index),
        Term::Int(old_uniq),
        Term::Pid(pid),
        ..,
    ] = parts
    else {
        return Err(ConvertError::Fun);
    };
    let narrow = |value: i64| i32::try_from(value).map_err(|_| ConvertError::Fun);
    Ok(eetf::InternalFun::New {
        module: atom_to(module),
        arity,
        pid: pid_to(pid),
        free_vars,
        index,
        uniq: *uniq,
        old_index: narrow(*old_index)?,
        old_uniq: narrow(*old_uniq)?,
    }
    .into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn there_and_back(term: &Term) {
        let theirs = eetf::Term::try_from(term).unwrap();
        assert_eq!(Term::try_from(&theirs).as_ref(), Ok(term));
    }

    #[test]
    fn every_kind_there_and_back() {
        let pid = Pid {
            node: "a@b".into(),
            id: 7,
            serial: 1,
            creation: 9,
        };
        let fun = eetf::InternalFun::New {
            module: eetf::Atom::from("m"),
            arity: 2,
            pid: pid_to(&pid),
            free_vars: vec![
                eetf::Binary::from(vec![7]).into(),
                eetf::FixInteger::from(-1).into(),
            ],
            index: 3,
            uniq: [5; 16],
            old_index: 1,
            old_uniq: -2,
        };
        let terms = [
            Term::from(i64::MIN),
            Term::from(i128::MIN),
            Term::from(u64::MAX),
            Term::from(-1.5),
            Term::atom("é"),
            Term::binary([1, 2]),
            Term::bit_string([1, 0xA0], 3).unwrap(),
            Term::list([Term::from(-1), Term::from(2), Term::from(3)]),
            Term::charlist("abc"),
            Term::list([]),
            Term::list_with_tail(vec![Term::from(1)], Term::from(2)),
            Term::tuple([Term::from(1)]),
            Term::map([(Term::from(1), Term::from(2)), (Term::from(1.0), Term::from(3))]),
            Term::from(pid.clone()),
            Term::from(Port {
                node: "a@b".into(),
                id: 1 << 40,
                creation: 2,
            }),
            Term::from(Reference {
                node: "a@b".into(),
                creation: 3,
                ids: vec![1, 2, 3],
            }),
            Term::from(Export {
                module: "m".into(),
                function: "f".into(),
                arity: 1,
            }),
            Term::try_from(&eetf::Term::from(fun.clone())).unwrap(),
        ];
        terms.iter().for_each(there_and_back);
        there_and_back(&Term::tuple(terms));
        let ours = Term::try_from(&eetf::Term::from(fun.clone())).unwrap();
        assert_eq!(eetf::Term::try_from(&ours), Ok(eetf::Term::from(fun)));
    }

    #[test]
    fn what_has_no_counterpart_is_refused() {
        let mut deep = Term::from(1);
        for _ in 0..DEPTH_CEILING + 1 {
            deep = Term::tuple([deep]);
        }
        assert_eq!(
            eetf::Term::try_from(&deep),
            Err(ConvertError::TooDeep { limit: DEPTH_CEILING })
        );
        assert_eq!(
            eetf::Term::try_from(&Term::from(f64::NAN)),
            Err(ConvertError::Float)
        );
        let one = |value: eetf::Term| (value, eetf::Atom::from("x").into());
        let twice = eetf::Map::from([
            one(eetf::FixInteger::from(1).into()),
            one(eetf::BigInteger::from(1).into()),
        ]);
        assert_eq!(
            Term::try_from(&eetf::Term::from(twice)),
            Err(ConvertError::DuplicateKey)
        );
        let bits = eetf::BitBinary {
            bytes: vec![1],
            tail_bits_size: 9,
        };
        assert_eq!(
            Term::try_from(&eetf::Term::from(bits)),
            Err(ConvertError::BitCount { len: 1, bits: 9 })
        );
    }
}
