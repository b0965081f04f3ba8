//! What an agent says of one of its instances in the catalogue.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Instance, MeshError, ServiceName};

/// An instance, and all that its registration says beyond it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The instance.
    pub instance: Instance,
    /// Tags, as they are shown and filtered by.
    pub tags: Vec<String>,
    /// Metadata; keys that begin with `meshx` are the agent's own.
    pub meta: BTreeMap<String, String>,
    /// How many of the service's connections it should get.
    pub weights: Option<Weights>,
    /// Time to live of its check, which the agent refreshes; the mesh's default when there is none.
    pub ttl: Option<Duration>,
    /// How long it may be critical before the mesh forgets it; the mesh's default when there is none.
    pub deregister_after: Option<Duration>,
    /// Further fields of a registration in Consul's own form. Whoever fills this has checked them: some make
    /// Consul run programs.
    pub extra: serde_json::Map<String, serde_json::Value>,
    /// Serve an instance that somebody else registered and will deregister.
    pub adopt: bool,
    /// Take an id over that somebody else registered with the same Consul agent.
    pub force: bool,
    /// Who carries its traffic.
    pub data_plane: DataPlane,
}

impl Entry {
    /// An instance and nothing else.
    pub fn plain(instance: Instance) -> Self {
        Self {
            instance,
            tags: Vec::new(),
            meta: BTreeMap::new(),
            weights: None,
            ttl: None,
            deregister_after: None,
            extra: serde_json::Map::new(),
            adopt: false,
            force: false,
            data_plane: DataPlane::Native,
        }
    }

    /// For a mesh that has none of this: the first thing that the entry asks for beyond the instance.
    ///
    /// # Errors
    /// [`MeshError::Unsupported`] that names it.
    pub fn only_plain(&self, mesh: &str) -> Result<&Instance, MeshError> {
        let asked = [
            ("tags", !self.tags.is_empty()),
            ("weights", self.weights.is_some()),
            ("a time to live", self.ttl.is_some()),
            ("deregister_after", self.deregister_after.is_some()),
            ("fields of a Consul registration", !self.extra.is_empty()),
            ("adopt", self.adopt),
            ("a sidecar", self.data_plane != DataPlane::Native),
        ];
        match asked.iter().find(|(_, asked)| *asked) {
            None => Ok(&self.instance),
            Some((what, _)) => Err(MeshError::Unsupported(format!(
                "{} asks for {what}, which the {mesh} mesh has not: leave it out or use Consul",
                self.instance.id
            ))),
        }
    }
}

/// Weights of an instance by the state of its checks (Consul: `Weights`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weights {
    /// While it passes.
    pub passing: u32,
    /// While it warns.
    pub warning: u32,
}

/// Who carries an instance's traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DataPlane {
    /// The agent itself.
    Native,
    /// A proxy beside the service, registered as its Consul sidecar.
    Sidecar(Sidecar),
}

/// The sidecar of an instance, as its registration has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Where the proxy hands inbound connections to, on loopback.
    pub local: SocketAddr,
    /// Where the proxy listens for the mesh, at the port of the instance's address.
    pub bind: IpAddr,
    /// What it offers locally.
    pub upstreams: Vec<SidecarUpstream>,
}

/// A service that a sidecar leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SidecarUpstream {
    /// The service.
    pub target: ServiceName,
    /// Where the proxy listens for it, on loopback.
    pub bind: SocketAddr,
}

/// An entry that is registered, in the hands of one agent process or its successor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// What is registered.
    pub entry: Entry,
    /// The client's own token for its service.
    pub token: Option<Token>,
    /// Where an adopted one is reached, by its registration.
    pub address: Option<SocketAddr>,
}

/// A mesh's secret of a client. Never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// Takes a token as it came.
    pub fn new(token: impl Into<String>) -> Self {
        Self(token.into())
    }

    /// For the request that carries it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::mesh::Protocol;

    fn instance() -> Instance {
        Instance {
            id: "echo-1".into(),
            service: ServiceName::new("echo").unwrap(),
            node: None,
            agent: "a".into(),
            address: "127.0.0.1:1".parse().unwrap(),
            protocol: Protocol::Meshx,
            meta: BTreeMap::new(),
        }
    }

    #[test]
    fn what_a_simple_mesh_has_not_is_named() {
        let plain = Entry::plain(instance());
        assert_eq!(plain.only_plain("embedded").unwrap(), &instance());
        let sidecar = DataPlane::Sidecar(Sidecar {
            bind: [127, 0, 0, 1].into(),
            local: "127.0.0.1:1".parse().unwrap(),
            upstreams: Vec::new(),
        });
        for (entry, named) in [
            (
                Entry {
                    tags: vec!["a".into()],
                    ..plain.clone()
                },
                "tags",
            ),
            (
                Entry {
                    adopt: true,
                    ..plain.clone()
                },
                "adopt",
            ),
            (
                Entry {
                    data_plane: sidecar,
                    ..plain.clone()
                },
                "a sidecar",
            ),
            (
                Entry {
                    ttl: Some(Duration::from_secs(1)),
                    ..plain.clone()
                },
                "a time to live",
            ),
        ] {
            let error = entry.only_plain("embedded").unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("embedded"), "{error}");
        }
    }

    #[test]
    fn a_token_is_not_shown() {
        assert_eq!(format!("{:?}", Token::new("s3cret")), "Token(..)");
    }
}
