//! What is registered through this agent, and by which control connection.
//!
//! An id goes through three phases: pending (reserved while the mesh is asked), live, leaving (taken out of
//! the mesh, its name not yet free). So two clients can never hold one name, whatever the mesh takes to
//! answer, and a late answer never touches a successor's registration.

pub mod carrier;
mod checks;
mod creation;
mod enlist;
mod handed;
mod hung;
mod leave;
pub mod options;
mod orphans;
mod pending;
mod request;
mod reserved;
mod session;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub(super) use carrier::FrozenSidecar;
use carrier::{Carried, Carriers};
pub(super) use checks::chosen_socket;
use creation::Creations;
use enlist::Wish;
pub(super) use handed::{FrozenSidecars, Handed, HandedInstance, HandedInstances, HandedPorts};
use pending::Pending;
pub use request::{Node, NodeListens, NodeRequest, Service, ServiceRequest};
pub(super) use reserved::Reserved;
pub(super) use session::HandedSession;
pub use session::SessionName;
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};
use tracing::info;

use super::{
    config::NodeService,
    sidecar::SidecarEvent,
    takeover::Predecessors,
    trust::{Peer, Trust},
};
use crate::{
    mesh::{Answer, Instance, Kept, Mesh, MeshError, Protocol, ServiceName},
    proxy::{
        cause::{Cause, Refusal},
        links::LinkTable,
        local::{Endpoint, LocalTable},
    },
};

/// Nodes and services that one control connection may have registered.
pub const INSTANCES_PER_CLIENT_MAX: usize = 256;
/// Nodes, services and sessions that one agent may have registered.
pub const INSTANCES_MAX: usize = 4096;
/// And those of one user other than the agent's own and root.
pub const INSTANCES_PER_USER_MAX: usize = 1024;
/// How long the mesh may take to answer one question of a registration.
pub const MESH_TIME: Duration = Duration::from_secs(5);

/// Events of sidecars that may wait for one control connection.
pub const SIDECAR_EVENTS_MAX: usize = 128;

/// How long links outlive the control connection of their end, so that a VM which lost it can register again; links
/// of what was deregistered by a command end at once.
pub const RECLAIM_TIME: Duration = Duration::from_secs(10);

/// A control connection, as far as registrations care.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    /// Unique in the agent's life.
    pub id: u64,
    /// Who is at its other end.
    pub peer: Peer,
}

/// The registrations of one agent.
pub struct Registry {
    mesh: Arc<dyn Mesh>,
    local: LocalTable,
    links: LinkTable,
    predecessors: Predecessors,
    trust: Trust,
    place: Place,
    carriers: Carriers,
    // Held for a registration or a release, never across an await; `state` is taken inside, never around it.
    sessions: Mutex<session::Held>,
    /// [`RECLAIM_TIME`], but in tests.
    reclaim: Duration,
    /// Nodes have come or gone.
    renamed: Notify,
    // Held for a look-up or a change, never across an await.
    state: Mutex<State>,
}

/// What the agent's own entries in the mesh say, and where its clients' sockets lie.
#[derive(Debug, Clone)]
pub struct Place {
    /// The agent's id in the mesh.
    pub agent: String,
    /// Where other agents connect.
    pub inbound: SocketAddr,
    /// Host parts of node names that it owns.
    pub hosts: Vec<String>,
    /// Where nodes make their sockets.
    pub vm: PathBuf,
    /// Where services make theirs.
    pub up: PathBuf,
    /// Which service a node is an instance of.
    pub node_service: NodeService,
}

#[derive(Debug)]
struct State {
    owners: HashMap<u64, Client>,
    ids: HashMap<String, Entry>,
    creations: Creations,
    services: u64,
    /// Nothing more is registered.
    closing: bool,
    reserved: Reserved,
}

/// A control connection.
#[derive(Debug)]
struct Client {
    registrations: usize,
    /// Of the one who registered something, when his share is limited.
    user: Option<u32>,
    /// What its sidecars do.
    events: mpsc::Sender<SidecarEvent>,
}

#[derive(Debug)]
struct Entry {
    owner: u64,
    phase: Phase,
    /// What the mesh was told, once it is live.
    kept: Option<Kept>,
    /// Ends with the entry, or before.
    carried: Option<Carried>,
    /// Whether the mesh has it as critical, because its VM does not answer.
    hung: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Pending,
    Live,
    Leaving,
}

impl Registry {
    /// No registrations yet.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn new(
        mesh: Arc<dyn Mesh>,
        local: LocalTable,
        links: LinkTable,
        trust: Trust,
        place: Place,
        carriers: Carriers,
    ) -> std::io::Result<Self> {
        let state = State {
            owners: HashMap::new(),
            ids: HashMap::new(),
            creations: Creations::new()?,
            services: 0,
            closing: false,
            reserved: Reserved::default(),
        };
        Ok(Self {
            mesh,
            local,
            links,
            predecessors: Predecessors::default(),
            trust,
            place,
            carriers,
            sessions: Mutex::default(),
            reclaim: RECLAIM_TIME,
            renamed: Notify::new(),
            state: Mutex::new(state),
        })
    }

    /// Keeps these names for their holders.
    pub(in crate::agent) fn reserve_names(&self, reserved: Reserved) {
        self.lock().reserved = reserved;
    }

    /// Who may be which service.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The mesh that registrations go to.
    pub fn mesh(&self) -> &Arc<dyn Mesh> {
        &self.mesh
    }

    /// What the agent's own entries say.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Earlier processes of this agent that still hold links.
    pub(in crate::agent) fn predecessors(&self) -> &Predecessors {
        &self.predecessors
    }

    /// What carries the traffic of instances.
    pub fn carriers(&self) -> &Carriers {
        &self.carriers
    }

    /// A control connection begins. What its sidecars do is told here; lines are left out when nobody reads.
    pub fn enter(&self, owner: u64) -> mpsc::Receiver<SidecarEvent> {
        let (events, told) = mpsc::channel(SIDECAR_EVENTS_MAX);
        let client = Client {
            registrations: 0,
            user: None,
            events,
        };
        self.lock().owners.insert(owner, client);
        told
    }

    /// Registers a node: it is in the mesh when this returns.
    ///
    /// # Errors
    /// What the table of causes lists under registration faults, `not_permitted`, `limit`, `not_ready`.
    pub async fn register_node(
        self: &Arc<Self>,
        owner: Owner,
        request: NodeRequest<'_>,
    ) -> Result<Node, Refusal> {
        let host = checks::node_name(request.node)?;
        let service = self
            .place
            .node_service
            .of(request.node)
            .map_err(|error| Cause::InvalidName.because(format!("node {:?}: {error}", request.node)))?;
        self.permit(owner.peer, &service)?;
        request.options.permit(owner.peer, &self.trust)?;
        self.own_host(request.node, host)?;
        let endpoint = match request.listens {
            NodeListens::Socket(socket) => {
                Endpoint::NodeSocket(checks::node_socket(&self.place.vm, socket, owner.peer)?)
            }
            NodeListens::Plain(address) => checks::plain_node(address)?,
        };
        let brought = request.creation.map(checks::creation).transpose()?;
        let reserved = |state: &State| {
            state
                .reserved
                .check(request.node, owner.peer, request.secret.as_ref())
        };
        reserved(&self.lock())?;
        let elsewhere = answer(self.mesh.node(request.node)).await?;
        if let Some(other) = elsewhere.filter(|other| other.agent != self.place.agent) {
            return Err(Cause::NameTaken.because(format!(
                "{} is registered with the agent at {}",
                request.node, other.address
            )));
        }
        let instance = self.instance(request.node, &service, Some(request.node));
        self.give_way(owner, &instance.id);
        let pending = self.reserve(owner, &instance.id)?;
        let creation = self.lock().creations.next(brought);
        let (secret, spiffe) = self
            .enlist(
                pending,
                Wish {
                    instance,
                    endpoint,
                    owner,
                    options: request.options,
                },
            )
            .await?;
        self.lock().reserved.forget(request.node);
        self.renamed.notify_one();
        info!(
            node = request.node, %service, creation, hidden = request.hidden, returned = brought.is_some(),
            uid = owner.peer.uid, client = owner.id, "node registered"
        );
        Ok(Node {
            creation,
            secret,
            service,
            spiffe,
        })
    }

    /// A creation for a node that the mesh is not told of.
    pub(crate) fn fresh_creation(&self) -> u32 {
        self.lock().creations.next(None)
    }

    /// Whether there is a passing node of this name, here or elsewhere.
    ///
    /// # Errors
    /// When the mesh does not answer.
    pub(crate) async fn knows(&self, node: &str) -> Result<bool, Refusal> {
        Ok(self.local.by_node(node).is_some() || answer(self.mesh.node(node)).await?.is_some())
    }

    /// The names of all nodes that are registered here.
    pub(crate) fn local_nodes(&self) -> Vec<String> {
        let all = self.local.all();
        all.iter()
            .filter_map(|local| local.instance.node.clone())
            .collect()
    }

    /// Registers a service: it is in the mesh when this returns.
    ///
    /// # Errors
    /// As [`Registry::register_node`].
    pub async fn register_service(
        self: &Arc<Self>,
        owner: Owner,
        request: ServiceRequest<'_>,
    ) -> Result<Service, Refusal> {
        let service = ServiceName::new(request.name)
            .map_err(|error| Cause::InvalidName.because(format!("service {:?}: {error}", request.name)))?;
        self.permit(owner.peer, &service)?;
        request.options.permit(owner.peer, &self.trust)?;
        let id = match request.id {
            Some(id) => checks::service_id(id)?.to_owned(),
            None => self.next_service_id(&service),
        };
        let endpoint = match request.address {
            Some(endpoint) => checks::endpoint(endpoint, &self.place, owner.peer, &self.trust)?,
            None => Endpoint::Uds(chosen_socket(&self.place.up)?),
        };
        let instance = self.instance(&id, &service, None);
        let pending = self.reserve(owner, &id)?;
        let address = endpoint.clone();
        let (_, spiffe) = self
            .enlist(
                pending,
                Wish {
                    instance,
                    endpoint,
                    owner,
                    options: request.options,
                },
            )
            .await?;
        info!(id, %service, uid = owner.peer.uid, client = owner.id, "service registered");
        Ok(Service {
            id,
            service,
            spiffe,
            address,
        })
    }

    /// Whether this connection has this instance registered.
    pub fn is_live(&self, owner: u64, id: &str) -> bool {
        let state = self.lock();
        state
            .ids
            .get(id)
            .is_some_and(|entry| entry.owner == owner && entry.phase == Phase::Live)
    }

    fn own_host(&self, node: &str, host: &str) -> Result<(), Refusal> {
        if self.place.hosts.iter().any(|owned| owned == host) {
            return Ok(());
        }
        Err(Cause::HostNotOwned.because(format!(
            "host part {host:?} of {node:?} is not one of this agent's: {}; start it with --host {host} to own that one \
             too",
            self.place.hosts.join(", ")
        )))
    }

    fn permit(&self, peer: Peer, service: &ServiceName) -> Result<(), Refusal> {
        self.trust
            .check(peer, service.as_ref())
            .map_err(|text| Cause::NotPermitted.because(text))
    }

    fn instance(&self, id: &str, service: &ServiceName, node: Option<&str>) -> Instance {
        Instance {
            id: id.to_owned(),
            service: service.clone(),
            node: node.map(str::to_owned),
            agent: self.place.agent.clone(),
            address: self.place.inbound,
            protocol: Protocol::Meshx,
            meta: BTreeMap::new(),
        }
    }

    fn next_service_id(&self, service: &ServiceName) -> String {
        let mut state = self.lock();
        state.services += 1;
        let host = self.place.hosts.first().map_or("host", String::as_str);
        format!("{service}-{host}-{}", state.services)
    }

    fn reserve(self: &Arc<Self>, owner: Owner, id: &str) -> Result<Pending, Refusal> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.closing {
            return Err(Cause::NotReady.because("this agent ends: another one may take its place"));
        }
        if state.ids.contains_key(id) {
            return Err(Cause::NameTaken.because(format!("{id} is registered with this agent")));
        }
        if state.ids.len() >= INSTANCES_MAX {
            let text = format!("{INSTANCES_MAX} registrations, more are not taken (INSTANCES_MAX)");
            return Err(Cause::Limit.because(text));
        }
        let user = self.trust.limited(owner.peer.uid);
        let his = |client: &&Client| user.is_some() && client.user == user;
        let of_user: usize = state
            .owners
            .values()
            .filter(his)
            .map(|client| client.registrations)
            .sum();
        if of_user >= INSTANCES_PER_USER_MAX {
            return Err(Cause::Limit.because(format!(
                "{of_user} registrations of uid {}, more are not taken (INSTANCES_PER_USER_MAX)",
                owner.peer.uid
            )));
        }
        let client = state.owners.get_mut(&owner.id).ok_or_else(owner_gone)?;
        client.user = user;
        let count = &mut client.registrations;
        if *count >= INSTANCES_PER_CLIENT_MAX {
            return Err(Cause::Limit.because(format!(
                "{count} registrations of this connection, more are not taken (INSTANCES_PER_CLIENT_MAX)"
            )));
        }
        *count += 1;
        state.ids.insert(
            id.to_owned(),
            Entry {
                owner: owner.id,
                phase: Phase::Pending,
                kept: None,
                carried: None,
                hung: false,
            },
        );
        Ok(Pending::new(self.clone(), id.to_owned()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget(&mut self, id: &str) {
        if let Some(entry) = self.ids.remove(id)
            && let Some(client) = self.owners.get_mut(&entry.owner)
        {
            client.registrations = client.registrations.saturating_sub(1);
        }
    }
}

fn owner_gone() -> Refusal {
    Cause::InvalidRequest.because("the connection that asked for it has ended")
}

/// The mesh's answer; none in time is none, and so a no.
pub(crate) async fn answer<T>(question: Answer<'_, T>) -> Result<T, Refusal> {
    match timeout(MESH_TIME, question).await {
        Ok(answer) => answer.map_err(refused),
        Err(_) => Err(silent()),
    }
}

fn refused(error: MeshError) -> Refusal {
    match error {
        MeshError::NameTaken(text) => Cause::NameTaken.because(text),
        MeshError::HostTaken(text) => Cause::HostNotOwned.because(text),
        MeshError::Refused(text) => Cause::InvalidRequest.because(text),
        error => error.into(),
    }
}

fn silent() -> Refusal {
    Cause::NotReady.because(format!(
        "the mesh did not answer within {} s",
        MESH_TIME.as_secs()
    ))
}

#[cfg(test)]
mod tests;
