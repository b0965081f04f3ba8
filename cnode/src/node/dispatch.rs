//! What each control message of a peer does here.
//!
//! Source: chapter "Distribution Protocol", section "Protocol between Connected Nodes". Nothing here waits.

use std::sync::Arc;

use meshx_dist::control::{Control, Proc, SpawnResult, Target};
use meshx_dist::flags::DistFlags;
use meshx_etf::{Atom, Pid, Term};

use super::address::Address;
use super::connection::Connection;
use super::event::DownReason;
use super::inner::Inner;
use super::mailbox::Message;
use super::outbound::QueueError;
use super::process::{Item, Process};
use super::watch::{Incoming, TooMany, Watched};
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
        Control::Send { to, .. } => deliver(inner.processes.by_pid(&to), None, payload),
        Control::SendSender { from, to, .. } => deliver(inner.processes.by_pid(&to), Some(from), payload),
        Control::RegSend { from, to, .. } => {
            deliver(inner.processes.by_name(to.as_str()), Some(from), payload);
        }
        Control::AliasSend { from, alias, .. } => {
            deliver(inner.processes.by_alias(&alias), Some(from), payload);
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
        Control::Exit { from, to, reason, .. } => link_broke(inner, peer, from, &to, reason),
        Control::PayloadExit { from, to, .. } => link_broke(inner, peer, from, &to, reason(inner, &payload)?),
        Control::Exit2 { from, to, reason, .. } => exit(inner, from, &to, reason),
        Control::PayloadExit2 { from, to, .. } => exit(inner, from, &to, reason(inner, &payload)?),
        Control::MonitorP { from, to, reference } => return monitor(inner, peer, from, to, reference),
        Control::DemonitorP { reference, .. } => {
            peer.watch(inner, |watch| watch.peer_demonitors(&reference));
        }
        Control::MonitorPExit {
            from,
            reference,
            reason,
            ..
        } => {
            down(inner, peer, from, &reference, reason);
        }
        Control::PayloadMonitorPExit { from, reference, .. } => {
            let reason = reason(inner, &payload)?;
            down(inner, peer, from, &reference, reason);
        }
        Control::SpawnRequest { id, from, .. } => {
            let result = SpawnResult::Error(Atom::from("notsup"));
            let reply = Control::SpawnReply {
                id,
                to: from,
                flags: 0,
                result,
                token: None,
            };
            return peer.answer(inner, reply, None);
        }
        Control::SpawnReply { id, to, result, .. } => spawned(inner, peer, &to, id, result),
        // A group leader means nothing here: nothing prints.
        Control::GroupLeader { .. } | Control::NodeLink => {}
        // Operations of later releases come only when agreed by flags that this node does not set.
        Control::Unknown { op, .. } => {
            return Err(DownReason::Protocol(format!("unknown control operation {op}")));
        }
    }
    Ok(())
}

fn deliver(to: Option<Arc<Process>>, from: Option<Pid>, payload: Option<Vec<u8>>) {
    // A message to a process that is not there is lost, as in Erlang.
    if let (Some(process), Some(payload)) = (to, payload) {
        process.deliver(Item::Encoded { from, payload });
    }
}

/// Messages to aliases from OTP 28 on, and whatever has priority, which a mailbox does not know.
fn altact(
    inner: &Arc<Inner>,
    peer: &Peer<'_>,
    from: Pid,
    to: Target,
    is_exit: bool,
    payload: Option<Vec<u8>>,
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
        let reason = reason(inner, &payload)?;
        if let Some(process) = process {
            process.deliver(Item::Ready(Message::Exit { from, reason }));
        }
    } else {
        deliver(process, Some(from), payload);
    }
    Ok(())
}

fn link(inner: &Arc<Inner>, peer: &Peer<'_>, from: Pid, to: Pid) -> Result<(), DownReason> {
    if inner.processes.by_pid(&to).is_some() {
        let (local, remote) = (to.clone(), from.clone());
        peer.watch(inner, |watch| watch.peer_links(local, remote))
            .map_err(|TooMany| peer.too_many(inner))?;
        // It may have ended between the two lines above. Then either its end took the link along and told the
        // peer, or the link is still there and it is ours to tell.
        if inner.processes.by_pid(&to).is_some() || !peer.watch(inner, |watch| watch.link_broke(&to, &from)) {
            return Ok(());
        }
    }
    peer.answer_exit(inner, to, from, "noproc")
}

fn link_broke(inner: &Arc<Inner>, peer: &Peer<'_>, from: Pid, to: &Pid, reason: Term) {
    if peer.watch(inner, |watch| watch.link_broke(to, &from)) {
        exit(inner, from, to, reason);
    }
}

fn exit(inner: &Arc<Inner>, from: Pid, to: &Pid, reason: Term) {
    if let Some(process) = inner.processes.by_pid(to) {
        process.deliver(Item::Ready(Message::Exit { from, reason }));
    }
}

fn monitor(
    inner: &Arc<Inner>,
    peer: &Peer<'_>,
    from: Pid,
    to: Proc,
    reference: meshx_etf::Reference,
) -> Result<(), DownReason> {
    let process = match &to {
        Proc::Pid(pid) => inner.processes.by_pid(pid),
        Proc::Name(name) => inner.processes.by_name(name.as_str()),
    };
    if let Some(process) = process {
        let watched = match &to {
            Proc::Pid(pid) => Watched::Pid(pid.clone()),
            Proc::Name(name) => Watched::Name(name.clone()),
        };
        let monitor = Incoming {
            watcher: from.clone(),
            watched,
            local: process.pid.clone(),
        };
        peer.watch(inner, |watch| watch.peer_monitors(reference.clone(), monitor))
            .map_err(|TooMany| peer.too_many(inner))?;
        // As with links: it may have ended meanwhile.
        let lives = inner.processes.by_pid(&process.pid).is_some();
        if lives
            || peer
                .watch(inner, |watch| watch.peer_demonitors(&reference))
                .is_none()
        {
            return Ok(());
        }
    }
    peer.answer_monitor_exit(inner, to, from, reference, "noproc")
}

fn down(inner: &Arc<Inner>, peer: &Peer<'_>, from: Proc, reference: &meshx_etf::Reference, reason: Term) {
    let Some(monitor) = peer.watch(inner, |watch| watch.take_outgoing(reference)) else {
        return;
    };
    if let Some(process) = inner.processes.by_pid(&monitor.local) {
        let target = match (from, monitor.target) {
            // The monitor of a spawn request learns the pid from its end.
            (Proc::Pid(pid), Address::Name { name, .. }) if name.as_str().is_empty() => Address::Pid(pid),
            (_, target) => target,
        };
        process.deliver(Item::Ready(Message::Down {
            reference: reference.clone(),
            target,
            reason,
        }));
    }
}

fn spawned(inner: &Arc<Inner>, peer: &Peer<'_>, to: &Pid, id: meshx_etf::Reference, result: SpawnResult) {
    let result = match result {
        SpawnResult::Pid(pid) => {
            // From here on the monitor is one of this pid.
            peer.watch(inner, |watch| {
                if let Some(mut monitor) = watch.take_outgoing(&id) {
                    monitor.target = Address::Pid(pid.clone());
                    watch.monitor(id.clone(), monitor);
                }
            });
            Ok(pid)
        }
        SpawnResult::Error(error) => {
            if peer.watch(inner, |watch| watch.take_outgoing(&id)).is_none() {
                return;
            }
            Err(Term::Atom(error))
        }
    };
    if let Some(process) = inner.processes.by_pid(to) {
        process.deliver(Item::Ready(Message::Spawned {
            reference: id,
            result,
        }));
    }
}

/// The exit reason in a payload.
fn reason(inner: &Inner, payload: &Option<Vec<u8>>) -> Result<Term, DownReason> {
    let bytes = payload.as_deref().unwrap_or_default();
    meshx_etf::decode(bytes, &inner.limits.terms).map_err(|error| DownReason::Protocol(error.to_string()))
}

impl Peer<'_> {
    /// The links and monitors between this node and that peer, under their lock.
    pub(crate) fn watch<T>(&self, inner: &Inner, with: impl FnOnce(&mut super::watch::Watch) -> T) -> T {
        match self {
            Self::Local => with(&mut inner.local_watch()),
            Self::Remote(connection) => with(&mut connection.watch()),
        }
    }

    fn too_many(&self, inner: &Inner) -> DownReason {
        let _ = self;
        DownReason::Limit {
            name: "watches_per_connection",
            value: inner.limits.watches_per_connection,
        }
    }

    /// Sends what the peer's own message caused.
    fn answer(&self, inner: &Arc<Inner>, control: Control, payload: Option<&Term>) -> Result<(), DownReason> {
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

    fn answer_exit(&self, inner: &Arc<Inner>, from: Pid, to: Pid, reason: &str) -> Result<(), DownReason> {
        let (control, payload) = wire::exit(self.flags(), from, to, Term::atom(reason));
        self.answer(inner, control, payload.as_ref())
    }

    fn answer_monitor_exit(
        &self,
        inner: &Arc<Inner>,
        from: Proc,
        to: Pid,
        reference: meshx_etf::Reference,
        reason: &str,
    ) -> Result<(), DownReason> {
        let (control, payload) = wire::monitor_exit(self.flags(), from, to, reference, Term::atom(reason));
        self.answer(inner, control, payload.as_ref())
    }

    pub(crate) fn flags(&self) -> meshx_dist::flags::DistFlags {
        match self {
            Self::Local => meshx_dist::flags::DistFlags::c_node_default(),
            Self::Remote(connection) => connection.flags,
        }
    }
}
