//! The running agent: everything tied together, started and ended in order.

mod end;
mod handover;
mod parts;
mod police;

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

pub use end::STOP_TIME;
use parts::{Parts, Place, context, join, listen_http, programs, serve_epmd};
use police::police;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    config::{AgentConfig, MeshKind},
    control::{
        commands::Context,
        idle::Idle,
        server::{self, Clients},
    },
    dir::AgentDir,
    paths::{CONTROL_SOCKET, DIST_SOCKET, DirError, TAKEOVER_SOCKET},
    registry::{RECLAIM_TIME, Reserved},
    sidecar::{SidecarError, Sidecars},
    takeover::{self, About, EpmdPlace, Listeners, Reception, Successor, TakeFault},
};
use crate::{
    epmd::{self, Epmd},
    http::{self, Sources},
    mesh::{MeshError, consul::ConsulMesh, observed::Observed},
};

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

/// A directory in a line of words: one with blanks is quoted as in JSON.
pub(crate) fn quoted(dir: &Path) -> String {
    let dir = dir.to_string_lossy();
    match dir.contains(|c: char| c.is_whitespace() || c == '"') {
        true => serde_json::Value::from(dir).to_string(),
        false => dir.into_owned(),
    }
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
    /// None when it is not EPMD, or a successor is.
    epmd: Option<(Arc<Epmd>, JoinHandle<epmd::Serving>)>,
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
    /// A successor has taken over, and the last link of this process has ended; or nobody has used the agent for
    /// [`AgentConfig::idle_exit`].
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
        let sidecars = Sidecars::new(mesh.clone(), dir.sidecars(), programs(config))?;
        let context = context(config, dir.clone(), &id, advertise, &mesh, sidecars)?;
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
        let epmd = config.epmd.clone().map(|epmd| {
            let (registry, ports) = (context.registry.clone(), context.ports.clone());
            Epmd::open(registry, ports, epmd, dir.path())
        });
        let parts = Parts {
            context,
            listeners,
            clients,
            epmd,
        };
        let agent = Self::serve(config, parts, mesh, id, advertise)?;
        info!(dir = %agent.context.dir.path().display(), %inbound, %advertise, mesh = agent.context.mesh, "agent started");
        Ok(agent)
    }

    fn serve(
        config: &AgentConfig,
        parts: Parts,
        mesh: Arc<Observed>,
        id: String,
        advertise: SocketAddr,
    ) -> Result<Self, StartError> {
        let Parts {
            mut context,
            listeners,
            mut clients,
            epmd,
        } = parts;
        clients.idle = Idle::new(config.idle_exit);
        let (stop, freeze) = (CancellationToken::new(), CancellationToken::new());
        let epmd = epmd.map(|epmd| serve_epmd(epmd, &stop, &freeze));
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
            epmd: context.epmd.as_ref().map(|epmd| EpmdPlace {
                port: epmd.port(),
                addresses: epmd.addresses(),
                host: epmd.host().to_owned(),
            }),
            advertise,
        });
        let (successors, coming) = mpsc::channel(1);
        let (told, of, with) = (about.clone(), registry.clone(), registry.clone());
        let reception = Arc::new(Reception {
            welcome: Box::new(move || told.welcome(&of)),
            predecessors: registry.predecessors().clone(),
            links: context.links.clone(),
            came: Box::new(move |links| with.cut_orphans_later(links)),
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
        let dir = quoted(self.context.dir.path());
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
            ended = control => {
                if ended.is_ok_and(|clients| clients.unused) {
                    info!("nobody uses this agent: ending");
                    return Event::Ended;
                }
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
}
