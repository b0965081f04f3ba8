//! The data plane: mutual TLS between agents, and the checks on every link.
//!
//! ```text
//!            dist socket          inbound port
//! BEAM ---> outbound ---> dial ===> inbound ---> requested -+-> endpoint ---> BEAM or service
//!              |           |           |                    |      ^
//!              |           |           +-----> foreign -----+      |
//!              |           |                   (other proxies)     |
//!              +---------- | ------- same agent: no TLS -----------+
//!                          |                                       |
//!                          +-> a sidecar of ours ~~> unverified ---+
//! plain distribution ---> plain ---> outbound, from its decision on
//! service client ---> upstream ---> dial or endpoint, likewise
//! ```
//!
//! A link is decided before its first byte flows, and whatever is unclear is a refusal. Each refusal has a
//! [`cause::Cause`], which the caller, the log and the counters tell alike.

pub(crate) mod admission;
mod balance;
mod busy_poll;
pub mod cause;
mod dial;
mod endpoint;
mod flow;
mod foreign;
mod frames;
mod gone;
mod inbound;
mod keepalive;
mod lanes;
pub mod links;
pub(crate) mod listener;
pub mod local;
mod near;
mod outbound;
pub(crate) mod peer_uid;
pub mod plain;
mod proof;
mod reauthorize;
mod reproof;
mod requested;
mod sessions;
mod splice;
mod tls;
pub mod totals;
mod turns;
mod unverified;
mod upstream;
pub mod why;
mod wide;
pub mod wire;

use std::future::Future;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use balance::Balance;
pub use busy_poll::busy_poll_of;
pub use lanes::Lanes;
pub use listener::Listener;
pub use proof::Proof;
pub(crate) use reproof::{Elsewhere, Forwarded};
pub use sessions::Session;
pub(crate) use sessions::gone_session;
pub use upstream::{Listen, Upstream, UpstreamHandle, UpstreamLinks};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::admission::Admission;
use self::balance::Balancer;
use self::cause::{Cause, Refusal};
use self::frames::Duplex;
use self::links::{LinkGuard, LinkId, LinkTable, Purpose};
use self::local::{LocalInstance, LocalTable};
use self::turns::Turns;
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
    /// How long a connection that is refused may take to read why.
    pub linger_time: Duration,
    /// From the first byte to the decision; covers all of the above together but that.
    pub setup_timeout: Duration,
    /// Connections on one listener that are not decided yet, three quarters of them of one dialler; one more ends the
    /// oldest of whoever has most. At the inbound ports those who have shown their certificate are counted apart.
    pub max_pending: usize,
    /// Links that are made to one other agent at a time, three quarters of them by one dialler; further ones wait.
    pub max_dials: usize,
    /// How often it is looked whether links are to be proven anew, or cut because they were not.
    pub proof_look: Duration,
    /// After a rotation links are proven anew within 10 ms for each that lives, and within this when there are many.
    pub reproof_spread: Duration,
    /// How long the other end of a link may take to prove itself anew, once its root is gone or its certificate has
    /// ended.
    pub reproof_grace: Duration,
    /// How often the catalogue is asked for the instances at the other ends of links.
    pub instance_look: Duration,
    /// How long an instance that was there may be absent from good answers until its links are cut.
    pub instance_gone_after: Duration,
    /// How long the ends of a cut link may take to close it with the reason.
    pub cut_grace: Duration,
    /// Which instance of a service is dialled first.
    pub balance: Balance,
    /// Whether nodes may be dialled through sidecars of another make, which keep to themselves whom they have verified:
    /// anybody who may reach the node's service may then claim any node's name.
    pub allow_unverified_peers: bool,
    /// The service that [sessions](Session) are beyond their own user's nodes here, and whose sessions are let in.
    pub session_service: Option<ServiceName>,
    /// The threads that carry links.
    pub lanes: Lanes,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            frame_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            mesh_timeout: Duration::from_secs(5),
            linger_time: Duration::from_secs(1),
            setup_timeout: Duration::from_secs(10),
            max_pending: PENDING_MAX,
            max_dials: 32,
            proof_look: Duration::from_secs(1),
            reproof_spread: Duration::from_secs(10),
            reproof_grace: Duration::from_secs(60),
            instance_look: Duration::from_secs(5),
            instance_gone_after: Duration::from_secs(60),
            cut_grace: Duration::from_secs(1),
            balance: Balance::default(),
            allow_unverified_peers: false,
            session_service: None,
            lanes: Lanes::default(),
        }
    }
}

/// Connections on one listener that are not decided yet, where descriptors are enough.
pub const PENDING_MAX: usize = 1024;

/// [`Settings::max_pending`] for a process that may have so many files open: at least 256.
pub fn pending_max(descriptors: u64) -> usize {
    usize::try_from(descriptors / 16).map_or(PENDING_MAX, |room| room.clamp(256, PENDING_MAX))
}

/// The data plane of one agent.
pub struct Proxy {
    mesh: Arc<dyn Mesh>,
    local: LocalTable,
    links: LinkTable,
    balancer: Balancer,
    settings: Settings,
    /// Of all inbound ports together: whoever floods many of them takes no more than by one.
    inbound: Arc<Admission>,
    /// Those of them that have shown their certificate.
    proven: Arc<Admission>,
    turns: Arc<Turns>,
    /// One for each kind of listener, so that who floods one hides nothing of the others.
    refusals: [LogLimit; Listener::ALL.len()],
    /// Fires when no listener takes connections any more.
    closed: CancellationToken,
    /// What listeners serve, links included.
    serving: TaskTracker,
    elsewhere: OnceLock<Arc<dyn Elsewhere>>,
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
            inbound: Admission::new(settings.max_pending),
            proven: Admission::new(settings.max_pending),
            turns: Turns::new(settings.max_dials),
            balancer: Balancer::new(settings.balance),
            settings,
            refusals: std::array::from_fn(|_| LogLimit::new("refused links")),
            closed: CancellationToken::new(),
            serving: TaskTracker::new(),
            elsewhere: OnceLock::new(),
        })
    }

    /// Takes no more connections at any of its listeners, for good. What was taken goes on, under the rules as before.
    pub fn close(&self) {
        self.closed.cancel();
        self.serving.close();
    }

    /// Returns when everything that came in before [`Proxy::close`] has ended.
    pub async fn drained(&self) {
        self.serving.wait().await;
    }

    /// Returns after [`Proxy::close`].
    pub(crate) async fn wait_closed(&self) {
        self.closed.cancelled().await;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
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

    /// Carries a link's bytes until it ends.
    async fn carry(&self, near: Box<dyn Duplex>, far: Box<dyn Duplex>, link: &LinkGuard, attempt: &Attempt) {
        let ended = splice::splice(near, far, link, self.settings.cut_grace).await;
        // Who takes the link and only then does not believe the certificate has sent nothing but that.
        if let Err(error) = ended
            && link.counters().bytes_in.load(Ordering::Relaxed) == 0
            && let Some(refusal) = tls::late_refusal(&error)
        {
            self.refuse(attempt, &refusal);
        }
    }

    /// Logs, counts and remembers a refusal. Beyond `LINES_PER_SECOND` (50) the log
    /// tells only how many there were.
    fn refuse(&self, attempt: &Attempt, refusal: &Refusal) {
        if attempt.is_probe {
            tracing::debug!(source = attempt.source, peer = attempt.peer, "probed and left");
            return;
        }
        self.links
            .refused(attempt.at, attempt.link, &attempt.target, refusal);
        let limit = self.refusals.get(attempt.at.index());
        if !limit.is_none_or(LogLimit::admit) {
            return;
        }
        let link = attempt.link.map(|link| link.to_string()).unwrap_or_default();
        tracing::warn!(
            cause = %refusal.cause,
            source = attempt.source,
            target = attempt.target,
            purpose = attempt.purpose.map(Purpose::as_str).unwrap_or_default(),
            at = attempt.at.as_str(),
            peer = attempt.peer,
            link,
            text = refusal.text,
            "link refused"
        );
    }
}

/// What is known so far of a link that is being decided; names that are not known are empty.
#[derive(Debug)]
struct Attempt {
    /// Where it came in.
    at: Listener,
    peer: String,
    link: Option<LinkId>,
    purpose: Option<Purpose>,
    source: String,
    target: String,
    /// The peer left before it asked for anything: it only wanted to know whether somebody answers.
    is_probe: bool,
}

impl Attempt {
    /// Nothing is known yet.
    fn new(at: Listener) -> Self {
        Self {
            at,
            peer: String::new(),
            link: None,
            purpose: None,
            source: String::new(),
            target: String::new(),
            is_probe: false,
        }
    }
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
