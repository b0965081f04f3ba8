//! The side that hands over.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener},
    time::timeout,
};

use super::{
    Successor,
    message::{Answer, Counts, EpmdPlace, Give, Take, Welcome},
    wire::Channel,
};
use crate::{
    agent::{
        control::server::Clients,
        dir::AgentDir,
        registry::{FrozenSidecars, Registry},
    },
    epmd::{self, Epmd},
    proxy::plain::PlainPorts,
};

/// How long a successor may take from its welcome to its `begin`: it joins the mesh and fetches certificates.
pub(super) const PREPARE_TIME: Duration = Duration::from_secs(30);
/// How long a successor may take to get ready once it has everything. Clients wait meanwhile.
const READY_TIME: Duration = Duration::from_secs(10);

/// A welcome, and the lock of the agent's entry that goes with it.
pub(in crate::agent) struct Given {
    pub(super) welcome: Welcome,
    pub(super) lock: Option<OwnedFd>,
}

/// What a process that serves says of itself.
pub(in crate::agent) struct About {
    pub(in crate::agent) mesh: String,
    pub(in crate::agent) mesh_dir: Option<std::path::PathBuf>,
    pub(in crate::agent) agent: String,
    pub(in crate::agent) bind: SocketAddr,
    pub(in crate::agent) http: Option<SocketAddr>,
    pub(in crate::agent) epmd: Option<EpmdPlace>,
    pub(in crate::agent) advertise: SocketAddr,
}

impl About {
    /// The welcome as of now.
    pub(in crate::agent) fn welcome(&self, registry: &Registry) -> io::Result<Given> {
        let lock = registry.mesh().entry_lock()?;
        Ok(Given {
            welcome: Welcome {
                version: 0,
                program: super::program(),
                mesh: self.mesh.clone(),
                mesh_dir: self.mesh_dir.clone(),
                entry_lock: lock.is_some(),
                agent: self.agent.clone(),
                bind: self.bind,
                http: self.http,
                epmd: self.epmd.clone(),
                advertise: self.advertise,
                services: registry.services(),
            },
            lock,
        })
    }
}

pub(super) async fn welcome(
    channel: &mut Channel,
    welcome: Welcome,
    lock: Option<OwnedFd>,
) -> io::Result<()> {
    let files: Vec<BorrowedFd<'_>> = lock.iter().map(AsFd::as_fd).collect();
    channel.send(&Answer::Welcome(Box::new(welcome)), &files).await
}

/// Whether the successor wants the rest; it says why when it does not.
pub(super) async fn begun(channel: &mut Channel) -> io::Result<bool> {
    match timeout(PREPARE_TIME, channel.receive_late()).await {
        Ok(Ok(Some(Take::Begin))) => Ok(true),
        Ok(Ok(Some(Take::Failed { text }))) => Err(io::Error::other(text)),
        Ok(Ok(Some(other))) => Err(io::Error::other(format!("{other:?}, wanted begin"))),
        Ok(Ok(None)) => Err(io::Error::other("the successor has left before it began")),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other(format!(
            "the successor did not begin within {} s",
            PREPARE_TIME.as_secs()
        ))),
    }
}

/// The listeners that all clients and agents share.
pub(in crate::agent) struct Listeners {
    pub(in crate::agent) control: Arc<UnixListener>,
    pub(in crate::agent) dist: Arc<UnixListener>,
    pub(in crate::agent) takeover: Arc<UnixListener>,
    pub(in crate::agent) inbound: Arc<TcpListener>,
    pub(in crate::agent) http: Option<Arc<TcpListener>>,
}

/// All that a process that serves has.
pub(in crate::agent) struct Whole<'a> {
    pub(in crate::agent) dir: &'a AgentDir,
    pub(in crate::agent) registry: &'a Registry,
    pub(in crate::agent) listeners: &'a Listeners,
    pub(in crate::agent) clients: &'a Clients,
    pub(in crate::agent) sidecars: &'a FrozenSidecars,
    pub(in crate::agent) ports: &'a PlainPorts,
    pub(in crate::agent) epmd: Option<(&'a Epmd, &'a epmd::Serving)>,
}

/// Hands everything over. When this returns without an error, the successor serves.
///
/// # Errors
/// The successor does not serve, and has been told so if it lives.
pub(in crate::agent) async fn give(successor: &mut Successor, whole: &Whole<'_>) -> io::Result<()> {
    match give_all(successor, whole).await {
        Ok(()) => Ok(()),
        Err(error) => Err(refuse(successor, error.to_string()).await),
    }
}

/// Tells the successor that this process goes on.
pub(in crate::agent) async fn refuse(successor: &mut Successor, text: String) -> io::Error {
    let abort = Give::Abort { text: text.clone() };
    // It may be gone.
    let _ = successor.channel.send(&abort, &[]).await;
    io::Error::other(text)
}

async fn give_all(successor: &mut Successor, whole: &Whole<'_>) -> io::Result<()> {
    let (pid, channel) = (successor.pid, &mut successor.channel);
    let Whole {
        dir,
        registry,
        listeners,
        clients,
        sidecars,
        ports,
        epmd,
    } = whole;
    let (lock, made) = dir.handed()?;
    let (handed, instances) = registry.handed(sidecars)?;
    let mut files = vec![
        lock.as_fd(),
        listeners.control.as_fd(),
        listeners.dist.as_fd(),
        listeners.takeover.as_fd(),
        listeners.inbound.as_fd(),
    ];
    files.extend(listeners.http.iter().map(|http| http.as_fd()));
    let agent = Give::Agent {
        made,
        next_id: clients.next_id,
        http: listeners.http.is_some(),
        registry: handed,
    };
    channel.send(&agent, &files).await?;
    let mut counts = Counts {
        clients: clients.parked.len(),
        instances: instances.len(),
        ..Counts::default()
    };
    for parked in &clients.parked {
        let id = parked.client.owner.id;
        let client = Give::Client {
            id,
            greeted: parked.greeted,
            watches: parked.client.watches.handed(),
            heartbeat: parked.client.heart.after(),
        };
        channel.send(&client, &[parked.stream.as_fd()]).await?;
        for (name, upstream, listener) in parked.client.upstreams.handed()? {
            counts.upstreams += 1;
            let upstream = Give::Upstream {
                owner: id,
                id: name,
                upstream,
            };
            channel.send(&upstream, &[listener.as_fd()]).await?;
        }
    }
    for (instance, files) in instances {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        channel.send(&Give::Instance(Box::new(instance)), &files).await?;
    }
    let sessions = registry.handed_sessions();
    counts.sessions = sessions.len();
    for session in sessions {
        channel.send(&Give::Session(session), &[]).await?;
    }
    for (target, listener) in ports.handed()? {
        counts.plain_ports += 1;
        channel
            .send(&Give::PlainPort { target }, &[listener.as_fd()])
            .await?;
    }
    if let Some((epmd, serving)) = epmd {
        channel.send(&Give::Epmd(Box::new(epmd.handed())), &[]).await?;
        for (address, listener) in serving.places() {
            counts.epmd_places += 1;
            channel.send(&Give::EpmdPlace { address }, &[listener]).await?;
        }
        for (name, connection) in serving.names()? {
            counts.epmd_names += 1;
            channel.send(&Give::EpmdName(name), &[connection]).await?;
        }
    }
    channel.send(&Give::All(counts), &[]).await?;
    match timeout(READY_TIME, channel.receive_late()).await {
        Ok(Ok(Some(Take::Ready))) => {}
        Ok(Ok(Some(Take::Failed { text }))) => return Err(io::Error::other(text)),
        Ok(Ok(Some(other))) => return Err(io::Error::other(format!("{other:?}, wanted ready"))),
        Ok(Ok(None)) => return Err(io::Error::other("the successor ended before it was ready")),
        Ok(Err(error)) => return Err(error),
        Err(_) => {
            return Err(io::Error::other(format!(
                "the successor was not ready within {} s",
                READY_TIME.as_secs()
            )));
        }
    }
    channel.send(&Give::Commit, &[]).await?;
    // From here on only its end can tell that it does not serve: there must never be two.
    let mut served = pin!(channel.receive_late());
    let served = loop {
        match timeout(READY_TIME, &mut served).await {
            Ok(served) => break served,
            Err(_) => tracing::warn!(
                pid,
                "the successor has everything and does not say that it serves: clients wait until it does or has \
                 ended, so end it if it hangs"
            ),
        }
    };
    match served {
        Ok(Some(Take::Serving)) => Ok(()),
        Ok(Some(other)) => Err(io::Error::other(format!("{other:?}, wanted serving"))),
        Ok(None) => Err(io::Error::other("the successor ended before it served")),
        Err(error) => Err(error),
    }
}
