//! A local socket that leads to a service of the mesh.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use super::admission::{Admission, Slot};
use super::cause::{Cause, Refusal};
use super::frames::{Duplex, silent};
use super::links::{Direction, LinkGuard, LinkId, LinkInfo, Purpose};
use super::local::Endpoint;
use super::splice::splice;
use super::{Attempt, Proxy, inbound, no_such_service};
use crate::mesh::{Instance, ServiceName};

/// Who dials whom through a local socket.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// The service whose certificate is shown. The caller has checked that the uid may be it.
    pub source: ServiceName,
    /// The service to reach.
    pub target: ServiceName,
    /// One instance of it; any when there is none.
    pub instance: Option<String>,
    /// [`Purpose::Rpc`] or [`Purpose::Tcp`].
    pub purpose: Purpose,
    /// Where the agent listens.
    pub path: PathBuf,
    /// Who may connect.
    pub uid: u32,
    /// The control connection that it belongs to.
    pub owner: u64,
}

/// A listening upstream. Dropping it closes the listener and its links, and removes the socket.
#[derive(Debug)]
pub struct UpstreamHandle {
    task: AbortHandle,
    path: PathBuf,
}

impl Drop for UpstreamHandle {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Proxy {
    /// Listens on a Unix socket (mode 0600) whose connections reach the target service.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn upstream(self: &Arc<Self>, upstream: Upstream) -> io::Result<UpstreamHandle> {
        let listener = UnixListener::bind(&upstream.path)?;
        let path = upstream.path.clone();
        let task = tokio::spawn(self.clone().serve_upstream(listener, Arc::new(upstream))).abort_handle();
        let handle = UpstreamHandle { task, path };
        std::fs::set_permissions(&handle.path, std::fs::Permissions::from_mode(0o600))?;
        Ok(handle)
    }

    async fn serve_upstream(self: Arc<Self>, listener: UnixListener, upstream: Arc<Upstream>) {
        let admission = Admission::new(self.settings.max_pending);
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        tasks.spawn(self.clone().upstream_link(stream, upstream.clone(), admission.enter()));
                    }
                    Err(error) => inbound::accept_failed("upstream", &error).await,
                },
                Some(ended) = tasks.join_next() => inbound::task_ended(ended),
            }
        }
    }

    async fn upstream_link(self: Arc<Self>, stream: UnixStream, upstream: Arc<Upstream>, slot: Slot) {
        let mut attempt = Attempt {
            at: "upstream",
            purpose: Some(upstream.purpose),
            source: upstream.source.to_string(),
            target: upstream.target.to_string(),
            ..Attempt::default()
        };
        let deadline = self.settings.setup_timeout;
        let prepared = tokio::select! {
            prepared = timeout(deadline, self.prepare_upstream(&stream, &upstream, &mut attempt)) => {
                prepared.unwrap_or_else(|_| Err(silent("the decision on a link", deadline)))
            }
            () = slot.evicted() => Err(slot.refusal()),
        };
        drop(slot);
        match prepared {
            Ok((remote, link)) => splice(Box::new(stream), remote, &link, self.settings.cut_grace).await,
            Err(refusal) => self.refuse(&attempt, &refusal),
        }
    }

    async fn prepare_upstream(
        &self,
        stream: &UnixStream,
        upstream: &Upstream,
        attempt: &mut Attempt,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let fault = |error: io::Error| Cause::InvalidRequest.because(format!("upstream: {error}"));
        let uid = stream.peer_cred().map_err(fault)?.uid();
        attempt.peer = format!("uid {uid}");
        if uid != upstream.uid {
            let text = format!("uid {uid} uses the upstream of uid {}", upstream.uid);
            return Err(Cause::NotPermitted.because(text));
        }
        let mut link = [0; 16];
        getrandom::fill(&mut link).map_err(|error| Cause::NotReady.because(error.to_string()))?;
        let link = LinkId(link);
        attempt.link = Some(link);

        let mut last = None;
        let candidates = self.candidates(&upstream.target, upstream.instance.as_deref());
        for candidate in candidates.await? {
            match self.reach_candidate(upstream, &candidate, link).await {
                Err(refusal) if is_of_one_instance(&refusal) => last = Some(refusal),
                decided => return decided,
            }
        }
        Err(last.unwrap_or_else(|| no_such_service(&upstream.target)))
    }

    /// The instances to try: those on this agent first, the others in a random order.
    pub(super) async fn candidates(
        &self,
        target: &ServiceName,
        instance: Option<&str>,
    ) -> Result<Vec<Instance>, Refusal> {
        let mut all = self.ask(self.mesh.instances(target)).await?;
        let wanted = |id: &str| instance.is_none_or(|instance| instance == id);
        all.retain(|instance| instance.node.is_none() && wanted(&instance.id));
        let mut keyed = Vec::with_capacity(all.len());
        for instance in all {
            let random = getrandom::u32().map_err(|error| Cause::NotReady.because(error.to_string()))?;
            keyed.push((self.local.by_id(&instance.id).is_none(), random, instance));
        }
        keyed.sort_by_key(|(elsewhere, random, _)| (*elsewhere, *random));
        Ok(keyed.into_iter().map(|(_, _, instance)| instance).collect())
    }

    async fn reach_candidate(
        &self,
        upstream: &Upstream,
        candidate: &Instance,
        link: LinkId,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let near = self.spiffe(&upstream.source)?;
        let mut info = LinkInfo {
            id: link,
            direction: Direction::Local,
            purpose: upstream.purpose,
            local: upstream.source.to_string(),
            remote: candidate.id.clone(),
            local_spiffe: near.clone(),
            remote_spiffe: self.spiffe(&candidate.service)?,
            remote_agent: None,
            local_not_after: None,
            remote_not_after: None,
            instances: Vec::new(),
            owners: vec![upstream.owner],
        };
        if let Some(local) = self.local.by_id(&candidate.id)
            && local.instance.service == upstream.target
            && !matches!(local.endpoint, Endpoint::NodeSocket(_))
        {
            info.instances.push(local.instance.id.clone());
            info.owners.push(local.owner);
            // In the table before it is asked: a denial that comes after the answer finds it there.
            let link = self.links.insert(info)?;
            self.still_here(&local)?;
            self.authorize(&near, &upstream.target).await?;
            return Ok((self.reach(&local).await?, link));
        }
        let dialled = self
            .dial(&upstream.source, candidate, upstream.purpose, link, "")
            .await?;
        info.direction = Direction::Outbound;
        info.remote_agent = Some(dialled.address);
        info.local_not_after = Some(dialled.identity.not_after);
        info.remote_not_after = Some(dialled.peer.not_after);
        info.remote_spiffe = dialled.peer.id;
        let link = self.links.insert(info)?;
        Ok((Box::new(dialled.stream), link))
    }
}

/// Another instance may still answer; a no by rule or certificate holds for all of them.
pub(super) fn is_of_one_instance(refusal: &Refusal) -> bool {
    matches!(refusal.cause, Cause::Unreachable | Cause::NoSuchService)
}
