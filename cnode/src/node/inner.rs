//! What all parts of a node share, and what its processes ask of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshx_dist::control::{Control, Proc};
use meshx_dist::handshake::{Cookie, LocalNode};
use meshx_etf::{Atom, Pid, Reference, Term};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::address::Address;
use super::carrier::Carrier;
use super::connection::Connection;
use super::connections::Connections;
use super::dispatch::{self, Peer};
use super::error::{ConnectError, SendError};
use super::event::{DownReason, NodeEvent};
use super::limits::Limits;
use super::mailbox::Message;
use super::outbound::{Origin, QueueError, Room};
use super::policy::{Kept, Reconnect};
use super::process::{Item, Process, Processes};
use super::watch::{Ended, Outgoing, Watch, Watched};
use super::wire;

/// A node, without what keeps it up.
pub(crate) struct Inner {
    pub(crate) name: Atom,
    pub(crate) local: LocalNode,
    pub(crate) cookie: Cookie,
    pub(crate) limits: Limits,
    pub(crate) net_ticktime: Duration,
    pub(crate) tick_interval: Duration,
    pub(crate) processes: Processes,
    pub(crate) connections: Connections,
    pub(crate) carrier: Carrier,
    pub(crate) events: broadcast::Sender<NodeEvent>,
    pub(crate) stop: CancellationToken,
    pub(crate) reconnect: Reconnect,
    pub(crate) kept: Kept,
    /// All tasks of this node.
    pub(crate) tasks: TaskTracker,
    /// Links and monitors between processes of this node.
    pub(crate) own_watch: Mutex<Watch>,
}

/// Keeps a node up: held by its handles and its mailboxes.
pub(crate) struct Alive(pub(crate) Arc<Inner>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.shut_down(&DownReason::Disconnected);
    }
}

impl Inner {
    pub(crate) fn local_watch(&self) -> MutexGuard<'_, Watch> {
        self.own_watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a task that [`Inner::stop`] waits for. Each ends soon after `stop` is cancelled.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.tasks.spawn(task)
    }

    pub(crate) fn tell(&self, event: NodeEvent) {
        // Nobody listens: nothing is lost.
        let _ = self.events.send(event);
    }

    /// Writes what is queued, then ends everything.
    pub(crate) async fn stop(self: &Arc<Self>, grace: Duration) {
        let mut events = self.events.subscribe();
        for connection in self.connections.close() {
            connection.outbound.finish();
        }
        let flushed = async {
            // An event that was lost leaves at least one more to come, or nothing to wait for.
            while !self.connections.all().is_empty() && !matches!(events.recv().await, Err(RecvError::Closed))
            {
            }
        };
        let _ = tokio::time::timeout(grace, flushed).await;
        self.shut_down(&DownReason::Disconnected);
        // A server may be busy with a request; it ends when it looks for the next.
        let _ = tokio::time::timeout(grace, self.tasks.wait()).await;
    }

    /// Ends everything at once.
    pub(crate) fn shut_down(self: &Arc<Self>, reason: &DownReason) {
        self.stop.cancel();
        self.carrier.release();
        for connection in self.connections.close() {
            connection.close(reason.clone());
        }
        self.processes.close();
        self.tasks.close();
    }

    pub(crate) async fn ensure_connected(self: &Arc<Self>, node: &Atom) -> Result<(), ConnectError> {
        if *node == self.name {
            Ok(())
        } else {
            self.connect(node).await.map(drop)
        }
    }

    /// Sends a message from one of this node's processes.
    pub(crate) async fn send(
        self: &Arc<Self>,
        from: &Pid,
        to: &Address,
        term: &Term,
    ) -> Result<(), SendError> {
        if *to.node() == self.name {
            self.send_here(from, to, term);
            return Ok(());
        }
        let connection = self.connect(to.node()).await?;
        let control = wire::send(connection.flags, from, to);
        self.post(&connection, control, Some(term)).await
    }

    /// Answers a call. A caller that does not read its answers loses its connection, so that it holds up a server
    /// for a bounded time only.
    pub(crate) async fn reply(
        self: &Arc<Self>,
        from: &Pid,
        to: &Address,
        term: &Term,
    ) -> Result<(), SendError> {
        if *to.node() == self.name {
            self.send_here(from, to, term);
            return Ok(());
        }
        // Never dials: without the connection that the call came by, the caller is gone.
        let connection = self
            .connections
            .up(to.node())
            .ok_or_else(|| SendError::Disconnected(to.node().as_str().to_owned()))?;
        let control = wire::send(connection.flags, from, to);
        let queued = queue(&connection, Room::Reply, control, Some(term));
        match tokio::time::timeout(self.limits.reply_wait, queued).await {
            Ok(sent) => sent,
            Err(_) => {
                let value = self.limits.reply_queue_bytes;
                connection.close(DownReason::Limit {
                    name: "reply_queue_bytes",
                    value,
                });
                Err(disconnected(&connection))
            }
        }
    }

    fn send_here(&self, from: &Pid, to: &Address, term: &Term) {
        let process = match to {
            Address::Pid(pid) => self.processes.by_pid(pid),
            Address::Name { name, .. } => self.processes.by_name(name.as_str()),
            Address::Alias(alias) => self.processes.by_alias(alias),
        };
        if let Some(process) = process {
            let message = Message::Term {
                from: Some(from.clone()),
                term: term.clone(),
            };
            process.deliver(Item::Ready(message));
        }
    }

    pub(crate) async fn monitor(
        self: &Arc<Self>,
        process: &Arc<Process>,
        reference: Reference,
        target: Address,
    ) {
        let to = match &target {
            Address::Pid(pid) => Proc::Pid(pid.clone()),
            Address::Name { name, .. } => Proc::Name(name.clone()),
            Address::Alias(_) => return down(process, reference, target, "noproc"),
        };
        let from = process.pid.clone();
        let node = target.node().clone();
        let outgoing = Outgoing {
            local: from.clone(),
            target: target.clone(),
        };
        let control = Control::MonitorP {
            from,
            to,
            reference: reference.clone(),
        };
        if node == self.name {
            self.local_watch().monitor(reference, outgoing);
            let _ = dispatch::handle(self, &Peer::Local, wire::local(control, None));
            return;
        }
        let Ok(connection) = self.connect(&node).await else {
            return down(process, reference, target, "noconnection");
        };
        connection.watch().monitor(reference.clone(), outgoing);
        if self.post(&connection, control, None).await.is_err()
            // Else the end of the connection has told it already.
            && connection.watch().take_outgoing(&reference).is_some()
        {
            down(process, reference, target, "noconnection");
        }
    }

    pub(crate) fn demonitor(self: &Arc<Self>, process: &Arc<Process>, reference: &Reference) {
        let mine = |watch: &mut Watch| watch.take_outgoing_of(reference, &process.pid);
        if let Some(outgoing) = mine(&mut self.local_watch()) {
            self.notify(None, demonitor(outgoing, reference), None);
        }
        for connection in self.connections.all() {
            let taken = mine(&mut connection.watch());
            if let Some(outgoing) = taken {
                self.notify(Some(&connection), demonitor(outgoing, reference), None);
            }
        }
    }

    pub(crate) async fn link(self: &Arc<Self>, process: &Arc<Process>, to: &Pid) {
        let from = process.pid.clone();
        let control = Control::Link {
            from: from.clone(),
            to: to.clone(),
        };
        if to.node == self.name {
            let new = self.local_watch().link(from, to.clone());
            if new {
                let _ = dispatch::handle(self, &Peer::Local, wire::local(control, None));
            }
            return;
        }
        let broken = || {
            let reason = Term::atom("noconnection");
            process.deliver(Item::Ready(Message::Exit {
                from: to.clone(),
                reason,
            }));
        };
        let Ok(connection) = self.connect(&to.node).await else {
            return broken();
        };
        let new = connection.watch().link(from.clone(), to.clone());
        if new
            && self.post(&connection, control, None).await.is_err()
            && connection.watch().link_broke(&from, to)
        {
            broken();
        }
    }

    pub(crate) fn unlink(self: &Arc<Self>, process: &Arc<Process>, to: &Pid) {
        let from = process.pid.clone();
        let connection = self.connections.up(&to.node);
        let id = match &connection {
            Some(connection) => connection.watch().unlink(from.clone(), to.clone()),
            None => self.local_watch().unlink(from.clone(), to.clone()),
        };
        if let Some(id) = id {
            self.notify(
                connection.as_ref(),
                Control::UnlinkId {
                    id,
                    from,
                    to: to.clone(),
                },
                None,
            );
        }
    }

    pub(crate) async fn exit(self: &Arc<Self>, from: &Pid, to: &Pid, reason: &Term) -> Result<(), SendError> {
        if to.node == self.name {
            let control = Control::Exit2 {
                from: from.clone(),
                to: to.clone(),
                reason: reason.clone(),
                token: None,
            };
            let _ = dispatch::handle(self, &Peer::Local, wire::local(control, None));
            return Ok(());
        }
        let connection = self.connect(&to.node).await?;
        let (control, payload) = wire::exit2(connection.flags, from.clone(), to.clone(), reason.clone());
        self.post(&connection, control, payload.as_ref()).await
    }

    pub(crate) async fn spawn_monitor(
        self: &Arc<Self>,
        process: &Arc<Process>,
        node: &str,
        module: &str,
        function: &str,
        args: Vec<Term>,
    ) -> Result<Reference, SendError> {
        let unsupported = || SendError::Unsupported {
            node: node.to_owned(),
            what: "a spawn request",
        };
        if self.name == *node {
            return Err(unsupported());
        }
        let arity =
            u8::try_from(args.len()).map_err(|_| SendError::Term("more than 255 arguments".into()))?;
        let node = Atom::from(node);
        let connection = self.connect(&node).await?;
        if !connection.flags.contains(meshx_dist::flags::DistFlags::SPAWN) {
            return Err(unsupported());
        }
        let id = self.processes.make_reference();
        let from = process.pid.clone();
        // The pid is not known yet; `dispatch` fills it in.
        let target = Address::Name {
            name: Atom::from(""),
            node,
        };
        connection.watch().monitor(
            id.clone(),
            Outgoing {
                local: from.clone(),
                target,
            },
        );
        let request = Control::SpawnRequest {
            id: id.clone(),
            group_leader: from.clone(),
            from,
            module: Atom::from(module),
            function: Atom::from(function),
            arity,
            options: vec![Term::atom("monitor")],
            token: None,
        };
        let sent = self.post(&connection, request, Some(&Term::List(args))).await;
        if sent.is_err() {
            connection.watch().take_outgoing(&id);
        }
        sent.map(|()| id)
    }

    /// Ends a process: tells all who watch it, and frees its names.
    pub(crate) fn retire(self: &Arc<Self>, process: &Arc<Process>, reason: &Term) {
        self.processes.remove(process);
        let ended = self.local_watch().take_process(&process.pid);
        self.tell_watchers(None, ended, reason);
        for connection in self.connections.all() {
            let ended = connection.watch().take_process(&process.pid);
            self.tell_watchers(Some(&connection), ended, reason);
        }
    }

    fn tell_watchers(self: &Arc<Self>, connection: Option<&Arc<Connection>>, ended: Ended, reason: &Term) {
        let flags = connection.map_or(Peer::Local, Peer::Remote).flags();
        for (local, remote) in ended.links {
            let (control, payload) = wire::exit(flags, local, remote, reason.clone());
            self.notify(connection, control, payload.as_ref());
        }
        for (reference, monitor) in ended.incoming {
            let from = match monitor.watched {
                Watched::Pid(pid) => Proc::Pid(pid),
                Watched::Name(name) => Proc::Name(name),
            };
            let (control, payload) =
                wire::monitor_exit(flags, from, monitor.watcher, reference, reason.clone());
            let origin = Some((monitor.local.id, monitor.local.serial));
            self.notify_from(connection, origin, control, payload.as_ref());
        }
        for (reference, monitor) in ended.outgoing {
            self.notify(connection, demonitor(monitor, &reference), None);
        }
    }

    /// A connection is over: tells all whose links and monitors it carried.
    pub(crate) fn ended(self: &Arc<Self>, connection: &Arc<Connection>) {
        self.connections.remove(connection);
        if !connection.tell_end() {
            return;
        }
        let reason = Term::atom("noconnection");
        let ended = connection.watch().take_all();
        for (local, remote) in ended.links {
            if let Some(process) = self.processes.by_pid(&local) {
                process.deliver(Item::Ready(Message::Exit {
                    from: remote,
                    reason: reason.clone(),
                }));
            }
        }
        for (reference, monitor) in ended.outgoing {
            if let Some(process) = self.processes.by_pid(&monitor.local) {
                down(&process, reference, monitor.target, "noconnection");
            }
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

    /// Sends a signal, waiting for room.
    async fn post(
        &self,
        connection: &Connection,
        control: Control,
        payload: Option<&Term>,
    ) -> Result<(), SendError> {
        queue(connection, Room::Send, control, payload).await
    }

    /// Sends a signal where nothing may wait; how many there are is bounded by the links and monitors they end.
    fn notify(
        self: &Arc<Self>,
        connection: Option<&Arc<Connection>>,
        control: Control,
        payload: Option<&Term>,
    ) {
        self.notify_from(connection, None, control, payload);
    }

    /// As [`Inner::notify`]; `origin` is the process that a signal which names none comes from.
    fn notify_from(
        self: &Arc<Self>,
        connection: Option<&Arc<Connection>>,
        origin: Origin,
        control: Control,
        payload: Option<&Term>,
    ) {
        let Some(connection) = connection else {
            let _ = dispatch::handle(self, &Peer::Local, wire::local(control, payload));
            return;
        };
        let queued = wire::encode(connection, control, payload, |own, frames| {
            connection.outbound.notice(origin.or(own), frames)
        });
        match queued {
            Ok(Ok(()) | Err(QueueError::Closed | QueueError::Full)) => {}
            // Only a reason that the owner of the mailbox gave can fail to encode.
            Err(error) => tracing::warn!(%error, "an exit reason could not be sent"),
        }
    }
}

/// Queues a message, at once when there is room.
async fn queue(
    connection: &Connection,
    room: Room,
    control: Control,
    payload: Option<&Term>,
) -> Result<(), SendError> {
    let closed = |_| disconnected(connection);
    let outbound = &connection.outbound;
    let waiting = wire::encode(connection, control, payload, |origin, frames| {
        let queued = outbound.try_queue(room, origin, frames)?;
        Ok((!queued).then(|| (origin, std::mem::take(frames))))
    });
    match waiting?.map_err(closed)? {
        None => Ok(()),
        Some((origin, frames)) => outbound.queue(room, origin, frames).await.map_err(closed),
    }
}

fn demonitor(monitor: Outgoing, reference: &Reference) -> Control {
    let to = match monitor.target {
        Address::Pid(pid) => Proc::Pid(pid),
        Address::Name { name, .. } => Proc::Name(name),
        Address::Alias(_) => Proc::Name(Atom::from("")),
    };
    Control::DemonitorP {
        from: monitor.local,
        to,
        reference: reference.clone(),
    }
}

fn down(process: &Process, reference: Reference, target: Address, reason: &str) {
    let reason = Term::atom(reason);
    process.deliver(Item::Ready(Message::Down {
        reference,
        target,
        reason,
    }));
}

fn disconnected(connection: &Connection) -> SendError {
    SendError::Disconnected(connection.node.as_str().to_owned())
}
