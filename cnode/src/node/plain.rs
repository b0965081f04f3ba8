//! Plain distribution: TCP without encryption, between nodes that EPMDs know.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use super::epmd::{PortError, Registrar, Registration, port_of};
use super::error::{ConnectError, StartError};
use super::handshake::Transport;

/// Addresses of one host that are tried.
const MAX_ADDRESSES: usize = 8;

/// What the builder was told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) epmd: SocketAddr,
    /// The address to listen on.
    pub(crate) listen: Option<IpAddr>,
    pub(crate) loopback_only: bool,
    /// Time for registering.
    pub(crate) limit: Duration,
}

/// A node that listens on TCP and is registered with an EPMD.
pub(crate) struct Plain {
    pub(crate) registrar: Registrar,
    pub(crate) loopback_only: bool,
    registration: Mutex<Option<Registration>>,
}

impl Plain {
    /// Listens, and registers the node. Gives the creation as well.
    pub(crate) async fn start(
        node: &str,
        hidden: bool,
        settings: Settings,
    ) -> Result<(Self, TcpListener, u32), StartError> {
        let Settings {
            epmd,
            loopback_only,
            limit,
            ..
        } = settings;
        let listen = settings.listen.unwrap_or(match epmd {
            SocketAddr::V4(_) => [127, 0, 0, 1].into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
        let at = SocketAddr::new(listen, 0);
        for addr in [epmd, at] {
            if loopback_only && !addr.ip().is_loopback() {
                return Err(StartError::NotLoopback(addr));
            }
        }
        let failed = |error| StartError::Listen {
            at: at.to_string(),
            error: Arc::new(error),
        };
        let listener = TcpListener::bind(at).await.map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let (name, _) = split(node);
        let registrar = Registrar {
            epmd,
            name: name.to_owned(),
            hidden,
            port,
            limit,
        };
        let registered = registrar.register().await;
        let (registration, creation) = registered.map_err(|reason| StartError::Registration {
            what: format!("registering {node} with the epmd at {epmd}"),
            reason,
        })?;
        let plain = Self {
            registrar,
            loopback_only,
            registration: Mutex::new(Some(registration)),
        };
        Ok((plain, listener, creation))
    }

    /// What the task that keeps the registration holds from then on.
    pub(crate) fn take_registration(&self) -> Option<Registration> {
        self.registration
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Asks an EPMD for the node's port, and connects to it.
    pub(crate) async fn dial(&self, node: &str) -> Result<Transport, ConnectError> {
        let io = |step| {
            move |error: std::io::Error| ConnectError::Io {
                node: node.to_owned(),
                step,
                error: Arc::new(error),
            }
        };
        let (name, host) = split(node);
        let epmds = if self.loopback_only {
            vec![self.registrar.epmd]
        } else {
            let found = tokio::net::lookup_host((host, self.registrar.epmd.port())).await;
            found
                .map_err(io("looking up the host"))?
                .take(MAX_ADDRESSES)
                .collect()
        };
        let mut error = None;
        for epmd in epmds {
            let port = match port_of(epmd, name).await {
                Ok(Some(port)) => port,
                Ok(None) => {
                    let node = node.to_owned();
                    error = Some(ConnectError::NoSuchNode { node, epmd });
                    continue;
                }
                Err(PortError::Connect(failed)) => {
                    error = Some(io("connecting to the epmd")(failed));
                    continue;
                }
                Err(PortError::Ask(text)) => {
                    let (node, text) = (node.to_owned(), format!("asking the epmd at {epmd}: {text}"));
                    error = Some(ConnectError::Protocol { node, text });
                    continue;
                }
            };
            let connected = TcpStream::connect(SocketAddr::new(epmd.ip(), port)).await;
            match connected.and_then(Self::transport) {
                Ok(transport) => return Ok(transport),
                Err(failed) => error = Some(io("connecting")(failed)),
            }
        }
        Err(error.unwrap_or_else(|| io("looking up the host")(std::io::ErrorKind::NotFound.into())))
    }

    pub(crate) fn transport(socket: TcpStream) -> std::io::Result<Transport> {
        // Messages are joined before they are written; waiting for more would only delay them.
        socket.set_nodelay(true)?;
        let (read, write) = socket.into_split();
        Ok(Transport {
            read: Box::new(read),
            write: Box::new(write),
            identity: None,
            link: None,
        })
    }
}

/// The two parts of a node name, which has been checked.
fn split(node: &str) -> (&str, &str) {
    node.split_once('@').unwrap_or((node, ""))
}
