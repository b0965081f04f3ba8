//! The EPMD of an agent in the hands of a successor of this process.
//!
//! Every connection that holds a name goes over, so no node notices. Between its freeze and the word to serve nobody is
//! answered, and nobody is turned away: connections wait where the kernel keeps them.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use meshx_dist::epmd::Request;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use super::kept::{Kept, KeptName};
use super::session::Held;
use super::{Epmd, EpmdConfig, HOSTS_MAX, Serving};
use crate::agent::registry::Registry;
use crate::proxy::plain::PlainPorts;

/// Places that one EPMD may listen at: some of its own, and one for each other host.
pub(crate) const PLACES_MAX: usize = 2 * HOSTS_MAX;

/// What counts on over all processes of one agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HandedEpmd {
    port: u16,
    next_owner: u64,
    /// How long the agent has been EPMD.
    age: Duration,
    hosts: BTreeMap<String, Ipv4Addr>,
    /// Who had which name before the agent started.
    before: BTreeMap<String, KeptName>,
}

/// A name, and what its connection proved. The connection goes with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HandedName {
    name: String,
    uid: u32,
    what: HandedWhat,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HandedWhat {
    /// A node: what it is registered by, and what outlives the agent.
    Node { owner: u64, kept: KeptName },
    /// A tool: its request, as EPMD reads it.
    Tool { request: Vec<u8> },
}

impl HandedName {
    /// What a node is registered by.
    pub(crate) fn owner(&self) -> Option<u64> {
        match self.what {
            HandedWhat::Node { owner, .. } => Some(owner),
            HandedWhat::Tool { .. } => None,
        }
    }
}

/// All that a predecessor of this process had.
#[derive(Debug)]
pub(crate) struct TakenEpmd {
    pub(crate) epmd: HandedEpmd,
    pub(crate) places: Vec<(SocketAddr, OwnedFd)>,
    pub(crate) names: Vec<(HandedName, OwnedFd)>,
}

impl Epmd {
    /// What goes to a successor, while nobody is served.
    pub(crate) fn handed(&self) -> HandedEpmd {
        HandedEpmd {
            port: self.port,
            next_owner: self.next_owner.load(Ordering::Relaxed),
            age: self.started.elapsed(),
            hosts: self.hosts.all(),
            before: self.kept.all_before(),
        }
    }

    /// As [`Epmd::open`], with all that a predecessor of this process had. Nothing is served before [`Epmd::serve`].
    ///
    /// # Errors
    /// A text, when it contradicts itself or there is no room for a name.
    pub(crate) fn take_over(
        registry: Arc<Registry>,
        ports: Arc<PlainPorts>,
        config: EpmdConfig,
        dir: &Path,
        taken: TakenEpmd,
    ) -> Result<(Arc<Self>, Serving), String> {
        let TakenEpmd { epmd, places, names } = taken;
        let HandedEpmd {
            port,
            next_owner,
            age,
            hosts,
            before,
        } = epmd;
        let kept = Kept::resume(Self::file(dir), before, hosts.clone());
        let (mut epmd, added) = Self::new(registry, ports, config, dir, (kept, hosts));
        epmd.port = port;
        epmd.next_owner = AtomicU64::new(next_owner);
        epmd.started = epmd.started.checked_sub(age).unwrap_or(epmd.started);
        let places = epmd.take_places(places);
        let epmd = Arc::new(epmd);
        let mut serving = Serving {
            places,
            added,
            parked: Vec::new(),
        };
        for (name, stream) in names {
            serving.parked.push(epmd.resume(name, stream)?);
        }
        Ok((epmd, serving))
    }

    fn resume(self: &Arc<Self>, handed: HandedName, stream: OwnedFd) -> Result<(TcpStream, Held), String> {
        let HandedName { name, uid, what } = handed;
        let stream = TcpStream::from_std(stream.into());
        let stream = stream.map_err(|error| format!("the connection of {name}: {error}"))?;
        let mut place = self.names.enter(uid).map_err(|refusal| refusal.to_string())?;
        let owner = match what {
            HandedWhat::Node { owner, kept } => {
                self.kept.set_name(&name, kept);
                Some(owner)
            }
            HandedWhat::Tool { request } => {
                let Ok(Some(Request::Alive2(node))) = Request::decode(&request) else {
                    return Err(format!("{name} is no tool"));
                };
                place
                    .hold_tool(&name, node)
                    .map_err(|refusal| refusal.to_string())?;
                None
            }
        };
        Ok((stream, Held::new(self.clone(), name, owner, place)))
    }
}

impl Serving {
    /// Where it listens.
    pub(crate) fn places(&self) -> impl Iterator<Item = (SocketAddr, BorrowedFd<'_>)> {
        self.places
            .iter()
            .filter_map(|(address, listener)| Some((*address, listener.as_ref()?.as_fd())))
    }

    /// The names, and the connections that hold them.
    ///
    /// # Errors
    /// When one cannot be described.
    pub(crate) fn names(&self) -> io::Result<Vec<(HandedName, BorrowedFd<'_>)>> {
        let names = self.parked.iter().filter_map(|(stream, held)| {
            let named = held.handed().transpose()?;
            Some(named.map(|named| (named, stream.as_fd())))
        });
        names.collect()
    }
}

impl Drop for Serving {
    /// Another process serves the names: theirs is the end of a registration.
    fn drop(&mut self) {
        self.parked.drain(..).for_each(|(_, held)| held.leave());
    }
}

impl Held {
    /// None for a name that has ended meanwhile.
    fn handed(&self) -> io::Result<Option<HandedName>> {
        let uid = self.place.uid();
        let what = match self.owner {
            Some(owner) => match self.epmd.kept.now(&self.name) {
                Some(kept) => HandedWhat::Node { owner, kept },
                None => return Ok(None),
            },
            None => {
                let Some(tool) = self.epmd.names.tool(&self.name) else {
                    return Ok(None);
                };
                let mut request = Vec::new();
                Request::Alive2(tool.node)
                    .encode(&mut request)
                    .map_err(io::Error::other)?;
                HandedWhat::Tool { request }
            }
        };
        Ok(Some(HandedName {
            name: self.name.clone(),
            uid,
            what,
        }))
    }
}
