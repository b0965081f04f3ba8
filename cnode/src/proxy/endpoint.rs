//! From the agent to an instance on its own host.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
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
                    let stream = connect_socket(local, path).await?;
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

/// Connects to a Unix socket. In the agent's directories each user makes his own, and may put a symbolic link there
/// instead at any time; the agent may go where he may not. So for others than its own user and root, what is looked at
/// and what is connected to are one open file: a socket of theirs.
async fn connect_socket(local: &LocalInstance, path: &Path) -> Result<UnixStream, Refusal> {
    let away = |error: io::Error| away(local, &error);
    if local.uid == 0 || local.uid == rustix::process::geteuid().as_raw() {
        return UnixStream::connect(path).await.map_err(away);
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = open(path, flags, Mode::empty()).map_err(|error| away(error.into()))?;
    let found = fstat(&socket).map_err(|error| away(error.into()))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(Cause::NotPermitted.because(format!(
            "{path:?} of {} is no socket of uid {}",
            local.instance.id, local.uid
        )));
    }
    owned(local, found.st_uid)?;
    let connected = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await;
    connected.map_err(|error| match error.kind() {
        // The socket is there, so it is this that is not.
        io::ErrorKind::NotFound => away(io::Error::other(format!(
            "the sockets of uid {} are reached by /proc, which is not mounted here",
            local.uid
        ))),
        _ => away(error),
    })
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
    use std::os::unix::fs::{chown, symlink};

    use tokio::net::{TcpListener, TcpSocket, UnixListener};

    use super::*;
    use crate::mesh::{Instance, Protocol, ServiceName};
    use crate::proxy::local::Secret;

    const STRANGER: u32 = 4711;

    fn service_of(uid: u32) -> LocalInstance {
        LocalInstance {
            instance: Instance {
                id: "shop-1".into(),
                service: ServiceName::new("shop").unwrap(),
                node: None,
                agent: "h1".into(),
                address: "127.0.0.1:1".parse().unwrap(),
                protocol: Protocol::Meshx,
                meta: Default::default(),
            },
            secret: Secret::generate().unwrap(),
            endpoint: Endpoint::Uds("/none".into()),
            owner: 1,
            uid,
            sidecar: None,
        }
    }

    #[tokio::test]
    async fn a_user_has_nobody_led_to_a_socket_that_is_not_his() {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes a socket of another user: run it as root"
        );
        let temp = tempfile::tempdir().unwrap();
        let (own, link, roots) = (
            temp.path().join("own"),
            temp.path().join("link"),
            temp.path().join("roots"),
        );
        let (his, ours) = (
            UnixListener::bind(&own).unwrap(),
            UnixListener::bind(&roots).unwrap(),
        );
        chown(&own, Some(STRANGER), None).unwrap();
        symlink(&roots, &link).unwrap();
        let file = temp.path().join("file");
        std::fs::write(&file, "").unwrap();
        let stranger = service_of(STRANGER);
        let connect = async |local: &LocalInstance, path: &Path| connect_socket(local, path).await.map(drop);

        connect(&stranger, &own).await.unwrap();
        his.accept().await.unwrap();
        for path in [&link, &roots, &file] {
            let refusal = connect(&stranger, path).await.unwrap_err();
            assert_eq!(refusal.cause, Cause::NotPermitted, "{path:?}: {}", refusal.text);
        }
        let none = connect(&stranger, &temp.path().join("none")).await.unwrap_err();
        assert_eq!(none.cause, Cause::Unreachable);
        // Nothing has come to it but this one, of root's own.
        connect(&service_of(0), &link).await.unwrap();
        ours.accept().await.unwrap();
        assert!(futures::FutureExt::now_or_never(ours.accept()).is_none());
    }

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
