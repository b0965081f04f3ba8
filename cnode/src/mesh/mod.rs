//! What the data plane needs from a service mesh: a few questions, each group replaceable alone.
//!
//! Nothing here knows which mesh answers. When an answer is unclear the caller must refuse: every
//! method returns an error rather than a guess.

mod entry;
mod identity;

pub mod consul;
pub mod embedded;
pub mod observed;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

pub use entry::{DataPlane, Entry, Kept, Sidecar, SidecarUpstream, Token, Weights};
use futures::future::BoxFuture;
pub use identity::{
    Identity, MAX_NODE_NAME, MAX_SERVICE_NAME, MAX_SPIFFE_ID, NameError, ServiceName, SpiffeId, split_node,
};
use rustls::pki_types::CertificateDer;
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
    /// The token lacks a right; the text names it.
    #[error("the mesh does not permit it: {0}")]
    Forbidden(String),
    /// More than this agent takes of the mesh.
    #[error("{0}")]
    Limit(String),
    /// This kind of mesh has no such thing.
    #[error("{0}")]
    Unsupported(String),
    /// Another agent has nodes of this host part.
    #[error("{0}")]
    HostTaken(String),
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
    /// Id of the agent that serves it; empty when none does.
    pub agent: String,
    /// Where mesh connections to it are accepted.
    pub address: SocketAddr,
    /// What is spoken there.
    #[serde(default, skip_serializing_if = "Protocol::is_meshx")]
    pub protocol: Protocol,
    /// Its metadata: what its registration gave, and of the agent's own [`META_CLUSTER`] alone.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<String, String>,
}

/// The label of a node's cluster, in the metadata of its instance.
pub const META_CLUSTER: &str = "meshx-cluster";

impl Instance {
    /// Nodes of one label are linked visibly, nodes of different ones hidden; without one it is the common label.
    pub fn cluster(&self) -> &str {
        self.meta.get(META_CLUSTER).map_or("", String::as_str)
    }
}

/// What is spoken at an instance's address, inside mutual TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// `meshx/1`: a request and a reply come first (`docs/mesh-protocol.md`, "Between agents").
    #[default]
    Meshx,
    /// The service's own bytes and nothing else: a sidecar of another make, or a Connect-native program.
    Connect,
}

impl Protocol {
    fn is_meshx(&self) -> bool {
        *self == Self::Meshx
    }
}

/// An instance as the catalogue shows it to people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The instance.
    pub instance: Instance,
    /// `passing`, `warning` or `critical`, with the output of the check that is worst.
    pub status: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Its share of the service's links.
    pub weight: u32,
}

impl Listed {
    /// Whether new links may be made to it.
    pub fn is_passing(&self) -> bool {
        self.status == "passing"
    }
}

/// Which instances of a service the mesh has, passing or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// Their ids, and the names of those that are nodes.
    pub ids: HashSet<String>,
    /// Another number than before: the mesh was away or has lost its state since, so what is absent may only not be
    /// there yet.
    pub series: u64,
}

impl Present {
    pub(crate) fn new<'a>(instances: impl Iterator<Item = &'a Instance>, series: u64) -> Self {
        let ids = |instance: &Instance| [Some(instance.id.clone()), instance.node.clone()];
        Self {
            ids: instances.flat_map(ids).flatten().collect(),
            series,
        }
    }
}

/// Whether a pair may talk, and by which rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The answer.
    pub allowed: bool,
    /// The rule that decided, in words for a log line.
    pub rule: String,
}

/// A rule of the mesh about pairs of services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intention {
    /// Who dials; `*` stands for any service.
    pub source: String,
    /// Who is dialled; `*` stands for any service.
    pub destination: String,
    /// `allow`, `deny`, or in words why it allows nothing here (L7 permissions, say).
    pub action: String,
}

/// All rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intentions {
    /// What holds for a pair without a rule: `allow`, `deny`, or `unknown` when the token may not see it.
    pub default: String,
    /// The rules, the first that fits decides.
    pub rules: Vec<Intention>,
}

/// Certificates of services.
pub trait Certificates: Send + Sync {
    /// The current leaf certificate, its key and the mesh's roots, for one service.
    fn identity(&self, service: &ServiceName) -> Answer<'_, std::sync::Arc<Identity>>;

    /// The identity that this mesh's certificates give to a service of this data centre. It may change when the
    /// mesh is set up anew.
    ///
    /// # Errors
    /// [`MeshError::Unavailable`] before the mesh has told its trust domain.
    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError>;

    /// The certificates of the authorities that are believed, for people; none where the mesh does not show them.
    fn roots(&self) -> Answer<'_, Vec<CertificateDer<'static>>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// A client's own token for a service: from now on that service's certificate, registration and watches are
    /// asked for with it, until the last instance of it is deregistered. One that may not be the service is refused,
    /// and takes the place of none that may.
    fn present_token(&self, service: &ServiceName, token: Token) -> Answer<'_, ()>;
}

/// Which instances there are.
pub trait Catalogue: Send + Sync {
    /// The instance that runs this Erlang node, when it passes.
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>>;

    /// All passing instances of one service.
    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>>;

    /// Which instances of one service there are now, passing or not. No answer when the mesh does not answer now,
    /// whatever it has told before.
    fn present(&self, _service: &ServiceName) -> Answer<'_, Present> {
        Box::pin(std::future::ready(Err(MeshError::Unsupported(
            "this mesh does not tell which instances are gone".to_owned(),
        ))))
    }

    /// How many of a service's links each of its instances should get, by id, as far as this is known at the moment;
    /// those that are not named count 1.
    fn weights(&self, _service: &ServiceName) -> HashMap<String, u32> {
        HashMap::new()
    }

    /// All passing nodes.
    fn nodes(&self) -> Answer<'_, Vec<Instance>>;

    /// The services that there are nodes of.
    fn node_services(&self) -> Answer<'_, Vec<ServiceName>> {
        Box::pin(async move {
            let mut services: Vec<_> = self.nodes().await?.into_iter().map(|node| node.service).collect();
            services.sort();
            services.dedup();
            Ok(services)
        })
    }

    /// All instances of services of this mesh, passing or not.
    fn services(&self) -> Answer<'_, Vec<Listed>>;
}

/// Who may talk to whom.
pub trait Authorization: Send + Sync {
    /// May `source` open connections to `target`? The caller has verified both already.
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision>;

    /// Resolves when [`Authorization::authorize`] may answer otherwise than before: live pairs are to be asked
    /// about again. One caller at a time waits here.
    fn changed(&self) -> Answer<'_, ()>;

    /// All rules, for people.
    fn intentions(&self) -> Answer<'_, Intentions>;

    /// The command by which an operator allows this pair.
    fn fix(&self, source: &ServiceName, target: &ServiceName) -> String;
}

/// This host's own entries in the catalogue.
pub trait Registration: Send + Sync {
    /// Adds or replaces an instance of this agent. It is kept in the mesh until it is deregistered, whatever the
    /// mesh loses meanwhile.
    fn register(&self, entry: &Entry) -> Answer<'_, ()>;

    /// Where whoever registered an adopted instance says that it is reached.
    fn adopted(&self, _id: &str) -> Option<SocketAddr> {
        None
    }

    /// Takes an instance of this agent away. One that is not there is no error.
    fn deregister(&self, id: &str) -> Answer<'_, ()>;

    /// Has an instance of our own shown as critical, for this reason, or passing again: whoever looks for instances
    /// to dial gets none that is critical. It holds until the next call, whatever the mesh loses meanwhile.
    fn set_critical(&self, id: &str, _reason: Option<&str>) -> Answer<'_, ()> {
        let text = format!("{id}: this mesh does not show whether an instance passes");
        Box::pin(std::future::ready(Err(MeshError::Unsupported(text))))
    }

    /// Resolves when the catalogue has this instance of our own as passing, sidecar included.
    fn passing(&self, id: &str) -> Answer<'_, ()>;

    /// What makes a successor of this process the same agent to the mesh: the lock of its entry, where there is one.
    ///
    /// # Errors
    /// What the system said.
    fn entry_lock(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }

    /// A successor keeps the entries of this agent from now on: they are left alone, and questions about them are
    /// answered as before.
    fn hand_over(&self) {}

    /// Keeps what a predecessor of this process has registered.
    fn take_over(&self, kept: Vec<Kept>) -> Answer<'_, ()> {
        Box::pin(async move {
            for kept in kept {
                self.register(&kept.entry).await?;
            }
            Ok(())
        })
    }
}

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, but not as well or not for ever.
    Warning,
    /// Does not work.
    Error,
}

impl Level {
    /// `ok`, `warning` or `error`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One line of `meshx doctor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How it is to be taken.
    pub level: Level,
    /// What was looked at.
    pub what: String,
    /// What was seen.
    pub text: String,
    /// What to do; empty when nothing.
    pub fix: String,
}

/// What is good and bad about the way to the mesh.
pub trait Diagnosis: Send + Sync {
    /// Looks at everything that can be looked at from here: the mesh's answers, rights, certificates, clocks.
    /// What cannot be seen is a finding, too.
    fn findings(&self) -> BoxFuture<'_, Vec<Finding>>;
}

/// A whole mesh.
pub trait Mesh: Certificates + Catalogue + Authorization + Registration + Diagnosis {}

impl<T: Certificates + Catalogue + Authorization + Registration + Diagnosis> Mesh for T {}
