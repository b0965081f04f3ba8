//! A successor of this process, and this process as one.

use std::{collections::HashMap, net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use futures::future::join_all;
use tokio::{
    net::{TcpListener, UnixListener},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Agent, StartError,
    parts::{Parts, Place, context, join, programs, serve_epmd},
};
use crate::{
    agent::{
        config::AgentConfig,
        control::{
            commands::{Client, Context},
            server::{self, Clients},
            session::Parked,
        },
        dir::AgentDir,
        registry::{FrozenSidecar, HandedPorts, Owner},
        sidecar::Sidecars,
        takeover::{self, Follower, Listeners, Successor, TakeFault, Taken, TakenClient, Whole},
    },
    epmd::Epmd,
    mesh::{Registration, observed::Observed},
    proxy::{Upstream, cause::Cause},
};

impl Agent {
    /// None when nobody serves in the directory.
    pub(super) async fn take_over(config: &AgentConfig) -> Result<Option<Self>, TakeFault> {
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
            parts,
            upstreams,
            ports,
            plain_ports,
        } = made;
        let context = &parts.context;
        let (links, inbound) = (
            parts.clients.parked.len(),
            parts.listeners.inbound.local_addr().ok(),
        );
        if let Err(error) = context.registry.serve_handed(ports).await {
            warn!(%error, "what is registered is not kept in the mesh yet");
        }
        for (client, id, upstream, listener) in upstreams {
            let resume = || {
                let handle = context.proxy.resume_upstream(upstream, listener);
                handle.map_err(|error| Cause::NotReady.because(error.to_string()))
            };
            let user = context.registry.trust().limited(client.owner.peer.uid);
            if let Err(refusal) = client.upstreams.open(&id, &context.upstreams, user, resume) {
                tracing::error!(id, %refusal, "an upstream is not served any more");
            }
        }
        for (target, listener) in plain_ports {
            if let Err(error) = context.ports.resume(&target, listener) {
                tracing::error!(target, %error, "a port of plain distribution is not served any more");
            }
        }
        let agent = Self::serve(config, parts, mesh, id, advertise);
        let agent = agent.map_err(|error| TakeFault::Gone(error.to_string()))?;
        let program = predecessor.program().to_owned();
        takeover::serving(predecessor).await;
        info!(
            dir = %agent.context.dir.path().display(), ?inbound, %advertise, mesh = agent.context.mesh, clients = links,
            predecessor = program, "agent taken over"
        );
        Ok(Some(agent))
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
        let epmd = async {
            let Some((epmd, serving)) = self.epmd.take() else {
                return Ok(None);
            };
            serving.await.map(|serving| Some((epmd, serving)))
        };
        let (clients, epmd) = match tokio::join!(control, epmd) {
            (Ok(clients), Ok(epmd)) => (clients, epmd),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "clients are lost: this is a bug, please report it");
                return;
            }
        };
        let Context {
            dir, registry, ports, ..
        } = self.context.as_ref();
        let given = match registry.freeze_sidecars().await {
            Ok(sidecars) => {
                let whole = Whole {
                    dir,
                    registry,
                    listeners,
                    clients: &clients,
                    sidecars: &sidecars,
                    ports,
                    epmd: epmd.as_ref().map(|(epmd, serving)| (epmd.as_ref(), serving)),
                };
                let given = takeover::give(&mut successor, &whole).await;
                if given.is_ok() {
                    join_all(sidecars.into_values().map(FrozenSidecar::leave)).await;
                }
                given
            }
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
            self.epmd = epmd.map(|epmd| serve_epmd(epmd, &self.stop, &self.freeze));
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
}

/// What a predecessor had, in the forms of this process; nothing of it serves yet.
struct Heritage {
    parts: Parts,
    upstreams: Vec<(Arc<Client>, String, Upstream, OwnedFd)>,
    ports: Vec<HandedPorts>,
    plain_ports: Vec<(String, OwnedFd)>,
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
        let sidecars = Sidecars::succeed(mesh.clone(), dir.sidecars(), programs(config))?;
        let context = context(config, Arc::new(dir), id, advertise, mesh, sidecars)?;
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
            heartbeat,
            stream,
            upstreams: of_client,
        } in taken.clients
        {
            let client = clients.resume(stream, id, greeted, (watches, heartbeat), &context)?;
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
        let of_epmd = taken.epmd.iter().flat_map(|epmd| &epmd.names);
        for owner in of_epmd.filter_map(|(name, _)| name.owner()) {
            // As for every name of EPMD: nobody hears its events.
            drop(context.registry.enter(owner));
        }
        let ports = context.registry.resume(taken.registry, taken.instances);
        let ports = ports.map_err(StartError::Takeover)?;
        let sessions = context.registry.resume_sessions(taken.sessions, &owners);
        sessions.map_err(StartError::Takeover)?;
        let (registry, plain) = (context.registry.clone(), context.ports.clone());
        let epmd = match (config.epmd.clone(), taken.epmd) {
            (Some(config), Some(taken)) => {
                let taken = Epmd::take_over(registry, plain, config, context.dir.path(), taken);
                Some(taken.map_err(StartError::Takeover)?)
            }
            (Some(config), None) => Some(Epmd::open(registry, plain, config, context.dir.path())),
            (None, None) => None,
            (None, Some(_)) => {
                return Err(StartError::Takeover(
                    "the predecessor is EPMD, and did not say so".to_owned(),
                ));
            }
        };
        Ok(Self {
            parts: Parts {
                context,
                listeners,
                clients,
                epmd,
            },
            upstreams,
            ports,
            plain_ports: taken.ports,
        })
    }
}
