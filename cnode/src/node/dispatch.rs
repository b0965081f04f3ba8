//! What each control message of a peer does here.
//!
//! Source: chapter "Distribution Protocol", section "Protocol between Connected Nodes". Nothing here waits.

use std::sync::Arc;

use meshx_dist::control::{Control, Proc, SpawnResult, Target};
use meshx_dist::flags::DistFlags;
use meshx_etf::{Atom, Pid, Reference, Term};

use super::address::Address;
use super::connection::Connection;
use super::event::DownReason;
use super::exits::{Reason, Via};
use super::inner::Inner;
use super::mailbox::Message;
use super::outbound::QueueError;
use super::payload::Payload;
use super::process::{Item, Process};
use super::spawned::{self, LINKED, MONITORED};
use super::watch::{Incoming, Outgoing, TooMany, Watched};
use super::wire::{self, Received};

/// Where a control message came from, and where its answers go.
pub(crate) enum Peer<'a> {
    /// A process of this node: its links and monitors work like those of others.
    Local,
    Remote(&'a Arc<Connection>),
}

/// Does what a control message asks for.
///
/// # Errors
/// Why the connection must end.
pub(crate) fn handle(inner: &Arc<Inner>, peer: &Peer<'_>, received: Received) -> Result<(), DownReason> {
    let Received { control, payload } = received;
    match control {
        Control::Send { to, .. } => deliver(peer, inner.processes.by_pid(&to), None, payload),
        Control::SendSender { from, to, .. } => {
            deliver(peer, inner.processes.by_pid(&to), Some(from), payload)
        }
        Control::RegSend { from, to, .. } => {
            deliver(peer, inner.processes.by_name(to.as_str()), Some(from), payload);
        }
        Control::AliasSend { from, alias, .. } => {
            deliver(peer, inner.processes.by_alias(&alias), Some(from), payload);
        }
        Control::AltactSig { from, to, exit, .. } => return altact(inner, peer, from, to, exit, payload),
        Control::Link { from, to } => return link(inner, peer, from, to),
        Control::Unlink { from, to } => peer.watch(inner, |watch| watch.peer_unlinks(&to, &from)),
        Control::UnlinkId { id, from, to } => {
            peer.watch(inner, |watch| watch.peer_unlinks(&to, &from));
            return peer.answer(
                inner,
                Control::UnlinkIdAck {
                    id,
                    from: to,
                    to: from,
                },
                None,
            );
        }
        Control::UnlinkIdAck { id, from, to } => {
            peer.watch(inner, |watch| watch.unlink_acknowledged(&to, &from, id));
        }
        Control::Exit { from, to, reason, .. } => link_broke(inner, peer, from, &to, in_control(reason)?),
        Control::PayloadExit { from, to, .. } => {
            link_broke(inner, peer, from, &to, in_payload(inner, payload)?)
        }
        Control::Exit2 { from, to, reason, .. } => {
            inner.exit_signal(from, &to, in_control(reason)?, Via::Exit);
        }
        Control::PayloadExit2 { from, to, .. } => {
            inner.exit_signal(from, &to, in_payload(inner, payload)?, Via::Exit);
        }
        Control::MonitorP { from, to, reference } => return monitor(inner, peer, from, to, reference),
        Control::DemonitorP { reference, .. } => {
            peer.watch(inner, |watch| watch.peer_demonitors(&reference));
        }
        Control::MonitorPExit {
            from,
            reference,
            reason,
            ..
        } => down(inner, peer, from, reference, in_control(reason)?),
        Control::PayloadMonitorPExit { from, reference, .. } => {
            down(inner, peer, from, reference, in_payload(inner, payload)?);
        }
        request @ Control::SpawnRequest { .. } => return spawned::request(inner, peer, request, payload),
        Control::SpawnReply {
            id,
            to,
            flags,
            result,
            ..
        } => return spawn_reply(inner, peer, to, id, flags, result),
        // A group leader means nothing here: nothing prints.
        Control::GroupLeader { .. } | Control::NodeLink => {}
        // Operations of later releases come only when agreed by flags that this node does not set.
        Control::Unknown { op, .. } => {
            return Err(DownReason::Protocol(format!("unknown control operation {op}")));
        }
    }
    Ok(())
}

fn deliver(peer: &Peer<'_>, to: Option<Arc<Process>>, from: Option<Pid>, payload: Option<Payload>) {
    // A message to a process that is not there is lost, as in Erlang.
    if let (Some(process), Some(payload)) = (to, payload) {
        let peer = peer.untold(from.as_ref());
        process.deliver(Item::Encoded { from, peer, payload });
    }
}

/// Messages to aliases from OTP 28 on, and whatever has priority, which a mailbox does not know.
fn altact(
    inner: &Arc<Inner>,
    peer: &Peer<'_>,
    from: Pid,
    to: Target,
    is_exit: bool,
    payload: Option<Payload>,
) -> Result<(), DownReason> {
    if !peer.flags().contains(DistFlags::ALTACT_SIG) {
        let text = "ALTACT_SIG_SEND came without being agreed";
        return Err(DownReason::Protocol(text.to_owned()));
    }
    let process = match &to {
        Target::Pid(pid) => inner.processes.by_pid(pid),
        Target::Name(name) => inner.processes.by_name(name.as_str()),
        Target::Alias(alias) => inner.processes.by_alias(alias),
    };
    if is_exit {
        let reason = in_payload(inner, payload)?;
        if let Some(process) = process {
            inner.exit_signal(from, &process.pid, reason, Via::Exit);
        }
    } else {
        deliver(peer, process, Some(from), payload);
    }
    Ok(())
}

fn link(inner: &Arc<Inner>, peer: &Peer<'_>, from: Pid, to: Pid) -> Result<(), DownReason> {
    if let Some(process) = inner.processes.by_pid(&to) {
        process.set_watched();
        let from = peer.known(from.clone());
        peer.watch(inner, |watch| watch.peer_links(&process.pid, from))
            .map_err(|TooMany| peer.too_many(inner))?;
        // It may have ended between the two lines above. Then either its end took the link along and told the
        // peer, or the link is still there and it is ours to tell.
        inner.sweep(&process);
        return Ok(());
    }
    let (control, payload) = wire::exit(peer.flags(), to, from, Term::atom("noproc"));
    peer.answer(inner, control, payload.as_ref())
}

fn link_broke(inner: &Arc<Inner>, peer: &Peer<'_>, from: Pid, to: &Pid, reason: Reason) {
    if let Some(ours) = peer.watch(inner, |watch| watch.link_broke(to, &from)) {
        inner.exit_signal(from, to, reason, Via::Link { ours });
    }
}

fn monitor(
    inner: &Arc<Inner>,
    peer: &Peer<'_>,
    from: Pid,
    to: Proc,
    reference: Reference,
) -> Result<(), DownReason> {
    let process = match &to {
        Proc::Pid(pid) => inner.processes.by_pid(pid),
        Proc::Name(name) => inner.processes.by_name(name.as_str()),
    };
    if let Some(process) = process {
        let watched = match to {
            Proc::Pid(_) => Watched::Pid(process.pid.clone()),
            Proc::Name(name) => Watched::Name(name),
        };
        let monitor = Incoming {
            watcher: peer.known(from),
            watched,
            local: process.pid.clone(),
        };
        process.set_watched();
        peer.watch(inner, |watch| watch.peer_monitors(reference, monitor))
            .map_err(|TooMany| peer.too_many(inner))?;
        // As with links: it may have ended meanwhile.
        inner.sweep(&process);
        return Ok(());
    }
    let (control, payload) = wire::monitor_exit(peer.flags(), to, from, reference, Term::atom("noproc"));
    peer.answer(inner, control, payload.as_ref())
}

fn down(inner: &Arc<Inner>, peer: &Peer<'_>, from: Proc, reference: Reference, reason: Reason) {
    let Some(monitor) = peer.watch(inner, |watch| watch.take_outgoing(&reference)) else {
        return;
    };
    let target = match (from, monitor.target) {
        (_, target @ Address::Name { .. }) => target,
        (Proc::Pid(pid), _) => Address::Pid(pid),
        (Proc::Name(_), target) => target,
    };
    if let Some(process) = inner.processes.by_pid(&monitor.local) {
        process.deliver_owed(match reason.encoded {
            Some(reason) => Item::Down {
                reference,
                target,
                reason,
            },
            None => Item::Ready(Message::Down {
                reference,
                target,
                reason: reason.term,
            }),
        });
    }
}

/// The answer to a spawn request of this node. The link and the monitor that it asked for stand from here on.
fn spawn_reply(
    inner: &Arc<Inner>,
    peer: &Peer<'_>,
    to: Pid,
    id: Reference,
    flags: u32,
    result: SpawnResult,
) -> Result<(), DownReason> {
    let known = peer.watch(inner, |watch| watch.take_spawning(&id));
    let process = inner.processes.by_pid(&to);
    match (result, known, process) {
        (SpawnResult::Error(error), Some(spawning), _) => {
            inner.spawned(&spawning.local, id, Err(Term::Atom(error)));
        }
        (SpawnResult::Pid(pid), Some(spawning), Some(process)) if process.pid == spawning.local => {
            peer.watch(inner, |watch| {
                if spawning.link && flags & LINKED != 0 {
                    watch.link(&process.pid, pid.clone());
                }
                if spawning.monitor && flags & MONITORED != 0 {
                    let outgoing = Outgoing {
                        local: process.pid.clone(),
                        target: Address::Pid(pid.clone()),
                    };
                    watch.monitor(id.clone(), outgoing);
                }
            });
            inner.spawned(&process.pid, id, Ok(pid));
            inner.sweep(&process);
        }
        // Nobody waits for it any more: it ends, if it was to be linked, and is not watched.
        (SpawnResult::Pid(pid), _, _) => {
            if flags & MONITORED != 0 {
                let demonitor = Control::DemonitorP {
                    from: to.clone(),
                    to: Proc::Pid(pid.clone()),
                    reference: id,
                };
                peer.answer(inner, demonitor, None)?;
            }
            if flags & LINKED != 0 {
                let (control, payload) = wire::exit(peer.flags(), to, pid, Term::atom("abandoned"));
                peer.answer(inner, control, payload.as_ref())?;
            }
        }
        (SpawnResult::Error(_), None, _) => {}
    }
    Ok(())
}

/// An exit reason within a control message, as nodes without `EXIT_PAYLOAD` send it.
fn in_control(term: Term) -> Result<Reason, DownReason> {
    let mut bytes = Vec::new();
    meshx_etf::encode(&term, &mut bytes).map_err(|error| DownReason::Protocol(error.to_string()))?;
    Ok(Reason {
        term,
        encoded: Some(bytes),
    })
}

/// An exit reason behind a control message.
fn in_payload(inner: &Inner, payload: Option<Payload>) -> Result<Reason, DownReason> {
    let bytes = payload.map(Payload::into_vec).unwrap_or_default();
    let term = meshx_etf::decode(&bytes, &inner.limits.terms);
    Ok(Reason {
        term: term.map_err(|error| DownReason::Protocol(error.to_string()))?,
        encoded: Some(bytes),
    })
}

impl Peer<'_> {
    /// The links and monitors between this node and that peer, under their lock.
    pub(crate) fn watch<T>(&self, inner: &Inner, with: impl FnOnce(&mut super::watch::Watch) -> T) -> T {
        match self {
            Self::Local => with(&mut inner.local_watch()),
            Self::Remote(connection) => with(&mut connection.watch()),
        }
    }

    pub(crate) fn too_many(&self, inner: &Inner) -> DownReason {
        let _ = self;
        DownReason::Limit {
            name: "watches_per_connection",
            value: inner.limits.watches_per_connection,
        }
    }

    /// Sends what the peer's own message caused.
    pub(crate) fn answer(
        &self,
        inner: &Arc<Inner>,
        control: Control,
        payload: Option<&Term>,
    ) -> Result<(), DownReason> {
        let connection = match self {
            Self::Local => return handle(inner, self, wire::local(control, payload)),
            Self::Remote(connection) => connection,
        };
        let queued = wire::encode(connection, control, payload, |origin, frames| {
            connection.outbound.answer(origin, frames)
        });
        match queued.map_err(|error| DownReason::Protocol(error.to_string()))? {
            Ok(()) | Err(QueueError::Closed) => Ok(()),
            Err(QueueError::Full) => {
                let value = inner.limits.answer_queue_bytes;
                Err(DownReason::Limit {
                    name: "answer_queue_bytes",
                    value,
                })
            }
        }
    }

    /// A pid of the peer, its node's name shared with the connection.
    pub(crate) fn known(&self, mut pid: Pid) -> Pid {
        if let Self::Remote(connection) = self
            && pid.node == connection.node
        {
            pid.node = connection.node.clone();
        }
        pid
    }

    /// The peer's name, unless a message's sender tells it. What the peer says of its sender may be a lie.
    fn untold(&self, from: Option<&Pid>) -> Option<Atom> {
        match self {
            Self::Remote(connection) if from.is_none_or(|from| from.node != connection.node) => {
                Some(connection.node.clone())
            }
            _ => None,
        }
    }

    pub(crate) fn flags(&self) -> meshx_dist::flags::DistFlags {
        match self {
            Self::Local => meshx_dist::flags::DistFlags::c_node_default(),
            Self::Remote(connection) => connection.flags,
        }
    }
}
