//! A local socket that leads to a service of the mesh.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::admission::{Admission, Origin, Slot};
use super::balance::Candidate;
use super::cause::{Cause, Refusal};
use super::frames::{Duplex, silent};
use super::links::{Direction, LinkGuard, LinkId, LinkInfo, Purpose};
use super::listener::{self, Accept, Listener};
use super::{Attempt, Proxy, no_such_service, peer_uid};
use crate::mesh::{Instance, ServiceName};

/// What an instance has at least to answer, though others wait to be tried.
const TRY_LEAST: Duration = Duration::from_secs(2);

/// Who dials whom through a local socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Upstream {
    /// The service whose certificate is shown. The caller has checked that the uid may be it.
    pub source: ServiceName,
    /// The service to reach.
    pub target: ServiceName,
    /// One instance of it; any when there is none.
    pub instance: Option<String>,
    /// An instance of `source` here by whose sidecar the target is reached; the agent reaches it itself when there is
    /// none.
    pub via: Option<String>,
    /// [`Purpose::Rpc`] or [`Purpose::Tcp`].
    pub purpose: Purpose,
    /// Where the agent listens.
    pub listen: Listen,
    /// Who may connect.
    pub uid: u32,
    /// The control connection that it belongs to.
    pub owner: u64,
}

/// Where an upstream takes connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Listen {
    /// A Unix socket, mode 0600.
    Uds(PathBuf),
    /// An address on loopback; port 0 is one that the system chooses.
    Tcp(SocketAddr),
}

/// A listening upstream. Dropping it closes the listener and its links, and removes the socket, which it leaves when
/// the proxy takes no connections any more: it may be a successor's.
#[derive(Debug)]
pub struct UpstreamHandle {
    upstream: Arc<Upstream>,
    listener: Weak<dyn AsFd + Send + Sync>,
    closed: CancellationToken,
    proxy: Arc<Proxy>,
    links: Option<UpstreamLinks>,
}

/// The links of an upstream. Dropping it ends them.
#[derive(Debug)]
pub struct UpstreamLinks {
    task: AbortHandle,
}

impl UpstreamHandle {
    /// Where it takes connections; the port is the chosen one.
    pub fn address(&self) -> &Listen {
        &self.upstream.listen
    }

    /// What a successor of this process needs to serve it.
    pub(crate) fn handed(&self) -> io::Result<(Upstream, OwnedFd)> {
        let listener = self.listener.upgrade();
        let listener =
            listener.ok_or_else(|| io::Error::other("an upstream takes no connections any more"))?;
        Ok(((*self.upstream).clone(), listener.as_fd().try_clone_to_owned()?))
    }

    /// Takes no more connections. Its live links end with `cut`; else they go on, under the rules and owned as before,
    /// until what this returns is dropped.
    pub fn close(mut self, cut: bool) -> Option<UpstreamLinks> {
        self.links.take_if(|_| !cut)
    }
}

impl Drop for UpstreamHandle {
    fn drop(&mut self) {
        self.closed.cancel();
        if let Listen::Uds(path) = &self.upstream.listen
            && !self.proxy.is_closed()
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl UpstreamLinks {
    /// Whether all have ended.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for UpstreamLinks {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A program of this host that uses an upstream.
trait Client: Duplex + 'static {
    /// Whose process it is.
    fn uid(&self) -> Result<u32, Refusal>;
}

impl Client for UnixStream {
    fn uid(&self) -> Result<u32, Refusal> {
        let fault = |error: io::Error| Cause::InvalidRequest.because(format!("upstream: {error}"));
        Ok(self.peer_cred().map_err(fault)?.uid())
    }
}

impl Client for TcpStream {
    fn uid(&self) -> Result<u32, Refusal> {
        peer_uid::of(self)
    }
}

impl Proxy {
    /// Listens on a Unix socket or a loopback port whose connections reach the target service.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn upstream(self: &Arc<Self>, mut upstream: Upstream) -> io::Result<UpstreamHandle> {
        match &mut upstream.listen {
            Listen::Uds(path) => {
                let path = path.clone();
                let listener = UnixListener::bind(&path)?;
                let handle = self.spawn_upstream(listener, upstream);
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                Ok(handle)
            }
            Listen::Tcp(address) => {
                if !address.ip().is_loopback() {
                    let text = format!("{address} is not on loopback");
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
                }
                let listener = std::net::TcpListener::bind(*address)?;
                listener.set_nonblocking(true)?;
                *address = listener.local_addr()?;
                Ok(self.spawn_upstream(TcpListener::from_std(listener)?, upstream))
            }
        }
    }

    /// Serves an upstream whose socket a predecessor of this process has made.
    pub(crate) fn resume_upstream(
        self: &Arc<Self>,
        upstream: Upstream,
        listener: OwnedFd,
    ) -> io::Result<UpstreamHandle> {
        Ok(match &upstream.listen {
            Listen::Uds(_) => self.spawn_upstream(UnixListener::from_std(listener.into())?, upstream),
            Listen::Tcp(_) => self.spawn_upstream(TcpListener::from_std(listener.into())?, upstream),
        })
    }

    fn spawn_upstream<L, S, A>(self: &Arc<Self>, listener: L, upstream: Upstream) -> UpstreamHandle
    where
        L: Accept<Connection = (S, A)> + AsFd + Send + Sync + 'static,
        S: Client,
        A: Send + 'static,
    {
        let (proxy, closed) = (self.clone(), self.closed.child_token());
        let (upstream, listener) = (Arc::new(upstream), Arc::new(listener));
        let (served, until) = (upstream.clone(), closed.clone());
        let weak: Weak<dyn AsFd + Send + Sync> = Arc::<L>::downgrade(&listener);
        let serve = async move {
            let admission = Admission::new(proxy.settings.max_pending);
            let lanes = proxy.settings.lanes.clone();
            let link = move |(stream, _), slot| proxy.clone().upstream_link(stream, served.clone(), slot);
            listener::serve(Listener::Upstream, listener, admission, until, &lanes, link).await;
        };
        let task = tokio::spawn(self.serving.track_future(serve)).abort_handle();
        UpstreamHandle {
            upstream,
            listener: weak,
            closed,
            proxy: self.clone(),
            links: Some(UpstreamLinks { task }),
        }
    }

    async fn upstream_link(self: Arc<Self>, stream: impl Client, upstream: Arc<Upstream>, slot: Slot) {
        let mut attempt = Attempt::new(Listener::Upstream);
        attempt.purpose = Some(upstream.purpose);
        attempt.source = upstream.source.to_string();
        attempt.target = upstream.target.to_string();
        let uid = stream.uid();
        if let Ok(uid) = uid {
            slot.is_of(Origin::user(uid));
        }
        let prepared = tokio::select! {
            prepared = Box::pin(self.prepare_upstream(uid, &upstream, &mut attempt)) => prepared,
            () = slot.evicted() => Err(slot.refusal()),
        };
        drop(slot);
        match prepared {
            Ok((remote, link)) => self.carry(Box::new(stream), remote, &link, &attempt).await,
            Err(refusal) => self.refuse(&attempt, &refusal),
        }
    }

    async fn prepare_upstream(
        &self,
        uid: Result<u32, Refusal>,
        upstream: &Upstream,
        attempt: &mut Attempt,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let uid = uid?;
        attempt.peer = format!("uid {uid}");
        // A file has a mode, a port has not: what looks at ports runs as root.
        let root = uid == 0 && matches!(upstream.listen, Listen::Tcp(_));
        if uid != upstream.uid && !root {
            let text = format!("uid {uid} uses the upstream of uid {}", upstream.uid);
            return Err(Cause::NotPermitted.because(text));
        }
        let link = LinkId::generate()?;
        attempt.link = Some(link);
        let all = self.settings.setup_timeout;
        let deadline = Instant::now() + all;
        // The mesh may tell who is who only with a first certificate.
        within(deadline, all, self.ask(self.mesh.identity(&upstream.source))).await?;
        if let Some(via) = &upstream.via {
            return within(deadline, all, self.reach_via(via, upstream, link)).await;
        }
        let candidates = self.candidates(&upstream.target, upstream.instance.as_deref());
        let mut waiting = within(deadline, all, candidates).await?;

        let mut last = no_such_service(&upstream.target);
        while !waiting.is_empty() {
            let (now, left) = (Instant::now(), waiting.len());
            if now >= deadline {
                break;
            }
            // Other links may have found out more by now.
            let next = waiting
                .iter()
                .position(|next| !self.balancer.is_ejected(&next.id));
            let candidate = waiting.remove(next.unwrap_or_default());
            // One that hangs leaves their share of the time to the others.
            let share = (deadline - now) / u32::try_from(left).unwrap_or(u32::MAX);
            let share = share.max(TRY_LEAST).min(deadline - now);
            let _dialling = self.balancer.dialling(&candidate.id);
            let reach = self.reach_candidate(upstream, &candidate, link);
            last = match within(now + share, share, reach).await {
                Err(Fault::OfOne(refusal)) => refusal,
                decided => {
                    self.balancer.succeeded(&candidate.id);
                    return decided.map_err(Refusal::from);
                }
            };
            self.balancer.failed(&candidate.id);
            // Whoever only does not answer is not worth a line while others do.
            if !waiting.is_empty() && !is_absence(&last) {
                self.refuse(attempt, &last);
            }
        }
        Err(last)
    }

    /// The instances to try, in this order.
    pub(super) async fn candidates(
        &self,
        target: &ServiceName,
        instance: Option<&str>,
    ) -> Result<Vec<Instance>, Refusal> {
        let mut all = self.ask(self.mesh.instances(target)).await?;
        let wanted = |id: &str| instance.is_none_or(|instance| instance == id);
        all.retain(|instance| instance.node.is_none() && wanted(&instance.id));
        let weights = self.mesh.weights(target);
        let links = self
            .links
            .to_instances(all.iter().map(|instance| instance.id.as_str()));
        let candidates = all.into_iter().zip(links).map(|(instance, links)| Candidate {
            here: self.local.by_id(&instance.id).is_some(),
            weight: weights.get(&instance.id).copied().unwrap_or(1),
            links,
            instance,
        });
        Ok(self.balancer.order(target, candidates.collect()))
    }

    async fn reach_candidate(
        &self,
        upstream: &Upstream,
        candidate: &Instance,
        link: LinkId,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Fault> {
        let mut info = self.upstream_info(upstream, link, candidate.id.clone())?;
        if let Some(local) = self.local.by_id(&candidate.id)
            && local.instance.service == upstream.target
            && !local.endpoint.is_node()
        {
            let near = info.local_spiffe.clone();
            info.instances.push(local.instance.id.clone());
            info.owners.push(local.owner);
            // In the table before it is asked: a denial that comes after the answer finds it there.
            let link = self.links.insert(info).map_err(Fault::OfAll)?;
            self.still_here(&local)?;
            let allowed = self.authorize(&near, &upstream.target).await;
            allowed.map_err(Fault::OfAll)?;
            return Ok((self.reach(&local).await?, link));
        }
        let dialled = self
            .dial(&upstream.source, candidate, upstream.purpose, link, "")
            .await?;
        dialled.describe(&mut info);
        let link = self.links.insert(info).map_err(Fault::OfAll)?;
        Ok((dialled.stream, link))
    }

    /// By the sidecar of an instance of this agent, which chooses the instance of the target.
    async fn reach_via(
        &self,
        via: &str,
        upstream: &Upstream,
        link: LinkId,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let local = self
            .local
            .by_id(via)
            .filter(|local| local.instance.service == upstream.source);
        let none =
            || Cause::NoSuchService.because(format!("{via} is no instance of {} here", upstream.source));
        let local = local.ok_or_else(none)?;
        let sidecar = local
            .sidecar
            .as_ref()
            .ok_or_else(|| Cause::InvalidRequest.because(format!("{via} has no sidecar")))?;
        let mut info = self.upstream_info(upstream, link, upstream.target.to_string())?;
        info.instances.push(local.instance.id.clone());
        let dialled = self
            .dial_sidecar(&local, sidecar.as_ref(), &upstream.target)
            .await?;
        dialled.describe(&mut info);
        let link = self.links.insert(info)?;
        self.still_here(&local)?;
        Ok((dialled.stream, link))
    }

    fn upstream_info(&self, upstream: &Upstream, id: LinkId, remote: String) -> Result<LinkInfo, Refusal> {
        Ok(LinkInfo {
            id,
            direction: Direction::Local,
            purpose: upstream.purpose,
            local: upstream.source.to_string(),
            remote,
            local_spiffe: self.spiffe(&upstream.source)?,
            remote_spiffe: self.spiffe(&upstream.target)?,
            verified: true,
            remote_agent: None,
            proof: None,
            instances: Vec::new(),
            owners: vec![upstream.owner],
        })
    }
}

/// Why there is no link to an instance.
enum Fault {
    /// Another one may still take it: no byte of the link has gone anywhere.
    OfOne(Refusal),
    OfAll(Refusal),
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        match is_of_one_instance(&refusal) {
            true => Self::OfOne(refusal),
            false => Self::OfAll(refusal),
        }
    }
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::OfOne(refusal) | Fault::OfAll(refusal) => refusal,
        }
    }
}

/// What takes longer is refused; `time` is what it had.
async fn within<T, E: From<Refusal>>(
    until: Instant,
    time: Duration,
    what: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let done = timeout_at(until, what).await;
    done.unwrap_or_else(|_| Err(silent("the decision on a link", time).into()))
}

/// A no by rule holds for all instances of a service. Everything else may be the fault of one, or of its agent: a
/// certificate that was not renewed there, a limit that is reached, a mesh that has not answered it yet.
pub(super) fn is_of_one_instance(refusal: &Refusal) -> bool {
    refusal.cause != Cause::IntentionDenied
}

/// Nobody answers, as when a host or a program was just ended.
fn is_absence(refusal: &Refusal) -> bool {
    matches!(
        refusal.cause,
        Cause::Unreachable | Cause::NoSuchService | Cause::Timeout
    )
}
