//! Which connections there are, and how they come about: dialling, accepting, and both at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use meshx_dist::handshake::HandshakeError;
use meshx_etf::Atom;
use tokio::sync::watch;

use super::carrier::{Accepted, Listener};
use super::connection::{self, Connection};
use super::error::ConnectError;
use super::event::{Direction, DownReason};
use super::handshake::{self, Failure, Ready, Standing};
use super::inner::Inner;
use super::policy::Reconnect;
use crate::log_limit::LogLimit;
use crate::proxy::admission::{Admission, Origin, Slot as Place};

type Outcome = Option<Result<Arc<Connection>, ConnectError>>;

/// The table of connections, one per node.
pub(crate) struct Connections {
    slots: Mutex<Slots>,
    /// Counts connections that came up and accepted handshakes that ended: wakes who waits for one.
    came_up: watch::Sender<u64>,
    max: usize,
}

#[derive(Default)]
struct Slots {
    by_node: HashMap<Atom, Slot>,
    /// Accepted handshakes that this node has said yes to, by the name that the peer gave; how many of each.
    accepting: HashMap<Atom, usize>,
    closed: bool,
}

enum Slot {
    /// All who want this connection wait for the same attempt.
    Dialling(watch::Receiver<Outcome>),
    Up(Arc<Connection>),
}

impl Connections {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            slots: Mutex::default(),
            came_up: watch::Sender::new(0),
            max,
        }
    }

    /// The connection to a node, when it stands.
    pub(crate) fn up(&self, node: &Atom) -> Option<Arc<Connection>> {
        match self.lock().by_node.get(node) {
            Some(Slot::Up(connection)) => Some(Arc::clone(connection)),
            _ => None,
        }
    }

    /// All connections that stand.
    pub(crate) fn all(&self) -> Vec<Arc<Connection>> {
        let slots = self.lock();
        let up = slots.by_node.values().filter_map(|slot| match slot {
            Slot::Up(connection) => Some(Arc::clone(connection)),
            Slot::Dialling(_) => None,
        });
        up.collect()
    }

    /// Takes no more, and gives those that stand.
    pub(crate) fn close(&self) -> Vec<Arc<Connection>> {
        self.lock().closed = true;
        self.all()
    }

    pub(crate) fn remove(&self, connection: &Arc<Connection>) {
        let mut slots = self.lock();
        if let Some(Slot::Up(current)) = slots.by_node.get(&connection.node)
            && Arc::ptr_eq(current, connection)
        {
            slots.by_node.remove(&connection.node);
        }
    }

    /// What there is with a peer that wants in. When it may come in, the handshake counts as under way until what is
    /// returned is dropped.
    fn standing(&self, own: &str, node: &str) -> (Standing, Option<Accepting<'_>>) {
        let mut slots = self.lock();
        let standing = match slots.by_node.get(node) {
            None => Standing::Unknown,
            Some(Slot::Dialling(_)) => Standing::Dialling,
            Some(Slot::Up(_)) => Standing::Up,
        };
        // Section "Distribution Handshake", step 3: of two attempts that of the greater name goes on.
        let refused = standing == Standing::Dialling && own > node;
        let accepting = (!refused).then(|| {
            let node = Atom::from(node);
            *slots.accepting.entry(node.clone()).or_default() += 1;
            Accepting { table: self, node }
        });
        (standing, accepting)
    }

    /// Whether a connection is up, once no accepted handshake with this peer is under way.
    async fn settled_up(&self, node: &Atom) -> bool {
        let mut changed = self.came_up.subscribe();
        loop {
            {
                let slots = self.lock();
                if let Some(Slot::Up(_)) = slots.by_node.get(node) {
                    return true;
                }
                if !slots.accepting.contains_key(node) {
                    return false;
                }
            }
            if changed.changed().await.is_err() {
                return false;
            }
        }
    }

    fn is_full(&self) -> bool {
        self.lock().by_node.len() >= self.max
    }

    /// Held for short, synchronous sections only.
    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An accepted handshake that is under way.
struct Accepting<'a> {
    table: &'a Connections,
    node: Atom,
}

impl Drop for Accepting<'_> {
    fn drop(&mut self) {
        let mut slots = self.table.lock();
        if let Some(count) = slots.accepting.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                slots.accepting.remove(&self.node);
            }
        }
        drop(slots);
        self.table.came_up.send_modify(|count| *count += 1);
    }
}

impl Inner {
    /// The connection to a node for something that is to be sent: the one there is, or a new one if the node may dial.
    pub(crate) async fn connect(self: &Arc<Self>, node: &Atom) -> Result<Arc<Connection>, ConnectError> {
        if let Some(connection) = self.connections.up(node) {
            return Ok(connection);
        }
        if self.reconnect == Reconnect::Never {
            return Err(ConnectError::NotConnected(node.as_str().to_owned()));
        }
        self.dial_or_wait(node).await
    }

    /// The connection to a node: the one there is, the one that is being made, or a new one.
    pub(crate) async fn dial_or_wait(self: &Arc<Self>, node: &Atom) -> Result<Arc<Connection>, ConnectError> {
        let mut outcome = {
            let mut slots = self.connections.lock();
            if slots.closed {
                return Err(ConnectError::NodeDown);
            }
            match slots.by_node.get(node) {
                Some(Slot::Up(connection)) => return Ok(Arc::clone(connection)),
                Some(Slot::Dialling(outcome)) => outcome.clone(),
                None => {
                    if !is_node_name(node.as_str()) || *node == self.name {
                        return Err(ConnectError::InvalidName(node.as_str().to_owned()));
                    }
                    let max = self.connections.max;
                    if slots.by_node.len() >= max {
                        return Err(ConnectError::TooManyConnections {
                            node: node.as_str().to_owned(),
                            max,
                        });
                    }
                    let (sender, outcome) = watch::channel(None);
                    slots
                        .by_node
                        .insert(node.clone(), Slot::Dialling(outcome.clone()));
                    // A task of its own: the attempt goes on for others when this caller gives up.
                    self.spawn(Arc::clone(self).dial(node.clone(), sender));
                    outcome
                }
            }
        };
        let outcome = outcome
            .wait_for(Option::is_some)
            .await
            .map(|outcome| outcome.clone());
        outcome.ok().flatten().unwrap_or(Err(ConnectError::NodeDown))
    }

    async fn dial(self: Arc<Self>, node: Atom, sender: watch::Sender<Outcome>) {
        let mut came_up = self.connections.came_up.subscribe();
        let attempt = async {
            // The peer's own attempt that this node has said yes to goes first, and once only: a peer that proves
            // nothing is not waited for again.
            let limit = self.limits.handshake_time;
            let came = tokio::time::timeout(limit, self.connections.settled_up(&node)).await;
            if let (Ok(true), Some(connection)) = (came, self.connections.up(&node)) {
                return Ok(Err(connection));
            }
            self.dial_once(&node).await.map(Ok)
        };
        let dialled = tokio::select! {
            dialled = attempt => dialled,
            () = self.stop.cancelled() => Err(ConnectError::NodeDown),
        };
        let outcome = match dialled {
            Ok(Ok(ready)) => self.admit(ready, Direction::Outbound),
            Ok(Err(connection)) => Ok(connection),
            Err(error) if is_simultaneous(&error) => {
                // Their attempt goes on instead of ours; its handshake has as much time as ours had.
                let theirs = async {
                    loop {
                        if let Some(connection) = self.connections.up(&node) {
                            return Some(connection);
                        }
                        came_up.changed().await.ok()?;
                    }
                };
                let theirs = tokio::time::timeout(self.limits.handshake_time, theirs).await;
                theirs.ok().flatten().ok_or(error)
            }
            Err(error) => self.connections.up(&node).ok_or(error),
        };
        let mut slots = self.connections.lock();
        if let Some(Slot::Dialling(_)) = slots.by_node.get(&node) {
            slots.by_node.remove(&node);
        }
        drop(slots);
        if let Err(error) = &outcome {
            tracing::info!(node = node.as_str(), %error, "no connection");
        }
        let _ = sender.send(Some(outcome));
    }

    async fn dial_once(&self, node: &Atom) -> Result<Ready, ConnectError> {
        let limits = &self.limits;
        let transport = self.carrier.dial(node.as_str(), limits.handshake_time).await?;
        let is_up = || self.connections.settled_up(node);
        let ready = handshake::initiate(
            transport,
            self.local.clone(),
            node.as_str(),
            self.cookie.clone(),
            limits.message_bytes,
            limits.handshake_time,
            is_up,
        );
        ready
            .await
            .map_err(|failure| failure.into_connect_error(node.as_str()))
    }

    /// A connection whose handshake is done takes its place in the table and starts to work.
    fn admit(self: &Arc<Self>, ready: Ready, direction: Direction) -> Result<Arc<Connection>, ConnectError> {
        let connection = Arc::new(Connection::new(self, &ready, direction));
        let node = connection.node.clone();
        let mut slots = self.connections.lock();
        let replaced = match slots.by_node.get(&node) {
            _ if slots.closed => return Err(ConnectError::NodeDown),
            Some(Slot::Up(old)) if ready.replaces => Some(Arc::clone(old)),
            Some(Slot::Up(old)) => return Ok(Arc::clone(old)),
            None if slots.by_node.len() >= self.connections.max => {
                let max = self.connections.max;
                return Err(ConnectError::TooManyConnections {
                    node: node.as_str().to_owned(),
                    max,
                });
            }
            Some(Slot::Dialling(_)) | None => None,
        };
        slots.by_node.insert(node, Slot::Up(Arc::clone(&connection)));
        drop(slots);
        if let Some(old) = replaced {
            // First its end, then the new one's beginning, also for those who listen.
            old.close(DownReason::Replaced);
            self.ended(&old);
        }
        tracing::info!(node = connection.node.as_str(), ?direction, "connection up");
        self.tell(connection.up_event());
        self.connections.came_up.send_modify(|count| *count += 1);
        let (inner, running) = (Arc::clone(self), Arc::clone(&connection));
        self.spawn(connection::run(inner, running, ready.transport, ready.decoder));
        Ok(connection)
    }

    /// Accepts connections until the node shuts down.
    pub(crate) async fn accept_all(self: Arc<Self>, listener: Listener) {
        let places = Arc::new(Places::new(self.limits.handshakes));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.stop.cancelled() => return,
            };
            match accepted {
                Ok(accepted) => {
                    // Taken here: whoever is pushed out is so before the next one is accepted.
                    let place = places.enter(&accepted);
                    let (inner, places) = (Arc::clone(&self), Arc::clone(&places));
                    self.spawn(async move {
                        tokio::select! {
                            () = inner.accept_one(accepted, &place, &places) => {}
                            () = place.evicted() => places.tell(inner.limits.handshakes),
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, say: no use to spin.
                    tracing::warn!(%error, "accepting failed");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn accept_one(self: &Arc<Self>, accepted: Accepted, place: &Place, places: &Places) {
        // Until the connection is in the table, or its attempt has failed.
        let mut under_way = None;
        let accepting = &mut under_way;
        if self.connections.is_full() {
            tracing::warn!(
                limit = self.connections.max,
                "a connection is refused: limit `connections`"
            );
            return;
        }
        let handshake = async {
            let limits = &self.limits;
            let (transport, vouched) = self.carrier.greet(accepted, limits.handshake_time).await?;
            if let Some(node) = &vouched {
                place.moves(&places.known, Origin::node(node.clone()));
            }
            handshake::accept(
                transport,
                self.local.clone(),
                vouched.as_deref(),
                self.cookie.clone(),
                limits.message_bytes,
                limits.handshake_time,
                |peer| {
                    let (standing, guard) = self.connections.standing(self.name.as_str(), peer);
                    *accepting = guard;
                    standing
                },
            )
            .await
        };
        let failure = tokio::select! {
            ready = handshake => match ready {
                Ok(ready) => self.admit(ready, Direction::Inbound).err().map(|error| error.to_string()),
                Err(failure) => Some(failure.to_string()),
            },
            () = self.stop.cancelled() => None,
        };
        if let Some(failure) = failure {
            tracing::warn!(failure, "a connection is refused");
        }
    }
}

/// Room for accepted handshakes: whoever is slow, or opens many, must not keep others out.
struct Places {
    /// Those of which it is not known yet whose they are: what comes from an agent and has not been greeted.
    strangers: Arc<Admission>,
    /// And the others.
    known: Arc<Admission>,
    log: LogLimit,
}

impl Places {
    fn new(max: usize) -> Self {
        Self {
            strangers: Admission::new(max),
            known: Admission::new(max),
            log: LogLimit::new("handshakes that gave way"),
        }
    }

    fn tell(&self, limit: usize) {
        if self.log.admit() {
            tracing::warn!(limit, "a handshake gave way to a newer one: limit `handshakes`");
        }
    }

    fn enter(&self, accepted: &Accepted) -> Place {
        match accepted {
            Accepted::Mesh(_) => self.strangers.enter(Origin::UNKNOWN),
            Accepted::Plain(_, from) => self.known.enter(Origin::address(from.ip())),
        }
    }
}

/// The peer said `nok`: it dials us at the same moment, and its name is the greater one. Or it has done so already.
fn is_simultaneous(error: &ConnectError) -> bool {
    let ConnectError::Handshake { error, .. } = error else {
        return false;
    };
    matches!(error, HandshakeError::Refused { status: "nok" })
}

/// `name@host`, each part at least one character, at most 255 in all.
pub(crate) fn is_node_name(name: &str) -> bool {
    let parts = name.split_once('@');
    name.chars().count() <= 255
        && parts.is_some_and(|(name, host)| !name.is_empty() && !host.is_empty() && !host.contains('@'))
}

impl Failure {
    fn into_connect_error(self, node: &str) -> ConnectError {
        let node = node.to_owned();
        let step = "handshake";
        match self {
            Self::Handshake(error) => ConnectError::Handshake { node, error },
            Self::Io(error) => ConnectError::Io {
                node,
                step,
                error: Arc::new(error),
            },
            Self::Timeout(after) => ConnectError::Timeout { node, step, after },
            other => ConnectError::Protocol {
                node,
                text: other.to_string(),
            },
        }
    }
}
