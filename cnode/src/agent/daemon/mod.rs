//! The running agent: everything tied together, started and ended in order.

use std::{collections::HashMap, io, net::SocketAddr, os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::process::{Resource, getrlimit};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Semaphore, mpsc},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    config::{AgentConfig, MeshKind},
    control::{
        commands::{Client, Context, QUESTIONS_MAX},
        diagnosis::PROBES_MAX,
        server::{self, Clients},
        session::Parked,
        upstreams::Budget,
    },
    dir::AgentDir,
    paths::{CONTROL_SOCKET, DIST_SOCKET, DirError, TAKEOVER_SOCKET},
    registry::{self, HandedPorts, Owner, RECLAIM_TIME, Registry, Reserved, carrier::Carriers},
    sidecar::{self, ConsulProgram, SidecarError, Sidecars},
    takeover::{self, About, Follower, Listeners, Reception, Successor, TakeFault, Taken, TakenClient},
};
use crate::{
    epmd::Epmd,
    http::{self, Sources},
    log_limit::LogLimit,
    mesh::{Mesh, MeshError, Registration, consul::ConsulMesh, embedded::EmbeddedMesh, observed::Observed},
    proxy::{
        Proxy, Settings, Upstream,
        cause::Cause,
        links::{LINKS_MAX, LinkTable},
        local::LocalTable,
        plain::PlainPorts,
    },
};

/// How long clients' registrations may take to be given up when the agent ends.
pub const STOP_TIME: Duration = Duration::from_secs(8);

/// Pause before the mesh is asked again for changes of the rules or about a link, after it failed to answer.
const POLICE_RETRY: Duration = Duration::from_secs(1);

/// How long the lock of a predecessor that broke off may take to be free: its process ends meanwhile.
const GONE_TIME: Duration = Duration::from_secs(2);
/// Pause between two tries for it.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Why an agent did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Its directory cannot be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The inbound port cannot be opened.
    #[error("cannot listen on {address}: {source}; choose another one with --bind")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The port for metrics and health cannot be opened.
    #[error("cannot listen on {address}: {source}; choose another one with --http")]
    Http {
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Whoever serves does not hand over, and goes on.
    #[error("cannot take over: {0}")]
    Takeover(String),
    /// The directory of sidecars cannot be used.
    #[error(transparent)]
    Sidecars(#[from] SidecarError),
    /// The mesh cannot be joined.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// The system lacks something.
    #[error("{0}")]
    System(#[from] io::Error),
}

/// An agent that serves.
pub struct Agent {
    context: Arc<Context>,
    mesh: Arc<Observed>,
    about: Arc<About>,
    hosts: Vec<String>,
    drain_time: Duration,
    /// None once a successor has them.
    listeners: Option<Listeners>,
    stop: CancellationToken,
    freeze: CancellationToken,
    /// None while clients are not served.
    control: Option<JoinHandle<Clients>>,
    takeover: JoinHandle<()>,
    reception: Arc<Reception>,
    successors: mpsc::Receiver<Successor>,
    epmd: Option<(Arc<Epmd>, JoinHandle<()>)>,
    /// The data plane; its links end when this is dropped.
    data: JoinSet<()>,
}

/// What an agent that serves comes to by itself.
#[derive(Debug)]
pub enum Event {
    /// A part that should serve for ever does not: the agent is of no more use.
    Failed,
    /// Another process wants to take over: [`Agent::hand_over`].
    Successor(Successor),
    /// A successor has taken over, and the last link of this process has ended.
    Ended,
}

impl Agent {
    /// Takes the directory, opens the port, joins the mesh and serves; or takes all of it over from the process that
    /// serves there, when it is to. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind then, and whoever served goes on.
    pub async fn start(config: AgentConfig) -> Result<Self, StartError> {
        let mut patience = Duration::ZERO;
        if config.takeover {
            match Self::take_over(&config).await {
                Ok(Some(agent)) => return Ok(agent),
                Ok(None) => info!("no agent serves here: nothing to take over"),
                Err(TakeFault::Refused(text)) => return Err(StartError::Takeover(text)),
                Err(TakeFault::Gone(text)) => {
                    warn!(
                        text,
                        "the takeover broke off: starting anew, unless the predecessor lives"
                    );
                    patience = GONE_TIME;
                }
            }
        }
        let until = Instant::now() + patience;
        let dir = loop {
            match AgentDir::open(&config.dir, config.access) {
                Err(DirError::Taken(_)) if Instant::now() < until => sleep(LOCK_RETRY).await,
                opened => break Arc::new(opened?),
            }
        };
        let started = Self::start_in(dir.clone(), &config).await;
        if started.is_err() {
            dir.remove();
        }
        started
    }

    async fn start_in(dir: Arc<AgentDir>, config: &AgentConfig) -> Result<Self, StartError> {
        let bound = |source| StartError::Bind {
            address: config.bind,
            source,
        };
        let port = TcpListener::bind(config.bind).await.map_err(bound)?;
        let inbound = port.local_addr()?;
        let advertise = match config.advertise {
            Some(address) if address.port() == 0 => SocketAddr::new(address.ip(), inbound.port()),
            Some(address) => address,
            None => inbound,
        };
        let id = match &config.mesh {
            MeshKind::Embedded { .. } => format!("{:016x}", getrandom::u64().map_err(io::Error::other)?),
            MeshKind::Consul(_) => ConsulMesh::agent_id(&config.dir),
        };
        let http = match config.http {
            Some(address) => Some(listen_http(address).await?),
            None => None,
        };
        let mesh = join(config, &id, advertise, Place::Own).await?;
        let mesh = Arc::new(Observed::new(mesh));
        let context = context(config, dir.clone(), &id, advertise, &mesh)?;
        context
            .registry
            .reserve_names(Reserved::load(&dir.names(), RECLAIM_TIME));
        let dist = UnixListener::from_std(dir.bind(DIST_SOCKET)?)?;
        let takeover = UnixListener::from_std(dir.bind(TAKEOVER_SOCKET)?)?;
        // Last: who finds the control socket finds an agent that is whole.
        let control = UnixListener::from_std(dir.bind(CONTROL_SOCKET)?)?;
        let listeners = Listeners {
            control: control.into(),
            dist: dist.into(),
            takeover: takeover.into(),
            inbound: port.into(),
            http: http.map(Arc::new),
        };
        // Ids of one process are never those of another: what is said of an old client reaches no new one.
        let first = u64::from(getrandom::u32().map_err(io::Error::other)?) << 24;
        let clients = Clients::new(first + 1);
        let agent = Self::serve(config, context, mesh, listeners, clients, id, advertise)?;
        info!(dir = %agent.context.dir.path().display(), %inbound, %advertise, mesh = agent.context.mesh, "agent started");
        Ok(agent)
    }

    /// None when nobody serves in the directory.
    async fn take_over(config: &AgentConfig) -> Result<Option<Self>, TakeFault> {
        let Some(mut predecessor) = takeover::find(config).await? else {
            return Ok(None);
        };
        info!(program = predecessor.program(), "taking over");
        let (id, advertise) = (predecessor.agent().to_owned(), predecessor.advertise());
        let place = Place::Succeed(predecessor.lock.take());
        let mesh = match join(config, &id, advertise, place).await {
            Ok(mesh) => Arc::new(Observed::new(mesh)),
            Err(error) => return Err(takeover::fail(&mut predecessor, error.to_string()).await),
        };
        takeover::prepare(&mut predecessor, mesh.as_ref()).await?;
        let taken = takeover::receive(&mut predecessor).await?;
        let made = match Heritage::of(taken, config, &id, advertise, &mesh) {
            Ok(made) => made,
            Err(error) => return Err(takeover::fail(&mut predecessor, error.to_string()).await),
        };
        takeover::ready(&mut predecessor).await?;
        let Heritage {
            context,
            listeners,
            clients,
            upstreams,
            ports,
        } = made;
        let (links, inbound) = (clients.parked.len(), listeners.inbound.local_addr().ok());
        if let Err(error) = context.registry.serve_handed(ports).await {
            warn!(%error, "what is registered is not kept in the mesh yet");
        }
        for (client, id, upstream, listener) in upstreams {
            let resume = || {
                let handle = context.proxy.resume_upstream(upstream, listener);
                handle.map_err(|error| Cause::NotReady.because(error.to_string()))
            };
            if let Err(refusal) = client.upstreams.open(&id, &context.upstreams, resume) {
                tracing::error!(id, %refusal, "an upstream is not served any more");
            }
        }
        let agent = Self::serve(config, context, mesh, listeners, clients, id, advertise);
        let agent = agent.map_err(|error| TakeFault::Gone(error.to_string()))?;
        let program = predecessor.program().to_owned();
        takeover::serving(predecessor).await;
        info!(
            dir = %agent.context.dir.path().display(), ?inbound, %advertise, mesh = agent.context.mesh, clients = links,
            predecessor = program, "agent taken over"
        );
        Ok(Some(agent))
    }

    fn serve(
        config: &AgentConfig,
        mut context: Context,
        mesh: Arc<Observed>,
        listeners: Listeners,
        clients: Clients,
        id: String,
        advertise: SocketAddr,
    ) -> Result<Self, StartError> {
        let (stop, freeze) = (CancellationToken::new(), CancellationToken::new());
        let epmd = config.epmd.clone().map(|epmd| {
            let (registry, ports) = (context.registry.clone(), context.ports.clone());
            let (epmd, serving) = Epmd::open(registry, ports, epmd, context.dir.path());
            (epmd.clone(), tokio::spawn(epmd.serve(serving, stop.clone())))
        });
        context.epmd = epmd.as_ref().map(|(epmd, _)| epmd.clone());
        let context = Arc::new(context);
        let (proxy, registry) = (&context.proxy, &context.registry);
        proxy.ask_elsewhere(Arc::new(registry.predecessors().clone()));
        let mut data = JoinSet::new();
        data.spawn(proxy.clone().serve_inbound(listeners.inbound.clone()));
        data.spawn(proxy.clone().serve_dist(listeners.dist.clone()));
        data.spawn(proxy.clone().keep_proven());
        data.spawn(proxy.clone().keep_present());
        data.spawn(police(mesh.clone(), proxy.clone(), registry.clone()));
        data.spawn(registry.clone().keep_names(context.dir.names()));
        let http = listeners.http.as_ref();
        let http = http.map(|http| http.local_addr()).transpose()?;
        if let Some(listener) = &listeners.http {
            let sources = Sources {
                answers: mesh.answers(),
                mesh: mesh.clone(),
                proxy: proxy.clone(),
                links: context.links.clone(),
                predecessors: registry.predecessors().clone(),
            };
            data.spawn(http::serve(listener.clone(), sources));
        }
        let about = Arc::new(About {
            mesh: context.mesh.to_owned(),
            mesh_dir: match &config.mesh {
                MeshKind::Embedded { dir } => Some(dir.canonicalize()?),
                MeshKind::Consul(_) => None,
            },
            agent: id,
            bind: listeners.inbound.local_addr()?,
            http,
            advertise,
        });
        let (successors, coming) = mpsc::channel(1);
        let (told, of) = (about.clone(), registry.clone());
        let reception = Arc::new(Reception {
            welcome: Box::new(move || told.welcome(&of)),
            predecessors: registry.predecessors().clone(),
            links: context.links.clone(),
            successors,
        });
        let takeover = takeover::serve(listeners.takeover.clone(), reception.clone());
        let control = server::serve(
            listeners.control.clone(),
            context.clone(),
            clients,
            stop.clone(),
            freeze.clone(),
        );
        Ok(Self {
            epmd,
            mesh,
            about,
            hosts: config.hosts.clone(),
            drain_time: config.drain_time,
            listeners: Some(listeners),
            stop,
            freeze,
            control: Some(tokio::spawn(control)),
            takeover: tokio::spawn(takeover),
            reception,
            successors: coming,
            data,
            context,
        })
    }

    /// One line for programs: `meshx agent ready dir=... inbound=IP:PORT hosts=A,B mesh=embedded`, and `http=IP:PORT`
    /// and `epmd=PORT` where these are served. A directory with blanks is quoted as in JSON.
    pub fn ready_line(&self) -> String {
        let dir = self.context.dir.path().to_string_lossy();
        let dir = match dir.contains(|c: char| c.is_whitespace() || c == '"') {
            true => serde_json::Value::from(dir).to_string(),
            false => dir.into_owned(),
        };
        let http = self.about.http;
        let http = http.map(|http| format!(" http={http}")).unwrap_or_default();
        let port = |(epmd, _): &(Arc<Epmd>, _)| format!(" epmd={}", epmd.port());
        let epmd = self.epmd.as_ref().map(port).unwrap_or_default();
        format!(
            "meshx agent ready dir={dir} inbound={} hosts={} mesh={}{http}{epmd}",
            self.about.advertise,
            self.hosts.join(","),
            self.context.mesh
        )
    }

    /// Serves until something comes of it. May be dropped and called again.
    pub async fn run(&mut self) -> Event {
        if self.listeners.is_none() {
            self.context.proxy.drained().await;
            info!("the last link has ended");
            return Event::Ended;
        }
        let Some(control) = self.control.as_mut() else {
            return Event::Failed;
        };
        tokio::select! {
            _ = control => {
                tracing::error!("the control socket is no longer served");
                Event::Failed
            }
            ended = self.data.join_next() => {
                tracing::error!(?ended, "the data plane has ended");
                Event::Failed
            }
            Some(successor) = self.successors.recv() => Event::Successor(successor),
        }
    }

    /// Has everything taken over but the live links; when that fails, this process serves as before. Must be waited
    /// for: half way, two processes have everything.
    pub async fn hand_over(&mut self, mut successor: Successor) {
        let (pid, program) = (successor.pid, successor.program.clone());
        info!(pid, program, "handing over");
        let (Some(control), Some(listeners)) = (self.control.take(), &self.listeners) else {
            return;
        };
        let began = Instant::now();
        self.freeze.cancel();
        self.takeover.abort();
        let clients = match control.await {
            Ok(clients) => clients,
            Err(error) => {
                tracing::error!(%error, "clients are lost: this is a bug, please report it");
                return;
            }
        };
        let Context { dir, registry, .. } = self.context.as_ref();
        let given = match self.can_be_handed() {
            Ok(()) => takeover::give(&mut successor, dir, registry, listeners, &clients).await,
            Err(text) => Err(takeover::refuse(&mut successor, text).await),
        };
        if let Err(error) = given {
            warn!(pid, program, %error, "the takeover failed: this process serves on");
            self.freeze = CancellationToken::new();
            let control = server::serve(
                listeners.control.clone(),
                self.context.clone(),
                clients,
                self.stop.clone(),
                self.freeze.clone(),
            );
            self.control = Some(tokio::spawn(control));
            let takeover = takeover::serve(listeners.takeover.clone(), self.reception.clone());
            self.takeover = tokio::spawn(takeover);
            return;
        }
        let waited = began.elapsed();
        self.leave(clients);
        info!(
            pid,
            program,
            links = self.context.links.snapshot().len(),
            ?waited,
            "handed over: this process holds its links until the last has ended"
        );
    }

    /// Why this process must go on.
    fn can_be_handed(&self) -> Result<(), String> {
        if self.epmd.is_some() || !self.context.ports.is_empty() {
            return Err(
                "nodes of plain distribution (--epmd, meshx_epmd) are tied to the process that serves and would lose \
                 their links: stop the agent and start it anew"
                    .to_owned(),
            );
        }
        self.context.registry.can_be_handed()
    }

    /// Everything but the live links is the successor's.
    fn leave(&mut self, clients: Clients) {
        let Context {
            dir,
            proxy,
            links,
            registry,
            ..
        } = self.context.as_ref();
        proxy.close();
        self.listeners = None;
        self.mesh.hand_over();
        dir.hand_over();
        registry.predecessors().dismiss();
        let (clients, cuts) = clients.parked.into_iter().map(Parked::leave).unzip();
        let follower = Follower {
            socket: takeover::socket(dir.path()),
            proxy: proxy.clone(),
            links: links.clone(),
            clients,
            cuts: takeover::merge(cuts),
        };
        self.data.spawn(follower.follow());
    }

    /// Takes no more connections and leaves the mesh, so that nobody is led here; returns when the last link has ended,
    /// or after [`AgentConfig::drain_time`], when those that are left have been told.
    pub async fn drain(&mut self) {
        let Context {
            proxy,
            links,
            registry,
            ..
        } = self.context.as_ref();
        proxy.close();
        self.takeover.abort();
        let leaving = async {
            if self.listeners.is_some() {
                registry.leave_mesh().await;
            }
            proxy.drained().await;
        };
        let live = links.snapshot().len();
        if live > 0 {
            info!(links = live, drain_time = ?self.drain_time, "ending: live links may end by themselves first");
        }
        if timeout(self.drain_time, leaving).await.is_err() {
            let text = format!(
                "the agent ends, {} s after it was told to",
                self.drain_time.as_secs()
            );
            let cut = links.cut_all(Cause::Unreachable, &text);
            info!(links = cut, "links were cut: the agent ends");
            // Their ends close them with the reason.
            let _ = timeout(Settings::default().cut_grace, proxy.drained()).await;
        }
    }

    /// Ends: no new connections, everything deregistered, all files removed.
    pub async fn stop(mut self) {
        self.stop.cancel();
        self.takeover.abort();
        let given_up = async {
            if let Some((_, serving)) = &mut self.epmd {
                let _ = serving.await;
            }
            if let Some(control) = &mut self.control
                && !control.is_finished()
            {
                let _ = control.await;
            }
        };
        if timeout(STOP_TIME, given_up).await.is_err() {
            warn!(
                "some registrations were not given up within {} s",
                STOP_TIME.as_secs()
            );
        }
        self.data.shutdown().await;
        self.context.dir.remove();
        info!("agent ended");
    }
}

/// What a predecessor had, in the forms of this process; nothing of it serves yet.
struct Heritage {
    context: Context,
    listeners: Listeners,
    clients: Clients,
    upstreams: Vec<(Arc<Client>, String, Upstream, OwnedFd)>,
    ports: Vec<HandedPorts>,
}

impl Heritage {
    fn of(
        taken: Taken,
        config: &AgentConfig,
        id: &str,
        advertise: SocketAddr,
        mesh: &Arc<Observed>,
    ) -> Result<Self, StartError> {
        let dir = AgentDir::take_over(&config.dir, config.access, taken.made, taken.lock)?;
        let context = context(config, Arc::new(dir), id, advertise, mesh)?;
        let listeners = Listeners {
            control: UnixListener::from_std(taken.control.into())?.into(),
            dist: UnixListener::from_std(taken.dist.into())?.into(),
            takeover: UnixListener::from_std(taken.takeover.into())?.into(),
            inbound: TcpListener::from_std(taken.inbound.into())?.into(),
            http: taken
                .http
                .map(|http| TcpListener::from_std(http.into()))
                .transpose()?
                .map(Arc::new),
        };
        let mut clients = Clients::new(taken.next_id);
        let mut upstreams = Vec::new();
        for TakenClient {
            id,
            greeted,
            watches,
            stream,
            upstreams: of_client,
        } in taken.clients
        {
            let client = clients.resume(stream, id, greeted, watches, &context)?;
            upstreams.extend(
                of_client
                    .into_iter()
                    .map(|(id, upstream, listener)| (client.clone(), id, upstream, listener)),
            );
        }
        let owners: HashMap<u64, Owner> = clients
            .parked
            .iter()
            .map(|parked| (parked.client.owner.id, parked.client.owner))
            .collect();
        let ports = context.registry.resume(taken.registry, taken.instances);
        let ports = ports.map_err(StartError::Takeover)?;
        let sessions = context.registry.resume_sessions(taken.sessions, &owners);
        sessions.map_err(StartError::Takeover)?;
        Ok(Self {
            context,
            listeners,
            clients,
            upstreams,
            ports,
        })
    }
}

/// Registry, data plane and all that clients ask; nothing serves yet.
fn context(
    config: &AgentConfig,
    dir: Arc<AgentDir>,
    id: &str,
    advertise: SocketAddr,
    mesh: &Arc<Observed>,
) -> Result<Context, StartError> {
    let mesh: Arc<dyn Mesh> = mesh.clone();
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let (local, links) = (LocalTable::default(), LinkTable::with_descriptors(descriptors));
    if links.max() < LINKS_MAX {
        warn!(
            links = links.max(),
            descriptors, "open files are limited, and links with them: raise the hard limit"
        );
    }
    let place = registry::Place {
        agent: id.to_owned(),
        inbound: advertise,
        hosts: config.hosts.clone(),
        vm: dir.vm(),
        up: dir.up(),
        node_service: config.node_service,
    };
    let settings = Settings {
        allow_unverified_peers: config.allow_unverified_peers,
        session_service: config.session_service.clone(),
        balance: config.balance,
        ..Settings::default()
    };
    let proxy = Proxy::new(mesh.clone(), local.clone(), links.clone(), settings);
    let carriers = Carriers {
        proxy: proxy.clone(),
        sidecars: Sidecars::new(mesh.clone(), dir.sidecars(), programs(config))?,
        bind: config.bind.ip(),
        ports: config.instance_ports.clone(),
        default: config.data_plane.clone(),
    };
    let registry = Registry::new(mesh, local, links.clone(), config.trust.clone(), place, carriers)?;
    Ok(Context {
        registry: Arc::new(registry),
        ports: Arc::new(PlainPorts::new(proxy.clone())),
        epmd: None,
        proxy,
        links,
        dir,
        mesh: config.mesh.name(),
        upstreams: Budget::default(),
        questions: Semaphore::new(QUESTIONS_MAX),
        probes: Semaphore::new(PROBES_MAX),
        log: LogLimit::new("refused clients and requests"),
    })
}

async fn listen_http(address: SocketAddr) -> Result<TcpListener, StartError> {
    if !address.ip().is_loopback() {
        warn!(%address, "metrics and health are served beyond this host, to whoever reaches the port");
    }
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| StartError::Http { address, source })
}

/// Holds live links against the rules whenever these change.
async fn police(mesh: Arc<dyn Mesh>, proxy: Arc<Proxy>, registry: Arc<Registry>) {
    loop {
        match mesh.changed().await {
            Ok(()) => {
                registry.carriers().rules_changed();
                recheck(&proxy).await;
            }
            Err(error) => {
                warn!(%error, "changes of the rules cannot be seen now");
                sleep(POLICE_RETRY).await;
            }
        }
    }
}

/// Until there is an answer for every link: the change that calls for it is told of once.
async fn recheck(proxy: &Proxy) {
    let mut warned = false;
    loop {
        let result = proxy.recheck().await;
        if result.cut > 0 {
            info!(
                links = result.cut,
                "the rules changed: links that they deny were cut"
            );
        }
        if result.unanswered == 0 {
            return;
        }
        if !warned {
            warn!(
                links = result.unanswered,
                "the rules changed, but for these links the mesh has no answer: asking again until it has"
            );
            warned = true;
        }
        sleep(POLICE_RETRY).await;
    }
}

/// How sidecars are started.
fn programs(config: &AgentConfig) -> sidecar::Settings {
    let consul = match &config.mesh {
        MeshKind::Embedded { .. } => None,
        MeshKind::Consul(settings) => Some(ConsulProgram {
            program: config.consul_program.clone(),
            environment: settings.environment(),
            token: settings.given_token(),
        }),
    };
    sidecar::Settings {
        consul,
        envoy: config.envoy_program.clone(),
        ..sidecar::Settings::default()
    }
}

/// In whose place the mesh is joined.
enum Place {
    Own,
    /// A predecessor's, with the lock of its entry where the mesh has one.
    Succeed(Option<OwnedFd>),
}

async fn join(
    config: &AgentConfig,
    id: &str,
    advertise: SocketAddr,
    place: Place,
) -> Result<Arc<dyn Mesh>, StartError> {
    let hosts = config.hosts.clone();
    match (&config.mesh, place) {
        (MeshKind::Embedded { dir }, place) => {
            let (dir, id) = (dir.clone(), id.to_owned());
            let joining = tokio::task::spawn_blocking(move || match place {
                Place::Own => EmbeddedMesh::open(&dir, &id, hosts, advertise),
                Place::Succeed(Some(lock)) => EmbeddedMesh::succeed(&dir, &id, hosts, advertise, lock),
                Place::Succeed(None) => Err(MeshError::Refused(
                    "the predecessor did not hand over the lock of its entry".into(),
                )),
            });
            Ok(Arc::new(joining.await.map_err(io::Error::other)??))
        }
        (MeshKind::Consul(settings), Place::Own) => {
            Ok(ConsulMesh::open((**settings).clone(), id, hosts, advertise)?)
        }
        (MeshKind::Consul(settings), Place::Succeed(_)) => {
            Ok(ConsulMesh::succeed((**settings).clone(), id, hosts, advertise)?)
        }
    }
}
