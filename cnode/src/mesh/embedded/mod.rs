//! The embedded mesh: one directory, one user, one machine.
//!
//! Every agent that names the directory belongs to the mesh. The file system is what they share:
//! files are replaced by rename, changes are made under one lock, and an agent is alive as long as it
//! holds the lock of its own entry, so a killed one is gone at once. The layout is in
//! `docs/mesh-protocol.md`.
//!
//! Not for more than one user or machine: whoever may read the directory may sign any name.

mod authority;
mod catalogue;
mod dir;
mod rules;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use authority::{Rotation, rotate};
pub use dir::MeshDir;
pub use rules::{Action, Pattern, Rule, Rules};

use self::authority::Authority;
use self::catalogue::{AgentEntry, OwnEntry, Record};
use futures::future::BoxFuture;
use rustls::pki_types::CertificateDer;

use super::{
    Answer, Authorization, Catalogue, Certificates, Decision, Diagnosis, Entry, Finding, Identity, Instance,
    Intention, Intentions, Kept, Level, Listed, MeshError, Present, Registration, ServiceName, SpiffeId,
    Token,
};
use crate::proxy::links::unix_now;

/// How often the rules are looked at: a denial cuts live links within 2 s.
const RULES_POLL: Duration = Duration::from_millis(250);

/// Leaves that are kept. Whoever may be any service could else have any number of them made and held.
const MAX_LEAVES: usize = 4096;

/// One agent's membership in the mesh of a directory. It ends when this is dropped.
#[derive(Debug)]
pub struct EmbeddedMesh {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: MeshDir,
    _occupied: File,
    trust_domain: String,
    own: OwnEntry,
    // Held while the authority is read anew, or a leaf is looked up or made; never across an await.
    issued: Mutex<Issued>,
    /// The version of the rules that `changed` told of last.
    rules_seen: Mutex<Option<dir::Stamp>>,
}

/// The authority as it was read last, and the leaves that it has made.
#[derive(Debug)]
struct Issued {
    authority: Authority,
    leaves: HashMap<ServiceName, Leaf>,
}

#[derive(Debug)]
struct Leaf {
    identity: Arc<Identity>,
    /// Renewed so many seconds before it must be.
    early: i64,
}

impl EmbeddedMesh {
    /// Joins the mesh of `dir` and makes it when it is not there. Blocks for a moment: call it at start.
    ///
    /// `agent` is this agent's id, `hosts` the host parts of node names that it owns, `advertise` where it
    /// accepts mesh connections (loopback only).
    ///
    /// # Errors
    /// [`MeshError::Refused`] when the directory is open to others, an agent of this id lives, or the
    /// address is not loopback; [`MeshError::Unavailable`] when a file cannot be read or written.
    pub fn open(
        dir: &Path,
        agent: &str,
        hosts: Vec<String>,
        advertise: SocketAddr,
    ) -> Result<Self, MeshError> {
        Self::join(dir, agent, hosts, advertise, OwnEntry::open)
    }

    /// As [`EmbeddedMesh::open`], in the place of an agent that hands over the lock of its entry
    /// ([`Registration::entry_lock`]); its entry stays as it is until [`Registration::take_over`].
    ///
    /// # Errors
    /// As there.
    pub fn succeed(
        dir: &Path,
        agent: &str,
        hosts: Vec<String>,
        advertise: SocketAddr,
        lock: OwnedFd,
    ) -> Result<Self, MeshError> {
        Self::join(dir, agent, hosts, advertise, |dir, entry| {
            OwnEntry::succeed(dir, entry, lock.into())
        })
    }

    fn join(
        dir: &Path,
        agent: &str,
        hosts: Vec<String>,
        advertise: SocketAddr,
        enter: impl FnOnce(&MeshDir, AgentEntry) -> Result<OwnEntry, MeshError>,
    ) -> Result<Self, MeshError> {
        if !advertise.ip().is_loopback() {
            return Err(MeshError::Refused(format!(
                "the embedded mesh is for one machine: {advertise} is not a loopback address"
            )));
        }
        let dir = MeshDir::open(dir)?;
        let lock = dir.lock()?;
        let authority = Authority::open(&dir)?;
        let own = enter(&dir, AgentEntry::new(agent, hosts, advertise)?)?;
        drop(lock);
        for conflict in own.host_conflicts(&dir)? {
            tracing::warn!(agent, %conflict, "two agents own the same host name");
        }
        Ok(Self {
            inner: Arc::new(Inner {
                _occupied: dir.occupy()?,
                dir,
                trust_domain: authority.trust_domain().to_owned(),
                own,
                issued: Mutex::new(Issued {
                    authority,
                    leaves: HashMap::new(),
                }),
                rules_seen: Mutex::default(),
            }),
        })
    }

    /// The trust domain that every identity of this mesh lies in.
    pub fn trust_domain(&self) -> &str {
        &self.inner.trust_domain
    }

    /// Other live agents that own one of this agent's host names, in words.
    ///
    /// # Errors
    /// [`MeshError::Unavailable`] when the catalogue cannot be read.
    pub fn host_conflicts(&self) -> Result<Vec<String>, MeshError> {
        self.inner.own.host_conflicts(&self.inner.dir)
    }

    /// Runs `work`, which reads and writes files, where it holds nobody up.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, MeshError> + Send + 'static,
    ) -> Answer<'_, T> {
        let inner = self.inner.clone();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || work(&inner))
                .await
                .unwrap_or_else(|error| Err(MeshError::Unavailable(error.to_string())))
        })
    }
}

impl Inner {
    /// Calls with the authority of now.
    fn with_issued<T>(&self, work: impl FnOnce(&mut Issued) -> Result<T, MeshError>) -> Result<T, MeshError> {
        let mut issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        if !issued.authority.is_current(&self.dir) {
            let _lock = self.dir.lock()?;
            let authority = Authority::load(&self.dir)?;
            if authority.trust_domain() != self.trust_domain {
                return Err(MeshError::Unavailable(format!(
                    "the mesh was made anew with trust domain {}: restart the agent",
                    authority.trust_domain()
                )));
            }
            *issued = Issued {
                authority,
                leaves: HashMap::new(),
            };
        }
        work(&mut issued)
    }

    fn records(&self, wanted: impl Fn(&Record) -> bool) -> Result<Vec<Record>, MeshError> {
        self.own.entries.records(&self.dir, wanted)
    }

    /// Those that pass.
    fn instances(&self, wanted: impl Fn(&Instance) -> bool) -> Result<Vec<Instance>, MeshError> {
        let passing = self.records(|record| record.critical.is_none() && wanted(&record.instance))?;
        Ok(passing.into_iter().map(|record| record.instance).collect())
    }

    fn identity(&self, service: &ServiceName) -> Result<Arc<Identity>, MeshError> {
        let now = unix_now();
        self.with_issued(|Issued { authority, leaves }| {
            if let Some(leaf) = leaves.get(service)
                && authority::is_fresh(&leaf.identity, leaf.early, now)
            {
                return Ok(leaf.identity.clone());
            }
            let identity = Arc::new(authority.issue(service)?);
            leaves.retain(|_, leaf| leaf.identity.not_after > now);
            if leaves.len() >= MAX_LEAVES {
                let oldest = leaves.iter().min_by_key(|(_, leaf)| leaf.identity.not_after);
                if let Some(oldest) = oldest.map(|(service, _)| service.clone()) {
                    leaves.remove(&oldest);
                }
            }
            let leaf = Leaf {
                identity: identity.clone(),
                early: authority::early(),
            };
            leaves.insert(service.clone(), leaf);
            Ok(identity)
        })
    }
}

impl Certificates for EmbeddedMesh {
    fn identity(&self, service: &ServiceName) -> Answer<'_, Arc<Identity>> {
        let service = service.clone();
        self.blocking(move |inner| inner.identity(&service))
    }

    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError> {
        Ok(SpiffeId::new(self.trust_domain(), service.clone()))
    }

    fn roots(&self) -> Answer<'_, Vec<CertificateDer<'static>>> {
        self.blocking(|inner| inner.with_issued(|issued| Ok(issued.authority.roots().to_vec())))
    }

    fn present_token(&self, service: &ServiceName, _: Token) -> Answer<'_, ()> {
        Box::pin(std::future::ready(Err(MeshError::Unsupported(format!(
            "a token for {service}: the embedded mesh has none, leave it out or use Consul"
        )))))
    }
}

impl Catalogue for EmbeddedMesh {
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>> {
        let node = node.to_owned();
        self.blocking(move |inner| {
            let of_name = inner.instances(|instance| instance.node.as_deref() == Some(&node))?;
            Ok(of_name.into_iter().next())
        })
    }

    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>> {
        let service = service.clone();
        self.blocking(move |inner| inner.instances(|instance| instance.service == service))
    }

    fn present(&self, service: &ServiceName) -> Answer<'_, Present> {
        let service = service.clone();
        self.blocking(move |inner| {
            let of_service = inner.records(|record| record.instance.service == service)?;
            Ok(Present::new(of_service.iter().map(|record| &record.instance), 0))
        })
    }

    fn nodes(&self) -> Answer<'_, Vec<Instance>> {
        self.blocking(|inner| inner.instances(|instance| instance.node.is_some()))
    }

    fn services(&self) -> Answer<'_, Vec<Listed>> {
        self.blocking(|inner| {
            let listed = |Record { instance, critical }| Listed {
                instance,
                // A dead agent's instances are not there at all.
                status: critical.map_or_else(|| "passing".to_owned(), |why| format!("critical: {why}")),
                tags: Vec::new(),
                weight: 1,
            };
            Ok(inner.records(|_| true)?.into_iter().map(listed).collect())
        })
    }
}

impl Authorization for EmbeddedMesh {
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision> {
        let (source, target) = (source.clone(), target.clone());
        self.blocking(move |inner| {
            let ours = inner.trust_domain.as_str();
            if source.trust_domain() != ours {
                let rule = format!("{source} is not of the trust domain {ours}");
                return Ok(Decision { allowed: false, rule });
            }
            Ok(Rules::load(&inner.dir)?.decide(source.service(), &target))
        })
    }

    fn changed(&self) -> Answer<'_, ()> {
        Box::pin(async move {
            loop {
                let changed = self.blocking(|inner| {
                    let now = Rules::stamp(&inner.dir);
                    let mut seen = inner.rules_seen.lock().unwrap_or_else(PoisonError::into_inner);
                    Ok(seen.replace(now) != Some(now))
                });
                if changed.await? {
                    return Ok(());
                }
                tokio::time::sleep(RULES_POLL).await;
            }
        })
    }

    fn intentions(&self) -> Answer<'_, Intentions> {
        self.blocking(|inner| {
            let rules = Rules::load(&inner.dir)?;
            Ok(Intentions {
                default: rules.default.to_string(),
                rules: rules
                    .by_precision()
                    .into_iter()
                    .map(|rule| Intention {
                        source: rule.source.to_string(),
                        destination: rule.destination.to_string(),
                        action: rule.action.to_string(),
                    })
                    .collect(),
            })
        })
    }

    fn fix(&self, source: &ServiceName, target: &ServiceName) -> String {
        format!("meshx allow {source} {target}")
    }
}

impl Registration for EmbeddedMesh {
    fn register(&self, entry: &Entry) -> Answer<'_, ()> {
        let instance = entry.only_plain("embedded").cloned();
        self.blocking(move |inner| inner.own.register(&inner.dir, instance?))
    }

    fn deregister(&self, id: &str) -> Answer<'_, ()> {
        let id = id.to_owned();
        self.blocking(move |inner| inner.own.deregister(&inner.dir, &id))
    }

    fn set_critical(&self, id: &str, reason: Option<&str>) -> Answer<'_, ()> {
        let (id, reason) = (id.to_owned(), reason.map(str::to_owned));
        self.blocking(move |inner| inner.own.set_critical(&inner.dir, &id, reason))
    }

    fn passing(&self, _: &str) -> Answer<'_, ()> {
        // What is registered passes at first.
        Box::pin(std::future::ready(Ok(())))
    }

    fn entry_lock(&self) -> io::Result<Option<OwnedFd>> {
        self.inner.own.lock()
    }

    fn hand_over(&self) {
        self.inner.own.hand_over();
    }

    fn take_over(&self, kept: Vec<Kept>) -> Answer<'_, ()> {
        let instances = kept.into_iter().map(|kept| kept.entry.instance).collect();
        self.blocking(move |inner| inner.own.take_over(&inner.dir, instances))
    }
}

impl Diagnosis for EmbeddedMesh {
    fn findings(&self) -> BoxFuture<'_, Vec<Finding>> {
        Box::pin(async {
            let rules = self.blocking(|inner| Rules::load(&inner.dir)).await;
            let conflicts = self.blocking(|inner| inner.own.host_conflicts(&inner.dir)).await;
            let mut findings = vec![match rules {
                Ok(rules) => Finding {
                    level: Level::Ok,
                    what: "rules".into(),
                    text: format!("{} rules, {} without one", rules.rules.len(), rules.default),
                    fix: String::new(),
                },
                Err(error) => Finding {
                    level: Level::Error,
                    what: "rules".into(),
                    text: error.to_string(),
                    fix: "every link is refused until rules.json can be read: mend it, or make the mesh anew"
                        .into(),
                },
            }];
            match conflicts {
                Ok(conflicts) => findings.extend(conflicts.into_iter().map(|text| Finding {
                    level: Level::Error,
                    what: "hosts".into(),
                    text,
                    fix: "give one of the two agents other hosts with --host".into(),
                })),
                Err(error) => findings.push(Finding {
                    level: Level::Error,
                    what: "catalogue".into(),
                    text: error.to_string(),
                    fix: "see that the mesh's directory and its agents/ can be read".into(),
                }),
            }
            findings
        })
    }
}

#[cfg(test)]
mod tests;
