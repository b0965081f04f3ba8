//! What the data plane needs from a service mesh: four questions, each replaceable alone.
//!
//! Nothing here knows which mesh answers. When an answer is unclear the caller must refuse: every
//! method returns an error rather than a guess.

mod identity;

pub mod embedded;

use std::net::SocketAddr;

use futures::future::BoxFuture;
pub use identity::{
    Identity, MAX_NODE_NAME, MAX_SERVICE_NAME, MAX_SPIFFE_ID, NameError, ServiceName, SpiffeId, split_node,
};
use serde::{Deserialize, Serialize};

/// Answer of one mesh question.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, MeshError>>;

/// The mesh could not answer. It is never taken for a yes.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MeshError {
    /// The mesh is away, or its answer could not be read.
    #[error("the mesh did not answer: {0}")]
    Unavailable(String),
    /// The mesh answered no to a registration or a certificate request.
    #[error("the mesh refused: {0}")]
    Refused(String),
    /// Another instance of this name or id is in the catalogue.
    #[error("{0}")]
    NameTaken(String),
}

/// One running copy of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Unique in the mesh. A node's instance is the node name itself.
    pub id: String,
    /// The service that its certificate names.
    pub service: ServiceName,
    /// The Erlang node name, when it is a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Id of the agent that serves it.
    pub agent: String,
    /// Where that agent accepts mesh connections.
    pub address: SocketAddr,
}

/// Whether a pair may talk, and by which rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The answer.
    pub allowed: bool,
    /// The rule that decided, in words for a log line.
    pub rule: String,
}

/// Certificates of services.
pub trait Certificates: Send + Sync {
    /// The current leaf certificate, its key and the mesh's roots, for one service.
    fn identity(&self, service: &ServiceName) -> Answer<'_, std::sync::Arc<Identity>>;

    /// The trust domain that every identity of this mesh lies in.
    fn trust_domain(&self) -> &str;
}

/// Which instances there are.
pub trait Catalogue: Send + Sync {
    /// The instance that runs this Erlang node, when it passes.
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>>;

    /// All passing instances of one service.
    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>>;

    /// All passing nodes.
    fn nodes(&self) -> Answer<'_, Vec<Instance>>;
}

/// Who may talk to whom.
pub trait Authorization: Send + Sync {
    /// May `source` open connections to `target`? The caller has verified both already.
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision>;

    /// Resolves when [`Authorization::authorize`] may answer otherwise than before: live pairs are to be asked
    /// about again. One caller at a time waits here.
    fn changed(&self) -> Answer<'_, ()>;
}

/// This host's own entries in the catalogue.
pub trait Registration: Send + Sync {
    /// Adds or replaces an instance of this agent.
    fn register(&self, instance: &Instance) -> Answer<'_, ()>;

    /// Takes an instance of this agent away. One that is not there is no error.
    fn deregister(&self, id: &str) -> Answer<'_, ()>;
}

/// A whole mesh.
pub trait Mesh: Certificates + Catalogue + Authorization + Registration {}

impl<T: Certificates + Catalogue + Authorization + Registration> Mesh for T {}
