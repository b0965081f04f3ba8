//! The data plane: mutual TLS between agents, and the checks on every link.
//!
//! ```text
//!            dist socket          inbound port
//! BEAM ---> outbound ---> dial ===> inbound ---> endpoint ---> BEAM or service
//!              |                                    ^
//!              +--------- same agent: no TLS -------+
//! service client ---> upstream ---> dial or endpoint, likewise
//! ```
//!
//! A link is decided before its first byte flows, and whatever is unclear is a refusal. Each refusal has a
//! [`cause::Cause`], which the caller, the log and the counters tell alike.

mod admission;
pub mod cause;
mod dial;
mod endpoint;
mod frames;
mod inbound;
mod keepalive;
pub mod links;
pub mod local;
mod outbound;
mod reauthorize;
mod splice;
mod tls;
mod upstream;
pub mod why;
pub mod wire;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

pub use upstream::{Upstream, UpstreamHandle};

use self::cause::{Cause, Refusal};
use self::links::{LinkId, LinkTable, Purpose};
use self::local::{LocalInstance, LocalTable};
use crate::log_limit::LogLimit;
use crate::mesh::{Instance, Mesh, MeshError, ServiceName, SpiffeId, split_node};

/// Deadlines and limits of the data plane. A live link has none.
#[derive(Debug, Clone)]
pub struct Settings {
    /// For one frame before the bytes flow, from its wait to its last byte.
    pub frame_timeout: Duration,
    /// For a TLS handshake.
    pub handshake_timeout: Duration,
    /// For a connection to an agent, a node or a service.
    pub connect_timeout: Duration,
    /// For an answer of the mesh.
    pub mesh_timeout: Duration,
    /// From the first byte to the decision; covers all of the above together.
    pub setup_timeout: Duration,
    /// Connections on one listener that are not decided yet; one more ends the oldest of them.
    pub max_pending: usize,
    /// How long the ends of a cut link may take to close it with the reason.
    pub cut_grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            frame_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            mesh_timeout: Duration::from_secs(5),
            setup_timeout: Duration::from_secs(10),
            max_pending: 256,
            cut_grace: Duration::from_secs(1),
        }
    }
}

/// The data plane of one agent.
pub struct Proxy {
    mesh: Arc<dyn Mesh>,
    local: LocalTable,
    links: LinkTable,
    settings: Settings,
    /// One for each listener, so that who floods one hides nothing of the others.
    refusals: [(&'static str, LogLimit); 3],
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy")
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}

impl Proxy {
    /// A data plane that asks `mesh`, serves what is in `local` and tells of its links in `links`.
    pub fn new(mesh: Arc<dyn Mesh>, local: LocalTable, links: LinkTable, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            mesh,
            local,
            links,
            settings,
            refusals: ["inbound", "dist", "upstream"].map(|at| (at, LogLimit::new("refused links"))),
        })
    }

    async fn find_node(&self, node: &str) -> Result<Instance, Refusal> {
        split_node(node).map_err(|error| Cause::InvalidName.because(error.to_string()))?;
        let found = self.ask(self.mesh.node(node)).await?;
        found.ok_or_else(|| Cause::NoSuchNode.because(format!("no agent has a node {node}")))
    }

    /// The rule that allows `source` to reach `target`, or the refusal.
    async fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Result<String, Refusal> {
        let decision = self.ask(self.mesh.authorize(source, target)).await?;
        let text = |verb| format!("{} -> {target} is {verb} by {}", source.service(), decision.rule);
        if decision.allowed {
            Ok(text("allowed"))
        } else {
            let fix = self.mesh.fix(source.service(), target);
            Err(Cause::IntentionDenied.because(format!("{}; to allow it: {fix}", text("denied"))))
        }
    }

    /// Silence is no answer, and no answer is a no.
    async fn ask<T>(&self, answer: impl Future<Output = Result<T, MeshError>>) -> Result<T, Refusal> {
        match tokio::time::timeout(self.settings.mesh_timeout, answer).await {
            Ok(answer) => answer.map_err(Refusal::from),
            Err(_) => Err(Cause::NotReady.because(format!(
                "the mesh was silent for {:?}",
                self.settings.mesh_timeout
            ))),
        }
    }

    /// A link's end that was deregistered before the link was in the table was not there to be cut. Ask when it is.
    fn still_here(&self, local: &LocalInstance) -> Result<(), Refusal> {
        let id = &local.instance.id;
        match self.local.by_id(id) {
            Some(now) if now.secret == local.secret => Ok(()),
            _ => Err(gone(&local.instance)),
        }
    }

    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, Refusal> {
        self.mesh.spiffe(service).map_err(Refusal::from)
    }

    /// Logs, counts and remembers a refusal. Beyond `LINES_PER_SECOND` (50) the log
    /// tells only how many there were.
    fn refuse(&self, attempt: &Attempt, refusal: &Refusal) {
        if attempt.is_probe {
            tracing::debug!(source = attempt.source, peer = attempt.peer, "probed and left");
            return;
        }
        self.links.refused(attempt.link, &attempt.target, refusal);
        let limit = self.refusals.iter().find(|(at, _)| *at == attempt.at);
        if !limit.is_none_or(|(_, limit)| limit.admit()) {
            return;
        }
        let link = attempt.link.map(|link| link.to_string()).unwrap_or_default();
        tracing::warn!(
            cause = %refusal.cause,
            source = attempt.source,
            target = attempt.target,
            purpose = attempt.purpose.map(Purpose::as_str).unwrap_or_default(),
            at = attempt.at,
            peer = attempt.peer,
            link,
            text = refusal.text,
            "link refused"
        );
    }
}

/// What is known so far of a link that is being decided; names that are not known are empty.
#[derive(Debug, Default)]
struct Attempt {
    /// Which listener it came in at.
    at: &'static str,
    peer: String,
    link: Option<LinkId>,
    purpose: Option<Purpose>,
    source: String,
    target: String,
    /// The peer left before it asked for anything: it only wanted to know whether somebody answers.
    is_probe: bool,
}

/// Why the links of a deregistered instance end.
pub(crate) fn gone(instance: &Instance) -> Refusal {
    let cause = match instance.node {
        Some(_) => Cause::NoSuchNode,
        None => Cause::NoSuchService,
    };
    cause.because(format!("{} was deregistered", instance.id))
}

fn no_such_service(service: &ServiceName) -> Refusal {
    Cause::NoSuchService.because(format!("no agent has an instance of the service {service}"))
}

#[cfg(test)]
mod tests;
