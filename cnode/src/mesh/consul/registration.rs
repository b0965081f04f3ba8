//! This agent's entries in Consul, kept there whatever Consul loses.
//!
//! An entry is a service with a TTL check that is refreshed at half its time. A refresh that Consul does not know,
//! a token that changed and an entry that is not in the Consul agent's list lead to a new registration. Entries
//! that carry this agent's id and that nobody holds (it was killed) are taken away.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::catalogue::{Catalogue, NOTE, NodeCheck, ServiceAnswer};
use super::client::{Client, Fault, Request};
use super::{META_AGENT, META_NODE, META_PROTOCOL, PROTOCOL_CONNECT, PROTOCOL_MESHX, Tokens, read, write};
use crate::mesh::{DataPlane, Entry, Instance, MeshError, Protocol, ServiceName, Sidecar, Token, split_node};
use crate::node::Backoff;
use crate::node::backoff::Attempts;

/// Time to live of a check, unless the entry says otherwise.
pub(super) const TTL: Duration = Duration::from_secs(10);
/// Between refreshes that failed.
const BACKOFF: Backoff = Backoff {
    min: Duration::from_millis(500),
    max: Duration::from_secs(2),
};
/// Between attempts to tell Consul the end of an entry.
const LEAVING: Backoff = Backoff {
    min: Duration::from_secs(1),
    max: COMPARE,
};
const TTL_MIN: Duration = Duration::from_secs(1);
const TTL_MAX: Duration = Duration::from_secs(86_400);
/// After this long as critical Consul forgets an entry, unless it says otherwise. Consul takes no less.
const DEREGISTER_AFTER: Duration = Duration::from_secs(60);
/// How often what we hold is compared with what the Consul agent has.
const COMPARE: Duration = Duration::from_secs(30);
/// Entries of this agent's id that nobody holds are left this long after its start: their VMs may come back.
const RECLAIM: Duration = Duration::from_secs(15);
/// How long a registration waits for the catalogue to show it; it follows within moments.
const SHOWN: Duration = Duration::from_millis(1500);
const SHOWN_POLL: Duration = Duration::from_millis(25);
/// How often the check of a sidecar's port runs. Consul's own would be 10 s, and as long until it first passes.
const SIDECAR_CHECK: &str = "2s";
/// Entries of one agent.
const ENTRIES_MAX: usize = 4096;
/// What is done with an id is done in order; ids share this many locks.
const LOCKS: usize = 64;
/// Longest id, in bytes.
const ID_MAX: usize = 512;

/// Fields of a registration that are ours (Consul API, "Register Service"), in the form of [`folded`].
const OURS: [&str; 10] = [
    "name", "id", "address", "port", "token", "check", "connect", "meta", "tags", "weights",
];

/// Fields of a sidecar's proxy that a registration may give (Consul, "Sidecar Service Registration").
const SIDECARS_OWN: [&str; 3] = ["Config", "Expose", "MeshGateway"];

/// Registers and keeps.
pub(super) struct Registrar {
    client: Arc<Client>,
    tokens: Arc<Tokens>,
    catalogue: Arc<Catalogue>,
    agent: String,
    hosts: Vec<String>,
    began: Instant,
    stop: CancellationToken,
    compare: Notify,
    /// Whether the last refresh of any check found no Consul.
    away: AtomicBool,
    // Held for a look or a change, never across an await.
    state: Mutex<State>,
    order: [tokio::sync::Mutex<()>; LOCKS],
}

#[derive(Default)]
struct State {
    held: HashMap<String, Held>,
    /// Entries that Consul was not told the end of, and the token to tell it with.
    leaving: HashMap<String, Option<Token>>,
}

struct Held {
    entry: Entry,
    /// What it is registered with: the token then in use.
    token: Option<Token>,
    /// Where an adopted entry is reached.
    address: Option<SocketAddr>,
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

    /// Compares what is held with what Consul has, until the mesh ends.
    pub(super) async fn keep_all(self: Arc<Self>) {
        let mut attempts = Attempts::new(LEAVING);
        loop {
            let left = !self.lock().leaving.is_empty();
            let pause = if left {
                attempts.wait()
            } else {
                attempts = Attempts::new(LEAVING);
                COMPARE
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.compare.notified() => {}
                () = sleep(pause) => {}
                () = sleep_until(self.began + RECLAIM), if self.began.elapsed() < RECLAIM => {}
            }
            if let Err(fault) = self.compare().await {
                tracing::debug!(%fault, "the Consul agent's entries cannot be compared with ours now");
            }
        }
    }

    /// Ids of ours that the Consul agent has not.
    pub(super) async fn lost(&self) -> Result<Vec<String>, Fault> {
        let there = self.agent_services(None).await?;
        let held: Vec<_> = {
            let state = self.lock();
            let held = state
                .held
                .iter()
                .map(|(id, held)| (id.clone(), held.entry.clone()));
            held.collect()
        };
        let mut lost = Vec::new();
        for (id, entry) in held {
            if !self.is_there(&entry, &there) && !self.is_seen(&entry).await? {
                lost.push(id);
            }
        }
        Ok(lost)
    }

    // === Registering ===

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
        let checks = self.catalogue.node_checks().await?;
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
        other: &NodeCheck,
        id: &str,
        service: &ServiceName,
        node: Option<&str>,
    ) -> Option<MeshError> {
        let NodeCheck { id: taken, agent, .. } = other;
        if taken == id && other.service == service.as_ref() {
            return Some(MeshError::NameTaken(format!(
                "{id} is registered by agent {agent}"
            )));
        }
        node?;
        let (_, host) = split_node(taken).ok()?;
        self.hosts.iter().any(|own| own == host).then(|| {
            MeshError::Refused(format!(
                "agent {agent} has {taken} of host {host}, which this agent has, too: give one of them other hosts"
            ))
        })
    }

    /// Writes it. Returns the token that was used.
    async fn put(&self, entry: &Entry) -> Result<Option<Token>, Fault> {
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
            .body(Value::Object(self.body(entry)));
        self.client.send(&request).await?;
        Ok(token)
    }

    fn hold(self: &Arc<Self>, entry: &Entry, token: Option<Token>, address: Option<SocketAddr>) {
        let id = entry.instance.id.clone();
        let ended = self.stop.child_token();
        let held = Held {
            entry: entry.clone(),
            token,
            address,
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
        let shown = async {
            loop {
                let known = self.catalogue.fresh(&instance.service).await;
                if known.is_ok_and(|known| known.iter().any(|listed| listed.instance.id == instance.id)) {
                    return;
                }
                sleep(SHOWN_POLL).await;
            }
        };
        if tokio::time::timeout(SHOWN, shown).await.is_err() {
            tracing::debug!(id = instance.id, "the catalogue does not show it yet");
        }
    }

    fn body(&self, entry: &Entry) -> Map<String, Value> {
        let Entry {
            instance,
            tags,
            weights,
            extra,
            data_plane,
            ..
        } = entry;
        // Consul takes field names in any case: what would be one of ours in another spelling is left out.
        let theirs = |key: &String| !OURS.contains(&folded(key).as_str());
        let mut body: Map<String, Value> = extra.clone();
        body.retain(|key, _| theirs(key));
        let given = |name: &str| {
            extra
                .iter()
                .find(|(key, _)| folded(key) == name)
                .map(|(_, value)| value)
        };

        let mut meta: Map<String, Value> = given("meta")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        meta.extend(entry.meta.iter().map(|(key, value)| (key.clone(), json!(value))));
        meta.retain(|key, _| !key.to_ascii_lowercase().starts_with("meshx"));
        meta.extend(
            self.own_meta(entry)
                .into_iter()
                .map(|(key, value)| (key.to_owned(), json!(value))),
        );
        let address = match data_plane {
            DataPlane::Native => instance.address,
            DataPlane::Sidecar(sidecar) => sidecar.local,
        };
        let fields = [
            ("Name", json!(instance.service)),
            ("ID", json!(instance.id)),
            ("Address", json!(address.ip())),
            ("Port", json!(address.port())),
            ("Check", self.check(entry)),
            (
                "Connect",
                match data_plane {
                    DataPlane::Native => json!({ "Native": true }),
                    DataPlane::Sidecar(sidecar) => {
                        json!({ "SidecarService": sidecar_body(entry, sidecar, &meta) })
                    }
                },
            ),
            ("Meta", Value::Object(meta)),
        ];
        body.extend(fields.map(|(name, value)| (name.to_owned(), value)));
        match (tags.is_empty(), given("tags")) {
            (true, Some(given)) => body.insert("Tags".to_owned(), given.clone()),
            _ => body.insert("Tags".to_owned(), json!(tags)),
        };
        if let Some(weights) = weights {
            let weights = json!({ "Passing": weights.passing, "Warning": weights.warning });
            body.insert("Weights".to_owned(), weights);
        } else if let Some(given) = given("weights") {
            body.insert("Weights".to_owned(), given.clone());
        }
        body
    }

    fn own_meta(&self, entry: &Entry) -> BTreeMap<&'static str, String> {
        let protocol = match (&entry.data_plane, entry.instance.protocol) {
            (DataPlane::Native, Protocol::Meshx) => PROTOCOL_MESHX,
            _ => PROTOCOL_CONNECT,
        };
        let mut meta = BTreeMap::from([
            (META_AGENT, self.agent.clone()),
            (META_PROTOCOL, protocol.to_owned()),
        ]);
        if let Some(node) = &entry.instance.node {
            meta.insert(META_NODE, node.clone());
        }
        meta
    }

    fn check(&self, entry: &Entry) -> Value {
        let after = entry.deregister_after.unwrap_or(DEREGISTER_AFTER);
        json!({
            "CheckID": check_id(&entry.instance.id),
            "Name": "meshx agent",
            "Notes": format!("{NOTE}{}", self.agent),
            "TTL": duration(ttl(entry)),
            "Status": "passing",
            "DeregisterCriticalServiceAfter": duration(after),
        })
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

    // === Keeping ===

    /// Refreshes one entry's check for as long as it is held.
    async fn keep(&self, id: &str) {
        let mut attempts = Attempts::new(BACKOFF);
        let mut failing = false;
        loop {
            let held = self
                .lock()
                .held
                .get(id)
                .map(|held| (ttl(&held.entry) / 2, held.entry.adopt));
            let Some((half, adopted)) = held else { return };
            // A Consul that is back is to know us soon.
            sleep(if failing { attempts.wait().min(half) } else { half }).await;
            let result = if adopted {
                self.refresh_adopted(id).await
            } else {
                self.refresh(id).await
            };
            let failed = result.is_err();
            match result {
                Ok(()) => {
                    attempts = Attempts::new(BACKOFF);
                    if self.away.swap(false, Ordering::Relaxed) {
                        tracing::info!("Consul is back");
                        self.compare.notify_one();
                    }
                }
                // One line for all entries.
                Err(fault) if fault.is_away() => {
                    if !self.away.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%fault, "checks in Consul cannot be refreshed, trying on");
                    }
                }
                Err(fault) if !failing => {
                    tracing::warn!(id, %fault, "its check in Consul cannot be refreshed, trying on");
                }
                Err(_) => {}
            }
            failing = failed;
        }
    }

    async fn refresh(&self, id: &str) -> Result<(), Fault> {
        let Some((entry, token)) = self.entry(id) else {
            return Ok(());
        };
        let service = &entry.instance.service;
        // What Consul keeps to speak for the entry is the token that it was registered with.
        if token != self.current(service) {
            return self.restore(id, "the token changed").await;
        }
        let request = Request::put(&["agent", "check", "pass", &check_id(id)])
            .token(token)
            .right(write(service.as_ref()));
        match self.client.send(&request).await {
            Ok(_) => Ok(()),
            Err(fault) if fault.is_missing() => self.restore(id, "Consul does not know it any more").await,
            Err(fault) => Err(fault),
        }
    }

    /// The check of somebody else's registration is refreshed only when there is one to refresh.
    async fn refresh_adopted(&self, id: &str) -> Result<(), Fault> {
        let Some((entry, _)) = self.entry(id) else {
            return Ok(());
        };
        let service = &entry.instance.service;
        let request = Request::get(&["agent", "checks"])
            .query("filter", format!("ServiceID == \"{id}\" and Type == \"ttl\""))
            .token(self.current(service))
            .large()
            .right(read(service.as_ref()));
        let checks: HashMap<String, serde::de::IgnoredAny> = self.client.send(&request).await?.json()?;
        for check in checks.keys() {
            let request = Request::put(&["agent", "check", "pass", check])
                .token(self.current(service))
                .right(write(service.as_ref()));
            self.client.send(&request).await?;
        }
        Ok(())
    }

    /// Registers again what is still held.
    async fn restore(&self, id: &str, why: &str) -> Result<(), Fault> {
        let _turn = self.turn(id).await;
        let Some((entry, _)) = self.entry(id) else {
            return Ok(());
        };
        if entry.adopt {
            return Ok(());
        }
        let token = self.put(&entry).await?;
        tracing::info!(id, why, "registered again");
        if let Some(held) = self.lock().held.get_mut(id) {
            held.token = token;
        }
        Ok(())
    }

    async fn compare(&self) -> Result<(), Fault> {
        for id in self.lost().await? {
            if let Err(fault) = self.restore(&id, "Consul had lost it").await {
                tracing::warn!(id, %fault, "cannot be registered again, trying on");
            }
        }
        let leaving: Vec<_> = {
            let state = self.lock();
            state
                .leaving
                .iter()
                .map(|(id, token)| (id.clone(), token.clone()))
                .collect()
        };
        let there = self.agent_services(None).await?;
        let ours = |answer: &&ServiceAnswer| answer.meta(META_AGENT) == Some(&self.agent);
        let strays = there
            .values()
            .filter(ours)
            .filter(|answer| answer.kind.as_deref().unwrap_or_default().is_empty());
        let mut strays: HashMap<String, Option<Token>> =
            strays.map(|answer| (answer.id.clone(), None)).collect();
        if self.began.elapsed() < RECLAIM {
            strays.clear();
        }
        strays.extend(leaving);
        for (id, token) in strays {
            let _turn = self.turn(&id).await;
            if self.lock().held.contains_key(&id) {
                continue;
            }
            let service = there.get(&id).map(|answer| answer.service.as_str());
            let service = service.unwrap_or_default();
            let presented = || self.tokens.of(&ServiceName::new(service).ok()?);
            let request = Request::put(&["agent", "service", "deregister", &id])
                .token(token.or_else(presented))
                .right(write(service));
            match self.client.send(&request).await {
                Err(fault) if !fault.is_missing() => {
                    tracing::warn!(id, %fault, "an entry that nobody holds any more cannot be removed");
                }
                _ => {
                    self.lock().leaving.remove(&id);
                    tracing::info!(id, "removed an entry that nobody holds any more");
                }
            }
        }
        Ok(())
    }

    /// Whether the Consul agent has it as we registered it.
    fn is_there(&self, entry: &Entry, there: &HashMap<String, ServiceAnswer>) -> bool {
        let Instance { id, service, .. } = &entry.instance;
        let Some(found) = there.get(id) else { return false };
        if found.service != service.as_ref() {
            return false;
        }
        if entry.adopt {
            return true;
        }
        let sidecar = matches!(entry.data_plane, DataPlane::Sidecar(_));
        found.meta(META_AGENT) == Some(&self.agent)
            && (!sidecar || there.contains_key(&format!("{id}-sidecar-proxy")))
    }

    /// The agent's token may not see it, the one that it was registered with does.
    async fn is_seen(&self, entry: &Entry) -> Result<bool, Fault> {
        if entry.adopt {
            return Ok(true);
        }
        let Some(token) = self.tokens.of(&entry.instance.service) else {
            return Ok(false);
        };
        Ok(self.is_there(entry, &self.agent_services(Some(token)).await?))
    }

    async fn agent_services(&self, token: Option<Token>) -> Result<HashMap<String, ServiceAnswer>, Fault> {
        let request = Request::get(&["agent", "services"])
            .token(token)
            .large()
            .right(read("*"));
        self.client.send(&request).await?.json()
    }

    async fn agent_service(&self, id: &str, service: &ServiceName) -> Result<Option<ServiceAnswer>, Fault> {
        let request = Request::get(&["agent", "services"])
            .query("filter", format!("ID == \"{id}\""))
            .token(self.tokens.of(service))
            .large()
            .right(read(service.as_ref()));
        let mut found: HashMap<String, ServiceAnswer> = self.client.send(&request).await?.json()?;
        Ok(found.remove(id))
    }

    fn entry(&self, id: &str) -> Option<(Entry, Option<Token>)> {
        let state = self.lock();
        let held = state.held.get(id)?;
        Some((held.entry.clone(), held.token.clone()))
    }

    /// The token that speaks for a service now.
    fn current(&self, service: &ServiceName) -> Option<Token> {
        self.tokens.of(service).or_else(|| self.client.token())
    }

    async fn turn(&self, id: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let sum: usize = id.bytes().map(usize::from).sum();
        // Always there: the remainder is below LOCKS.
        self.order[sum % LOCKS].lock().await
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What would make a registration say something else than the entry.
fn check_entry(entry: &Entry) -> Result<(), MeshError> {
    let id = &entry.instance.id;
    let refuse = |text: String| Err(MeshError::Refused(text));
    if id.is_empty() || id.len() > ID_MAX || id.chars().any(|c| c.is_control() || c == '"' || c == '\\') {
        return refuse(format!(
            "instance id {id:?}: wanted 1 to {ID_MAX} bytes without control characters, \" and \\"
        ));
    }
    let time = ttl(entry);
    if !(TTL_MIN..=TTL_MAX).contains(&time) {
        return refuse(format!("{id}: ttl {time:?}, wanted {TTL_MIN:?} to {TTL_MAX:?}"));
    }
    // Consul folds more letters than these when it reads field names.
    if let Some(key) = entry.extra.keys().find(|key| !key.is_ascii()) {
        return refuse(format!(
            "{id}: the field {key:?} of its registration is no name in ASCII"
        ));
    }
    Ok(())
}

/// A field name as Consul compares it: `deregister_critical` and `DeregisterCritical` are one.
fn folded(key: &str) -> String {
    key.to_ascii_lowercase().replace('_', "")
}

fn ttl(entry: &Entry) -> Duration {
    entry.ttl.unwrap_or(TTL)
}

fn duration(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

fn check_id(id: &str) -> String {
    format!("meshx:{id}")
}

fn sidecar_body(entry: &Entry, sidecar: &Sidecar, meta: &Map<String, Value>) -> Value {
    let Instance { id, address, .. } = &entry.instance;
    let upstreams: Vec<_> = sidecar
        .upstreams
        .iter()
        .map(|upstream| {
            json!({
                "DestinationName": upstream.target,
                "LocalBindAddress": upstream.bind.ip(),
                "LocalBindPort": upstream.bind.port(),
            })
        })
        .collect();
    let given = entry.extra.get("Connect");
    let given = given.and_then(|connect| connect.get("SidecarService")?.get("Proxy")?.as_object());
    let mut proxy: Map<String, Value> = given
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    proxy.retain(|key, _| SIDECARS_OWN.contains(&key.as_str()));
    let config = proxy.entry("Config").or_insert_with(|| json!({}));
    if let Some(config) = config.as_object_mut() {
        // Consul's built-in proxy and the Envoy that it drives would listen on all addresses.
        config.insert("bind_address".to_owned(), json!(sidecar.bind));
    }
    proxy.extend([
        ("LocalServiceAddress".to_owned(), json!(sidecar.local.ip())),
        ("LocalServicePort".to_owned(), json!(sidecar.local.port())),
        ("Upstreams".to_owned(), json!(upstreams)),
    ]);
    let mut body = json!({ "Address": address.ip(), "Meta": meta, "Proxy": proxy });
    // Port 0: Consul chooses one of its range, and its own checks.
    if address.port() != 0
        && let Some(fields) = body.as_object_mut()
    {
        fields.insert("Port".to_owned(), json!(address.port()));
        fields.insert(
            "Checks".to_owned(),
            json!([
                { "Name": "sidecar port", "TCP": address.to_string(), "Interval": SIDECAR_CHECK },
                { "Name": "service of the sidecar", "AliasService": id },
            ]),
        );
    }
    body
}
