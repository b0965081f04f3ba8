//! A connection's decoder as a resource.

use std::panic::RefUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use meshx_frame::{Budget, Cause, Checksum, Decoder, Failure, Options, Output, Role, contain, encode};
use rustler::{
    Atom, Binary, Encoder, Env, Error, NifMap, NifResult, NifUnitEnum, Resource, ResourceArc, Term,
};

use crate::{atoms, event};

/// One call looks at so many bytes and frames at most: the tests count them.
///
/// Measured on one busy core of two, OTP 25, release build, median and worst of 100 or more calls: 256 KiB of a 256 MiB
/// message in blocks of 16 KiB with checksums 0.16 and 0.47 ms (mostly the first touch of new pages); 512 requests of
/// 64 bytes, each an event, 0.28 ms.
const MAX_SLICE: usize = 128 * 1024;
const MAX_FRAMES: usize = 512;

struct Connection {
    began: Instant,
    decoder: Mutex<Decoder>,
}

#[rustler::resource_impl]
impl Resource for Connection {}
impl RefUnwindSafe for Connection {}

struct BudgetResource(Arc<Budget>);

#[rustler::resource_impl]
impl Resource for BudgetResource {}
impl RefUnwindSafe for BudgetResource {}

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
    budget: Option<ResourceArc<BudgetResource>>,
}

#[derive(NifMap)]
struct StatsMap {
    frames: u64,
    bytes: u64,
    open: u64,
    reserved: u64,
}

#[rustler::nif]
fn budget(max: u64) -> ResourceArc<BudgetResource> {
    ResourceArc::new(BudgetResource(Arc::new(Budget::new(max))))
}

#[rustler::nif]
fn budget_used(budget: ResourceArc<BudgetResource>) -> u64 {
    budget.0.used()
}

#[rustler::nif]
fn new(options: OptionsMap) -> NifResult<ResourceArc<Connection>> {
    let budget = options.budget;
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
    let mut decoder = Decoder::with_memory(options, event::MEMORY)
        .map_err(|error| Error::Term(Box::new(error.to_string())))?;
    if let Some(budget) = budget {
        decoder.share(Arc::clone(&budget.0));
    }
    Ok(ResourceArc::new(Connection {
        began: Instant::now(),
        decoder: Mutex::new(decoder),
    }))
}

#[rustler::nif]
fn agree(connection: ResourceArc<Connection>, checksum: u8, blk_max_size: u64) -> NifResult<Atom> {
    let checksum = match (checksum, Checksum::from_number(checksum)) {
        (0, _) => None,
        (_, Some(checksum)) => Some(checksum),
        (_, None) => return Err(Error::BadArg),
    };
    let block = usize::try_from(blk_max_size).unwrap_or(usize::MAX);
    with(&connection, |decoder| decoder.agree(checksum, block));
    Ok(atoms::ok())
}

#[rustler::nif]
fn open(connection: ResourceArc<Connection>, first: u32, last: u32) -> Atom {
    with(&connection, |decoder| {
        (first..=last).for_each(|stream| decoder.open(stream));
    });
    atoms::ok()
}

#[rustler::nif]
fn release(connection: ResourceArc<Connection>, streams: Vec<u32>) -> Atom {
    with(&connection, |decoder| {
        streams.into_iter().for_each(|stream| decoder.release(stream));
    });
    atoms::ok()
}

#[rustler::nif]
fn skipped(connection: ResourceArc<Connection>) -> Vec<u32> {
    with(&connection, |decoder| decoder.skipped())
}

#[rustler::nif]
fn stats(connection: ResourceArc<Connection>) -> StatsMap {
    let stats = with(&connection, |decoder| decoder.stats());
    StatsMap {
        frames: stats.frames,
        bytes: stats.bytes,
        open: stats.open as u64,
        reserved: stats.reserved,
    }
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
    let result = contain(|| match connection.decoder.lock() {
        Ok(mut decoder) => decoder.feed_some(before - connection.began, slice, MAX_FRAMES, &mut output),
        Err(_) => Err(Failure {
            cause: Cause::Internal,
            text: "the decoder failed before".to_owned(),
        }),
    });
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

/// Does nothing on a decoder that panicked: its connection was told to end.
fn with<T: Default>(connection: &Connection, work: impl FnOnce(&mut Decoder) -> T) -> T {
    connection
        .decoder
        .lock()
        .map(|mut decoder| work(&mut decoder))
        .unwrap_or_default()
}
