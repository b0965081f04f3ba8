//! Listeners: a task for each connection, and no more undecided ones than there is room for.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, unix};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::admission::{Admission, Origin, Slot};
use super::lanes::Lanes;
use super::near;

/// Pause after a failed accept: descriptors that ran out come back when links end.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Where connections come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// The inbound port, and those of single instances: other agents and foreign proxies.
    Inbound,
    /// The dist socket: nodes of this agent.
    Dist,
    /// Upstreams: programs of this host.
    Upstream,
    /// Behind a sidecar of another make.
    Unverified,
    /// Loopback ports that lead nodes of plain distribution to others.
    Plain,
    /// EPMD's port.
    Epmd,
}

impl Listener {
    /// All of them, in the order of their declaration.
    pub const ALL: &'static [Self] = &[
        Self::Inbound,
        Self::Dist,
        Self::Upstream,
        Self::Unverified,
        Self::Plain,
        Self::Epmd,
    ];

    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Dist => "dist",
            Self::Upstream => "upstream",
            Self::Unverified => "unverified",
            Self::Plain => "plain",
            Self::Epmd => "epmd",
        }
    }

    /// Position in [`Listener::ALL`].
    pub(super) fn index(self) -> usize {
        self as usize
    }
}

/// What connections are taken from.
pub(crate) trait Accept {
    /// A connection and its peer.
    type Connection;

    /// The same on its way to another runtime.
    type Parcel: Send + 'static;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>>;

    /// Takes a connection out of this runtime.
    fn pack(connection: Self::Connection) -> io::Result<Self::Parcel>;

    /// Puts it into this one.
    fn unpack(parcel: Self::Parcel) -> io::Result<Self::Connection>;

    /// Who dials, as far as the connection itself tells.
    fn origin(connection: &Self::Connection) -> Origin;
}

impl Accept for TcpListener {
    type Connection = (TcpStream, SocketAddr);
    type Parcel = (std::net::TcpStream, SocketAddr);

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>> {
        Self::poll_accept(self, cx)
    }

    fn pack((stream, peer): Self::Connection) -> io::Result<Self::Parcel> {
        Ok((stream.into_std()?, peer))
    }

    fn unpack((stream, peer): Self::Parcel) -> io::Result<Self::Connection> {
        Ok((TcpStream::from_std(stream)?, peer))
    }

    fn origin((_, peer): &Self::Connection) -> Origin {
        Origin::address(peer.ip())
    }
}

impl Accept for UnixListener {
    type Connection = (UnixStream, unix::SocketAddr);
    type Parcel = (std::os::unix::net::UnixStream, unix::SocketAddr);

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>> {
        let accepted = ready!(Self::poll_accept(self, cx))?;
        near::widen(&accepted.0);
        Poll::Ready(Ok(accepted))
    }

    fn pack((stream, peer): Self::Connection) -> io::Result<Self::Parcel> {
        Ok((stream.into_std()?, peer))
    }

    fn unpack((stream, peer): Self::Parcel) -> io::Result<Self::Connection> {
        Ok((UnixStream::from_std(stream)?, peer))
    }

    fn origin((stream, _): &Self::Connection) -> Origin {
        let peer = stream.peer_cred();
        peer.map_or(Origin::UNKNOWN, |peer| Origin::user(peer.uid()))
    }
}

/// Serves `listener` until `closed`, then what it has accepted until that ends; each connection on one of `lanes`.
/// Dropped, it ends everything.
pub(crate) async fn serve<L: Accept, F>(
    at: Listener,
    listener: Arc<L>,
    admission: Arc<Admission>,
    closed: CancellationToken,
    lanes: &Lanes,
    link: impl Fn(L::Connection, Slot) -> F + Clone + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = poll_fn(|cx| listener.poll_accept(cx)) => match accepted {
                Ok(connection) => {
                    let slot = admission.enter(L::origin(&connection));
                    let Some(place) = lanes.take() else {
                        tasks.spawn(link(connection, slot));
                        continue;
                    };
                    let (parcel, link) = (L::pack(connection), link.clone());
                    let lane = place.runtime().clone();
                    let there = async move {
                        let _place = place;
                        let link = match parcel.and_then(L::unpack) {
                            Ok(connection) => link(connection, slot),
                            Err(error) => return not_accepted(at, &error),
                        };
                        link.await;
                    };
                    tasks.spawn_on(there, &lane);
                }
                Err(error) => {
                    not_accepted(at, &error);
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            },
            Some(ended) = tasks.join_next() => task_ended(ended),
            () = closed.cancelled() => break,
        }
    }
    drop(listener);
    while let Some(ended) = tasks.join_next().await {
        task_ended(ended);
    }
}

fn not_accepted(at: Listener, error: &io::Error) {
    tracing::warn!(at = at.as_str(), %error, "a connection could not be accepted");
}

fn task_ended(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a link's task panicked: this is a bug, please report it");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Answers with the name of the thread it runs on, and stays.
    async fn name_thread(mut stream: impl tokio::io::AsyncWrite + Unpin, slot: Slot) {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        stream
            .write_all(&[thread.as_bytes(), b"\n"].concat())
            .await
            .unwrap();
        slot.evicted().await;
    }

    async fn read_line(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            line.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(line).unwrap()
    }

    #[tokio::test]
    async fn connections_are_served_on_a_lane_and_end_with_their_listener() {
        let lanes = Lanes::new(1, Duration::ZERO).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(dir.path().join("s")).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = UnixStream::connect(dir.path().join("s")).await.unwrap();
        let mut far = TcpStream::connect(tcp.local_addr().unwrap()).await.unwrap();
        let closed = CancellationToken::new();
        let both = {
            let (lanes, closed) = (lanes.clone(), closed.clone());
            tokio::spawn(async move {
                let [one, other] = [(); 2].map(|()| Admission::new(4));
                let unix = serve(
                    Listener::Dist,
                    Arc::new(unix),
                    one,
                    closed.clone(),
                    &lanes,
                    |(s, _), slot| name_thread(s, slot),
                );
                let tcp = serve(
                    Listener::Inbound,
                    Arc::new(tcp),
                    other,
                    closed,
                    &lanes,
                    |(s, _), slot| name_thread(s, slot),
                );
                tokio::join!(unix, tcp)
            })
        };
        assert_eq!(read_line(&mut near).await, "meshx-links-0\n");
        assert_eq!(read_line(&mut far).await, "meshx-links-0\n");
        both.abort();
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
    }
}
