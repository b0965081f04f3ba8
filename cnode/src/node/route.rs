//! A way to one receiver that is looked up and encoded once.

use std::sync::Arc;

use meshx_dist::link::Prepared;
use meshx_etf::{Pid, Term};

use super::address::Address;
use super::connection::Connection;
use super::error::SendError;
use super::inner::{Alive, Inner, queue_prepared};
use super::wire;

/// For many messages from one [`Mailbox`](super::Mailbox) to one receiver: sending by it costs less than
/// [`Mailbox::send`](super::Mailbox::send), and does the same. Messages of both ways stay in order.
///
/// ```no_run
/// # use meshx::node::{Node, SendError};
/// # use meshx_etf::Term;
/// # async fn example(node: Node) -> Result<(), SendError> {
/// let mailbox = node.mailbox();
/// let mut route = mailbox.route(("metrics", "shop@h1"));
/// for value in 0..1_000_000 {
///     route.send(&Term::Int(value)).await?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct Route {
    inner: Arc<Inner>,
    /// Keeps the node up, as the mailbox does.
    _alive: Option<Arc<Alive>>,
    from: Pid,
    to: Address,
    ready: Option<(Arc<Connection>, Prepared)>,
}

impl Route {
    pub(crate) fn new(inner: Arc<Inner>, alive: Option<Arc<Alive>>, from: Pid, to: Address) -> Self {
        Self {
            inner,
            _alive: alive,
            from,
            to,
            ready: None,
        }
    }

    /// Sends a message, connecting first if need be. Waits while the connection has no room for it.
    ///
    /// # Errors
    /// [`SendError`]. A process that does not exist is no error, as in Erlang.
    pub async fn send(&mut self, term: &Term) -> Result<(), SendError> {
        if self.to.node() == &self.inner.name {
            return self.inner.send(&self.from, &self.to, term).await;
        }
        let origin = Some((self.from.id, self.from.serial));
        if let Some((connection, control)) = &self.ready
            && !connection.is_over()
        {
            return queue_prepared(connection, origin, control, term).await;
        }
        let connection = self.inner.connect(self.to.node()).await?;
        let control = Prepared::new(wire::send(connection.flags, &self.from, &self.to));
        let control = control.map_err(|error| SendError::Term(error.to_string()))?;
        let (connection, control) = self.ready.insert((connection, control));
        queue_prepared(connection, origin, control, term).await
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Route({:?} -> {})", self.from, self.to)
    }
}
