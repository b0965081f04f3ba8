//! What an agent is made of, by its configuration.

use std::{io, net::SocketAddr, num::NonZero, os::fd::OwnedFd, sync::Arc, thread::available_parallelism};

use rustix::process::{Resource, getrlimit};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::StartError;
use crate::{
    agent::{
        config::{AgentConfig, MeshKind},
        control::{
            commands::{Context, QUESTIONS_MAX},
            diagnosis::PROBES_MAX,
            server::Clients,
            upstreams::Budget,
        },
        dir::AgentDir,
        registry::{self, Registry, carrier::Carriers},
        sidecar::{self, ConsulProgram, Sidecars},
        takeover::Listeners,
    },
    epmd::{self, Epmd},
    log_limit::LogLimit,
    mesh::{Mesh, MeshError, consul::ConsulMesh, embedded::EmbeddedMesh, observed::Observed},
    proxy::{
        Lanes, Proxy, Settings, busy_poll_of,
        links::{LINKS_MAX, LinkTable},
        local::LocalTable,
        pending_max,
        plain::PlainPorts,
    },
};

/// All that serves.
pub(super) struct Parts {
    pub(super) context: Context,
    pub(super) listeners: Listeners,
    pub(super) clients: Clients,
    pub(super) epmd: Option<(Arc<Epmd>, epmd::Serving)>,
}

pub(super) fn serve_epmd(
    (epmd, serving): (Arc<Epmd>, epmd::Serving),
    stop: &CancellationToken,
    freeze: &CancellationToken,
) -> (Arc<Epmd>, JoinHandle<epmd::Serving>) {
    let running = epmd.clone().serve(serving, stop.clone(), freeze.clone());
    (epmd, tokio::spawn(running))
}

/// Registry, data plane and all that clients ask; nothing serves yet.
pub(super) fn context(
    config: &AgentConfig,
    dir: Arc<AgentDir>,
    id: &str,
    advertise: SocketAddr,
    mesh: &Arc<Observed>,
    sidecars: Sidecars,
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
    let threads = available_parallelism().map_or(1, NonZero::get);
    let settings = Settings {
        allow_unverified_peers: config.allow_unverified_peers,
        session_service: config.session_service.clone(),
        balance: config.balance,
        max_pending: pending_max(descriptors),
        lanes: Lanes::new(threads, config.busy_poll.unwrap_or_else(|| busy_poll_of(threads)))?,
        ..Settings::default()
    };
    let proxy = Proxy::new(mesh.clone(), local.clone(), links.clone(), settings);
    let carriers = Carriers {
        proxy: proxy.clone(),
        sidecars,
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

pub(super) async fn listen_http(address: SocketAddr) -> Result<TcpListener, StartError> {
    if !address.ip().is_loopback() {
        warn!(%address, "metrics and health are served beyond this host, to whoever reaches the port");
    }
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| StartError::Http { address, source })
}

/// How sidecars are started.
pub(super) fn programs(config: &AgentConfig) -> sidecar::Settings {
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
pub(super) enum Place {
    Own,
    /// A predecessor's, with the lock of its entry where the mesh has one.
    Succeed(Option<OwnedFd>),
}

pub(super) async fn join(
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
