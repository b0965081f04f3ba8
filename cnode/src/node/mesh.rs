//! The road through an agent: registration over the control socket, links over Unix sockets.

use std::fs::{Permissions, remove_file, set_permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshx_etf::Term;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::backoff::{Attempts, Backoff};
use super::carrier::Carrier;
use super::error::{ConnectError, StartError};
use super::event::DownReason;
use super::handshake::{Failure, Transport};
use super::inner::Inner;
use crate::agent::client::{ClientError, ControlClient, Event};
use crate::agent::control::message::{map, text};
use crate::proxy::links::LinkId;
use crate::proxy::local::{SECRET_LEN, Secret};
use crate::proxy::wire::{Accept, Connect, ConnectReply, MAX_DIST_FRAME};

/// How an agent that is gone is looked for.
const RETRY: Backoff = Backoff {
    min: Duration::from_millis(200),
    max: Duration::from_secs(1),
};

/// A node that an agent carries.
pub(crate) struct Mesh {
    node: String,
    hidden: bool,
    agent_dir: Option<PathBuf>,
    socket: PathBuf,
    registration: Mutex<Registration>,
    /// Events of the first registration, until [`keep`] takes them.
    events: Mutex<Option<mpsc::Receiver<Event>>>,
}

/// What the agent gave.
struct Registration {
    /// Open for as long as the node is registered.
    control: Option<ControlClient>,
    dist_socket: PathBuf,
    secret: Secret,
    creation: u32,
}

impl Mesh {
    /// Registers with the agent, and gives the node's creation as well.
    pub(crate) async fn start(
        node: &str,
        hidden: bool,
        agent_dir: Option<&Path>,
    ) -> Result<(Self, UnixListener, u32), StartError> {
        let registering = |error: ClientError| StartError::Registration {
            what: format!("registering {node} with the agent"),
            reason: error.to_string(),
        };
        let control = ControlClient::connect(agent_dir).await.map_err(registering)?;
        let socket = control.hello().vm_dir.join(socket_name()?);
        let listen = |error| StartError::Listen {
            at: socket.display().to_string(),
            error: Arc::new(error),
        };
        let listener = UnixListener::bind(&socket).map_err(listen)?;
        // The directory lets nobody else in; this holds should somebody loosen it.
        set_permissions(&socket, Permissions::from_mode(0o600)).map_err(listen)?;
        let (registration, events) = match register(control, node, hidden, &socket, None).await {
            Ok(registered) => registered,
            Err(error) => {
                let _ = remove_file(&socket);
                return Err(registering(error));
            }
        };
        let creation = registration.creation;
        let mesh = Self {
            node: node.to_owned(),
            hidden,
            agent_dir: agent_dir.map(Path::to_path_buf),
            socket,
            registration: Mutex::new(registration),
            events: Mutex::new(Some(events)),
        };
        Ok((mesh, listener, creation))
    }

    /// Reads the agent's `ACCEPT`. Gives the node that the agent vouches for.
    pub(crate) async fn greet(&self, mut socket: UnixStream) -> Result<(Transport, String), Failure> {
        let frame = read_frame(&mut socket).await?;
        let frame = Accept::decode(&frame).map_err(|error| Failure::Greeting(error.to_string()))?;
        // Compared in constant time, see `Secret`.
        if frame.secret != self.registration().secret {
            return Err(Failure::Greeting(
                "the agent's secret is not this node's".to_owned(),
            ));
        }
        let transport = transport(socket, frame.remote_spiffe, frame.link);
        Ok((transport, frame.remote_node))
    }

    pub(crate) async fn dial(&self, node: &str) -> Result<Transport, ConnectError> {
        let io = |step| {
            move |error: io::Error| ConnectError::Io {
                node: node.to_owned(),
                step,
                error: Arc::new(error),
            }
        };
        let protocol = |text: String| ConnectError::Protocol {
            node: node.to_owned(),
            text,
        };
        let mut link = LinkId([0; 16]);
        getrandom::fill(&mut link.0).map_err(|error| protocol(error.to_string()))?;
        let (dist_socket, secret) = {
            let registration = self.registration();
            (registration.dist_socket.clone(), registration.secret.clone())
        };
        let mut socket = UnixStream::connect(dist_socket)
            .await
            .map_err(io("connecting to the agent"))?;
        let mut connect = Vec::new();
        Connect {
            link,
            secret,
            target: node.to_owned(),
        }
        .encode(&mut connect);
        socket.write_all(&connect).await.map_err(io("asking the agent"))?;
        let reply = read_frame(&mut socket)
            .await
            .map_err(io("reading the agent's answer"))?;
        match ConnectReply::decode(&reply).map_err(|error| protocol(error.to_string()))? {
            ConnectReply::Ok { remote_spiffe, .. } => Ok(transport(socket, remote_spiffe, link)),
            ConnectReply::Refused(refusal) => Err(ConnectError::Refused {
                node: node.to_owned(),
                cause: refusal.cause.as_str().to_owned(),
                text: refusal.text,
            }),
        }
    }

    /// Frees the name.
    pub(crate) fn release(&self) {
        self.registration().control = None;
        let _ = remove_file(&self.socket);
    }

    /// Held for short, synchronous sections only.
    fn registration(&self) -> MutexGuard<'_, Registration> {
        self.registration.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_events(&self) -> Option<mpsc::Receiver<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Registers again, with the running creation, as after an agent's restart.
    async fn register_again(&self) -> Result<mpsc::Receiver<Event>, ClientError> {
        let control = ControlClient::connect(self.agent_dir.as_deref()).await?;
        let (creation, secret) = {
            let registration = self.registration();
            (registration.creation, registration.secret.clone())
        };
        let before = Some((creation, secret));
        let (registration, events) = register(control, &self.node, self.hidden, &self.socket, before).await?;
        if registration.creation != creation {
            return Err(ClientError::Protocol(format!(
                "the agent gave creation {}, wanted the running one, {creation}",
                registration.creation
            )));
        }
        *self.registration() = registration;
        Ok(events)
    }
}

/// Does what the agent asks for, and registers again whenever the agent was away.
pub(crate) async fn keep(inner: Arc<Inner>) {
    let Carrier::Mesh(mesh) = &inner.carrier else {
        return;
    };
    let Some(mut events) = mesh.take_events() else {
        return;
    };
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = inner.stop.cancelled() => return,
        };
        match event {
            Some(event) if event.name == "cut" => cut(&inner, &event.args),
            Some(event) => tracing::warn!(event = event.name, args = %event.args, "the agent says"),
            None => {
                tracing::warn!("the agent is gone, looking for it again");
                tokio::select! {
                    again = again(mesh) => events = again,
                    () = inner.stop.cancelled() => return,
                }
            }
        }
    }
}

async fn again(mesh: &Mesh) -> mpsc::Receiver<Event> {
    // Spread out, so that a host's nodes do not all come at once.
    let mut attempts = Attempts::new(RETRY);
    loop {
        tokio::time::sleep(attempts.wait()).await;
        match mesh.register_again().await {
            Ok(events) => {
                tracing::info!("registered with the agent again");
                return events;
            }
            Err(error) => tracing::warn!(%error, "no agent yet"),
        }
    }
}

fn cut(inner: &Inner, args: &Term) {
    let link = args
        .map_get("link")
        .and_then(Term::as_binary)
        .and_then(|b| b.try_into().ok())
        .map(LinkId);
    let word = |key: &str| {
        let value = args.map_get(key);
        let value = value.and_then(|v| v.as_str().or_else(|| v.as_atom()));
        value.unwrap_or_default().to_owned()
    };
    let reason = DownReason::Cut {
        cause: word("cause"),
        text: word("text"),
    };
    for connection in inner.connections.all() {
        if link.is_some() && connection.link == link {
            connection.close(reason.clone());
        }
    }
}

async fn register(
    control: ControlClient,
    node: &str,
    hidden: bool,
    socket: &Path,
    before: Option<(u32, Secret)>,
) -> Result<(Registration, mpsc::Receiver<Event>), ClientError> {
    let events = control.events();
    let path = socket
        .to_str()
        .ok_or_else(|| ClientError::Request(format!("the path {} is not utf-8", socket.display())))?;
    let common = [
        ("node", text(node)),
        ("socket", text(path)),
        ("hidden", Term::from(hidden)),
    ];
    let [a, b, c] = common;
    let args = match before {
        Some((creation, secret)) => {
            let creation = ("creation", Term::from(creation));
            map([a, b, c, creation, ("secret", Term::binary(*secret.expose()))])
        }
        None => map([a, b, c]),
    };
    let answer = control.request("register_node", args).await?;
    let missing = |what: &str| ClientError::Protocol(format!("the answer to register_node has no {what}"));
    let creation = answer.map_get("creation").and_then(Term::as_int);
    let creation = creation
        .and_then(|c| u32::try_from(c).ok())
        .ok_or_else(|| missing("creation"))?;
    let secret = answer.map_get("secret").and_then(Term::as_binary);
    let secret = secret
        .and_then(|s| <[u8; SECRET_LEN]>::try_from(s).ok())
        .map(Secret::from_bytes);
    let secret = secret.ok_or_else(|| missing("secret of 32 bytes"))?;
    let dist_socket = control.hello().dist_socket.clone();
    Ok((
        Registration {
            control: Some(control),
            dist_socket,
            secret,
            creation,
        },
        events,
    ))
}

fn socket_name() -> Result<String, StartError> {
    let random = getrandom::u64().map_err(|error| StartError::Random(error.to_string()))?;
    Ok(format!("n-{random:016x}.sock"))
}

fn transport(socket: UnixStream, spiffe: String, link: LinkId) -> Transport {
    let (read, write) = socket.into_split();
    Transport {
        read: Box::new(read),
        write: Box::new(write),
        // Empty: a sidecar is between, and the agent cannot tell who is there.
        identity: Some(spiffe).filter(|spiffe| !spiffe.is_empty()),
        link: Some(link),
    }
}

/// One `{packet, 2}` frame, and no byte more: the handshake follows.
async fn read_frame(socket: &mut UnixStream) -> io::Result<Vec<u8>> {
    let len = usize::from(socket.read_u16().await?);
    if len > MAX_DIST_FRAME {
        let text = format!("frame of {len} bytes announced, at most {MAX_DIST_FRAME} are taken");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut frame = vec![0; len];
    socket.read_exact(&mut frame).await?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn what_nothing_proves_is_no_identity() {
        for (spiffe, identity) in [("", None), ("spiffe://x", Some("spiffe://x"))] {
            let (socket, _) = UnixStream::pair().unwrap();
            let transport = transport(socket, spiffe.to_owned(), LinkId([1; 16]));
            assert_eq!(transport.identity.as_deref(), identity);
        }
    }
}
