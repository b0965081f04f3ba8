//! Between frames and control messages, as the flags of a link want it.

use std::cell::RefCell;
use std::sync::Arc;

use meshx_dist::control::{Control, Proc, Target};
use meshx_dist::flags::DistFlags;
use meshx_dist::link::{LinkError, LinkLimits, Prepared, Receiver, SendError as LinkSendError, Sender};
use meshx_etf::{Pid, Reference, Term};

use super::address::Address;
use super::buffers::Buffers;
use super::connection::Connection;
use super::error::SendError;
use super::event::DownReason;
use super::limits::Limits;
use super::outbound::Origin;
use super::payload::Payload;

/// Largest buffer that a thread keeps for the next message it encodes, in bytes.
const RETAINED_CAPACITY: usize = 256 * 1024;

/// A control message, and the term that belongs to it.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) control: Control,
    pub(crate) payload: Option<Payload>,
}

/// Makes messages of a connection's frames.
pub(crate) struct Assembler {
    receiver: Receiver,
    terms: meshx_etf::Limits,
}

impl Assembler {
    pub(crate) fn new(flags: DistFlags, limits: &Limits) -> Self {
        let limit = LinkLimits {
            max_message: limits.message_bytes,
            max_sequences: limits.fragmented_messages,
            max_reassembly: limits.reassembly_bytes,
            control: limits.terms,
        };
        Self {
            receiver: Receiver::new(flags, limit),
            terms: limits.terms,
        }
    }

    /// Takes one frame; `None` while a message is not complete. `buffer` is what the frame may stay in.
    pub(crate) fn take(
        &mut self,
        frame: &[u8],
        buffer: Option<&Arc<Vec<u8>>>,
        buffers: &Buffers,
    ) -> Result<Option<Received>, DownReason> {
        let Some(message) = self.receiver.receive(frame).map_err(down_reason)? else {
            return Ok(None);
        };
        // Checked here, so that garbage ends the connection that it came by; decoded by its reader.
        let payload = message.payload.map(|payload| {
            let taken = Payload::take(payload, buffer, buffers, &self.terms);
            taken.map_err(|error| DownReason::Protocol(format!("a message's payload: {error}")))
        });
        let payload = payload.transpose()?;
        Ok(Some(Received {
            control: message.control,
            payload,
        }))
    }
}

fn down_reason(error: LinkError) -> DownReason {
    match error {
        LinkError::TooManySequences { max } => DownReason::Limit {
            name: "fragmented_messages",
            value: max,
        },
        LinkError::MessageTooLarge { max, .. } => DownReason::Limit {
            name: "message_bytes",
            value: max,
        },
        LinkError::ReassemblyFull { max, .. } => DownReason::Limit {
            name: "reassembly_bytes",
            value: max,
        },
        error => DownReason::Protocol(error.to_string()),
    }
}

thread_local! {
    /// Nearly all messages are small and are copied into the connection's queue at once.
    static FRAMES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Encodes a message, and hands its frames and the process that they come from to `queue`, which may take them away.
/// No lock is held while a large term is encoded.
pub(crate) fn encode<T>(
    connection: &Connection,
    control: Control,
    payload: Option<&Term>,
    queue: impl FnOnce(Origin, &mut Vec<u8>) -> T,
) -> Result<T, SendError> {
    let origin = origin(&control);
    frames(
        connection,
        |sender, frames| sender.send(control, payload, frames),
        |frames| queue(origin, frames),
    )
}

/// As [`encode`], with a control message that is encoded already.
pub(crate) fn encode_prepared<T>(
    connection: &Connection,
    control: &Prepared,
    payload: &Term,
    queue: impl FnOnce(&mut Vec<u8>) -> T,
) -> Result<T, SendError> {
    let send = |sender: &mut Sender, frames: &mut Vec<u8>| sender.send_prepared(control, payload, frames);
    frames(connection, send, queue)
}

fn frames<T>(
    connection: &Connection,
    send: impl FnOnce(&mut Sender, &mut Vec<u8>) -> Result<(), LinkSendError>,
    queue: impl FnOnce(&mut Vec<u8>) -> T,
) -> Result<T, SendError> {
    FRAMES.with_borrow_mut(|frames| {
        frames.clear();
        let mut sender = Sender::starting_at(connection.flags, connection.next_sequence());
        send(&mut sender, frames).map_err(|error| SendError::Term(error.to_string()))?;
        if frames.len() > connection.max_message {
            let (len, max) = (frames.len(), connection.max_message);
            *frames = Vec::new();
            return Err(SendError::TooLarge { len, max });
        }
        let queued = queue(frames);
        if frames.capacity() > RETAINED_CAPACITY {
            *frames = Vec::new();
        }
        Ok(queued)
    })
}

/// The process that a control message comes from.
fn origin(control: &Control) -> Origin {
    match control {
        Control::Link { from, .. }
        | Control::Exit { from, .. }
        | Control::Unlink { from, .. }
        | Control::RegSend { from, .. }
        | Control::Exit2 { from, .. }
        | Control::MonitorP { from, .. }
        | Control::DemonitorP { from, .. }
        | Control::SendSender { from, .. }
        | Control::PayloadExit { from, .. }
        | Control::PayloadExit2 { from, .. }
        | Control::SpawnRequest { from, .. }
        | Control::AliasSend { from, .. }
        | Control::UnlinkId { from, .. }
        | Control::UnlinkIdAck { from, .. }
        | Control::AltactSig { from, .. }
        | Control::MonitorPExit {
            from: Proc::Pid(from),
            ..
        }
        | Control::PayloadMonitorPExit {
            from: Proc::Pid(from),
            ..
        } => Some((from.id, from.serial)),
        // Without a sender, or known by its name only: see `encode_from`.
        _ => None,
    }
}

/// A message between processes of this node, in the form that a peer's have.
pub(crate) fn local(control: Control, payload: Option<&Term>) -> Received {
    let payload = payload.and_then(|term| {
        let mut bytes = Vec::new();
        meshx_etf::encode(term, &mut bytes).ok()?;
        Some(Payload::Own(bytes))
    });
    Received { control, payload }
}

/// The control message that sends from one process to another.
pub(crate) fn send(flags: DistFlags, from: &Pid, to: &Address) -> Control {
    let from = from.clone();
    match to.clone() {
        Address::Pid(to) if flags.contains(DistFlags::SEND_SENDER) => Control::SendSender {
            from,
            to,
            token: None,
        },
        Address::Pid(to) => Control::Send { to, token: None },
        Address::Name { name, .. } => Control::RegSend {
            from,
            to: name,
            token: None,
        },
        Address::Alias(alias) if flags.contains(DistFlags::ALTACT_SIG) => Control::AltactSig {
            from,
            to: Target::Alias(alias),
            priority: false,
            exit: false,
            token: None,
        },
        Address::Alias(alias) => Control::AliasSend {
            from,
            alias,
            token: None,
        },
    }
}

/// The end of a link.
pub(crate) fn exit(flags: DistFlags, from: Pid, to: Pid, reason: Term) -> (Control, Option<Term>) {
    if flags.contains(DistFlags::EXIT_PAYLOAD) {
        (
            Control::PayloadExit {
                from,
                to,
                token: None,
            },
            Some(reason),
        )
    } else {
        (
            Control::Exit {
                from,
                to,
                reason,
                token: None,
            },
            None,
        )
    }
}

/// An exit signal as of `exit/2`.
pub(crate) fn exit2(flags: DistFlags, from: Pid, to: Pid, reason: Term) -> (Control, Option<Term>) {
    if flags.contains(DistFlags::EXIT_PAYLOAD) {
        (
            Control::PayloadExit2 {
                from,
                to,
                token: None,
            },
            Some(reason),
        )
    } else {
        (
            Control::Exit2 {
                from,
                to,
                reason,
                token: None,
            },
            None,
        )
    }
}

/// The end of a monitor.
pub(crate) fn monitor_exit(
    flags: DistFlags,
    from: Proc,
    to: Pid,
    reference: Reference,
    reason: Term,
) -> (Control, Option<Term>) {
    if flags.contains(DistFlags::EXIT_PAYLOAD) {
        (Control::PayloadMonitorPExit { from, to, reference }, Some(reason))
    } else {
        (
            Control::MonitorPExit {
                from,
                to,
                reference,
                reason,
            },
            None,
        )
    }
}
