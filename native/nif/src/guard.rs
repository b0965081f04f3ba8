//! The term guard in slices.

use std::panic::{AssertUnwindSafe, RefUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::Instant;

use meshx_etf::guard::{Guard, GuardError, GuardPolicy, Step};
use meshx_etf::{DecodeError, Indexed};
use rustler::{Atom, Binary, Encoder, Env, Error, NewBinary, NifMap, NifResult, Resource, ResourceArc, Term};

use crate::atoms;

/// Bytes of a term that one call looks at, contents of binaries not counted. The worst are terms of one byte: 16 ns
/// each, so 0.5 ms a call; 10,000 small maps take 7 ns a byte.
const SLICE: usize = 32 * 1024;

/// What a term may be that is decoded on a normal scheduler: work of the guard (2,048 tokens or more), and bytes. The
/// dearest terms are atoms and pairs of maps, 0.3 us each; keys are hashed at 1 ns a byte: so 0.6 ms and 0.13 ms.
const AT_ONCE: usize = 16 * 1024;
const AT_ONCE_BYTES: usize = 128 * 1024;

/// The tag of a compressed term.
const COMPRESSED: u8 = 80;

struct GuardResource(Mutex<Guard>);

#[rustler::resource_impl]
impl Resource for GuardResource {}
impl RefUnwindSafe for GuardResource {}

#[derive(NifMap)]
struct PolicyMap {
    max_bytes: usize,
    max_depth: u32,
    max_terms: usize,
    max_atoms: usize,
    max_atom_bytes: usize,
    max_integer_bytes: usize,
    max_map_pairs: usize,
    max_key_bytes: usize,
    max_nodes: usize,
    max_heap_words: usize,
    allow_funs: bool,
    allow_exports: bool,
    allow_pids: bool,
    allow_ports: bool,
    allow_references: bool,
}

/// A policy that is read once for many terms.
struct PolicyResource(GuardPolicy);

#[rustler::resource_impl]
impl Resource for PolicyResource {}
impl RefUnwindSafe for PolicyResource {}

#[rustler::nif]
fn guard_policy(policy: PolicyMap) -> ResourceArc<PolicyResource> {
    ResourceArc::new(PolicyResource(GuardPolicy {
        max_bytes: policy.max_bytes,
        max_depth: policy.max_depth,
        max_terms: policy.max_terms,
        max_atoms: policy.max_atoms,
        max_atom_bytes: policy.max_atom_bytes,
        max_integer_bytes: policy.max_integer_bytes,
        max_map_pairs: policy.max_map_pairs,
        max_key_bytes: policy.max_key_bytes,
        max_nodes: policy.max_nodes,
        max_heap_words: policy.max_heap_words,
        allow_funs: policy.allow_funs,
        allow_exports: policy.allow_exports,
        allow_pids: policy.allow_pids,
        allow_ports: policy.allow_ports,
        allow_references: policy.allow_references,
    }))
}

/// The first slice, and for most terms the only one: `ok`, `{error, {Name, Text}}`, or `{more, Guard}`.
#[rustler::nif]
fn guard<'a>(env: Env<'a>, policy: ResourceArc<PolicyResource>, bytes: Binary<'a>) -> Term<'a> {
    first(env, Guard::new(policy.0), &bytes, || atoms::ok().encode(env))
}

/// The same, and most terms are decoded: `{ok, Term}`, or `unknown` for an atom that this VM does not have. Those that are
/// `more`, and those for which it is `aside`, take long to decode: [`binary_to_term`] is for them. With `Index` it may also
/// be `{indexed, Names, Bytes}`: the term is allowed, and these are its atoms and its other form.
///
/// The VM's own `binary_to_term` yields where reductions end, and until August 2026 could damage its caller's heap by that:
/// who decodes many terms one after the other, however small, and keeps them, could end the VM (erlang/otp issue 11404).
#[rustler::nif]
fn decode<'a>(env: Env<'a>, policy: ResourceArc<PolicyResource>, bytes: Binary<'a>, index: bool) -> Term<'a> {
    let guard = match index {
        true => Guard::indexing(policy.0),
        false => Guard::new(policy.0),
    };
    first(env, guard, &bytes, || match bytes.len() {
        ..=AT_ONCE_BYTES => match env.binary_to_term(&bytes) {
            Some((term, _length)) => (atoms::ok(), term).encode(env),
            None => atoms::unknown().encode(env),
        },
        _ => atoms::aside().encode(env),
    })
}

/// `passed` is for a term that was wholly looked at.
fn first<'a>(env: Env<'a>, guard: Guard, bytes: &[u8], passed: impl FnOnce() -> Term<'a>) -> Term<'a> {
    let before = Instant::now();
    let step = catch_unwind(AssertUnwindSafe(|| {
        let mut guard = guard;
        let step = step(&mut guard, bytes, AT_ONCE);
        (guard, step)
    }));
    let answer = match step {
        Ok((guard, Ok((Step::More, _)))) => {
            let guard = ResourceArc::new(GuardResource(Mutex::new(guard)));
            (atoms::more(), guard).encode(env)
        }
        Ok((_, Ok((Step::Done(_), Some(indexed))))) => encode(env, &indexed),
        Ok((_, Ok(_))) => passed(),
        Ok((_, Err(error))) => (atoms::error(), (name(&error), error.to_string())).encode(env),
        Err(_) => failed(env),
    };
    crate::count_time(env, before);
    answer
}

/// Goes on for one slice: `more`, `ok`, `{indexed, Names, Bytes}` or `{error, {Name, Text}}`.
#[rustler::nif]
fn guard_step<'a>(env: Env<'a>, guard: ResourceArc<GuardResource>, bytes: Binary<'a>) -> Term<'a> {
    let before = Instant::now();
    let step = catch_unwind(AssertUnwindSafe(|| {
        let mut guard = guard.0.lock().ok()?;
        Some(step(&mut guard, &bytes, SLICE))
    }));
    let answer = match step {
        Ok(Some(Ok((Step::More, _)))) => atoms::more().encode(env),
        Ok(Some(Ok((Step::Done(_), Some(indexed))))) => encode(env, &indexed),
        Ok(Some(Ok((Step::Done(_), None)))) => atoms::ok().encode(env),
        Ok(Some(Err(error))) => (atoms::error(), (name(&error), error.to_string())).encode(env),
        Ok(None) | Err(_) => failed(env),
    };
    crate::count_time(env, before);
    answer
}

fn step(guard: &mut Guard, bytes: &[u8], work: usize) -> Result<(Step, Option<Indexed>), GuardError> {
    let step = guard.step(bytes, work)?;
    Ok((step, guard.indexed(bytes)))
}

fn encode<'a>(env: Env<'a>, indexed: &Indexed) -> Term<'a> {
    let binary = |bytes: &[u8]| {
        let mut binary = NewBinary::new(env, bytes.len());
        binary.as_mut_slice().copy_from_slice(bytes);
        Term::from(binary)
    };
    let names: Vec<_> = indexed
        .atoms
        .iter()
        .map(|atom| binary(atom.as_str().as_bytes()))
        .collect();
    (atoms::indexed(), names, binary(&indexed.bytes)).encode(env)
}

/// `binary_to_term(Bytes, [safe])` on a dirty scheduler, for what the guard has let pass. A bad argument: an atom that
/// this VM does not have.
#[rustler::nif(schedule = "DirtyCpu")]
fn binary_to_term<'a>(env: Env<'a>, bytes: Binary<'a>) -> NifResult<Term<'a>> {
    match env.binary_to_term(bytes.as_slice()) {
        Some((term, _length)) => Ok(term),
        None => Err(Error::BadArg),
    }
}

fn failed(env: Env<'_>) -> Term<'_> {
    let text = "the guard failed, please report it";
    (atoms::error(), (atoms::internal(), text)).encode(env)
}

fn name(error: &GuardError) -> Atom {
    match error {
        GuardError::NotAllowed { .. } => atoms::not_allowed(),
        GuardError::TooManyAtoms { .. } => atoms::too_many_atoms(),
        GuardError::TooManyAtomBytes { .. } => atoms::too_many_atom_bytes(),
        GuardError::TooManyMapPairs { .. } => atoms::too_many_map_pairs(),
        GuardError::TooManyKeyBytes { .. } => atoms::too_many_key_bytes(),
        GuardError::TooManyNodes { .. } => atoms::too_many_nodes(),
        GuardError::TooManyHeapWords { .. } => atoms::too_many_heap_words(),
        GuardError::Decode(error) => match error {
            DecodeError::Version { .. } => atoms::version(),
            DecodeError::Trailing { .. } => atoms::trailing(),
            DecodeError::TooDeep { .. } => atoms::too_deep(),
            DecodeError::TooManyTerms { .. } => atoms::too_many_terms(),
            DecodeError::TooLong { .. } => atoms::too_long(),
            DecodeError::IntegerTooLong { .. } => atoms::integer_too_long(),
            DecodeError::Refused { tag: COMPRESSED, .. } => atoms::compressed_not_allowed(),
            _ => atoms::malformed(),
        },
        _ => atoms::internal(),
    }
}
