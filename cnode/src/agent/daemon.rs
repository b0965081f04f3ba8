//! The running agent: everything tied together, started and ended in order.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustix::process::{Resource, getrlimit};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    config::{AgentConfig, MeshKind},
    control::{
        commands::{Context, QUESTIONS_MAX},
        diagnosis::PROBES_MAX,
        server,
        upstreams::Budget,
    },
    dir::AgentDir,
    paths::{CONTROL_SOCKET, DIST_SOCKET, DirError},
    registry::{Place, Registry, carrier::Carriers},
    sidecar::{self, ConsulProgram, SidecarError, Sidecars},
};
use crate::{
    epmd::Epmd,
    http::{self, Sources},
    log_limit::LogLimit,
    mesh::{Mesh, MeshError, consul::ConsulMesh, embedded::EmbeddedMesh, observed::Observed},
    proxy::{
        Proxy, Settings,
        links::{LINKS_MAX, LinkTable},
        local::LocalTable,
        plain::PlainPorts,
    },
};

/// How long clients' registrations may take to be given up when the agent ends.
pub const STOP_TIME: Duration = Duration::from_secs(8);

/// Pause before the mesh is asked again for changes of the rules or about a link, after it failed to answer.
const POLICE_RETRY: Duration = Duration::from_secs(1);

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
    dir: Arc<AgentDir>,
    inbound: SocketAddr,
    hosts: Vec<String>,
    mesh: &'static str,
    http: Option<SocketAddr>,
    stop: CancellationToken,
    control: JoinHandle<()>,
    epmd: Option<(Arc<Epmd>, JoinHandle<()>)>,
    /// The data plane; its links end when this is dropped.
    data: JoinSet<()>,
}

impl Agent {
    /// Takes the directory, opens the port, joins the mesh and serves. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind then.
    pub async fn start(config: AgentConfig) -> Result<Self, StartError> {
        let dir = Arc::new(AgentDir::open(&config.dir, config.access)?);
        let started = Self::start_in(dir.clone(), config).await;
        if started.is_err() {
            dir.remove();
        }
        started
    }

    async fn start_in(dir: Arc<AgentDir>, config: AgentConfig) -> Result<Self, StartError> {
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
        let kind = config.mesh.name();
        let programs = programs(&config);
        let http = match config.http {
            Some(address) => Some(listen_http(address).await?),
            None => None,
        };
        let mesh = join(config.mesh, &id, config.hosts.clone(), advertise).await?;
        let mesh = Arc::new(Observed::new(mesh));
        let answers = mesh.answers();
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let (local, links) = (LocalTable::default(), LinkTable::with_descriptors(descriptors));
        if links.max() < LINKS_MAX {
            warn!(
                links = links.max(),
                descriptors, "open files are limited, and links with them: raise the hard limit"
            );
        }
        let place = Place {
            agent: id,
            inbound: advertise,
            hosts: config.hosts.clone(),
            vm: dir.vm(),
            up: dir.up(),
            node_service: config.node_service,
        };
        let settings = Settings {
            allow_unverified_peers: config.allow_unverified_peers,
            session_service: config.session_service,
            balance: config.balance,
            ..Settings::default()
        };
        let proxy = Proxy::new(mesh.clone(), local.clone(), links.clone(), settings);
        let carriers = Carriers {
            proxy: proxy.clone(),
            sidecars: Sidecars::new(mesh.clone(), dir.sidecars(), programs)?,
            bind: config.bind.ip(),
            ports: config.instance_ports,
            default: config.data_plane,
        };
        let registry = Registry::new(mesh.clone(), local, links.clone(), config.trust, place, carriers)?;
        let registry = Arc::new(registry);
        let dist = UnixListener::from_std(dir.bind(DIST_SOCKET)?)?;
        let mut data = JoinSet::new();
        data.spawn(proxy.clone().serve_inbound(port));
        data.spawn(proxy.clone().serve_dist(dist));
        data.spawn(proxy.clone().keep_proven());
        data.spawn(proxy.clone().keep_present());
        data.spawn(police(mesh.clone(), proxy.clone(), registry.clone()));
        let http_at = http.as_ref().map(TcpListener::local_addr).transpose()?;
        if let Some(listener) = http {
            let sources = Sources {
                mesh,
                answers,
                proxy: proxy.clone(),
                links: links.clone(),
            };
            data.spawn(http::serve(listener, sources));
        }

        let stop = CancellationToken::new();
        let upstreams = Budget::default();
        let ports = Arc::new(PlainPorts::new(proxy.clone()));
        let epmd = config.epmd.map(|epmd| {
            let (epmd, serving) = Epmd::open(registry.clone(), ports.clone(), epmd, dir.path());
            (epmd.clone(), tokio::spawn(epmd.serve(serving, stop.clone())))
        });
        let context = Context {
            registry,
            proxy,
            links,
            dir: dir.clone(),
            mesh: kind,
            upstreams,
            ports,
            epmd: epmd.as_ref().map(|(epmd, _)| epmd.clone()),
            questions: Semaphore::new(QUESTIONS_MAX),
            probes: Semaphore::new(PROBES_MAX),
            log: LogLimit::new("refused clients and requests"),
        };
        // Last: who finds the control socket finds an agent that is whole.
        let control = UnixListener::from_std(dir.bind(CONTROL_SOCKET)?)?;
        let control = tokio::spawn(server::serve(control, Arc::new(context), stop.clone()));
        let agent = Self {
            dir,
            inbound: advertise,
            hosts: config.hosts,
            mesh: kind,
            http: http_at,
            stop,
            control,
            epmd,
            data,
        };
        info!(dir = %agent.dir.path().display(), %inbound, %advertise, mesh = kind, "agent started");
        Ok(agent)
    }

    /// One line for programs: `meshx agent ready dir=... inbound=IP:PORT hosts=A,B mesh=embedded`, and `http=IP:PORT`
    /// and `epmd=PORT` where these are served. A directory with blanks is quoted as in JSON.
    pub fn ready_line(&self) -> String {
        let dir = self.dir.path().to_string_lossy();
        let dir = match dir.contains(|c: char| c.is_whitespace() || c == '"') {
            true => serde_json::Value::from(dir).to_string(),
            false => dir.into_owned(),
        };
        let http = self.http.map(|http| format!(" http={http}")).unwrap_or_default();
        let port = |(epmd, _): &(Arc<Epmd>, _)| format!(" epmd={}", epmd.port());
        let epmd = self.epmd.as_ref().map(port).unwrap_or_default();
        format!(
            "meshx agent ready dir={dir} inbound={} hosts={} mesh={}{http}{epmd}",
            self.inbound,
            self.hosts.join(","),
            self.mesh
        )
    }

    /// Returns when a part that should serve for ever does not: the agent is of no more use then.
    pub async fn failed(&mut self) {
        tokio::select! {
            _ = &mut self.control => tracing::error!("the control socket is no longer served"),
            ended = self.data.join_next() => tracing::error!(?ended, "the data plane has ended"),
        }
    }

    /// Ends: no new connections, everything deregistered, all files removed.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let given_up = async {
            if let Some((_, serving)) = &mut self.epmd {
                let _ = serving.await;
            }
            if !self.control.is_finished() {
                let _ = (&mut self.control).await;
            }
        };
        if timeout(STOP_TIME, given_up).await.is_err() {
            warn!(
                "some registrations were not given up within {} s",
                STOP_TIME.as_secs()
            );
        }
        self.data.shutdown().await;
        self.dir.remove();
        info!("agent ended");
    }
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

async fn join(
    kind: MeshKind,
    id: &str,
    hosts: Vec<String>,
    advertise: SocketAddr,
) -> Result<Arc<dyn Mesh>, StartError> {
    match kind {
        MeshKind::Embedded { dir } => {
            let id = id.to_owned();
            let joining =
                tokio::task::spawn_blocking(move || EmbeddedMesh::open(&dir, &id, hosts, advertise));
            Ok(Arc::new(joining.await.map_err(io::Error::other)??))
        }
        MeshKind::Consul(settings) => Ok(ConsulMesh::open(*settings, id, hosts, advertise)?),
    }
}
