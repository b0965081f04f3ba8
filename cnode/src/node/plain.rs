//! Plain distribution: TCP without encryption, between nodes that one EPMD knows.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use erl_dist::epmd::{EpmdClient, NodeEntry};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use super::error::{ConnectError, StartError};
use super::handshake::Transport;

/// A node that listens on TCP and is registered with an EPMD.
pub(crate) struct Plain {
    epmd: SocketAddr,
    pub(crate) listener: TcpListener,
    pub(crate) loopback_only: bool,
    /// Registered for as long as this is open.
    registration: Mutex<Option<Compat<TcpStream>>>,
}

impl Plain {
    /// Listens on the EPMD's address and registers the node there. Gives the creation as well.
    pub(crate) async fn start(
        node: &str,
        hidden: bool,
        epmd: SocketAddr,
        loopback_only: bool,
    ) -> Result<(Self, u32), StartError> {
        if loopback_only && !epmd.ip().is_loopback() {
            return Err(StartError::NotLoopback(epmd));
        }
        let at = || SocketAddr::new(epmd.ip(), 0);
        let listen = |error| StartError::Listen {
            at: at().to_string(),
            error: Arc::new(error),
        };
        let listener = TcpListener::bind(at()).await.map_err(listen)?;
        let port = listener.local_addr().map_err(listen)?.port();
        let failed = |reason: String| StartError::Registration {
            what: format!("registering {node} with the epmd at {epmd}"),
            reason,
        };
        let name = node.split('@').next().unwrap_or_default();
        let entry = if hidden {
            NodeEntry::new_hidden(name, port)
        } else {
            NodeEntry::new(name, port)
        };
        let socket = TcpStream::connect(epmd)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let registering = EpmdClient::new(socket.compat()).register(entry);
        let (registration, creation) = registering.await.map_err(|error| failed(error.to_string()))?;
        let plain = Self {
            epmd,
            listener,
            loopback_only,
            registration: Mutex::new(Some(registration)),
        };
        Ok((plain, creation.get()))
    }

    /// Frees the name.
    pub(crate) fn release(&self) {
        *self.registration.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Asks the EPMD for the node's port, and connects to it on the EPMD's host.
    pub(crate) async fn dial(&self, node: &str) -> Result<Transport, ConnectError> {
        let io = |step| {
            move |error: std::io::Error| ConnectError::Io {
                node: node.to_owned(),
                step,
                error: Arc::new(error),
            }
        };
        let name = node.split('@').next().unwrap_or_default();
        let socket = TcpStream::connect(self.epmd)
            .await
            .map_err(io("connecting to the epmd"))?;
        let asked = EpmdClient::new(socket.compat()).get_node(name).await;
        let entry = asked.map_err(|error| ConnectError::Protocol {
            node: node.to_owned(),
            text: format!("asking the epmd: {error}"),
        })?;
        let Some(entry) = entry else {
            return Err(ConnectError::NoSuchNode {
                node: node.to_owned(),
                epmd: self.epmd,
            });
        };
        let at = SocketAddr::new(self.epmd.ip(), entry.port);
        let socket = TcpStream::connect(at).await.map_err(io("connecting"))?;
        Self::transport(socket).map_err(io("connecting"))
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
