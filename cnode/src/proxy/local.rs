//! What is registered on this agent.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::cause::{Cause, Refusal};
use super::sessions::{Session, Sessions};
use crate::mesh::{Instance, ServiceName};

/// Length of a registration's secret in bytes.
pub const SECRET_LEN: usize = 32;

/// Proves that a connection comes from a registration. Compared in constant time, never shown.
#[derive(Clone)]
pub struct Secret([u8; SECRET_LEN]);

impl Secret {
    /// A fresh secret.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = [0; SECRET_LEN];
        getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
        Ok(Self(bytes))
    }

    /// The secret that a peer presents.
    pub fn from_bytes(bytes: [u8; SECRET_LEN]) -> Self {
        Self(bytes)
    }

    /// For the one who registered, and for the frame that proves the agent to it.
    pub fn expose(&self) -> &[u8; SECRET_LEN] {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Where an instance takes connections from its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    /// A node's own Unix socket: it is sent an ACCEPT frame first.
    NodeSocket(PathBuf),
    /// A loopback port of a node of plain distribution, which knows of no agent.
    PlainNode(SocketAddr),
    /// A service's TCP address.
    Tcp(SocketAddr),
    /// A service's Unix socket.
    Uds(PathBuf),
}

impl Endpoint {
    /// Whether distribution is spoken there.
    pub fn is_node(&self) -> bool {
        matches!(self, Self::NodeSocket(_) | Self::PlainNode(_))
    }
}

/// The way out of an instance that has a sidecar of another make: ports of its proxy on loopback, each of which leads
/// to one service.
pub trait SidecarUpstreams: fmt::Debug + Send + Sync {
    /// Where the proxy takes connections for `target`.
    fn port_for(&self, target: &ServiceName) -> BoxFuture<'_, Result<SocketAddr, Refusal>>;
}

/// An instance that is registered on this agent.
#[derive(Debug, Clone)]
pub struct LocalInstance {
    /// As the catalogue has it.
    pub instance: Instance,
    /// Proof of later connections.
    pub secret: Secret,
    /// Where it takes connections.
    pub endpoint: Endpoint,
    /// The control connection that it lives by.
    pub owner: u64,
    /// The uid that registered it: no other may dial as this instance.
    pub uid: u32,
    /// What it dials others by, when that is not the agent.
    pub sidecar: Option<Arc<dyn SidecarUpstreams>>,
}

/// The instances of this agent, and its sessions. Clones share one table.
#[derive(Debug, Clone, Default)]
pub struct LocalTable {
    // Held for a look-up or a change, never across an await.
    by_id: Arc<Mutex<HashMap<String, Arc<LocalInstance>>>>,
    // Likewise.
    sessions: Arc<Mutex<Sessions>>,
    /// Those whose VM does not answer, with their control connections. Likewise, inside `by_id`.
    hung: Arc<Mutex<HashSet<(String, u64)>>>,
}

impl LocalTable {
    /// Adds an instance.
    ///
    /// # Errors
    /// [`Cause::NameTaken`] when one of this id is there, or another instance of the same node.
    pub fn insert(&self, local: LocalInstance) -> Result<(), Refusal> {
        let mut table = self.lock();
        let id = local.instance.id.clone();
        let same_node = |other: &Arc<LocalInstance>| {
            local.instance.node.is_some() && other.instance.node == local.instance.node
        };
        if table.contains_key(&id) || table.values().any(same_node) {
            return Err(Cause::NameTaken.because(format!("{id} is registered on this agent")));
        }
        table.insert(id, Arc::new(local));
        Ok(())
    }

    /// Takes an instance away.
    pub fn remove(&self, id: &str) -> Option<Arc<LocalInstance>> {
        let mut table = self.lock();
        let local = table.remove(id)?;
        self.hung().remove(&(id.to_owned(), local.owner));
        Some(local)
    }

    /// Takes away all instances of one control connection.
    pub fn remove_owner(&self, owner: u64) -> Vec<Instance> {
        let mut gone = Vec::new();
        let mut table = self.lock();
        self.hung().retain(|(_, of)| *of != owner);
        table.retain(|_, local| {
            if local.owner == owner {
                gone.push(local.instance.clone());
            }
            local.owner != owner
        });
        gone
    }

    /// Notes whether the VM of an instance that this control connection has registered hangs: new links to it are
    /// refused.
    pub fn set_hung(&self, id: &str, owner: u64, hung: bool) {
        let table = self.lock();
        let there = table.get(id).is_some_and(|local| local.owner == owner);
        match hung && there {
            true => self.hung().insert((id.to_owned(), owner)),
            false => self.hung().remove(&(id.to_owned(), owner)),
        };
    }

    /// Whether the VM of this instance hangs.
    pub fn is_hung(&self, local: &LocalInstance) -> bool {
        self.hung().contains(&(local.instance.id.clone(), local.owner))
    }

    /// The instance whose secret this is. Looks at all of them, so that time tells nothing.
    pub fn by_secret(&self, secret: &Secret) -> Option<Arc<LocalInstance>> {
        let mut found = None;
        for local in self.lock().values() {
            if local.secret == *secret {
                found = Some(local.clone());
            }
        }
        found
    }

    /// The instance of this id.
    pub fn by_id(&self, id: &str) -> Option<Arc<LocalInstance>> {
        self.lock().get(id).cloned()
    }

    /// The instance that is this node.
    pub fn by_node(&self, node: &str) -> Option<Arc<LocalInstance>> {
        self.lock()
            .values()
            .find(|local| local.instance.node.as_deref() == Some(node))
            .cloned()
    }

    /// The instances of a service.
    pub fn by_service(&self, service: &ServiceName) -> Vec<Arc<LocalInstance>> {
        self.lock()
            .values()
            .filter(|local| local.instance.service == *service)
            .cloned()
            .collect()
    }

    /// The service of all instances here, when there is just one.
    pub fn only_service(&self) -> Option<ServiceName> {
        let table = self.lock();
        let first = table.values().next()?.instance.service.clone();
        table
            .values()
            .all(|local| local.instance.service == first)
            .then_some(first)
    }

    /// All instances, in no order.
    pub fn all(&self) -> Vec<Arc<LocalInstance>> {
        self.lock().values().cloned().collect()
    }

    /// Adds a session.
    pub fn insert_session(&self, session: Session) {
        self.sessions().insert(session);
    }

    /// The session of this id.
    pub fn session(&self, id: &str) -> Option<Arc<Session>> {
        self.sessions().get(id)
    }

    /// The session whose secret this is.
    pub fn session_by_secret(&self, secret: &Secret) -> Option<Arc<Session>> {
        self.sessions().by_secret(secret)
    }

    /// Whether another node gave this name to a session of this control connection.
    pub fn was_given(&self, owner: u64, name: &str) -> bool {
        self.sessions().was_given(owner, name)
    }

    /// All sessions, in no order.
    pub(crate) fn all_sessions(&self) -> Vec<Arc<Session>> {
        self.sessions().all()
    }

    /// Takes away all sessions of one control connection.
    pub fn remove_sessions(&self, owner: u64) -> Vec<Arc<Session>> {
        self.sessions().remove_owner(owner)
    }

    /// Takes away one session.
    pub fn remove_session(&self, id: &str) {
        self.sessions().remove(id);
    }

    fn hung(&self) -> MutexGuard<'_, HashSet<(String, u64)>> {
        self.hung.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<LocalInstance>>> {
        // Nothing that can panic runs under the lock, so a poisoned map is still whole.
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::mesh::Protocol;

    fn local(id: &str, owner: u64, secret: u8) -> LocalInstance {
        LocalInstance {
            instance: Instance {
                id: id.to_owned(),
                service: ServiceName::from_node(id).unwrap(),
                node: Some(id.to_owned()),
                agent: "agent-1".to_owned(),
                address: "127.0.0.1:1".parse().unwrap(),
                protocol: Protocol::Meshx,
                meta: Default::default(),
            },
            secret: Secret::from_bytes([secret; SECRET_LEN]),
            endpoint: Endpoint::NodeSocket("/x".into()),
            owner,
            uid: 0,
            sidecar: None,
        }
    }

    #[test]
    fn finds_by_every_key_and_forgets_by_owner() {
        let table = LocalTable::default();
        table.insert(local("shop@h1", 1, 1)).unwrap();
        table.insert(local("shop@h2", 1, 2)).unwrap();
        assert_eq!(table.only_service().unwrap().as_ref(), "shop");
        table.insert(local("cart@h2", 2, 3)).unwrap();
        assert_eq!(
            table.insert(local("cart@h2", 3, 4)).unwrap_err().cause,
            Cause::NameTaken
        );
        let mut other_id = local("cart@h2", 3, 4);
        other_id.instance.id = "other".to_owned();
        assert_eq!(table.insert(other_id).unwrap_err().cause, Cause::NameTaken);

        let secret = Secret::from_bytes([3; SECRET_LEN]);
        assert_eq!(table.by_secret(&secret).unwrap().instance.id, "cart@h2");
        assert!(table.by_secret(&Secret::from_bytes([9; SECRET_LEN])).is_none());
        assert_eq!(table.by_node("shop@h2").unwrap().owner, 1);
        assert!(table.by_node("shop@h9").is_none());
        assert_eq!(table.by_service(&ServiceName::new("shop").unwrap()).len(), 2);
        assert!(table.only_service().is_none());

        let cart = table.by_id("cart@h2").unwrap();
        table.set_hung("cart@h2", 1, true);
        assert!(!table.is_hung(&cart), "another connection's");
        table.set_hung("cart@h2", 2, true);
        assert!(table.is_hung(&cart));
        table.set_hung("cart@h2", 2, false);
        assert!(!table.is_hung(&cart));

        assert_eq!(table.remove_owner(1).len(), 2);
        assert_eq!(table.all().len(), 1);
        assert!(table.remove("cart@h2").is_some() && table.remove("cart@h2").is_none());
    }

    #[test]
    fn a_secret_is_not_shown() {
        let text = format!("{:?}", local("shop@h1", 1, 77));
        assert!(text.contains("Secret(..)") && !text.contains("77"), "{text}");
        assert_ne!(Secret::generate().unwrap(), Secret::generate().unwrap());
    }
}
