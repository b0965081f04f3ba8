//! NIF: terms to and from meshx-frame and meshx-etf, nothing else.
//!
//! The Elixir side is `MeshxRpc.Codec.Nif`; its module `Native` has the stubs. Every call here returns within about a
//! millisecond whatever a peer sent: work is done in slices, and the Elixir side loops.

mod decoder;
mod event;
mod guard;

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use meshx_frame::Checksum;
use rustler::schedule::consume_timeslice;
use rustler::{Binary, Env, ListIterator, NifResult};

mod atoms {
    rustler::atoms! {
        ok, error, more, aside, indexed, unknown, infinity, call, cast, result, started,
        hello, hello_ack, auth, ready, refused, request, response, cancel, reset, stream_error, window, pong, goaway,
        protocol, invalid_cks, full, too_large, cancelled, sequence, unknown_stream, version, settings, timeout,
        shutdown, internal, refused_term, unread,
        malformed, trailing, too_long, too_deep, too_many_terms, integer_too_long, compressed_not_allowed,
        not_allowed, too_many_atoms, too_many_atom_bytes, too_many_heap_words,
        too_many_map_pairs, too_many_key_bytes, too_many_nodes,
    }
}

/// CRC-32 of a list of binaries, one after the other.
#[rustler::nif]
fn crc32(iovec: ListIterator<'_>) -> NifResult<u32> {
    checksum(Checksum::Crc32, iovec)
}

/// CRC-32C of the same.
#[rustler::nif]
fn crc32c(iovec: ListIterator<'_>) -> NifResult<u32> {
    checksum(Checksum::Crc32c, iovec)
}

fn checksum(checksum: Checksum, iovec: ListIterator<'_>) -> NifResult<u32> {
    let parts = iovec
        .map(|part| part.decode::<Binary<'_>>())
        .collect::<NifResult<Vec<_>>>()?;
    Ok(checksum.of_parts(parts.iter().map(Binary::as_slice)))
}

/// To the VM a call is one reduction, however long it was: this says how much of a millisecond it really took. What is
/// not a whole hundredth is left to a later call on the same scheduler: a small term takes a tenth of one.
pub(crate) fn count_time(env: Env<'_>, began: Instant) {
    let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    LONGEST.fetch_max(took, Ordering::Relaxed);
    let uncounted = UNCOUNTED.get().saturating_add(took);
    UNCOUNTED.set(uncounted % PERCENT);
    match uncounted / PERCENT {
        0 => {}
        percent => {
            consume_timeslice(env, percent.min(100) as i32);
        }
    }
}

/// A hundredth of a time slice of the VM's, in nanoseconds.
const PERCENT: u64 = 10_000;

thread_local! {
    static UNCOUNTED: Cell<u64> = const { Cell::new(0) };
}

static LONGEST: AtomicU64 = AtomicU64::new(0);

/// The longest that a call held its scheduler since this was asked before, in nanoseconds.
#[rustler::nif]
fn longest_slice() -> u64 {
    LONGEST.swap(0, Ordering::Relaxed)
}

rustler::init!("Elixir.MeshxRpc.Codec.Nif.Native");
