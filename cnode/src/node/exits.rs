//! How processes end, and who is told.
//!
//! An exit signal can end a process, whose links then carry it on to others. Those that are here wait in a list for
//! their turn: however long a chain of links a peer makes, nothing here recurses.

use std::collections::VecDeque;
use std::sync::Arc;

use meshx_dist::control::{Control, Proc};
use meshx_dist::flags::DistFlags;
use meshx_etf::{Pid, Reference, Term};

use super::address::Address;
use super::connection::Connection;
use super::error::SendError;
use super::event::{DownReason, NodeEvent};
use super::inner::{Inner, demonitor};
use super::mailbox::Message;
use super::outbound::{Origin, QueueError};
use super::process::{Item, OnExit, Process};
use super::watch::{Ended, Incoming, Outgoing, Watched};
use super::wire;

/// What a peer gets for a reason that cannot be sent to it.
pub(crate) const UNSENDABLE_REASON: &str = "unsendable_reason";

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

/// What the end of a process causes at one peer.
enum Signal {
    Exit { from: Pid, to: Pid },
    Down(Reference, Incoming),
    Demonitor(Reference, Outgoing),
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
    /// those who are told, as a server that answers does. A peer that `reason` cannot be sent to gets `instead`.
    pub(crate) async fn finish(self: &Arc<Self>, process: &Arc<Process>, reason: &Term, instead: &Term) {
        let Some(Watchers { here, away }) = self.end(process, None) else {
            return;
        };
        let mut endings = VecDeque::new();
        self.tell_here(here, reason, &mut endings);
        self.end_all(endings);
        for (connection, ended) in away {
            let mut reason = reason;
            for signal in signals(ended) {
                let mut sent = self.post_signal(&connection, process, &signal, reason).await;
                if let Err(error) = &sent
                    && error.is_unsendable()
                {
                    warn_unsendable(&connection, error);
                    reason = instead;
                    sent = self.post_signal(&connection, process, &signal, reason).await;
                }
                if let Err(error) = sent {
                    tracing::debug!(node = connection.node.as_str(), %error, "an exit reason was not sent");
                    break;
                }
            }
        }
    }

    async fn post_signal(
        &self,
        connection: &Connection,
        process: &Process,
        signal: &Signal,
        reason: &Term,
    ) -> Result<(), SendError> {
        let (control, payload) = signal.message(connection.flags, reason);
        self.post_reply(connection, origin(process), control, payload.as_ref())
            .await
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

    /// Tells all who watch a process that it has ended. They are told so whatever its reason is: one that cannot be
    /// sent is replaced.
    fn tell_watchers(
        self: &Arc<Self>,
        process: &Process,
        watchers: Watchers,
        reason: &Term,
        endings: &mut VecDeque<Ending>,
    ) {
        self.tell_here(watchers.here, reason, endings);
        let unsendable = Term::atom(UNSENDABLE_REASON);
        for (connection, ended) in watchers.away {
            let mut reason = reason;
            let tell = |signal: &Signal, reason: &Term| {
                let (control, payload) = signal.message(connection.flags, reason);
                self.try_notify(&connection, origin(process), control, payload.as_ref())
            };
            for signal in signals(ended) {
                let mut told = tell(&signal, reason);
                if let Err(error) = &told {
                    warn_unsendable(&connection, error);
                    reason = &unsendable;
                    told = tell(&signal, reason);
                }
                if let Ok(false) = told {
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

    /// Sends a signal that carries no reason where nothing may wait; see [`Inner::try_notify`].
    pub(crate) fn notify(
        &self,
        connection: &Connection,
        origin: Origin,
        control: Control,
        payload: Option<&Term>,
    ) -> bool {
        let sent = self.try_notify(connection, origin, control, payload);
        sent.unwrap_or_else(|error| {
            warn_unsendable(connection, &error);
            true
        })
    }

    /// Sends a signal where nothing may wait; false when the connection takes no more. A peer that reads none of the
    /// signals that its links and monitors cause loses its connection. `origin` is the process that a signal which
    /// names none comes from.
    ///
    /// # Errors
    /// A reason that cannot be encoded, or is too large: the owner of a mailbox may give any.
    fn try_notify(
        &self,
        connection: &Connection,
        origin: Origin,
        control: Control,
        payload: Option<&Term>,
    ) -> Result<bool, SendError> {
        let queued = wire::encode(connection, control, payload, |own, frames| {
            connection.outbound.notice(origin.or(own), frames)
        });
        Ok(match queued? {
            Ok(()) => true,
            Err(QueueError::Closed) => false,
            Err(QueueError::Full) => {
                connection.close(DownReason::Limit {
                    name: "notice_queue_bytes",
                    value: self.limits.notice_queue_bytes,
                });
                false
            }
        })
    }
}

fn warn_unsendable(connection: &Connection, error: &SendError) {
    tracing::warn!(node = connection.node.as_str(), %error, "an exit reason cannot be sent, another one is");
}

fn origin(process: &Process) -> Origin {
    Some((process.pid.id, process.pid.serial))
}

impl Signal {
    fn message(&self, flags: DistFlags, reason: &Term) -> (Control, Option<Term>) {
        match self {
            Self::Exit { from, to } => wire::exit(flags, from.clone(), to.clone(), reason.clone()),
            Self::Down(reference, monitor) => {
                let from = match &monitor.watched {
                    Watched::Pid(pid) => Proc::Pid(pid.clone()),
                    Watched::Name(name) => Proc::Name(name.clone()),
                };
                let (to, reference) = (monitor.watcher.clone(), reference.clone());
                wire::monitor_exit(flags, from, to, reference, reason.clone())
            }
            Self::Demonitor(reference, monitor) => (demonitor(monitor.clone(), reference), None),
        }
    }
}

/// The signals that the end of a process causes at one peer.
fn signals(ended: Ended) -> impl Iterator<Item = Signal> {
    let links = ended.links.into_iter();
    let links = links.map(|(from, to, _)| Signal::Exit { from, to });
    let incoming = ended.incoming.into_iter();
    let incoming = incoming.map(|(reference, monitor)| Signal::Down(reference, monitor));
    let outgoing = ended.outgoing.into_iter();
    let outgoing = outgoing.map(|(reference, monitor)| Signal::Demonitor(reference, monitor));
    links.chain(incoming).chain(outgoing)
}
