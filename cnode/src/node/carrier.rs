//! The road to other nodes: through the agent of a mesh, or plain TCP between nodes that one EPMD knows.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::error::ConnectError;
use super::handshake::{Failure, Transport};
use super::mesh::Mesh;
use super::plain::Plain;

/// How a node reaches others and is reached.
pub(crate) enum Carrier {
    Mesh(Box<Mesh>),
    Plain(Plain),
}

/// Where connections come in. Held by the task that accepts them, so that it is closed when the node stops.
pub(crate) enum Listener {
    Mesh(UnixListener),
    Plain(TcpListener),
}

impl Listener {
    /// The next connection that comes in. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Mesh(listener) => listener.accept().await.map(|(socket, _)| Accepted::Mesh(socket)),
            Self::Plain(listener) => listener
                .accept()
                .await
                .map(|(socket, from)| Accepted::Plain(socket, from)),
        }
    }
}

/// A connection that came in. Nothing of it has been read.
pub(crate) enum Accepted {
    Mesh(UnixStream),
    Plain(TcpStream, SocketAddr),
}

impl Carrier {
    /// Opens a connection on which the handshake can begin.
    pub(crate) async fn dial(&self, node: &str, limit: Duration) -> Result<Transport, ConnectError> {
        let dialling = async {
            match self {
                Self::Mesh(mesh) => mesh.dial(node).await,
                Self::Plain(plain) => plain.dial(node).await,
            }
        };
        tokio::time::timeout(limit, dialling).await.unwrap_or_else(|_| {
            Err(ConnectError::Timeout {
                node: node.to_owned(),
                step: "opening a connection",
                after: limit,
            })
        })
    }

    /// Frees the node's name.
    pub(crate) fn release(&self) {
        match self {
            Self::Mesh(mesh) => mesh.release(),
            // The registration ends with the task that keeps it.
            Self::Plain(_) => {}
        }
    }

    /// What comes before the handshake of a connection that came in, and the name that it proves, if it does.
    pub(crate) async fn greet(
        &self,
        accepted: Accepted,
        limit: Duration,
    ) -> Result<(Transport, Option<String>), Failure> {
        match (self, accepted) {
            (Self::Mesh(mesh), Accepted::Mesh(socket)) => {
                let greeting = tokio::time::timeout(limit, mesh.greet(socket)).await;
                let (transport, node) = greeting.map_err(|_| Failure::Timeout(limit))??;
                Ok((transport, Some(node)))
            }
            (_, Accepted::Plain(socket, from)) => {
                if let Self::Plain(plain) = self
                    && plain.loopback_only
                    && !from.ip().is_loopback()
                {
                    return Err(Failure::Io(io::ErrorKind::PermissionDenied.into()));
                }
                Ok((Plain::transport(socket)?, None))
            }
            (_, Accepted::Mesh(_)) => Err(Failure::Io(io::ErrorKind::InvalidInput.into())),
        }
    }
}
