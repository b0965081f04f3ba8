//! The side that takes over.

use std::{collections::HashMap, io, net::SocketAddr, os::fd::OwnedFd, time::Duration};

use tokio::{net::UnixStream, time::timeout};

use super::{
    Meeting, Role,
    give::PREPARE_TIME,
    message::{Counts, Give, Take, Welcome},
    wire::{Channel, invalid},
};
use crate::{
    agent::{
        config::{AgentConfig, MeshKind},
        control::{CLIENTS_MAX, UPSTREAMS_MAX, server::FREEZE_TIME},
        registry::{Handed, HandedInstances, HandedSession, INSTANCES_MAX},
    },
    epmd::{EpmdConfig, NAMES_MAX, PLACES_MAX, TakenEpmd},
    mesh::{Mesh, MeshError, ServiceName},
    proxy::{Upstream, plain::PLAIN_PORTS_MAX},
};

/// How long everything may take to come: clients may take [`FREEZE_TIME`] to come between two frames.
const GIVE_TIME: Duration = FREEZE_TIME.saturating_add(Duration::from_secs(10));
/// How long certificates may take to come.
const CERTIFICATES_TIME: Duration = PREPARE_TIME.saturating_sub(Duration::from_secs(10));

/// Why a takeover came to nothing.
#[derive(Debug)]
pub(in crate::agent) enum TakeFault {
    /// The predecessor ended, or may have: its lock tells.
    Gone(String),
    /// It serves on.
    Refused(String),
}

impl From<io::Error> for TakeFault {
    fn from(error: io::Error) -> Self {
        Self::Gone(error.to_string())
    }
}

/// A predecessor that has welcomed this process.
pub(in crate::agent) struct Predecessor {
    channel: Channel,
    welcome: Box<Welcome>,
    /// The lock of the agent's entry in the mesh.
    pub(in crate::agent) lock: Option<OwnedFd>,
}

impl Predecessor {
    pub(in crate::agent) fn program(&self) -> &str {
        &self.welcome.program
    }

    /// The agent's id in the mesh.
    pub(in crate::agent) fn agent(&self) -> &str {
        &self.welcome.agent
    }

    pub(in crate::agent) fn advertise(&self) -> SocketAddr {
        self.welcome.advertise
    }
}

/// Everything that the predecessor had.
pub(in crate::agent) struct Taken {
    pub(in crate::agent) made: bool,
    pub(in crate::agent) next_id: u64,
    pub(in crate::agent) registry: Handed,
    pub(in crate::agent) lock: OwnedFd,
    pub(in crate::agent) control: OwnedFd,
    pub(in crate::agent) dist: OwnedFd,
    pub(in crate::agent) takeover: OwnedFd,
    pub(in crate::agent) inbound: OwnedFd,
    pub(in crate::agent) http: Option<OwnedFd>,
    pub(in crate::agent) clients: Vec<TakenClient>,
    pub(in crate::agent) instances: HandedInstances,
    pub(in crate::agent) sessions: Vec<HandedSession>,
    /// Ports of nodes of plain distribution, by the node that each leads to.
    pub(in crate::agent) ports: Vec<(String, OwnedFd)>,
    pub(in crate::agent) epmd: Option<TakenEpmd>,
}

impl Taken {
    fn counts(&self, upstreams: usize) -> Counts {
        let epmd = self.epmd.as_ref();
        Counts {
            clients: self.clients.len(),
            upstreams,
            instances: self.instances.len(),
            sessions: self.sessions.len(),
            plain_ports: self.ports.len(),
            epmd_places: epmd.map_or(0, |epmd| epmd.places.len()),
            epmd_names: epmd.map_or(0, |epmd| epmd.names.len()),
        }
    }
}

/// A client, and its upstreams.
pub(in crate::agent) struct TakenClient {
    pub(in crate::agent) id: u64,
    pub(in crate::agent) greeted: bool,
    pub(in crate::agent) watches: HashMap<String, Vec<ServiceName>>,
    pub(in crate::agent) heartbeat: Option<Duration>,
    pub(in crate::agent) stream: UnixStream,
    pub(in crate::agent) upstreams: Vec<(String, Upstream, OwnedFd)>,
}

/// Whoever serves in the directory of `config`, when it is what `config` describes.
pub(in crate::agent) async fn find(config: &AgentConfig) -> Result<Option<Predecessor>, TakeFault> {
    let meeting = super::meet(&super::socket(&config.dir), Role::Successor).await;
    let meeting = meeting.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            error.into()
        }
        _ => TakeFault::Refused(error.to_string()),
    })?;
    let Some(Meeting { mut channel, welcome }) = meeting else {
        return Ok(None);
    };
    if let Err(text) = same(config, &welcome) {
        let _ = channel.send(&Take::Failed { text: text.clone() }, &[]).await;
        return Err(TakeFault::Refused(text));
    }
    let lock = match welcome.entry_lock {
        true => Some(channel.file()?),
        false => None,
    };
    Ok(Some(Predecessor {
        channel,
        welcome,
        lock,
    }))
}

/// What other agents and the mesh know of an agent cannot change while it runs.
fn same(config: &AgentConfig, welcome: &Welcome) -> Result<(), String> {
    let port = |seen: SocketAddr, wanted: SocketAddr| match wanted.port() {
        0 => seen.ip() == wanted.ip(),
        _ => seen == wanted,
    };
    let differs = |what: &str, seen: String, wanted: String| {
        Err(format!(
            "{what} is {seen} and would be {wanted}, which a takeover cannot change: stop the agent and start it anew"
        ))
    };
    if config.mesh.name() != welcome.mesh {
        return differs("the mesh", welcome.mesh.clone(), config.mesh.name().to_owned());
    }
    if let MeshKind::Embedded { dir } = &config.mesh {
        let wanted = dir.canonicalize().unwrap_or_else(|_| dir.clone());
        if welcome.mesh_dir.as_deref() != Some(&wanted) {
            let seen = welcome.mesh_dir.as_ref();
            let seen = seen.map_or("none".to_owned(), |dir| dir.display().to_string());
            return differs("--mesh-dir", seen, wanted.display().to_string());
        }
    }
    if !port(welcome.bind, config.bind) {
        return differs("--bind", welcome.bind.to_string(), config.bind.to_string());
    }
    let advertise = config.advertise.unwrap_or(SocketAddr::new(config.bind.ip(), 0));
    if !port(welcome.advertise, advertise) {
        return differs(
            "--advertise",
            welcome.advertise.to_string(),
            advertise.to_string(),
        );
    }
    match (welcome.http, config.http) {
        (None, None) => {}
        (Some(seen), Some(wanted)) if port(seen, wanted) => {}
        (seen, wanted) => {
            let text = |http: Option<SocketAddr>| http.map_or("off".to_owned(), |http| http.to_string());
            return differs("--http", text(seen), text(wanted));
        }
    }
    // Nodes that are registered live by what they found.
    match (&welcome.epmd, &config.epmd) {
        (None, _) => Ok(()),
        (Some(seen), Some(wanted)) if !wanted.is_at(seen.port) => {
            differs("--epmd", seen.port.to_string(), places(wanted))
        }
        (Some(seen), Some(wanted)) if !seen.addresses.is_empty() && seen.addresses != wanted.addresses() => {
            let addresses = seen
                .addresses
                .iter()
                .map(|ip| SocketAddr::new(*ip, seen.port).to_string());
            differs("--epmd", addresses.collect::<Vec<_>>().join(", "), places(wanted))
        }
        (Some(seen), Some(wanted)) if seen.host != wanted.host => {
            differs("--epmd-host", seen.host.clone(), wanted.host.clone())
        }
        (Some(_), Some(_)) => Ok(()),
        (Some(seen), None) => differs("--epmd", seen.port.to_string(), "off".to_owned()),
    }
}

fn places(epmd: &EpmdConfig) -> String {
    let places: Vec<String> = epmd.listen.iter().map(SocketAddr::to_string).collect();
    places.join(", ")
}

/// Until the mesh has given every certificate that links will need.
pub(in crate::agent) async fn prepare(
    predecessor: &mut Predecessor,
    mesh: &dyn Mesh,
) -> Result<(), TakeFault> {
    let services = &predecessor.welcome.services;
    let asking = services.iter().map(|service| async move {
        match mesh.identity(service).await {
            // A client's own token may be wanted for it, and comes with the rest.
            Ok(_) | Err(MeshError::Forbidden(_) | MeshError::Refused(_)) => Ok(()),
            Err(error) => Err(format!("no certificate for {service} yet: {error}")),
        }
    });
    let asked = timeout(CERTIFICATES_TIME, futures::future::join_all(asking)).await;
    let prepared = match asked {
        Ok(answers) => answers
            .into_iter()
            .collect::<Result<Vec<()>, String>>()
            .map(|_| ()),
        Err(_) => Err(format!(
            "the mesh did not give certificates for {} services within {} s",
            services.len(),
            CERTIFICATES_TIME.as_secs()
        )),
    };
    match prepared {
        Ok(()) => Ok(()),
        Err(text) => Err(fail(predecessor, text).await),
    }
}

/// Tells the predecessor that this process cannot serve.
pub(in crate::agent) async fn fail(predecessor: &mut Predecessor, text: String) -> TakeFault {
    let _ = predecessor
        .channel
        .send(&Take::Failed { text: text.clone() }, &[])
        .await;
    TakeFault::Refused(text)
}

/// Everything; from here on clients wait.
pub(in crate::agent) async fn receive(predecessor: &mut Predecessor) -> Result<Taken, TakeFault> {
    let channel = &mut predecessor.channel;
    channel.send(&Take::Begin, &[]).await?;
    match timeout(GIVE_TIME, receive_all(channel)).await {
        Ok(taken) => taken,
        Err(_) => Err(TakeFault::Gone(format!(
            "the predecessor did not hand over within {} s",
            GIVE_TIME.as_secs()
        ))),
    }
}

async fn next(channel: &mut Channel) -> Result<Give, TakeFault> {
    match channel.receive_late().await? {
        Some(Give::Abort { text }) => Err(TakeFault::Refused(text)),
        Some(given) => Ok(given),
        None => Err(TakeFault::Gone(
            "the predecessor closed the connection".to_owned(),
        )),
    }
}

async fn receive_all(channel: &mut Channel) -> Result<Taken, TakeFault> {
    let Give::Agent {
        made,
        next_id,
        http,
        registry,
    } = next(channel).await?
    else {
        return Err(unwanted("agent"));
    };
    let mut taken = Taken {
        made,
        next_id,
        registry,
        lock: channel.file()?,
        control: channel.file()?,
        dist: channel.file()?,
        takeover: channel.file()?,
        inbound: channel.file()?,
        http: http.then(|| channel.file()).transpose()?,
        clients: Vec::new(),
        instances: Vec::new(),
        sessions: Vec::new(),
        ports: Vec::new(),
        epmd: None,
    };
    let mut upstreams = 0;
    loop {
        match next(channel).await? {
            Give::Client {
                id,
                greeted,
                watches,
                heartbeat,
            } if taken.clients.len() < CLIENTS_MAX => {
                let stream = std::os::unix::net::UnixStream::from(channel.file()?);
                taken.clients.push(TakenClient {
                    id,
                    greeted,
                    watches,
                    heartbeat,
                    stream: UnixStream::from_std(stream)?,
                    upstreams: Vec::new(),
                });
            }
            Give::Upstream { owner, id, upstream } if upstreams < UPSTREAMS_MAX => {
                upstreams += 1;
                let file = channel.file()?;
                match taken.clients.last_mut() {
                    Some(client) if client.id == owner => client.upstreams.push((id, upstream, file)),
                    _ => return Err(unwanted("upstream of the last client")),
                }
            }
            Give::Instance(instance) if taken.instances.len() < INSTANCES_MAX => {
                let files = (0..instance.files()).map(|_| channel.file());
                let files = files.collect::<io::Result<_>>()?;
                taken.instances.push((*instance, files));
            }
            Give::Session(session) if taken.sessions.len() < INSTANCES_MAX => taken.sessions.push(session),
            Give::PlainPort { target } if taken.ports.len() < PLAIN_PORTS_MAX => {
                taken.ports.push((target, channel.file()?));
            }
            Give::Epmd(epmd) if taken.epmd.is_none() => {
                taken.epmd = Some(TakenEpmd {
                    epmd: *epmd,
                    places: Vec::new(),
                    names: Vec::new(),
                });
            }
            Give::EpmdPlace { address } => match &mut taken.epmd {
                Some(epmd) if epmd.places.len() < PLACES_MAX => {
                    epmd.places.push((address, channel.file()?));
                }
                _ => return Err(unwanted("no further place of EPMD")),
            },
            Give::EpmdName(name) => match &mut taken.epmd {
                Some(epmd) if epmd.names.len() < NAMES_MAX => epmd.names.push((name, channel.file()?)),
                _ => return Err(unwanted("no further name of EPMD")),
            },
            Give::All(counts) if counts == taken.counts(upstreams) => return Ok(taken),
            _ => {
                return Err(unwanted(
                    "further client, upstream or registration, or the right number",
                ));
            }
        }
    }
}

fn unwanted(wanted: &str) -> TakeFault {
    invalid(format!("the predecessor sent something else, wanted: {wanted}")).into()
}

/// Says that this process has everything, and waits for the word to serve. When this returns without an error, the
/// predecessor waits for [`serving`], or has ended.
pub(in crate::agent) async fn ready(predecessor: &mut Predecessor) -> Result<(), TakeFault> {
    let channel = &mut predecessor.channel;
    channel.send(&Take::Ready, &[]).await?;
    match timeout(GIVE_TIME, next(channel)).await {
        Ok(Ok(Give::Commit)) => Ok(()),
        Ok(Ok(_)) => Err(unwanted("commit")),
        Ok(Err(fault)) => Err(fault),
        Err(_) => Err(TakeFault::Gone(
            "the predecessor gave no word to serve".to_owned(),
        )),
    }
}

/// This process serves: the predecessor takes no more connections.
pub(in crate::agent) async fn serving(mut predecessor: Predecessor) {
    if let Err(error) = predecessor.channel.send(&Take::Serving, &[]).await {
        tracing::warn!(%error, "the predecessor has ended");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::os::fd::AsFd;

    use super::*;

    /// What comes of a predecessor that sends this: messages, and how many open files go with each.
    async fn received(messages: Vec<(serde_json::Value, usize)>) -> Result<Taken, String> {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut giver, mut taker) = (Channel::new(near), Channel::new(far));
        let giving = tokio::spawn(async move {
            let file = tempfile::tempfile().unwrap();
            for (message, files) in messages {
                // It is refused half way, and then nobody reads.
                let sent = giver.send(&message, &vec![file.as_fd(); files]).await;
                if sent.is_err() {
                    return;
                }
            }
        });
        let received = receive_all(&mut taker).await;
        drop(taker);
        giving.await.unwrap();
        received.map_err(|fault| match fault {
            TakeFault::Gone(text) | TakeFault::Refused(text) => text,
        })
    }

    fn agent() -> (serde_json::Value, usize) {
        let registry = serde_json::json!({"creation": 4, "services": 0});
        let agent = serde_json::json!({"made": false, "next_id": 1, "http": false, "registry": registry});
        (serde_json::json!({ "agent": agent }), 5)
    }

    fn give(name: &str, fields: serde_json::Value) -> serde_json::Value {
        serde_json::json!({ name: fields })
    }

    #[tokio::test]
    async fn a_predecessor_that_contradicts_itself_is_not_believed() {
        let all = |fields| (give("all", fields), 0);
        let port = give("plain_port", serde_json::json!({"target": "shop@h1"}));
        let place = give("epmd_place", serde_json::json!({"address": "127.0.0.1:4369"}));
        let name = serde_json::json!({"name": "shop", "uid": 0, "what": {"tool": {"request": []}}});
        let name = give("epmd_name", name);
        let upstream = serde_json::json!({"source": "web", "target": "echo", "instance": null, "via": null,
            "purpose": "Rpc", "listen": {"Uds": "/u"}, "uid": 0, "owner": 7});
        let upstream = give(
            "upstream",
            serde_json::json!({"owner": 7, "id": "u", "upstream": upstream}),
        );
        let nothing = serde_json::json!({});

        let taken = received(vec![
            agent(),
            (port.clone(), 1),
            all(serde_json::json!({"plain_ports": 1})),
        ])
        .await;
        assert_eq!(taken.unwrap().ports.len(), 1);
        for (messages, seen) in [
            (vec![all(nothing.clone())], "wanted: agent"),
            (vec![(agent().0, 4)], "an open file that did not come"),
            (vec![agent(), (port.clone(), 0)], "an open file that did not come"),
            (
                vec![agent(), (port.clone(), 1), all(nothing.clone())],
                "the right number",
            ),
            (
                vec![agent(), all(serde_json::json!({"epmd_names": 1}))],
                "the right number",
            ),
            (vec![agent(), agent()], "wanted: further client"),
            (vec![agent(), (place, 1)], "no further place of EPMD"),
            (vec![agent(), (name, 1)], "no further name of EPMD"),
            (vec![agent(), (upstream, 1)], "upstream of the last client"),
            (vec![agent()], "closed the connection"),
        ] {
            let text = received(messages).await.map(|_| "everything").unwrap_err();
            assert!(text.contains(seen), "{text}, wanted {seen}");
        }
        let many = vec![(port, 1); PLAIN_PORTS_MAX + 1];
        let text = received([vec![agent()], many].concat())
            .await
            .map(|_| ())
            .unwrap_err();
        assert!(text.contains("the right number"), "{text}");
    }
}
