//! A connection's decoder as a resource.

use std::panic::{AssertUnwindSafe, RefUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use meshx_frame::{Cause, Decoder, Failure, Options, Output, Role, encode};
use rustler::{Binary, Encoder, Env, Error, NifMap, NifResult, NifUnitEnum, Resource, ResourceArc, Term};

use crate::{atoms, event};

/// One call looks at so many bytes and frames at most.
///
/// Measured on one busy core of two, OTP 25, release build, median and worst of 100 or more calls: 256 KiB of a 256 MiB
/// message in blocks of 16 KiB with checksums 0.16 and 0.47 ms (mostly the first touch of new pages); 512 requests of
/// 64 bytes, each an event, 0.28 ms.
const MAX_SLICE: usize = 256 * 1024;
const MAX_FRAMES: usize = 512;

struct Connection {
    began: Instant,
    decoder: Mutex<Decoder>,
}

#[rustler::resource_impl]
impl Resource for Connection {}
impl RefUnwindSafe for Connection {}

#[derive(NifUnitEnum)]
enum RoleAtom {
    Client,
    Server,
}

#[derive(NifMap)]
struct OptionsMap {
    role: RoleAtom,
    max_message: u64,
    max_bytes: u64,
    max_streams: u64,
    stream_window: u32,
    connection_window: u32,
}

#[derive(NifMap)]
struct StatsMap {
    frames: u64,
    bytes: u64,
    open: u64,
    reserved: u64,
}

#[rustler::nif]
fn new(options: OptionsMap) -> NifResult<ResourceArc<Connection>> {
    let options = Options {
        role: match options.role {
            RoleAtom::Client => Role::Client,
            RoleAtom::Server => Role::Server,
        },
        max_message: options.max_message,
        max_bytes: options.max_bytes,
        max_streams: usize::try_from(options.max_streams).unwrap_or(usize::MAX),
        stream_window: options.stream_window,
        connection_window: options.connection_window,
    };
    let decoder = Decoder::with_discard(options, event::discard)
        .map_err(|error| Error::Term(Box::new(error.to_string())))?;
    Ok(ResourceArc::new(Connection {
        began: Instant::now(),
        decoder: Mutex::new(decoder),
    }))
}

#[rustler::nif]
fn agree(connection: ResourceArc<Connection>, checksum: u8, blk_max_size: u64) -> NifResult<rustler::Atom> {
    let block = usize::try_from(blk_max_size).unwrap_or(usize::MAX);
    lock(&connection)?.agree(checksum == 1, block);
    Ok(atoms::ok())
}

#[rustler::nif]
fn open(connection: ResourceArc<Connection>, stream: u32) -> NifResult<rustler::Atom> {
    lock(&connection)?.open(stream);
    Ok(atoms::ok())
}

#[rustler::nif]
fn release(connection: ResourceArc<Connection>, stream: u32) -> NifResult<rustler::Atom> {
    lock(&connection)?.release(stream);
    Ok(atoms::ok())
}

#[rustler::nif]
fn stats(connection: ResourceArc<Connection>) -> NifResult<StatsMap> {
    let stats = lock(&connection)?.stats();
    Ok(StatsMap {
        frames: stats.frames,
        bytes: stats.bytes,
        open: stats.open as u64,
        reserved: stats.reserved,
    })
}

/// Takes a slice of a read, from `offset` on: `{ok, NextOffset, Events, Bytes}` or
/// `{error, Events, Bytes, Cause, Text}`.
#[rustler::nif]
fn feed<'a>(
    env: Env<'a>,
    connection: ResourceArc<Connection>,
    bytes: Binary<'a>,
    offset: usize,
) -> NifResult<Term<'a>> {
    let rest = bytes.as_slice().get(offset..).ok_or(Error::BadArg)?;
    let slice = &rest[..rest.len().min(MAX_SLICE)];
    let mut output = Output::default();
    let before = Instant::now();
    // The decoder has no panic that a peer can reach. If it has, the connection ends and the VM doesn't notice: the
    // lock stays poisoned, so that nobody goes on with half a state.
    let result = catch_unwind(AssertUnwindSafe(|| {
        let Ok(mut decoder) = connection.decoder.lock() else {
            return Err(internal());
        };
        decoder.feed_some(connection.began.elapsed(), slice, MAX_FRAMES, &mut output)
    }))
    .unwrap_or_else(|_| Err(internal()));
    if let Err(Failure {
        cause: Cause::Internal,
        text,
    }) = &result
    {
        encode::goaway(&mut output.bytes, 0, Cause::Internal, text);
    }
    let events: Vec<Term<'a>> = output
        .events
        .into_iter()
        .map(|event| event::encode(env, event))
        .collect();
    let out = event::copied(env, &output.bytes);
    crate::count_time(env, before);
    Ok(match result {
        Ok(used) => (atoms::ok(), offset + used, events, out).encode(env),
        Err(failure) => (
            atoms::error(),
            events,
            out,
            event::cause_atom(failure.cause),
            failure.text,
        )
            .encode(env),
    })
}

fn internal() -> Failure {
    Failure {
        cause: Cause::Internal,
        text: "the decoder failed, please report it".to_owned(),
    }
}

fn lock(connection: &Connection) -> NifResult<MutexGuard<'_, Decoder>> {
    connection
        .decoder
        .lock()
        .map_err(|_| Error::Term(Box::new(internal().text)))
}
