//! This agent's entries in Consul, kept there whatever Consul loses.
//!
//! An entry is a service with a TTL check that is refreshed at half its time. A refresh that Consul does not know,
//! a token that changed and an entry that is not in the Consul agent's list lead to a new registration. Entries
//! that carry this agent's id and that nobody holds (it was killed) are taken away.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::catalogue::{AgentCheck, Catalogue, NOTE};
use super::client::{Client, Fault, Request};
use super::form::{check_entry, form};
use super::{META_AGENT, Tokens, write};
use crate::mesh::{DataPlane, Entry, Instance, MeshError, ServiceName, Token, split_node};

/// How long a registration waits for the catalogue to show it; it follows within moments.
const SHOWN: Duration = Duration::from_millis(1500);
/// Entries of one agent.
const ENTRIES_MAX: usize = 4096;
/// What is done with an id is done in order; ids share this many locks.
const LOCKS: usize = 64;

/// Registers and keeps.
pub(super) struct Registrar {
    pub(super) client: Arc<Client>,
    pub(super) tokens: Arc<Tokens>,
    catalogue: Arc<Catalogue>,
    pub(super) agent: String,
    hosts: Vec<String>,
    pub(super) began: Instant,
    /// Fires when nothing is kept any more: the mesh ends, or a successor of this process keeps it.
    pub(super) stop: CancellationToken,
    pub(super) compare: Notify,
    /// Whether the last refresh of any check found no Consul.
    pub(super) away: AtomicBool,
    // Held for a look or a change, never across an await.
    state: Mutex<State>,
    order: [tokio::sync::Mutex<()>; LOCKS],
}

#[derive(Default)]
pub(super) struct State {
    pub(super) held: HashMap<String, Held>,
    /// Entries that Consul was not told the end of, and the token to tell it with.
    pub(super) leaving: HashMap<String, Option<Token>>,
}

pub(super) struct Held {
    pub(super) entry: Entry,
    /// What it is registered with: the token then in use.
    pub(super) token: Option<Token>,
    /// Where an adopted entry is reached.
    address: Option<SocketAddr>,
    /// Why its check is to be critical.
    pub(super) critical: Option<String>,
    /// Fires when Consul is to be told of its check at once.
    pub(super) changed: Arc<Notify>,
    /// Ends its keeper.
    ended: CancellationToken,
}

impl Registrar {
    pub(super) fn new(
        client: Arc<Client>,
        tokens: Arc<Tokens>,
        catalogue: Arc<Catalogue>,
        agent: &str,
        hosts: Vec<String>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            client,
            tokens,
            catalogue,
            agent: agent.to_owned(),
            hosts,
            began: Instant::now(),
            stop,
            compare: Notify::new(),
            away: AtomicBool::new(false),
            state: Mutex::default(),
            order: std::array::from_fn(|_| tokio::sync::Mutex::default()),
        })
    }

    /// Whether this agent has an instance of the service.
    pub(super) fn serves(&self, service: &ServiceName) -> bool {
        let state = self.lock();
        state
            .held
            .values()
            .any(|held| held.entry.instance.service == *service)
    }

    pub(super) fn agent(&self) -> &str {
        &self.agent
    }

    pub(super) fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// How many instances are held.
    pub(super) fn count(&self) -> usize {
        self.lock().held.len()
    }

    /// The services that this agent has instances of.
    pub(super) fn services(&self) -> Vec<ServiceName> {
        let state = self.lock();
        let services: HashSet<_> = state
            .held
            .values()
            .map(|held| &held.entry.instance.service)
            .collect();
        services.into_iter().cloned().collect()
    }

    /// The service of an instance of this agent.
    pub(super) fn service_of(&self, id: &str) -> Option<ServiceName> {
        Some(self.lock().held.get(id)?.entry.instance.service.clone())
    }

    /// Where an adopted instance is reached, by its registration.
    pub(super) fn adopted_address(&self, id: &str) -> Option<SocketAddr> {
        self.lock().held.get(id)?.address
    }

    pub(super) async fn register(self: &Arc<Self>, entry: &Entry) -> Result<(), MeshError> {
        let id = &entry.instance.id;
        check_entry(entry)?;
        {
            let state = self.lock();
            if state.held.len() >= ENTRIES_MAX && !state.held.contains_key(id) {
                return Err(MeshError::Refused(format!(
                    "{ENTRIES_MAX} instances are registered, more are not taken (ENTRIES_MAX)"
                )));
            }
        }
        let _turn = self.turn(id).await;
        if entry.adopt {
            return self.adopt(entry).await;
        }
        self.free(entry).await?;
        let token = self.put(entry).await?;
        self.hold(entry, token, None);
        self.wait_shown(&entry.instance).await;
        Ok(())
    }

    pub(super) async fn deregister(&self, id: &str) -> Result<(), MeshError> {
        let _turn = self.turn(id).await;
        let held = self.lock().held.remove(id);
        let Some(held) = held else { return Ok(()) };
        held.ended.cancel();
        if held.entry.adopt {
            return Ok(());
        }
        let service = &held.entry.instance.service;
        let mut result = self.remove(id, service, held.token.clone()).await;
        if let Err(Fault::UnknownToken(_) | Fault::Forbidden(_)) = result {
            // It was rotated; the one of now may do it.
            result = self.remove(id, service, self.current(service)).await;
        }
        match result {
            Ok(()) => Ok(()),
            Err(fault) => {
                self.lock().leaving.insert(id.to_owned(), held.token);
                self.compare.notify_one();
                Err(MeshError::from(fault))
            }
        }
    }

    /// Its keeper tells Consul at once, and again whenever that is needed.
    pub(super) fn set_critical(&self, id: &str, reason: Option<&str>) {
        if let Some(held) = self.lock().held.get_mut(id) {
            held.critical = reason.map(str::to_owned);
            held.changed.notify_one();
        }
    }

    /// Another token speaks for the service: its entries are registered anew with it. Consul would else take them away
    /// with the old one, which may be gone.
    pub(super) fn refresh_soon(&self, service: &ServiceName) {
        let state = self.lock();
        let of_service = state.held.values();
        let of_service = of_service.filter(|held| held.entry.instance.service == *service);
        of_service.for_each(|held| held.changed.notify_one());
    }

    /// Why the check of an entry that is held is to be critical.
    pub(super) fn critical(&self, id: &str) -> Option<String> {
        self.lock().held.get(id)?.critical.clone()
    }

    async fn adopt(self: &Arc<Self>, entry: &Entry) -> Result<(), MeshError> {
        let Instance { id, service, .. } = &entry.instance;
        let Some(found) = self.agent_service(id, service).await? else {
            return Err(MeshError::Refused(format!(
                "adopt: this host's Consul agent has no service with id {id}: whoever registers it must do so first"
            )));
        };
        if found.service != service.as_ref() {
            return Err(MeshError::Refused(format!(
                "adopt: {id} is registered as service {}, wanted {service}",
                found.service
            )));
        }
        let address = found.socket("");
        self.hold(entry, self.current(service), address);
        Ok(())
    }

    /// Whether id, node name and host are free for us.
    async fn free(&self, entry: &Entry) -> Result<(), MeshError> {
        let Instance {
            id, service, node, ..
        } = &entry.instance;
        if !self.lock().held.contains_key(id)
            && let Some(found) = self.agent_service(id, service).await?
            && found.meta(META_AGENT) != Some(&self.agent)
            && !entry.force
        {
            let who = match found.meta(META_AGENT) {
                Some(agent) => format!("meshx agent {agent}"),
                None => "another program".to_owned(),
            };
            return Err(MeshError::NameTaken(format!(
                "{who} has registered {id} with this host's Consul agent: stop it, or register with force"
            )));
        }
        // Hosts are found by what their nodes' names end in, and then looked at again.
        let mut asked = format!("ServiceID == {id:?}");
        for host in self.hosts.iter().filter(|_| node.is_some()) {
            asked.push_str(&format!(" or ServiceID contains {:?}", format!("@{host}")));
        }
        let own = format!("{NOTE}{}", self.agent);
        let only = format!(" and Status == \"passing\" and Notes != {own:?} and ({asked})");
        let checks = self.catalogue.checks(&only).await?;
        let others = checks
            .iter()
            .filter(|check| check.passing && check.agent != self.agent);
        for other in others {
            if let Some(error) = self.conflict(other, id, service, node.as_deref()) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// What another meshx agent has that keeps us from registering.
    fn conflict(
        &self,
        other: &AgentCheck,
        id: &str,
        service: &ServiceName,
        node: Option<&str>,
    ) -> Option<MeshError> {
        let AgentCheck { id: taken, agent, .. } = other;
        if taken == id && other.service == service.as_ref() {
            return Some(MeshError::NameTaken(format!(
                "{id} is registered by agent {agent}"
            )));
        }
        node?;
        let (_, host) = split_node(taken).ok()?;
        self.hosts.iter().any(|own| own == host).then(|| {
            MeshError::HostTaken(format!(
                "agent {agent} has {taken} of host {host}, which this agent has, too: give one of them other hosts"
            ))
        })
    }

    /// Writes it. Returns the token that was used.
    pub(super) async fn put(&self, entry: &Entry) -> Result<Option<Token>, Fault> {
        let service = &entry.instance.service;
        let token = self.current(service);
        let right = match entry.data_plane {
            DataPlane::Native => write(service.as_ref()),
            DataPlane::Sidecar(_) => format!(
                "{} or {}",
                write(service.as_ref()),
                write(&format!("{service}-sidecar-proxy"))
            ),
        };
        let request = Request::put(&["agent", "service", "register"])
            .query("replace-existing-checks", "true")
            .token(token.clone())
            .right(right)
            .body(Value::Object(form(
                entry,
                &self.agent,
                self.critical(&entry.instance.id).is_none(),
            )));
        self.client.send(&request).await?;
        Ok(token)
    }

    pub(super) fn hold(self: &Arc<Self>, entry: &Entry, token: Option<Token>, address: Option<SocketAddr>) {
        let id = entry.instance.id.clone();
        let ended = self.stop.child_token();
        let changed = Arc::new(Notify::new());
        // A check that Consul already knows keeps its status when it is registered anew: after a crash it is critical.
        changed.notify_one();
        let held = Held {
            entry: entry.clone(),
            token,
            address,
            critical: None,
            changed,
            ended: ended.clone(),
        };
        let mut state = self.lock();
        state.leaving.remove(&id);
        if let Some(old) = state.held.insert(id.clone(), held) {
            old.ended.cancel();
        }
        drop(state);
        let registrar = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = registrar.keep(&id) => {}
            }
        });
    }

    /// The catalogue follows the Consul agent; whoever is told that it is registered should find it there.
    async fn wait_shown(&self, instance: &Instance) {
        let shown = self
            .catalogue
            .wait(&instance.service, |listed| listed.instance.id == instance.id);
        if tokio::time::timeout(SHOWN, shown).await.is_err() {
            tracing::debug!(id = instance.id, "the catalogue does not show it yet");
        }
    }

    async fn remove(&self, id: &str, service: &ServiceName, token: Option<Token>) -> Result<(), Fault> {
        let request = Request::put(&["agent", "service", "deregister", id])
            .token(token)
            .right(write(service.as_ref()));
        match self.client.send(&request).await {
            Err(fault) if fault.is_missing() => Ok(()),
            result => result.map(|_| ()),
        }
    }

    pub(super) fn entry(&self, id: &str) -> Option<(Entry, Option<Token>)> {
        let state = self.lock();
        let held = state.held.get(id)?;
        Some((held.entry.clone(), held.token.clone()))
    }

    /// The token that speaks for a service now.
    pub(super) fn current(&self, service: &ServiceName) -> Option<Token> {
        self.tokens.of(service).or_else(|| self.client.token())
    }

    pub(super) async fn turn(&self, id: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let sum: usize = id.bytes().map(usize::from).sum();
        // Always there: the remainder is below LOCKS.
        self.order[sum % LOCKS].lock().await
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
