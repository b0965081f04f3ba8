//! How processes end, and who is told.
//!
//! An exit signal can end a process, whose links then carry it on to others. Those that are here wait in a list for
//! their turn: however long a chain of links a peer makes, nothing here recurses.

use std::collections::VecDeque;
use std::sync::Arc;

use meshx_dist::control::{Control, Proc};
use meshx_etf::{Pid, Reference, Term};

use super::address::Address;
use super::connection::Connection;
use super::event::{DownReason, NodeEvent};
use super::inner::{Inner, demonitor};
use super::mailbox::Message;
use super::outbound::{Origin, QueueError};
use super::process::{Item, OnExit, Process};
use super::watch::{Ended, Watched};
use super::wire;

/// What an exit signal came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    /// A link, and whether this node's process asked for it.
    Link { ours: bool },
    /// `exit/2`.
    Exit,
}

/// The reason of an exit signal, and the bytes that it came in if a peer sent it.
pub(crate) struct Reason {
    pub(crate) term: Term,
    pub(crate) encoded: Option<Vec<u8>>,
}

impl Reason {
    pub(crate) fn atom(text: &str) -> Self {
        Self {
            term: Term::atom(text),
            encoded: None,
        }
    }
}

/// A process whose end is decided.
struct Ending {
    process: Arc<Process>,
    reason: Term,
}

/// Who watches a process, here and at each peer.
#[derive(Default)]
struct Watchers {
    here: Ended,
    away: Vec<(Arc<Connection>, Ended)>,
}

impl Inner {
    /// An exit signal for a process here.
    pub(crate) fn exit_signal(self: &Arc<Self>, from: Pid, to: &Pid, reason: Reason, via: Via) {
        let ending = self.signalled(from, to, reason, via);
        self.end_all(ending.into_iter().collect());
    }

    /// Ends a process with this reason, if it has not ended yet.
    pub(crate) fn retire(self: &Arc<Self>, process: &Arc<Process>, reason: &Term) {
        let mut endings = VecDeque::new();
        if let Some(watchers) = self.end(process, None) {
            self.tell_watchers(process, watchers, reason, &mut endings);
        }
        self.end_all(endings);
    }

    /// Ends a process whose reason may be large, as the result of a call is: waits for room on the connections of
    /// those who are told, as a server that answers does.
    pub(crate) async fn finish(self: &Arc<Self>, process: &Arc<Process>, reason: &Term) {
        let Some(Watchers { here, away }) = self.end(process, None) else {
            return;
        };
        let mut endings = VecDeque::new();
        self.tell_here(here, reason, &mut endings);
        self.end_all(endings);
        for (connection, ended) in away {
            for (control, payload) in signals(&connection, ended, reason) {
                if let Err(error) = self
                    .post_reply(&connection, origin(process), control, payload.as_ref())
                    .await
                {
                    tracing::debug!(node = connection.node.as_str(), %error, "an exit reason was not sent");
                    break;
                }
            }
        }
    }

    /// Forgets the links and monitors that were made while their process ended, and tells their other ends.
    pub(crate) fn sweep(self: &Arc<Self>, process: &Arc<Process>) {
        // Those from before its end are the end's to tell.
        let ending = process.ending();
        if self.processes.by_pid(&process.pid).is_some() {
            return;
        }
        let watchers = self.take_watchers(process);
        drop(ending);
        let reason = process.killed().unwrap_or_else(|| Term::atom("noproc"));
        let mut endings = VecDeque::new();
        self.tell_watchers(process, watchers, &reason, &mut endings);
        self.end_all(endings);
    }

    fn end_all(self: &Arc<Self>, mut endings: VecDeque<Ending>) {
        while let Some(Ending { process, reason }) = endings.pop_front() {
            if let Some(watchers) = self.end(&process, Some(&reason)) {
                self.tell_watchers(&process, watchers, &reason, &mut endings);
            }
        }
    }

    /// Ends a process, `killed` when a signal does, and takes all who watch it. None when it had ended before.
    fn end(&self, process: &Arc<Process>, killed: Option<&Term>) -> Option<Watchers> {
        let _ending = process.ending();
        let ended = self.processes.remove(process, killed);
        ended.then(|| self.take_watchers(process))
    }

    fn take_watchers(&self, process: &Process) -> Watchers {
        if !process.is_watched() {
            return Watchers::default();
        }
        let here = self.local_watch().take_process(&process.pid);
        let connections = self.connections.all().into_iter();
        let away = connections.map(|connection| {
            let ended = connection.watch().take_process(&process.pid);
            (connection, ended)
        });
        Watchers {
            here,
            away: away.collect(),
        }
    }

    /// What an exit signal does to the process that it is for.
    fn signalled(&self, from: Pid, to: &Pid, reason: Reason, via: Via) -> Option<Ending> {
        let process = self.processes.by_pid(to)?;
        let sent_by = (via == Via::Exit).then_some(&from);
        match process.on_exit(&reason.term, sent_by) {
            OnExit::Nothing => None,
            OnExit::End => Some(Ending {
                process,
                reason: reason.term,
            }),
            OnExit::Kill => Some(Ending {
                process,
                reason: Term::atom("killed"),
            }),
            OnExit::Message => {
                let item = match reason.encoded {
                    Some(reason) => Item::Exit { from, reason },
                    None => Item::Ready(Message::Exit {
                        from,
                        reason: reason.term,
                    }),
                };
                if via == (Via::Link { ours: true }) {
                    process.deliver_owed(item);
                } else {
                    process.deliver(item);
                }
                None
            }
        }
    }

    /// Tells all who watch a process that it has ended.
    fn tell_watchers(
        self: &Arc<Self>,
        process: &Process,
        watchers: Watchers,
        reason: &Term,
        endings: &mut VecDeque<Ending>,
    ) {
        self.tell_here(watchers.here, reason, endings);
        for (connection, ended) in watchers.away {
            for (control, payload) in signals(&connection, ended, reason) {
                if !self.notify(&connection, origin(process), control, payload.as_ref()) {
                    break;
                }
            }
        }
    }

    /// The part of those that are here too.
    fn tell_here(self: &Arc<Self>, ended: Ended, reason: &Term, endings: &mut VecDeque<Ending>) {
        for (local, other, _) in ended.links {
            let broke = self.local_watch().link_broke(&other, &local);
            if let Some(ours) = broke {
                let reason = Reason {
                    term: reason.clone(),
                    encoded: None,
                };
                endings.extend(self.signalled(local, &other, reason, Via::Link { ours }));
            }
        }
        for (reference, _) in ended.incoming {
            let monitor = self.local_watch().take_outgoing(&reference);
            if let Some(monitor) = monitor {
                self.down(&monitor.local, reference, monitor.target, reason.clone());
            }
        }
        for (reference, _) in ended.outgoing {
            self.local_watch().peer_demonitors(&reference);
        }
    }

    /// Tells a process here that one that it monitors has ended.
    pub(crate) fn down(&self, to: &Pid, reference: Reference, target: Address, reason: Term) {
        if let Some(process) = self.processes.by_pid(to) {
            process.deliver_owed(Item::Ready(Message::Down {
                reference,
                target,
                reason,
            }));
        }
    }

    /// A connection is over: tells all whose links and monitors it carried.
    pub(crate) fn ended(self: &Arc<Self>, connection: &Arc<Connection>) {
        self.connections.remove(connection);
        if !connection.tell_end() {
            return;
        }
        // Nothing that came by it may follow its end.
        drop(connection.turn());
        let ended = connection.watch().take_all();
        for (local, remote, ours) in ended.links {
            self.exit_signal(remote, &local, Reason::atom("noconnection"), Via::Link { ours });
        }
        for (reference, monitor) in ended.outgoing {
            self.down(
                &monitor.local,
                reference,
                monitor.target,
                Term::atom("noconnection"),
            );
        }
        for (reference, spawning) in ended.spawning {
            self.spawned(&spawning.local, reference, Err(Term::atom("noconnection")));
        }
        let reason = connection.reason();
        // Ends that somebody should look into are told without being asked for.
        match &reason {
            DownReason::Closed | DownReason::Disconnected | DownReason::Replaced => {
                tracing::info!(node = connection.node.as_str(), %reason, "connection down");
            }
            _ => tracing::warn!(node = connection.node.as_str(), %reason, "connection down"),
        }
        self.tell(NodeEvent::Down {
            node: connection.node.as_str().to_owned(),
            reason,
        });
    }

    /// Tells a process here what came of its spawn request.
    pub(crate) fn spawned(&self, to: &Pid, reference: Reference, result: Result<Pid, Term>) {
        if let Some(process) = self.processes.by_pid(to) {
            process.deliver_owed(Item::Ready(Message::Spawned { reference, result }));
        }
    }

    /// Sends a signal where nothing may wait; false when the connection takes no more. A peer that reads none of the
    /// signals that its links and monitors cause loses its connection. `origin` is the process that a signal which
    /// names none comes from.
    pub(crate) fn notify(
        &self,
        connection: &Connection,
        origin: Origin,
        control: Control,
        payload: Option<&Term>,
    ) -> bool {
        let queued = wire::encode(connection, control, payload, |own, frames| {
            connection.outbound.notice(origin.or(own), frames)
        });
        match queued {
            Ok(Ok(())) => true,
            Ok(Err(QueueError::Closed)) => false,
            Ok(Err(QueueError::Full)) => {
                connection.close(DownReason::Limit {
                    name: "notice_queue_bytes",
                    value: self.limits.notice_queue_bytes,
                });
                false
            }
            // Only a reason that the owner of the mailbox gave can fail to encode, or be too large.
            Err(error) => {
                tracing::warn!(%error, "an exit reason could not be sent");
                true
            }
        }
    }
}

fn origin(process: &Process) -> Origin {
    Some((process.pid.id, process.pid.serial))
}

/// The signals that the end of a process causes at one peer.
fn signals(
    connection: &Connection,
    ended: Ended,
    reason: &Term,
) -> impl Iterator<Item = (Control, Option<Term>)> {
    let flags = connection.flags;
    let links = ended
        .links
        .into_iter()
        .map(move |(local, remote, _)| wire::exit(flags, local, remote, reason.clone()));
    let incoming = ended.incoming.into_iter().map(move |(reference, monitor)| {
        let from = match monitor.watched {
            Watched::Pid(pid) => Proc::Pid(pid),
            Watched::Name(name) => Proc::Name(name),
        };
        wire::monitor_exit(flags, from, monitor.watcher, reference, reason.clone())
    });
    let outgoing = ended
        .outgoing
        .into_iter()
        .map(|(reference, monitor)| (demonitor(monitor, &reference), None));
    links.chain(incoming).chain(outgoing)
}
