//! One connection: a request, its answer and, for a registration, the wait for its end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use meshx_dist::epmd::{
    Alive2Resp, DIST_VERSION, MAX_REQUEST, Node, NodeType, Port2Resp, Request, encode_names_resp,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Duration, Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::kept::KeptName;
use super::names::Place;
use super::{Epmd, HOLD, RECLAIM, REQUEST_TIME, invalid};
use crate::agent::control::FREEZE_TIME;
use crate::agent::registry::options::Options;
use crate::agent::registry::{NodeListens, NodeRequest, Owner};
use crate::agent::trust::Peer;
use crate::proxy::admission::{Origin, Slot};
use crate::proxy::cause::{Cause, Refusal};
use crate::proxy::peer_uid;

/// A name is free within a second after its VM was killed: one that starts again at once waits for that.
const NAME_FREE_WITHIN: Duration = Duration::from_secs(2);
const REGISTER_AGAIN: Duration = Duration::from_millis(100);
/// How often the mesh is asked for a node that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// What `KILL_REQ` and `STOP_REQ` are answered with, as by an EPMD that does not allow them.
const NO: &[u8] = b"NO";
const NO_EXIST: &[u8] = b"NOEXIST";

/// A registration through one connection.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) epmd: Arc<Epmd>,
    pub(super) name: String,
    /// None: a tool, which the mesh does not know.
    pub(super) owner: Option<u64>,
    pub(super) place: Place,
}

impl Epmd {
    pub(super) async fn session(
        self: Arc<Self>,
        mut stream: TcpStream,
        slot: Slot,
        stop: CancellationToken,
        freeze: CancellationToken,
    ) {
        let mut asked = String::new();
        // Now, while the client cannot have gone unnoticed: a socket without a process has no user.
        let uid = peer_uid::of(&stream);
        let known = uid.as_ref().ok().copied();
        if let Some(uid) = known {
            slot.is_of(Origin::user(uid));
        }
        let answered = tokio::select! {
            answered = self.answer(&mut stream, uid, &mut asked) => answered,
            () = slot.evicted() => Err(slot.refusal()),
            () = too_late(&freeze) => Err(Cause::NotReady.because("another process takes this agent over: ask again")),
            () = stop.cancelled() => return,
        };
        match answered {
            Ok(None) => {}
            Ok(Some(held)) => {
                drop(slot);
                self.hold(stream, held, stop, freeze).await;
            }
            Err(gone) if asked.is_empty() && gone.cause == Cause::Unreachable => {}
            Err(refusal) => self.refused(known, &asked, &refusal),
        }
    }

    /// Until the connection ends, or this process is to serve it no more.
    pub(super) async fn hold(
        self: Arc<Self>,
        mut stream: TcpStream,
        mut held: Held,
        stop: CancellationToken,
        freeze: CancellationToken,
    ) {
        let mut more = [0];
        tokio::select! {
            // A node says nothing more.
            _ = stream.read(&mut more) => self.kept.forget_name(&held.name),
            // It runs on and comes back to the next agent.
            () = stop.cancelled() => {}
            () = freeze.cancelled() => return self.park(stream, held),
        }
        held.end().await;
    }

    /// Gives what the connection holds from now on.
    async fn answer(
        self: &Arc<Self>,
        stream: &mut TcpStream,
        uid: Result<u32, Refusal>,
        asked: &mut String,
    ) -> Result<Option<Held>, Refusal> {
        let request = timeout(REQUEST_TIME, read_request(stream)).await;
        let silent = |_| Cause::Timeout.because(format!("no whole request within {REQUEST_TIME:?}"));
        let request = request.map_err(silent)??;
        let uid = uid?;
        let here = stream
            .local_addr()
            .map_err(|error| invalid(error.to_string()))?
            .ip();
        let mut reply = Vec::new();
        let mut held = Ok(None);
        match request {
            Request::Alive2(node) => {
                *asked = String::from_utf8_lossy(&node.name).into_owned();
                let registered = self.register(&node, uid, here).await;
                let creation = registered.as_ref().map(|(_, creation)| *creation);
                alive2_resp(node.highest_version, creation.ok()).encode(&mut reply);
                held = registered.map(|(held, _)| Some(held));
            }
            Request::PortPlease2(name) => {
                *asked = String::from_utf8_lossy(&name).into_owned();
                let found = self.port_of(&name, uid, here).await;
                let response = match &found {
                    Ok(Some(node)) => Port2Resp::Found(node.clone()),
                    Ok(None) | Err(_) => Port2Resp::NotFound(1),
                };
                response
                    .encode(&mut reply)
                    .map_err(|error| invalid(error.to_string()))?;
                held = found.map(|_| None);
            }
            Request::Names => {
                let names = self.all_names(here);
                let names = names.iter().map(|(name, port)| (name.as_bytes(), *port));
                encode_names_resp(self.port.into(), names, &mut reply)
                    .map_err(|error| invalid(error.to_string()))?;
            }
            Request::Kill => reply.extend_from_slice(NO),
            Request::Stop(_) => reply.extend_from_slice(NO_EXIST),
            Request::Dump => {}
        }
        write(stream, &reply).await?;
        held
    }

    async fn register(self: &Arc<Self>, node: &Node, uid: u32, here: IpAddr) -> Result<(Held, u32), Refusal> {
        let name = std::str::from_utf8(&node.name)
            .map_err(|_| Cause::InvalidName.because("the name is not UTF-8"))?
            .to_owned();
        if node.highest_version < DIST_VERSION {
            return Err(Cause::VersionMismatch.because(format!(
                "{name} speaks distribution version {} at most, wanted {DIST_VERSION} (OTP 23 and later)",
                node.highest_version
            )));
        }
        let mut place = self.names.enter(uid)?;
        if self.config.tools.matches(&name) {
            place.hold_tool(&name, node.clone())?;
            debug!(name, uid, "tool registered");
            let creation = self.registry.fresh_creation();
            return Ok((Held::new(self.clone(), name, None, place), creation));
        }
        if !self.config.nodes.matches(&name) {
            return Err(Cause::NotPermitted.because(format!(
                "{name} is not among the names that EPMD takes: start the agent with --epmd-nodes {name}, or the node \
                 with meshx run"
            )));
        }
        // The peer's group cannot be told: no rule is about this one.
        let peer = Peer {
            uid,
            gid: u32::MAX,
            pid: None,
        };
        let owner = Owner {
            id: self.next_owner.fetch_add(1, Ordering::Relaxed),
            peer,
        };
        let brought = self.brought(&name, uid, node.port)?;
        // What its events tell concerns nodes with a control connection.
        drop(self.registry.enter(owner.id));
        let mut held = Held::new(self.clone(), name, Some(owner.id), place);
        match self
            .register_in_mesh(owner, &held.name, node, here, brought)
            .await
        {
            Ok(creation) => {
                let kept = KeptName {
                    uid,
                    port: node.port,
                    creation,
                };
                self.kept.set_name(&held.name, kept);
                self.arrived.notify_waiters();
                Ok((held, creation))
            }
            Err(refusal) => {
                held.end().await;
                Err(refusal)
            }
        }
    }

    /// The creation of a node that ran before this agent did, and goes on: it ignores what it is told now.
    fn brought(&self, name: &str, uid: u32, port: u16) -> Result<Option<u32>, Refusal> {
        let Some(before) = self
            .kept
            .before(name)
            .filter(|_| self.started.elapsed() < RECLAIM)
        else {
            return Ok(None);
        };
        if before.uid != uid {
            return Err(Cause::NameTaken.because(format!(
                "{name} was registered by uid {} before this agent started, and is kept for it for {RECLAIM:?}",
                before.uid
            )));
        }
        Ok((before.port == port).then_some(before.creation))
    }

    async fn register_in_mesh(
        &self,
        owner: Owner,
        name: &str,
        node: &Node,
        here: IpAddr,
        brought: Option<u32>,
    ) -> Result<u32, Refusal> {
        let full = format!("{name}@{}", self.config.host);
        let until = Instant::now() + NAME_FREE_WITHIN;
        loop {
            let request = NodeRequest {
                node: &full,
                listens: NodeListens::Plain(SocketAddr::new(own_loopback(here), node.port)),
                secret: None,
                creation: brought.map(i64::from),
                hidden: node.node_type == NodeType::Hidden,
                options: Options::default(),
            };
            match self.registry.register_node(owner, request).await {
                Err(taken) if taken.cause == Cause::NameTaken && Instant::now() < until => {
                    sleep(REGISTER_AGAIN).await;
                }
                registered => return registered.map(|node| node.creation),
            }
        }
    }

    /// Where the asking user reaches a node of the host that the address stands for.
    async fn port_of(&self, name: &[u8], uid: u32, here: IpAddr) -> Result<Option<Node>, Refusal> {
        let Ok(name) = std::str::from_utf8(name) else {
            return Ok(None);
        };
        let Some(host) = self.host_at(here) else {
            return Ok(None);
        };
        // Nobody else's business, and no other host's.
        if let Some(tool) = self.names.tool(name).filter(|_| host == self.config.host) {
            return Ok((tool.uid == uid).then_some(tool.node));
        }
        let node = format!("{name}@{host}");
        if !self.find(&node).await? {
            return Ok(None);
        }
        let port = self.ports.port(here, &node);
        let port = port.map_err(|error| Cause::NotReady.because(format!("no port for {node}: {error}")))?;
        Ok(Some(Node::new(name, port, NodeType::Normal)))
    }

    /// Whether there is such a node. For a while after the start one that is not there yet is waited for.
    async fn find(&self, node: &str) -> Result<bool, Refusal> {
        loop {
            let arrived = self.arrived.notified();
            let found = self.registry.knows(node).await;
            let left = HOLD.saturating_sub(self.started.elapsed());
            match found {
                Ok(false) | Err(_) if !left.is_zero() => {}
                found => return found,
            }
            let _ = timeout(left.min(LOOK_AGAIN), arrived).await;
        }
    }

    /// The nodes of this host; port 0 for what there is no room for.
    fn all_names(&self, here: IpAddr) -> Vec<(String, u16)> {
        let own = |node: &str| {
            let (name, host) = node.split_once('@')?;
            (host == self.config.host).then(|| name.to_owned())
        };
        let of_mesh = self.registry.local_nodes().into_iter().filter_map(|node| {
            // A node's name outside EPMD may be one that a listing cannot show.
            let name =
                own(&node).filter(|name| !name.contains(|c: char| c.is_whitespace() || c.is_control()))?;
            Some((name, self.ports.port_if_room(here, &node).unwrap_or_default()))
        });
        let mut names: Vec<_> = of_mesh.chain(self.names.tools()).collect();
        names.sort();
        names
    }
}

impl Held {
    pub(super) fn new(epmd: Arc<Epmd>, name: String, owner: Option<u64>, place: Place) -> Self {
        Self {
            epmd,
            name,
            owner,
            place,
        }
    }

    /// Another process has it.
    pub(super) fn leave(mut self) {
        self.owner = None;
    }

    async fn end(&mut self) {
        if let Some(owner) = self.owner.take() {
            self.epmd.registry.release(owner).await;
        }
    }
}

impl Drop for Held {
    /// When its connection had to make room in the middle of its registration.
    fn drop(&mut self) {
        if let Some(owner) = self.owner.take() {
            self.epmd.kept.forget_name(&self.name);
            let registry = self.epmd.registry.clone();
            tokio::spawn(async move { registry.release(owner).await });
        }
    }
}

/// A request that is not answered yet when a successor asks for everything: it has as long as those of clients.
async fn too_late(freeze: &CancellationToken) {
    freeze.cancelled().await;
    sleep(FREEZE_TIME).await;
}

/// Reads up to the end of one request: nothing may follow it.
async fn read_request(stream: &mut TcpStream) -> Result<Request, Refusal> {
    let mut bytes = Vec::with_capacity(64);
    loop {
        match Request::decode(&bytes) {
            Ok(Some(request)) => return Ok(request),
            Ok(None) => {}
            Err(error) => return Err(invalid(error.to_string())),
        }
        let mut chunk = [0; MAX_REQUEST + 2];
        let read = stream.read(&mut chunk).await.map_err(left)?;
        match (read, bytes.len()) {
            (0, 0) => return Err(Cause::Unreachable.because("closed without a request")),
            (0, read) => return Err(invalid(format!("closed inside a request, after {read} bytes"))),
            _ => bytes.extend_from_slice(chunk.get(..read).unwrap_or_default()),
        }
    }
}

/// One write, so that nobody sees half of it.
async fn write(stream: &mut TcpStream, bytes: &[u8]) -> Result<(), Refusal> {
    match timeout(REQUEST_TIME, stream.write_all(bytes)).await {
        Ok(written) => written.map_err(left),
        Err(_) => Err(Cause::Timeout.because("the answer is not read")),
    }
}

fn left(error: io::Error) -> Refusal {
    Cause::Unreachable.because(error.to_string())
}

/// In the form that the node knows; result 1 says that the name cannot be had.
fn alive2_resp(highest_version: u16, creation: Option<u32>) -> Alive2Resp {
    match (creation, highest_version >= DIST_VERSION) {
        (Some(creation), _) => Alive2Resp::Creation32 { result: 0, creation },
        (None, true) => Alive2Resp::Creation32 {
            result: 1,
            creation: 0,
        },
        (None, false) => Alive2Resp::Creation16 {
            result: 1,
            creation: 0,
        },
    }
}

/// A node listens by the family by which it registers, for all addresses or this one.
fn own_loopback(here: IpAddr) -> IpAddr {
    match here {
        IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}
