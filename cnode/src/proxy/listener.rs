//! Listeners: a task for each connection, and no more undecided ones than there is room for.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::admission::{Admission, Origin, Slot};
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

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>>;

    /// Who dials, as far as the connection itself tells.
    fn origin(connection: &Self::Connection) -> Origin;
}

impl Accept for TcpListener {
    type Connection = (tokio::net::TcpStream, std::net::SocketAddr);

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>> {
        Self::poll_accept(self, cx)
    }

    fn origin((_, peer): &Self::Connection) -> Origin {
        Origin::address(peer.ip())
    }
}

impl Accept for UnixListener {
    type Connection = (tokio::net::UnixStream, tokio::net::unix::SocketAddr);

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>> {
        let accepted = ready!(Self::poll_accept(self, cx))?;
        near::widen(&accepted.0);
        Poll::Ready(Ok(accepted))
    }

    fn origin((stream, _): &Self::Connection) -> Origin {
        let peer = stream.peer_cred();
        peer.map_or(Origin::UNKNOWN, |peer| Origin::user(peer.uid()))
    }
}

/// Serves `listener` until `closed`, then what it has accepted until that ends. Dropped, it ends everything.
pub(crate) async fn serve<L: Accept, F>(
    at: Listener,
    listener: Arc<L>,
    admission: Arc<Admission>,
    closed: CancellationToken,
    link: impl Fn(L::Connection, Slot) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = poll_fn(|cx| listener.poll_accept(cx)) => match accepted {
                Ok(connection) => {
                    let slot = admission.enter(L::origin(&connection));
                    tasks.spawn(link(connection, slot));
                }
                Err(error) => {
                    tracing::warn!(at = at.as_str(), %error, "a connection could not be accepted");
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

fn task_ended(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a link's task panicked: this is a bug, please report it");
    }
}
