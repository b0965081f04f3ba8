//! From the agent to an instance on its own host.

use std::io;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::cause::{Cause, Refusal};
use super::frames::Duplex;
use super::links::LinkId;
use super::local::{Endpoint, LocalInstance};
use super::wire::Accept;
use super::{Proxy, near, peer_uid};
use crate::mesh::SpiffeId;

impl Proxy {
    /// Connects to an instance of this agent. Whoever listens on its Unix socket must be the user that
    /// registered it: a node is sent its secret next. One that hangs would only take the connection, and never
    /// read it.
    pub(super) async fn reach(&self, local: &LocalInstance) -> Result<Box<dyn Duplex>, Refusal> {
        if self.local.is_hung(local) {
            return Err(Cause::Unreachable.because(format!(
                "{} does not answer its agent: its VM hangs or is stopped",
                local.instance.id
            )));
        }
        let connect = async {
            let stream: Box<dyn Duplex> = match &local.endpoint {
                Endpoint::NodeSocket(path) | Endpoint::Uds(path) => {
                    let stream = UnixStream::connect(path)
                        .await
                        .map_err(|error| away(local, &error))?;
                    near::widen(&stream);
                    owned(
                        local,
                        stream.peer_cred().map_err(|error| away(local, &error))?.uid(),
                    )?;
                    Box::new(stream)
                }
                Endpoint::Tcp(address) | Endpoint::PlainNode(address) => {
                    let stream = TcpStream::connect(address)
                        .await
                        .and_then(not_itself)
                        .map_err(|error| away(local, &error))?;
                    near::hasten(&stream).map_err(|error| away(local, &error))?;
                    if local.endpoint.is_node() {
                        // Once the node has ended anybody on this host can have its port.
                        owned(local, peer_uid::of_server(&stream).await?)?;
                    }
                    Box::new(stream)
                }
            };
            Ok(stream)
        };
        match timeout(self.settings.connect_timeout, connect).await {
            Ok(connected) => connected,
            Err(_) => Err(Cause::Unreachable.because(format!(
                "{} took no connection for {:?}",
                local.instance.id, self.settings.connect_timeout
            ))),
        }
    }
}

/// Refuses a connection that is its own other end. Where nobody listens the kernel may choose the very port that is
/// dialled, and whatever is sent comes back.
pub(super) fn not_itself(stream: TcpStream) -> io::Result<TcpStream> {
    match stream.local_addr()? == stream.peer_addr()? {
        true => Err(io::ErrorKind::ConnectionRefused.into()),
        false => Ok(stream),
    }
}

fn owned(local: &LocalInstance, uid: u32) -> Result<(), Refusal> {
    if uid == local.uid {
        return Ok(());
    }
    Err(Cause::NotPermitted.because(format!(
        "uid {uid} listens for {}, wanted {}",
        local.instance.id, local.uid
    )))
}

/// The frame that proves the agent to a node and says who dials it; `remote` is none when nothing proves that. A node of
/// plain distribution gets none.
pub(super) fn accept_frame(
    local: &LocalInstance,
    link: LinkId,
    remote_node: &str,
    remote: Option<&SpiffeId>,
    remote_agent: &str,
) -> Vec<u8> {
    let mut frame = Vec::new();
    if matches!(local.endpoint, Endpoint::PlainNode(_)) {
        return frame;
    }
    Accept {
        link,
        secret: local.secret.clone(),
        remote_node: remote_node.to_owned(),
        remote_spiffe: remote.map(ToString::to_string).unwrap_or_default(),
        remote_agent: remote_agent.to_owned(),
    }
    .encode(&mut frame);
    frame
}

fn away(local: &LocalInstance, error: &io::Error) -> Refusal {
    Cause::Unreachable.because(format!(
        "{} does not take connections: {error}",
        local.instance.id
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    #[tokio::test]
    async fn a_connection_with_itself_is_none() {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let own = socket.local_addr().unwrap();
        let itself = socket.connect(own).await.unwrap();
        assert_eq!(
            not_itself(itself).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        assert!(not_itself(stream).is_ok());
    }
}
