//! What all parts of a node share, and what its processes ask of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshx_dist::control::{Control, Proc};
use meshx_dist::handshake::{Cookie, LocalNode};
use meshx_dist::link::Prepared;
use meshx_etf::{Atom, Pid, Reference, Term};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::address::Address;
use super::buffers::Buffers;
use super::carrier::Carrier;
use super::connection::Connection;
use super::connections::Connections;
use super::dispatch::{self, Peer};
use super::error::{ConnectError, SendError};
use super::event::{DownReason, NodeEvent};
use super::exits::{Reason, Via};
use super::exposed::Exposed;
use super::limits::Limits;
use super::mailbox::{Message, SpawnOptions};
use super::outbound::{Origin, Room};
use super::policy::{Kept, Reconnect};
use super::process::{Item, Process, Processes};
use super::request::{self, Entry};
use super::watch::{Outgoing, Spawning, Watch};
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
    pub(crate) exposed: Exposed,
    /// Links and monitors between processes of this node.
    pub(crate) own_watch: Mutex<Watch>,
    pub(crate) buffers: Buffers,
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

    /// Writes what is queued, waits until the peers have read it and closed, then ends everything.
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
        self.post_reply(&connection, None, control, Some(term)).await
    }

    /// Queues what answers a peer's request, waiting for room for a bounded time. `origin` is the process that it
    /// comes from if it names none.
    pub(crate) async fn post_reply(
        &self,
        connection: &Connection,
        origin: Origin,
        control: Control,
        payload: Option<&Term>,
    ) -> Result<(), SendError> {
        let queued = queue(connection, Room::Reply, origin, control, payload);
        match tokio::time::timeout(self.limits.reply_wait, queued).await {
            Ok(sent) => sent,
            Err(_) => {
                let value = self.limits.reply_queue_bytes;
                connection.close(DownReason::Limit {
                    name: "reply_queue_bytes",
                    value,
                });
                Err(disconnected(connection))
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
        let from = process.pid.clone();
        let to = match &target {
            Address::Pid(pid) => Proc::Pid(pid.clone()),
            Address::Name { name, .. } => Proc::Name(name.clone()),
            Address::Alias(_) => return self.down(&from, reference, target, Term::atom("noproc")),
        };
        let node = target.node().clone();
        let outgoing = Outgoing {
            local: from.clone(),
            target: target.clone(),
        };
        let control = Control::MonitorP {
            from: from.clone(),
            to,
            reference: reference.clone(),
        };
        process.set_watched();
        if node == self.name {
            self.local_watch().monitor(reference, outgoing);
            self.handle_here(control, None);
            return self.sweep(process);
        }
        let noconnection = || Term::atom("noconnection");
        let Ok(connection) = self.connect(&node).await else {
            return self.down(&from, reference, target, noconnection());
        };
        let entry = Entry::Monitor(reference.clone(), outgoing);
        if request::ask(&connection, control, None, entry).await.is_err() {
            self.down(&from, reference, target, noconnection());
        }
        self.sweep(process);
    }

    pub(crate) fn demonitor(self: &Arc<Self>, process: &Arc<Process>, reference: &Reference) {
        let mine = |watch: &mut Watch| watch.take_outgoing_of(reference, &process.pid);
        let here = mine(&mut self.local_watch());
        if let Some(outgoing) = here {
            return self.handle_here(demonitor(outgoing, reference), None);
        }
        for connection in self.connections.all() {
            let taken = mine(&mut connection.watch());
            if let Some(outgoing) = taken {
                self.notify(&connection, None, demonitor(outgoing, reference), None);
                return;
            }
        }
    }

    pub(crate) async fn link(self: &Arc<Self>, process: &Arc<Process>, to: &Pid) {
        let from = &process.pid;
        let control = Control::Link {
            from: from.clone(),
            to: to.clone(),
        };
        process.set_watched();
        if to.node == self.name {
            // A link to itself is none.
            if to != from && self.local_watch().link(from, to.clone()) {
                self.handle_here(control, None);
            }
            return self.sweep(process);
        }
        let broken = || {
            self.exit_signal(
                to.clone(),
                from,
                Reason::atom("noconnection"),
                Via::Link { ours: true },
            )
        };
        let Ok(connection) = self.connect(&to.node).await else {
            return broken();
        };
        // One that is there already has nothing to wait for.
        let known = {
            let mut watch = connection.watch();
            watch.is_linked(from, to) && !watch.link(from, to.clone())
        };
        let entry = Entry::Link(from.clone(), to.clone());
        if !known && request::ask(&connection, control, None, entry).await.is_err() {
            broken();
        }
        self.sweep(process);
    }

    pub(crate) fn unlink(self: &Arc<Self>, process: &Arc<Process>, to: &Pid) {
        let from = process.pid.clone();
        let unlink = |id| Control::UnlinkId {
            id,
            from: from.clone(),
            to: to.clone(),
        };
        if to.node == self.name {
            let id = self.local_watch().unlink(&from, to);
            if let Some(id) = id {
                self.handle_here(unlink(id), None);
            }
        } else if let Some(connection) = self.connections.up(&to.node) {
            let id = connection.watch().unlink(&from, to);
            if let Some(id) = id {
                self.notify(&connection, None, unlink(id), None);
            }
        }
    }

    pub(crate) async fn exit(self: &Arc<Self>, from: &Pid, to: &Pid, reason: &Term) -> Result<(), SendError> {
        if to.node == self.name {
            let reason = Reason {
                term: reason.clone(),
                encoded: None,
            };
            self.exit_signal(from.clone(), to, reason, Via::Exit);
            return Ok(());
        }
        let connection = self.connect(&to.node).await?;
        let (control, payload) = wire::exit2(connection.flags, from.clone(), to.clone(), reason.clone());
        self.post(&connection, control, payload.as_ref()).await
    }

    pub(crate) async fn spawn_request(
        self: &Arc<Self>,
        process: &Arc<Process>,
        node: &str,
        module: &str,
        function: &str,
        args: Vec<Term>,
        options: SpawnOptions,
    ) -> Result<Reference, SendError> {
        let arity =
            u8::try_from(args.len()).map_err(|_| SendError::Term("more than 255 arguments".into()))?;
        let id = self.processes.make_reference();
        let from = process.pid.clone();
        let spawning = Spawning {
            local: from.clone(),
            link: options.link,
            monitor: options.monitor,
        };
        let wanted = [(options.link, "link"), (options.monitor, "monitor")];
        let request = Control::SpawnRequest {
            id: id.clone(),
            group_leader: from.clone(),
            from,
            module: Atom::from(module),
            function: Atom::from(function),
            arity,
            options: wanted
                .iter()
                .filter(|(wanted, _)| *wanted)
                .map(|(_, name)| Term::atom(*name))
                .collect(),
            token: None,
        };
        process.set_watched();
        if self.name == *node {
            self.local_watch().spawn(id.clone(), spawning);
            self.handle_here(request, Some(&Term::List(args)));
            return Ok(id);
        }
        let connection = self.connect(&Atom::from(node)).await?;
        if !connection.flags.contains(meshx_dist::flags::DistFlags::SPAWN) {
            return Err(SendError::Unsupported {
                node: node.to_owned(),
                what: "a spawn request",
            });
        }
        let args = Term::List(args);
        let entry = Entry::Spawn(id.clone(), spawning);
        request::ask(&connection, request, Some(&args), entry).await?;
        Ok(id)
    }

    /// Forgets a spawn request; false when it was answered already.
    pub(crate) fn abandon(&self, node: &str, id: &Reference) -> bool {
        if self.name == *node {
            return self.local_watch().take_spawning(id).is_some();
        }
        let connection = self.connections.up(&Atom::from(node));
        connection.is_some_and(|connection| connection.watch().take_spawning(id).is_some())
    }

    /// Does what a control message between processes of this node asks for.
    fn handle_here(self: &Arc<Self>, control: Control, payload: Option<&Term>) {
        let _ = dispatch::handle(self, &Peer::Local, wire::local(control, payload));
    }

    /// Sends a signal, waiting for room.
    async fn post(
        &self,
        connection: &Connection,
        control: Control,
        payload: Option<&Term>,
    ) -> Result<(), SendError> {
        queue(connection, Room::Send, None, control, payload).await
    }
}

/// As [`queue`], for a message whose control message is encoded already.
pub(crate) async fn queue_prepared(
    connection: &Connection,
    origin: Origin,
    control: &Prepared,
    payload: &Term,
) -> Result<(), SendError> {
    let closed = |_| disconnected(connection);
    let outbound = &connection.outbound;
    let waiting = wire::encode_prepared(connection, control, payload, |frames| {
        let queued = outbound.try_queue(Room::Send, origin, frames)?;
        Ok((!queued).then(|| std::mem::take(frames)))
    });
    match waiting?.map_err(closed)? {
        None => Ok(()),
        Some(frames) => outbound.queue(Room::Send, origin, frames).await.map_err(closed),
    }
}

/// Queues a message, at once when there is room.
async fn queue(
    connection: &Connection,
    room: Room,
    origin: Origin,
    control: Control,
    payload: Option<&Term>,
) -> Result<(), SendError> {
    let closed = |_| disconnected(connection);
    let outbound = &connection.outbound;
    let waiting = wire::encode(connection, control, payload, |own, frames| {
        let origin = origin.or(own);
        let queued = outbound.try_queue(room, origin, frames)?;
        Ok((!queued).then(|| (origin, std::mem::take(frames))))
    });
    match waiting?.map_err(closed)? {
        None => Ok(()),
        Some((origin, frames)) => outbound.queue(room, origin, frames).await.map_err(closed),
    }
}

pub(crate) fn demonitor(monitor: Outgoing, reference: &Reference) -> Control {
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

pub(crate) fn disconnected(connection: &Connection) -> SendError {
    SendError::Disconnected(connection.node.as_str().to_owned())
}
