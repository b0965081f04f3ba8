//! What carries an instance's traffic: the agent, at the inbound port that all share or at one of the instance's own,
//! or a sidecar.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, OwnedMutexGuard, mpsc},
    task::AbortHandle,
    time::{sleep, timeout},
};

use super::{MESH_TIME, options::SidecarKind};
use crate::{
    agent::sidecar::{
        self, HandedSidecar, SidecarError, SidecarEvent, SidecarHandle, SidecarSpec, Sidecars, free_loopback,
    },
    mesh::{DataPlane, Entry, Instance, Mesh, Protocol, ServiceName, Sidecar, SidecarUpstream, Token},
    proxy::{
        Proxy,
        cause::{Cause, Refusal},
        local::{Endpoint, SidecarUpstreams},
    },
};

/// How long a sidecar may take to open the port of an upstream that is new to it.
pub const UPSTREAM_TIME: Duration = Duration::from_secs(5);
/// Pause between two looks whether that port is open: no program tells of it.
const UPSTREAM_POLL: Duration = Duration::from_millis(20);

/// What the agent can carry traffic by.
pub struct Carriers {
    /// The data plane of the agent itself.
    pub proxy: Arc<Proxy>,
    /// Starts sidecars.
    pub sidecars: Sidecars,
    /// Where the agent listens, and whose ports instances get for themselves.
    pub bind: IpAddr,
    /// Ports of their own, when instances have them.
    pub ports: Option<RangeInclusive<u16>>,
    /// What carries the traffic of whatever does not say.
    pub default: SidecarKind,
}

/// What an instance has for itself while it is registered. Dropped, it ends.
#[derive(Debug, Default)]
pub(super) struct Carried {
    ports: Vec<Port>,
    sidecar: Option<Arc<Ports>>,
}

/// A port that leads to one instance, and who serves it.
#[derive(Debug)]
struct Port {
    kind: PortKind,
    listener: Weak<TcpListener>,
    task: AbortHandle,
}

/// What is spoken at an instance's own port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// Mutual TLS, as at the port that all share.
    Inbound,
    /// What a sidecar hands over in clear.
    Unverified,
}

impl Carried {
    /// How it dials others, when not by the agent.
    pub(super) fn upstreams(&self) -> Option<Arc<dyn SidecarUpstreams>> {
        self.sidecar
            .clone()
            .map(|ports| ports as Arc<dyn SidecarUpstreams>)
    }
}

impl Carried {
    /// What freezes its sidecar, if it is to have one.
    pub(super) fn freezing(
        &self,
        id: &str,
    ) -> Option<impl Future<Output = Result<FrozenSidecar, String>> + Send + 'static> {
        let ports = self.sidecar.clone()?;
        let freezer = ports.running().as_ref().map(|handle| handle.freezer(id));
        Some(async move {
            // Whoever wants a new upstream waits from here on.
            let entry = ports.entry.clone().lock_owned().await;
            let sidecar = match freezer {
                Some(freezer) => freezer.freeze().await?,
                None => None,
            };
            Ok(FrozenSidecar {
                ports,
                entry,
                sidecar,
            })
        })
    }

    /// The ports that a successor of this process is to serve.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn handed(&self) -> io::Result<Vec<(PortKind, OwnedFd)>> {
        let handed = self.ports.iter().map(|port| {
            let listener = port.listener.upgrade();
            let listener = listener.ok_or_else(|| io::Error::other("a port is not served any more"))?;
            Ok((port.kind, listener.as_fd().try_clone_to_owned()?))
        });
        handed.collect()
    }

    /// Of what a predecessor of this process had registered. Nothing is served yet.
    pub(super) fn resume(mesh: &Arc<dyn Mesh>, entry: &Entry) -> Self {
        let has_sidecar = matches!(entry.data_plane, DataPlane::Sidecar(_));
        Self {
            ports: Vec::new(),
            sidecar: has_sidecar.then(|| Ports::new(mesh, entry)),
        }
    }

    /// Serves the ports that a predecessor of this process had opened.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn resume_ports(
        &mut self,
        proxy: &Arc<Proxy>,
        id: &str,
        ports: Vec<(PortKind, OwnedFd)>,
    ) -> io::Result<()> {
        for (kind, listener) in ports {
            let listener = TcpListener::from_std(listener.into())?;
            self.serve(proxy, kind, listener, id.to_owned());
        }
        Ok(())
    }

    /// Where its sidecar is entered once it runs.
    pub(super) fn place(&self) -> Option<SidecarPlace> {
        self.sidecar.clone().map(SidecarPlace)
    }

    fn serve(&mut self, proxy: &Arc<Proxy>, kind: PortKind, listener: TcpListener, id: String) {
        let (listener, proxy) = (Arc::new(listener), proxy.clone());
        let weak = Arc::downgrade(&listener);
        let task = match kind {
            PortKind::Inbound => tokio::spawn(proxy.serve_instance(listener, id)),
            PortKind::Unverified => tokio::spawn(proxy.serve_unverified(listener, id)),
        };
        self.ports.push(Port {
            kind,
            listener: weak,
            task: task.abort_handle(),
        });
    }

    /// Ends it for good: when this returns, nothing of it registers the instance again.
    pub(super) async fn end(mut self) {
        self.ports.drain(..).for_each(|port| port.task.abort());
        if let Some(ports) = self.sidecar.take() {
            ports.running().take();
            *ports.entry.lock().await = None;
        }
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.ports.iter().for_each(|port| port.task.abort());
        if let Some(ports) = &self.sidecar {
            ports.running().take();
        }
    }
}

impl Carriers {
    /// Opens what the instance of `entry` has for itself, and enters it there. A sidecar is started later, when the
    /// mesh knows the instance.
    pub(super) async fn prepare(
        &self,
        mesh: &Arc<dyn Mesh>,
        kind: &SidecarKind,
        entry: &mut Entry,
        endpoint: &Endpoint,
    ) -> Result<Carried, Refusal> {
        let mut carried = Carried::default();
        let id = entry.instance.id.clone();
        if *kind == SidecarKind::Native {
            if let Some(ports) = &self.ports {
                let listener = self.own_port(ports).await?;
                let port = listener.local_addr().map_err(|error| no_port(&error))?.port();
                entry.instance.address.set_port(port);
                carried.serve(&self.proxy, PortKind::Inbound, listener, id);
            }
            return Ok(carried);
        }
        let local = match endpoint {
            Endpoint::Tcp(address) => *address,
            Endpoint::NodeSocket(_) | Endpoint::PlainNode(_) => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
                let listener = listener.map_err(|error| no_port(&error))?;
                let address = listener.local_addr().map_err(|error| no_port(&error))?;
                carried.serve(&self.proxy, PortKind::Unverified, listener, id);
                address
            }
            Endpoint::Uds(path) => {
                return Err(Cause::InvalidRequest.because(format!(
                    "address {}: a sidecar hands connections to a TCP address, wanted {{tcp, Ip, Port}} on loopback",
                    path.display()
                )));
            }
        };
        if !local.ip().is_loopback() {
            return Err(Cause::InvalidRequest.because(format!(
                "address {local}: a sidecar hands connections over in clear, wanted an address on loopback"
            )));
        }
        let public = self.public_port(entry.instance.address.ip()).await?;
        entry.instance.address = public;
        entry.instance.protocol = Protocol::Connect;
        entry.data_plane = DataPlane::Sidecar(Sidecar {
            local,
            bind: self.bind,
            upstreams: Vec::new(),
        });
        carried.sidecar = Some(Ports::new(mesh, entry));
        Ok(carried)
    }

    /// Listens where whoever registered an adopted instance has said that it is reached.
    pub(super) async fn listen_as_registered(
        &self,
        carried: &mut Carried,
        id: &str,
        address: SocketAddr,
    ) -> Result<(), Refusal> {
        let listener = TcpListener::bind((self.bind, address.port())).await.map_err(|error| {
            Cause::NotReady.because(format!(
                "adopt: {id} is registered at {address}, and this agent cannot listen there: {error}; leave that port \
                 to the agent"
            ))
        })?;
        carried.serve(&self.proxy, PortKind::Inbound, listener, id.to_owned());
        Ok(())
    }

    /// Starts the sidecar, once the mesh knows the instance.
    pub(super) async fn start(
        &self,
        carried: &Carried,
        kind: SidecarKind,
        told: Told,
    ) -> Result<(), Refusal> {
        let Some(ports) = &carried.sidecar else {
            return Ok(());
        };
        let kind = match kind {
            SidecarKind::Native => return Ok(()),
            SidecarKind::ConnectProxy => sidecar::SidecarKind::ConnectProxy,
            SidecarKind::Envoy => sidecar::SidecarKind::Envoy,
            SidecarKind::Command(words) => sidecar::SidecarKind::Command(words),
        };
        let spec = {
            let entry = ports.entry.lock().await;
            let Some(entry) = &*entry else { return Ok(()) };
            let DataPlane::Sidecar(sidecar) = &entry.data_plane else {
                return Ok(());
            };
            let Instance {
                id, service, address, ..
            } = &entry.instance;
            SidecarSpec {
                max_restarts: told.max_restarts,
                output: told.output,
                token: told.token,
                ..SidecarSpec::new(id, service.clone(), kind, sidecar.local, *address)
            }
        };
        let handle = self.sidecars.start(spec, told.events).await.map_err(refusal)?;
        *ports.running() = Some(handle);
        Ok(())
    }

    /// Keeps the sidecar of a predecessor of this process up.
    pub(super) async fn resume_sidecar(
        &self,
        SidecarPlace(ports): SidecarPlace,
        (handed, files): (HandedSidecar, Vec<OwnedFd>),
        events: mpsc::Sender<SidecarEvent>,
    ) -> Result<(), SidecarError> {
        let handle = self.sidecars.resume(handed, files, events).await?;
        *ports.running() = Some(handle);
        Ok(())
    }

    /// The rules may have changed: sidecars that this agent drives are told.
    pub fn rules_changed(&self) {
        self.sidecars.rules_changed();
    }

    async fn own_port(&self, ports: &RangeInclusive<u16>) -> Result<TcpListener, Refusal> {
        for port in ports.clone() {
            match TcpListener::bind((self.bind, port)).await {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                bound => return bound.map_err(|error| no_port(&error)),
            }
        }
        Err(Cause::Limit.because(format!(
            "all of {}-{} are taken: widen --instance-ports",
            ports.start(),
            ports.end()
        )))
    }

    /// Where a sidecar is to listen. Nothing keeps it free until the sidecar does.
    async fn public_port(&self, ip: IpAddr) -> Result<SocketAddr, Refusal> {
        let listener = match &self.ports {
            Some(ports) => self.own_port(ports).await?,
            None => TcpListener::bind((self.bind, 0))
                .await
                .map_err(|error| no_port(&error))?,
        };
        let port = listener.local_addr().map_err(|error| no_port(&error))?.port();
        Ok(SocketAddr::new(ip, port))
    }
}

/// What a sidecar's start is told beyond its entry.
pub(super) struct Told {
    /// Where its lines and its end go.
    pub(super) events: mpsc::Sender<SidecarEvent>,
    /// Whether its lines are wanted.
    pub(super) output: bool,
    /// Restarts within a minute.
    pub(super) max_restarts: u32,
    /// The client's own token.
    pub(super) token: Option<Token>,
}

/// A sidecar of which this process does nothing, and whose upstreams do not change. Dropped, it goes on.
pub(in crate::agent) struct FrozenSidecar {
    ports: Arc<Ports>,
    entry: OwnedMutexGuard<Option<Entry>>,
    /// None when it has ended for good.
    sidecar: Option<sidecar::Frozen>,
}

impl FrozenSidecar {
    /// Its instance's entry in the mesh, with all upstreams.
    pub(super) fn entry(&self) -> Option<&Entry> {
        self.entry.as_ref()
    }

    /// What a successor must know of it, and the open files that go with it.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn handed(&self) -> io::Result<(Option<HandedSidecar>, Vec<OwnedFd>)> {
        let Some(sidecar) = &self.sidecar else {
            return Ok((None, Vec::new()));
        };
        let files = sidecar.files.iter().map(OwnedFd::try_clone);
        Ok((Some(sidecar.handed.clone()), files.collect::<io::Result<_>>()?))
    }

    /// A successor has it; returns when this process has let go.
    pub(in crate::agent) async fn leave(self) {
        if let Some(sidecar) = self.sidecar {
            sidecar.leave().await;
        }
        self.ports.running().take();
    }
}

/// Where a sidecar is entered once it runs.
pub(super) struct SidecarPlace(Arc<Ports>);

/// The upstreams of one sidecar: a port for each service that was asked for.
struct Ports {
    /// None once the instance leaves.
    // Held while the mesh and the sidecar are told of a new upstream: one at a time.
    entry: Arc<Mutex<Option<Entry>>>,
    /// None before it has started and once it has ended.
    // Held for a look or a change, never across an await.
    running: std::sync::Mutex<Option<SidecarHandle>>,
    mesh: Arc<dyn Mesh>,
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ports")
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl Ports {
    fn new(mesh: &Arc<dyn Mesh>, entry: &Entry) -> Arc<Self> {
        Arc::new(Self {
            entry: Arc::new(Mutex::new(Some(entry.clone()))),
            running: std::sync::Mutex::new(None),
            mesh: mesh.clone(),
        })
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Option<SidecarHandle>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn port(&self, target: &ServiceName) -> Result<SocketAddr, Refusal> {
        let mut entry = self.entry.lock().await;
        let mut next = entry.as_ref().ok_or_else(gone)?.clone();
        let DataPlane::Sidecar(sidecar) = &mut next.data_plane else {
            return Err(gone());
        };
        if let Some(known) = sidecar
            .upstreams
            .iter()
            .find(|upstream| upstream.target == *target)
        {
            return Ok(known.bind);
        }
        if self.running().is_none() {
            return Err(gone());
        }
        let bind = free_loopback().map_err(|error| no_port(&error))?;
        sidecar.upstreams.push(SidecarUpstream {
            target: target.clone(),
            bind,
        });
        let upstreams = sidecar.upstreams.clone();
        match timeout(MESH_TIME, self.mesh.register(&next)).await {
            Ok(registered) => registered?,
            Err(_) => return Err(super::silent()),
        }
        match &*self.running() {
            Some(handle) => handle.set_upstreams(upstreams).map_err(refusal)?,
            None => return Err(gone()),
        }
        *entry = Some(next);
        // The next who asks must not wait for a sidecar that is slow.
        drop(entry);
        let open = async {
            while TcpStream::connect(bind).await.is_err() {
                sleep(UPSTREAM_POLL).await;
            }
        };
        match timeout(UPSTREAM_TIME, open).await {
            Ok(()) => Ok(bind),
            Err(_) => Err(Cause::Unreachable.because(format!(
                "the sidecar has not opened {bind} for {target} within {} s",
                UPSTREAM_TIME.as_secs()
            ))),
        }
    }
}

impl SidecarUpstreams for Ports {
    fn port_for(&self, target: &ServiceName) -> BoxFuture<'_, Result<SocketAddr, Refusal>> {
        let target = target.clone();
        Box::pin(async move { self.port(&target).await })
    }
}

fn gone() -> Refusal {
    Cause::Unreachable.because("the sidecar has ended")
}

fn no_port(error: &io::Error) -> Refusal {
    Cause::NotReady.because(format!("no port can be had: {error}"))
}

fn refusal(error: SidecarError) -> Refusal {
    let text = format!("sidecar: {error}");
    match error {
        SidecarError::NoConsul(_) => Cause::Unsupported.because(text),
        SidecarError::NoProgram { .. } | SidecarError::Invalid(_) => Cause::InvalidRequest.because(text),
        SidecarError::Limit(_) => Cause::Limit.because(text),
        SidecarError::Mesh(error) => error.into(),
        _ => Cause::NotReady.because(text),
    }
}
