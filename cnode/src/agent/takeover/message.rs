//! What two processes of one agent tell each other (`docs/operations.md`, "Upgrading").

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    agent::registry::{Handed, HandedInstance, HandedSession},
    epmd::{HandedEpmd, HandedName},
    mesh::ServiceName,
    proxy::{
        Forwarded, Upstream,
        cause::{Cause, Refusal},
        links::{CutEvent, LinkId, LinkSnapshot},
    },
};

/// Lowest and highest version of this protocol that this program speaks. Fields that a version does not know are left
/// alone, so a new version is for what both must understand.
pub const TAKEOVER_VERSIONS: (u32, u32) = (1, 1);

/// The first message of whoever connects.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// What it speaks.
    pub(super) versions: (u32, u32),
    /// Name and version of its program.
    pub(super) program: String,
    pub(super) role: Role,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Role {
    /// Takes over.
    Successor,
    /// Was taken over, and has links that live.
    Predecessor,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Welcome(Box<Welcome>),
    Refused { text: String },
}

/// Who serves, as far as a successor must know before it asks for the rest.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Welcome {
    /// The highest that both speak.
    pub(super) version: u32,
    pub(super) program: String,
    /// Which mesh; the embedded one's directory. The lock of the agent's entry goes with this when `entry_lock`.
    pub(super) mesh: String,
    pub(super) mesh_dir: Option<PathBuf>,
    pub(super) entry_lock: bool,
    /// The agent's id in the mesh.
    pub(super) agent: String,
    /// Where it listens.
    pub(super) bind: SocketAddr,
    pub(super) http: Option<SocketAddr>,
    /// Where nodes of plain distribution find it, when it is EPMD.
    #[serde(default)]
    pub(super) epmd: Option<EpmdPlace>,
    /// What other agents are told.
    pub(super) advertise: SocketAddr,
    /// Whose certificates the successor will need.
    pub(super) services: Vec<ServiceName>,
}

/// An agent that is EPMD, as its nodes know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::agent) struct EpmdPlace {
    pub(in crate::agent) port: u16,
    /// Where it was told to listen; empty of a build that does not say.
    #[serde(default)]
    pub(in crate::agent) addresses: BTreeSet<IpAddr>,
    /// The host part of the nodes that register.
    pub(in crate::agent) host: String,
}

/// From the process that serves to its successor, in this order.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Give {
    /// The lock of the directory, the listeners of the control, dist and takeover sockets and of the inbound port, and
    /// of HTTP when there is one.
    Agent {
        made: bool,
        next_id: u64,
        http: bool,
        registry: Handed,
    },
    /// A client's connection.
    Client {
        id: u64,
        greeted: bool,
        /// Services that it watches the nodes of, by the watches' names.
        #[serde(default)]
        watches: HashMap<String, Vec<ServiceName>>,
        /// How long it may be silent, when it is asked whether it lives.
        #[serde(default)]
        heartbeat: Option<Duration>,
    },
    /// An upstream's listener.
    Upstream {
        owner: u64,
        id: String,
        upstream: Upstream,
    },
    /// A registration, and the listeners of its own ports and the files of its sidecar.
    Instance(Box<HandedInstance>),
    /// A session.
    Session(HandedSession),
    /// A port that leads nodes of plain distribution to this one, and its listener.
    PlainPort { target: String },
    /// The agent is EPMD.
    Epmd(Box<HandedEpmd>),
    /// Where it listens as that, and the listener.
    EpmdPlace { address: SocketAddr },
    /// A name, and the connection that holds it.
    EpmdName(HandedName),
    /// So many there were.
    All(Counts),
    /// The successor serves from here on.
    Commit,
    /// It does not: the process that served goes on.
    Abort { text: String },
}

/// How much of everything was sent.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Counts {
    pub(super) clients: usize,
    pub(super) upstreams: usize,
    pub(super) instances: usize,
    pub(super) sessions: usize,
    pub(super) plain_ports: usize,
    pub(super) epmd_places: usize,
    pub(super) epmd_names: usize,
}

/// From the successor to the process that serves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Take {
    /// It wants everything.
    Begin,
    /// It has everything, and waits for the word to serve.
    Ready,
    /// It serves.
    Serving,
    /// It cannot.
    Failed { text: String },
}

/// From the process that serves to one that was taken over.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::agent) enum Order {
    /// Cut one link.
    Cut {
        link: LinkId,
        cause: Cause,
        text: String,
    },
    /// Cut the links of an instance that is gone.
    CutInstance { id: String, cause: Cause, text: String },
    /// Cut the links of an upstream.
    CloseUpstream { owner: u64, id: String },
    /// Cut the links of all upstreams of a client that is gone.
    ClientGone { owner: u64 },
    /// Believe a link by this proof, if it is here.
    Prove(Forwarded),
    /// Tell what links there are.
    Links,
}

/// From a process that was taken over to the one that serves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Report {
    /// So many links live.
    Holding { links: usize },
    /// A link was cut: its owner is to close it with the reason.
    Cut { owner: u64, event: CutEvent },
    /// The answer to [`Order::Prove`]; none when the link is not here.
    Proven { answer: Option<Result<(), Refusal>> },
    /// Some links, the answer to [`Order::Links`]; `last` with the last ones.
    Links { links: Vec<ShownLink>, last: bool },
}

/// A link as it is shown: whichever process of the agent holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::agent) struct ShownLink {
    #[serde(flatten)]
    pub(in crate::agent) link: LinkSnapshot,
    /// End of this end's certificate, unix seconds; none where the agent showed none.
    #[serde(default)]
    pub(in crate::agent) local_not_after: Option<i64>,
    /// End of the other end's certificate, likewise.
    #[serde(default)]
    pub(in crate::agent) remote_not_after: Option<i64>,
}

impl From<LinkSnapshot> for ShownLink {
    fn from(link: LinkSnapshot) -> Self {
        Self {
            local_not_after: link.info.local_not_after(),
            remote_not_after: link.info.remote_not_after(),
            link,
        }
    }
}

/// The highest version that both ranges have.
pub(super) fn common_version(theirs: (u32, u32), program: &str) -> Result<u32, String> {
    let (low, high) = TAKEOVER_VERSIONS;
    let version = theirs.1.min(high);
    if version < theirs.0.max(low) {
        return Err(format!(
            "{program} speaks versions {} to {} of the takeover protocol, {} speaks {low} to {high}",
            theirs.0,
            theirs.1,
            super::program()
        ));
    }
    Ok(version)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn the_highest_common_version_is_chosen_and_none_is_told() {
        let high = TAKEOVER_VERSIONS.1;
        assert_eq!(common_version((1, high), "old"), Ok(high));
        assert_eq!(common_version((high, high + 1), "the next release"), Ok(high));
        let text = common_version((high + 1, high + 2), "meshx 9").unwrap_err();
        assert!(
            text.contains("meshx 9") && text.contains(&crate::agent::takeover::program()),
            "{text}"
        );
        assert!(common_version((0, 0), "none").is_err());
        assert!(common_version((high, 0), "upside down").is_err());
    }

    #[test]
    fn what_a_later_release_adds_is_left_alone() {
        let hello = r#"{"versions": [1, 2], "program": "meshx 9", "role": "successor", "features": ["x"]}"#;
        let hello: Hello = serde_json::from_str(hello).unwrap();
        assert_eq!((hello.role, hello.versions), (Role::Successor, (1, 2)));
    }
}
