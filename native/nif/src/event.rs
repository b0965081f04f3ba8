//! Events of a decoder as terms.

use std::panic::RefUnwindSafe;

use meshx_frame::{Cause, Event, Kind, Memory, Pool, Status};
use rustler::{Atom, Encoder, Env, NewBinary, Resource, ResourceArc, Term};

use crate::atoms;

/// From this size on a message's bytes are handed over as they are; smaller ones are copied, which is cheaper than
/// a resource and its destructor.
const ZERO_COPY_FROM: usize = 4096;

/// From this size on memory is given back by a thread of its own: 64 MiB take the system some 5 ms, and whoever
/// drops them is a scheduler. build.rs keeps the library mapped while such a thread runs.
const DISCARD_ASIDE_FROM: usize = 4 << 20;

/// The bytes of a large message, owned by the binaries that show them.
pub(crate) struct Message(Vec<u8>);

#[rustler::resource_impl]
impl Resource for Message {}
impl RefUnwindSafe for Message {}

impl Drop for Message {
    fn drop(&mut self) {
        discard(vec![std::mem::take(&mut self.0)]);
    }
}

static POOL: Pool = Pool::new();

/// Where decoders put large messages.
pub(crate) const MEMORY: Memory = Memory {
    reserve: |size| POOL.reserve(size),
    discard,
};

fn discard(messages: Vec<Vec<u8>>) {
    let messages: Vec<Vec<u8>> = messages
        .into_iter()
        .flat_map(|message| POOL.put_back(message))
        .collect();
    if messages.iter().map(Vec::capacity).sum::<usize>() >= DISCARD_ASIDE_FROM {
        // Without a thread to be had, the closure and what it holds are dropped here.
        let _ = std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || drop(messages));
    }
}

pub(crate) fn encode<'a>(env: Env<'a>, event: Event) -> Term<'a> {
    match event {
        Event::Hello(payload) => (atoms::hello(), binary(env, payload)).encode(env),
        Event::HelloAck(payload) => (atoms::hello_ack(), binary(env, payload)).encode(env),
        Event::Auth(proof) => (atoms::auth(), binary(env, proof)).encode(env),
        Event::Ready => atoms::ready().encode(env),
        Event::Refused { cause, text } => {
            (atoms::refused(), cause_term(env, cause), binary(env, text)).encode(env)
        }
        Event::Request {
            stream,
            kind,
            deadline,
            fun,
            term,
            argument,
        } => {
            let kind = match kind {
                Kind::Call => atoms::call(),
                Kind::Cast => atoms::cast(),
            };
            let deadline = match deadline {
                Some(milliseconds) => milliseconds.encode(env),
                None => atoms::infinity().encode(env),
            };
            let (fun, argument) = (binary(env, fun), binary(env, argument));
            (atoms::request(), stream, kind, deadline, fun, term, argument).encode(env)
        }
        Event::Response {
            stream,
            status,
            term,
            result,
        } => {
            let status = match status {
                Status::Result => atoms::result(),
                Status::Error => atoms::error(),
                Status::Started => atoms::started(),
            };
            (atoms::response(), stream, status, term, binary(env, result)).encode(env)
        }
        Event::Cancel { stream } => (atoms::cancel(), stream).encode(env),
        Event::Reset { stream, cause, text } => {
            (atoms::reset(), stream, cause_term(env, cause), binary(env, text)).encode(env)
        }
        Event::StreamError { stream, cause, text } => {
            (atoms::stream_error(), stream, cause_atom(cause), text).encode(env)
        }
        Event::Window { stream, increment } => (atoms::window(), stream, increment).encode(env),
        Event::Pong(bytes) => (atoms::pong(), binary(env, bytes)).encode(env),
        Event::Goaway { last, cause, text } => {
            (atoms::goaway(), last, cause_term(env, cause), binary(env, text)).encode(env)
        }
    }
}

pub(crate) fn copied<'a>(env: Env<'a>, bytes: &[u8]) -> Term<'a> {
    NewBinary::from_slice(env, bytes).into()
}

pub(crate) fn cause_atom(cause: Cause) -> Atom {
    match cause {
        Cause::Protocol => atoms::protocol(),
        Cause::InvalidCks => atoms::invalid_cks(),
        Cause::Full => atoms::full(),
        Cause::TooLarge => atoms::too_large(),
        Cause::Cancelled => atoms::cancelled(),
        Cause::Sequence => atoms::sequence(),
        Cause::UnknownStream => atoms::unknown_stream(),
        Cause::Version => atoms::version(),
        Cause::Auth => atoms::auth(),
        Cause::Settings => atoms::settings(),
        Cause::Timeout => atoms::timeout(),
        Cause::Shutdown => atoms::shutdown(),
        Cause::Internal => atoms::internal(),
        Cause::RefusedTerm => atoms::refused_term(),
        Cause::Unread => atoms::unread(),
    }
}

/// A number that has no name stays a number: no atoms are made from the wire.
fn cause_term<'a>(env: Env<'a>, number: u16) -> Term<'a> {
    match Cause::from_number(number) {
        Some(cause) => cause_atom(cause).encode(env),
        None => number.encode(env),
    }
}

fn binary<'a>(env: Env<'a>, bytes: Vec<u8>) -> Term<'a> {
    if bytes.len() < ZERO_COPY_FROM {
        return copied(env, &bytes);
    }
    ResourceArc::new(Message(bytes))
        .make_binary(env, |message| &message.0)
        .to_term(env)
}
