//! What a link is, and what is known of it.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::mesh::{ServiceName, SpiffeId};
use crate::proxy::cause::{Cause, Refusal};
use crate::proxy::proof::Proof;

/// The 16 bytes that name a link at both of its ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LinkId(pub [u8; 16]);

impl LinkId {
    /// A fresh id, for a link that nobody else has named.
    pub(in crate::proxy) fn generate() -> Result<Self, Refusal> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)
            .map_err(|error| Cause::NotReady.because(format!("the system gave no random bytes: {error}")))?;
        Ok(Self(id))
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinkId({self})")
    }
}

/// Which end made a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// An instance of this agent dialled another agent, or a proxy of another make.
    Outbound,
    /// Another agent, or a proxy of another make, dialled an instance of this one.
    Inbound,
    /// Both ends are here.
    Local,
    /// Likewise, and the one that dialled is a session of the other's user: no rule is about it.
    Session,
}

impl Direction {
    /// The name in the `links` command.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Local | Self::Session => "local",
        }
    }
}

/// What a link carries. The numbers are those of the `meshx/1` request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Erlang distribution.
    Dist = 1,
    /// MeshxRpc.
    Rpc = 2,
    /// Plain bytes.
    Tcp = 3,
}

impl Purpose {
    /// The purpose of this number.
    pub fn from_wire(number: u8) -> Option<Self> {
        [Self::Dist, Self::Rpc, Self::Tcp]
            .into_iter()
            .find(|purpose| *purpose as u8 == number)
    }

    /// The name in the `links` command.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dist => "dist",
            Self::Rpc => "rpc",
            Self::Tcp => "tcp",
        }
    }
}

/// A service, and whether it has proven to be that: whoever only says so takes no links from who is.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct Dialler(pub(super) SpiffeId, bool);

/// What is known of a link from its start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkInfo {
    /// Its name.
    pub id: LinkId,
    /// Which end made it.
    pub direction: Direction,
    /// What it carries.
    pub purpose: Purpose,
    /// Node or service at this end (of a local link: the one that dialled).
    pub local: String,
    /// Node or service at the other end.
    pub remote: String,
    /// Proven identity of this end.
    pub local_spiffe: SpiffeId,
    /// Identity of the other end: proven when `verified`, else only what its name stands for.
    pub remote_spiffe: SpiffeId,
    /// Whether this agent knows by itself who is at the other end. False when a sidecar of another make is between.
    pub verified: bool,
    /// Where the other agent or proxy is; none on a local link.
    pub remote_agent: Option<SocketAddr>,
    /// What the ends have proven to each other last; none where this agent showed and saw no certificate.
    #[serde(skip)]
    pub proof: Option<Proof>,
    /// Registered instances that are ends of it here: it ends with them.
    pub instances: Vec<String>,
    /// Control connections of the ends that are here, to be told of a cut.
    pub owners: Vec<u64>,
}

impl LinkInfo {
    /// Who made the link.
    pub(super) fn dialler(&self) -> Dialler {
        match self.direction {
            Direction::Inbound => Dialler(self.remote_spiffe.clone(), self.verified),
            Direction::Outbound | Direction::Local | Direction::Session => {
                Dialler(self.local_spiffe.clone(), true)
            }
        }
    }

    /// The instance of a service that this agent chose.
    pub(super) fn chosen_instance(&self) -> Option<&str> {
        let chosen = self.direction != Direction::Inbound && self.purpose != Purpose::Dist;
        chosen.then_some(&self.remote)
    }

    /// End of this end's certificate, unix seconds; none where this agent showed none.
    pub fn local_not_after(&self) -> Option<i64> {
        self.proof.as_ref().map(|proof| proof.shown.not_after)
    }

    /// End of the other end's certificate, unix seconds; none where this agent saw none.
    pub fn remote_not_after(&self) -> Option<i64> {
        self.proof.as_ref().map(|proof| proof.peer.not_after)
    }

    /// The service that dialled, and the one that was dialled.
    pub(in crate::proxy) fn services(&self) -> (ServiceName, ServiceName) {
        let (here, there) = (self.local_spiffe.service(), self.remote_spiffe.service());
        match self.direction {
            Direction::Inbound => (there.clone(), here.clone()),
            Direction::Outbound | Direction::Local | Direction::Session => (here.clone(), there.clone()),
        }
    }
}

/// A live link as seen at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkSnapshot {
    /// What is known from its start.
    pub info: LinkInfo,
    /// When it started, unix seconds.
    pub since: i64,
    /// Bytes towards this end.
    pub bytes_in: u64,
    /// Bytes from this end.
    pub bytes_out: u64,
}
