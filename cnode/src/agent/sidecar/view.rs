//! What one sidecar must know of the mesh: its certificate, who may connect, and where its upstreams are.
//!
//! The mesh's traits tell of changes of the rules to one caller only, which is the agent, and of other changes to
//! none. So certificates and instances are asked for every [`POLL`], which meshes answer from what they hold; all services
//! and rules every [`SOURCES_AGE`], or when the agent says that rules have changed; and `authorize` when one of these
//! changed, and at least every [`RECHECK`].

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream};
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tracing::warn;

use crate::mesh::{Answer, Identity, Intentions, Mesh, MeshError, ServiceName, SidecarUpstream, SpiffeId};

/// How often the mesh is asked.
pub(super) const POLL: Duration = Duration::from_secs(2);
/// How old a look at all services and rules may be: as long may a service that is new be refused.
const SOURCES_AGE: Duration = Duration::from_secs(5);
/// How often `authorize` is asked although nothing that can be seen has changed.
const RECHECK: Duration = Duration::from_secs(30);
/// How long a yes holds while the mesh gives no answer.
const STALE_MAX: Duration = Duration::from_secs(600);
/// How long the mesh may take for one answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Services that are asked about as sources; further ones are not let in.
const SOURCES_MAX: usize = 1024;
/// Questions that are open at once.
const CONCURRENT: usize = 8;

/// What is known now.
#[derive(Debug)]
pub(super) struct View {
    pub(super) identity: Arc<Identity>,
    pub(super) roots: Vec<CertificateDer<'static>>,
    /// SPIFFE URIs of the services that may connect.
    pub(super) allowed: BTreeSet<String>,
    pub(super) upstreams: Vec<Upstream>,
}

/// A service that the sidecar leads to.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) bind: SocketAddr,
    /// Whose certificate is wanted there.
    pub(super) spiffe: SpiffeId,
    pub(super) addresses: Vec<SocketAddr>,
}

/// What `authorize` said last of a source.
#[derive(Debug, Clone)]
struct Verdict {
    spiffe: SpiffeId,
    allowed: bool,
    at: Instant,
}

/// Asks for one sidecar, and remembers what must be remembered while the mesh is away.
pub(super) struct Viewer {
    mesh: Arc<dyn Mesh>,
    service: ServiceName,
    sources: Arc<Sources>,
    /// When the rules were last said to have changed.
    woken: Option<Instant>,
    seen: Option<Arc<Seen>>,
    candidates: BTreeSet<ServiceName>,
    verdicts: HashMap<ServiceName, Verdict>,
    /// When all were asked about with an answer for each; none: they are to be asked about.
    asked: Option<Instant>,
    addresses: HashMap<ServiceName, Vec<SocketAddr>>,
}

impl Viewer {
    pub(super) fn new(mesh: Arc<dyn Mesh>, sources: Arc<Sources>, service: ServiceName) -> Self {
        Self {
            mesh,
            service,
            sources,
            woken: None,
            seen: None,
            candidates: BTreeSet::new(),
            verdicts: HashMap::new(),
            asked: None,
            addresses: HashMap::new(),
        }
    }

    /// The rules may have changed: look at all and ask about all sources next time.
    pub(super) fn rules_changed(&mut self, now: Instant) {
        self.woken = Some(now);
        self.asked = None;
    }

    /// Asks, at this time. Without a certificate there is no view; what else is not answered stays as it was, a yes for
    /// [`STALE_MAX`].
    pub(super) async fn look(&mut self, wanted: &[SidecarUpstream], now: Instant) -> Result<View, MeshError> {
        let identity = answer(self.mesh.identity(&self.service)).await?;
        // After the leaf: roots that are newer than it still hold the one that signed it.
        let roots = answer(self.mesh.roots()).await?;
        if roots.is_empty() {
            // A proxy without roots might believe everybody.
            return Err(MeshError::Unavailable("it shows no root certificates".into()));
        }
        let own = self.mesh.spiffe(&self.service)?;
        if identity.id != own {
            return Err(MeshError::Unavailable(format!(
                "the certificate of {} names {}, wanted {own}",
                self.service, identity.id
            )));
        }
        // A mesh that was set up anew has other names for all.
        if self
            .verdicts
            .values()
            .any(|verdict| verdict.spiffe.trust_domain() != own.trust_domain())
        {
            self.asked = None;
        }
        self.find_sources(now).await;
        self.authorize(now).await;
        let allowed = self.verdicts.values().filter(|verdict| verdict.holds(now));
        let allowed = allowed.map(|verdict| verdict.spiffe.to_string()).collect();
        let upstreams = self.find_upstreams(wanted).await?;
        Ok(View {
            identity,
            roots,
            allowed,
            upstreams,
        })
    }

    /// Who might connect: the services of the catalogue, and those that a rule names.
    async fn find_sources(&mut self, now: Instant) {
        let seen = self.sources.seen(self.woken, now).await;
        if self.seen.as_ref() == Some(&seen) {
            return;
        }
        let rules = seen.rules.iter().flat_map(|rules| &rules.rules);
        let mut sources: BTreeSet<_> = rules
            .filter_map(|rule| ServiceName::new(&rule.source).ok())
            .collect();
        sources.extend(seen.services.iter().cloned());
        if sources.len() > SOURCES_MAX {
            warn!(
                service = %self.service,
                sources = sources.len(),
                max = SOURCES_MAX,
                "more services than a sidecar is told of: the last by name are not let in"
            );
            sources = sources.into_iter().take(SOURCES_MAX).collect();
        }
        self.verdicts.retain(|service, _| sources.contains(service));
        self.candidates = sources;
        self.seen = Some(seen);
        self.asked = None;
    }

    async fn authorize(&mut self, now: Instant) {
        if self.asked.is_some_and(|at| now.duration_since(at) < RECHECK) {
            return;
        }
        let (mesh, service) = (&self.mesh, &self.service);
        let ask = |source: ServiceName| async move {
            let spiffe = mesh.spiffe(&source)?;
            let decision = answer(mesh.authorize(&spiffe, service)).await?;
            let allowed = decision.allowed;
            Ok::<_, MeshError>((
                source,
                Verdict {
                    spiffe,
                    allowed,
                    at: now,
                },
            ))
        };
        let mut answers = stream::iter(self.candidates.iter().cloned().map(ask)).buffer_unordered(CONCURRENT);
        let mut whole = true;
        while let Some(answer) = answers.next().await {
            match answer {
                Ok((source, verdict)) => {
                    self.verdicts.insert(source, verdict);
                }
                Err(_) => whole = false,
            }
        }
        drop(answers);
        self.asked = whole.then_some(now);
    }

    async fn find_upstreams(&mut self, wanted: &[SidecarUpstream]) -> Result<Vec<Upstream>, MeshError> {
        self.addresses
            .retain(|service, _| wanted.iter().any(|upstream| upstream.target == *service));
        let mut upstreams = Vec::new();
        for SidecarUpstream { target, bind } in wanted {
            if let Ok(instances) = answer(self.mesh.instances(target)).await {
                let mut addresses: Vec<_> = instances.into_iter().map(|instance| instance.address).collect();
                // Many instances behind one agent are one address, and the catalogue has no order.
                addresses.sort_unstable();
                addresses.dedup();
                self.addresses.insert(target.clone(), addresses);
            }
            upstreams.push(Upstream {
                bind: *bind,
                spiffe: self.mesh.spiffe(target)?,
                addresses: self.addresses.get(target).cloned().unwrap_or_default(),
            });
        }
        Ok(upstreams)
    }
}

/// What of the catalogue and the rules tells who might connect anywhere: one for all sidecars of an agent, since a mesh
/// may have to ask for each service.
pub(super) struct Sources {
    mesh: Arc<dyn Mesh>,
    /// Held while the mesh is asked, so that those who come meanwhile get the same answer.
    known: Mutex<(Option<Instant>, Arc<Seen>)>,
}

/// One look at it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    services: BTreeSet<ServiceName>,
    rules: Option<Intentions>,
}

impl Sources {
    pub(super) fn new(mesh: Arc<dyn Mesh>) -> Self {
        Self {
            mesh,
            known: Mutex::default(),
        }
    }

    /// What was seen since `since`, and at most [`SOURCES_AGE`] ago. What is not answered stays as it was: a token may
    /// not see all rules, and pairs are asked about one by one.
    async fn seen(&self, since: Option<Instant>, now: Instant) -> Arc<Seen> {
        let mut known = self.known.lock().await;
        let (at, seen) = &mut *known;
        let fresh = at
            .is_some_and(|at| since.is_none_or(|since| at >= since) && now.duration_since(at) < SOURCES_AGE);
        if !fresh {
            let (listed, rules) = tokio::join!(answer(self.mesh.services()), answer(self.mesh.intentions()));
            let mut next = Seen::clone(seen);
            if let Ok(listed) = listed {
                next.services = listed.into_iter().map(|listed| listed.instance.service).collect();
            }
            if let Ok(rules) = rules {
                next.rules = Some(rules);
            }
            *at = Some(now);
            if **seen != next {
                *seen = Arc::new(next);
            }
        }
        seen.clone()
    }
}

impl Verdict {
    fn holds(&self, now: Instant) -> bool {
        self.allowed && now.duration_since(self.at) < STALE_MAX
    }
}

async fn answer<T>(question: Answer<'_, T>) -> Result<T, MeshError> {
    timeout(ANSWER_TIME, question).await.unwrap_or_else(|_| {
        Err(MeshError::Unavailable(format!(
            "not within {} s",
            ANSWER_TIME.as_secs()
        )))
    })
}
