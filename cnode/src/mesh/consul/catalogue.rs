//! Which instances there are: a warm copy of each service that is in use, and look-ups of what it lacks.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep};

use super::client::{Client, Fault, Reply, Request, shorten};
use super::watch::{Seen, watch};
use super::{IDLE, META_AGENT, META_NODE, META_PROTOCOL, PROTOCOL_MESHX, RETRY, Slots, read};
use crate::mesh::{Instance, Listed, META_CLUSTER, MeshError, Present, Protocol, ServiceName, split_node};

/// Instances of one service that are taken; the rest are left out.
pub(super) const INSTANCES_MAX: usize = 4096;
/// Services that are looked at when all are asked for.
const SERVICES_MAX: usize = 2048;
/// Requests at one time for that.
const SERVICES_AT_ONCE: usize = 8;
/// Services that are remembered, in use or looked up in vain.
const WARM_MAX: usize = 1024;
/// What a look-up found holds this long: a peer can make us look up any name.
const LOOKUP_HOLDS: Duration = Duration::from_millis(500);
/// Look-ups of all names together.
const LOOKUPS_PER_SECOND: u32 = 100;
/// The note on the checks of our instances, by which one request finds all nodes of all agents.
pub(super) const NOTE: &str = "meshx agent ";

/// The catalogue, as the agent's own token shows it: whose question it is cannot be told from a name.
pub(super) struct Catalogue {
    client: Arc<Client>,
    slots: Slots,
    // Each is held for a look or a change, never across an await.
    warm: Mutex<HashMap<ServiceName, Arc<Warm>>>,
    rate: Mutex<(Instant, u32)>,
}

/// What is known of one service.
struct Warm {
    /// Only for a service of our own, or that was found.
    copy: Mutex<Option<watch::Receiver<Seen<Known>>>>,
    used: Mutex<Instant>,
    /// The last look-up. Held while one is under way, so that all who wait share it.
    lookup: tokio::sync::Mutex<Option<(Instant, Known)>>,
}

/// All instances of a service.
type Known = Arc<Vec<Listed>>;

/// An instance of some agent, as its check shows it.
pub(super) struct AgentCheck {
    pub(super) id: String,
    pub(super) service: String,
    pub(super) agent: String,
    pub(super) passing: bool,
}

impl Catalogue {
    pub(super) fn new(client: Arc<Client>, slots: Slots) -> Self {
        Self {
            client,
            slots,
            warm: Mutex::default(),
            rate: Mutex::new((Instant::now(), 0)),
        }
    }

    /// All instances of a service, passing or not. An empty answer was looked up.
    pub(super) async fn all(&self, service: &ServiceName) -> Result<Known, MeshError> {
        let warm = self.warm(service);
        match self.copy(&warm).await {
            Some(known) if !known.is_empty() => Ok(known),
            _ => self.look_up(service, &warm).await,
        }
    }

    /// All instances of a service, straight from Consul's leader, and at which index.
    async fn fresh(&self, service: &ServiceName) -> Result<(Known, Option<u64>), MeshError> {
        let request = self.health(service).query("consistent", "");
        let reply = self.client.send(&request).await?;
        Ok((read_health(&reply, service)?, reply.index))
    }

    /// The passing instance that runs this node.
    pub(super) async fn node(&self, node: &str) -> Result<Option<Instance>, MeshError> {
        // Its agent chose one of them (`node_service`).
        let services = [ServiceName::from_node(node), ServiceName::of_single_node(node)];
        let find = |known: &Known| {
            let mut passing = known.iter().filter(|listed| listed.is_passing());
            let found = passing.find(|listed| listed.instance.node.as_deref() == Some(node));
            found.map(|listed| listed.instance.clone())
        };
        for service in services.iter().flatten() {
            if let Some(found) = self.copy(&self.warm(service)).await.as_ref().and_then(find) {
                return Ok(Some(found));
            }
        }
        // It may just have booted: what the copies lack is looked up.
        for service in services.iter().flatten() {
            if let Some(found) = find(&self.look_up(service, &self.warm(service)).await?) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    pub(super) async fn passing(&self, service: &ServiceName) -> Result<Vec<Instance>, MeshError> {
        let passing = |known: Known| {
            let passing = known.iter().filter(|listed| listed.is_passing());
            passing.map(|listed| listed.instance.clone()).collect::<Vec<_>>()
        };
        let warm = self.warm(service);
        match self.copy(&warm).await.map(passing) {
            Some(some) if !some.is_empty() => Ok(some),
            _ => Ok(passing(self.look_up(service, &warm).await?)),
        }
    }

    /// The weights of the instances in the warm copy.
    pub(super) fn weights(&self, service: &ServiceName) -> HashMap<String, u32> {
        let copy = lock(&self.warm(service).copy).clone();
        let known = copy.and_then(|copy| copy.borrow().value.clone());
        let listed = known.iter().flat_map(|known| known.iter());
        listed
            .map(|listed| (listed.instance.id.clone(), listed.weight))
            .collect()
    }

    /// The instances of a service that is watched, as long as the watch sees.
    pub(super) async fn present(&self, service: &ServiceName) -> Result<Present, MeshError> {
        // It begins the watch of a service that is there.
        self.all(service).await?;
        let copy = lock(&self.warm(service).copy).clone();
        let seen = copy.map(|copy| copy.borrow().clone());
        match seen {
            Some(Seen {
                value: Some(known),
                fault: None,
                breaks,
                ..
            }) => Ok(Present::new(known.iter().map(|listed| &listed.instance), breaks)),
            Some(Seen {
                fault: Some(fault), ..
            }) => Err(fault.into()),
            _ => Err(MeshError::Unavailable(format!("{service} is not watched"))),
        }
    }

    /// All instances of all services of the mesh that the token may see.
    pub(super) async fn every(&self) -> Result<Vec<Listed>, MeshError> {
        let request = Request::get(&["catalog", "services"]).large().right(read("*"));
        let names: BTreeMap<String, serde::de::IgnoredAny> = self.client.send(&request).await?.json()?;
        let names = names.keys().filter_map(|name| ServiceName::new(name).ok());
        self.of_services(names.take(SERVICES_MAX).collect()).await
    }

    /// All passing nodes of agents.
    pub(super) async fn nodes(&self) -> Result<Vec<Instance>, MeshError> {
        let listed = self.of_services(self.node_services().await?).await?;
        let nodes = listed
            .into_iter()
            .filter(|listed| listed.is_passing() && listed.instance.node.is_some());
        Ok(nodes.map(|listed| listed.instance).collect())
    }

    /// The services of all nodes of agents, passing or not: one request.
    pub(super) async fn node_services(&self) -> Result<Vec<ServiceName>, MeshError> {
        // A node's id is its name.
        let checks = self.checks(" and ServiceID contains \"@\"").await?;
        let mut names: Vec<_> = checks
            .iter()
            .filter_map(|check| ServiceName::new(&check.service).ok())
            .collect();
        names.sort();
        names.dedup();
        names.truncate(SERVICES_MAX);
        Ok(names)
    }

    /// Nodes and other instances of all agents, by the notes on their checks: one request. `only` narrows the
    /// question (Consul, "Filtering"): whoever asks about a name need not read all of them.
    pub(super) async fn checks(&self, only: &str) -> Result<Vec<AgentCheck>, MeshError> {
        let request = Request::get(&["health", "state", "any"])
            .query("filter", format!("Notes contains {NOTE:?}{only}"))
            .large()
            .right("node:read and service:read");
        let checks: Vec<CheckAnswer> = self.client.send(&request).await?.json()?;
        let of_agent = |check: CheckAnswer| {
            Some(AgentCheck {
                agent: check.notes.strip_prefix(NOTE)?.to_owned(),
                passing: check.status == "passing",
                id: check.service_id,
                service: check.service_name,
            })
        };
        Ok(checks.into_iter().filter_map(of_agent).collect())
    }

    /// Resolves when one of the instances of a service of our own is `as_wanted`.
    pub(super) async fn wait(&self, service: &ServiceName, as_wanted: impl Fn(&Listed) -> bool) {
        let wanted = |known: &Known| known.iter().any(&as_wanted);
        let warm = self.warm(service);
        let copy = {
            let mut copy = lock(&warm.copy);
            if copy.is_none() {
                *copy = self.slots.take().map(|slot| self.watch(service, slot, None));
            }
            copy.clone()
        };
        if let Some(mut copy) = copy {
            let seen = copy.wait_for(|seen| seen.value.as_ref().is_some_and(wanted));
            if seen.await.is_ok() {
                return;
            }
        }
        // There is no place for a watch.
        while !self.look_up(service, &warm).await.as_ref().is_ok_and(wanted) {
            sleep(LOOKUP_HOLDS).await;
        }
    }

    /// Ends the watches of services that nobody has asked about for long.
    pub(super) fn forget_idle(&self) {
        lock(&self.warm).retain(|_, warm| lock(&warm.used).elapsed() < IDLE);
    }

    async fn of_services(&self, services: Vec<ServiceName>) -> Result<Vec<Listed>, MeshError> {
        let asked = stream::iter(services).map(|service| async move {
            let reply = self.client.send(&self.health(&service)).await?;
            read_health(&reply, &service)
        });
        let mut asked = asked.buffered(SERVICES_AT_ONCE);
        let mut all = Vec::new();
        while let Some(known) = asked.next().await {
            all.extend(known?.iter().cloned());
        }
        Ok(all)
    }

    fn health(&self, service: &ServiceName) -> Request {
        Request::get(&["health", "connect", service.as_ref()])
            .large()
            .right(read(service.as_ref()))
    }

    fn watch(
        &self,
        service: &ServiceName,
        slot: OwnedSemaphorePermit,
        known: Option<(Known, u64)>,
    ) -> watch::Receiver<Seen<Known>> {
        let of = service.clone();
        watch(
            self.client.clone(),
            self.health(service),
            Some(slot),
            known,
            move |reply| read_health(reply, &of),
        )
    }

    /// The warm copy, once it is there; none for a service that is not known.
    async fn copy(&self, warm: &Warm) -> Option<Known> {
        let mut copy = lock(&warm.copy).clone()?;
        // An old copy serves while Consul is away: whoever is at those addresses must still prove who they are.
        let seen = copy.wait_for(Seen::is_known).await.ok()?;
        seen.value.clone()
    }

    /// Asks Consul's leader, at most once in [`LOOKUP_HOLDS`] for each service.
    async fn look_up(&self, service: &ServiceName, warm: &Warm) -> Result<Known, MeshError> {
        let mut last = warm.lookup.lock().await;
        if let Some((at, known)) = &*last
            && at.elapsed() < LOOKUP_HOLDS
        {
            return Ok(known.clone());
        }
        self.admit()?;
        let (known, index) = self.fresh(service).await?;
        *last = Some((Instant::now(), known.clone()));
        let mut copy = lock(&warm.copy);
        if copy.is_none() && !known.is_empty() {
            // Without a free slot every question is a look-up.
            let slot = self.slots.take();
            *copy = slot.map(|slot| self.watch(service, slot, index.map(|index| (known.clone(), index))));
        }
        Ok(known)
    }

    fn admit(&self) -> Result<(), MeshError> {
        let mut rate = lock(&self.rate);
        if rate.0.elapsed() >= Duration::from_secs(1) {
            *rate = (Instant::now(), 0);
        }
        if rate.1 >= LOOKUPS_PER_SECOND {
            return Err(MeshError::Unavailable(format!(
                "{LOOKUPS_PER_SECOND} names were looked up in this second, more are not (LOOKUPS_PER_SECOND)"
            )));
        }
        rate.1 += 1;
        Ok(())
    }

    fn warm(&self, service: &ServiceName) -> Arc<Warm> {
        let mut all = lock(&self.warm);
        if let Some(warm) = all.get(service) {
            *lock(&warm.used) = Instant::now();
            return warm.clone();
        }
        if all.len() >= WARM_MAX {
            // Names that were looked up in vain go first.
            all.retain(|_, warm| lock(&warm.copy).is_some() || lock(&warm.used).elapsed() < RETRY);
            let oldest = all.iter().min_by_key(|(_, warm)| *lock(&warm.used));
            if all.len() >= WARM_MAX
                && let Some(oldest) = oldest.map(|(service, _)| service.clone())
            {
                all.remove(&oldest);
            }
        }
        let warm = Arc::new(Warm {
            copy: Mutex::default(),
            used: Mutex::new(Instant::now()),
            lookup: tokio::sync::Mutex::default(),
        });
        all.insert(service.clone(), warm.clone());
        warm
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CheckAnswer {
    #[serde(default)]
    status: String,
    #[serde(default)]
    output: String,
    #[serde(default)]
    notes: String,
    #[serde(rename = "ServiceID", default)]
    service_id: String,
    #[serde(default)]
    service_name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HealthAnswer {
    node: NodeAnswer,
    service: ServiceAnswer,
    #[serde(default)]
    checks: Option<Vec<CheckAnswer>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NodeAnswer {
    #[serde(default)]
    address: String,
}

/// A service as the catalogue and the Consul agent show it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ServiceAnswer {
    #[serde(default)]
    pub(super) kind: Option<String>,
    #[serde(rename = "ID", default)]
    pub(super) id: String,
    #[serde(default)]
    pub(super) service: String,
    #[serde(default)]
    pub(super) address: String,
    #[serde(default)]
    pub(super) port: u32,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    pub(super) meta: Option<BTreeMap<String, String>>,
    #[serde(default)]
    connect: Option<ConnectAnswer>,
    #[serde(default)]
    proxy: Option<ProxyAnswer>,
    #[serde(default)]
    weights: Option<WeightsAnswer>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WeightsAnswer {
    passing: u32,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ConnectAnswer {
    #[serde(default)]
    native: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ProxyAnswer {
    #[serde(default)]
    destination_service_name: String,
    #[serde(rename = "DestinationServiceID", default)]
    destination_service_id: String,
}

impl ServiceAnswer {
    pub(super) fn meta(&self, key: &str) -> Option<&str> {
        self.meta.as_ref()?.get(key).map(String::as_str)
    }

    /// What the registration gave, and the cluster's label.
    fn shown_meta(&self) -> BTreeMap<String, String> {
        let all = self.meta.iter().flatten();
        all.filter(|(key, _)| !key.starts_with("meshx") || *key == META_CLUSTER)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    /// Where mesh connections to it are accepted. `node` is the address of its Consul node.
    pub(super) fn socket(&self, node: &str) -> Option<SocketAddr> {
        let address = if self.address.is_empty() {
            node
        } else {
            &self.address
        };
        let ip: IpAddr = address.parse().ok()?;
        let port = u16::try_from(self.port).ok().filter(|port| *port != 0)?;
        (!ip.is_unspecified()).then_some(SocketAddr::new(ip, port))
    }

    /// The instance of `service` that this entry stands for; a sidecar stands for what is behind it.
    fn instance(&self, service: &ServiceName, node: &str) -> Option<Instance> {
        let sidecar = self.kind.as_deref() == Some("connect-proxy");
        let (name, id) = match (&self.proxy, sidecar) {
            (Some(proxy), true) if proxy.destination_service_id.is_empty() => {
                (&proxy.destination_service_name, &self.id)
            }
            (Some(proxy), true) => (&proxy.destination_service_name, &proxy.destination_service_id),
            _ => (&self.service, &self.id),
        };
        let native = self.kind.as_deref().unwrap_or_default().is_empty()
            && self.connect.as_ref().is_some_and(|connect| connect.native);
        if name != service.as_ref() || !(sidecar || native) {
            return None;
        }
        let meshx = native && self.meta(META_PROTOCOL) == Some(PROTOCOL_MESHX);
        Some(Instance {
            id: id.clone(),
            service: service.clone(),
            node: self
                .meta(META_NODE)
                .filter(|node| split_node(node).is_ok())
                .map(str::to_owned),
            agent: self.meta(META_AGENT).unwrap_or_default().to_owned(),
            address: self.socket(node)?,
            protocol: if meshx { Protocol::Meshx } else { Protocol::Connect },
            meta: self.shown_meta(),
        })
    }
}

/// Reads an answer of `health/connect/SERVICE`. What is no instance of the service, or has no address that can
/// be dialled, is left out.
fn read_health(reply: &Reply, service: &ServiceName) -> Result<Known, Fault> {
    let entries: Vec<HealthAnswer> = reply.json()?;
    if entries.len() > INSTANCES_MAX {
        tracing::warn!(%service, instances = entries.len(), "only {INSTANCES_MAX} of them are looked at");
    }
    let listed = |entry: HealthAnswer| {
        let instance = entry.service.instance(service, &entry.node.address);
        if instance.is_none() {
            tracing::debug!(%service, id = entry.service.id, "an entry that cannot be dialled is left out");
        }
        Some(Listed {
            instance: instance?,
            status: status(entry.checks.as_deref().unwrap_or_default()),
            // Only passing instances are dialled.
            weight: entry.service.weights.map_or(1, |weights| weights.passing),
            tags: entry.service.tags.unwrap_or_default(),
        })
    };
    Ok(Arc::new(
        entries
            .into_iter()
            .take(INSTANCES_MAX)
            .filter_map(listed)
            .collect(),
    ))
}

/// The worst check's status, and its output unless it passes.
fn status(checks: &[CheckAnswer]) -> String {
    // What is not known is no good sign.
    let badness = |check: &&CheckAnswer| match check.status.as_str() {
        "passing" => 0,
        "warning" => 1,
        _ => 2,
    };
    match checks.iter().max_by_key(badness) {
        None => "passing".to_owned(),
        Some(worst) => match badness(&worst) {
            0 => "passing".to_owned(),
            level => {
                let word = if level == 1 { "warning" } else { "critical" };
                format!("{word}: {}", shorten(&worst.output))
                    .trim_end_matches([':', ' '])
                    .to_owned()
            }
        },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
