//! When a node dials, and keeping connections up.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use meshx_etf::Atom;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backoff::{Attempts, Backoff};
use super::connections::is_node_name;
use super::error::ConnectError;
use super::inner::Inner;

/// When a node opens connections of its own accord. Set with [`NodeBuilder::reconnect`](super::NodeBuilder::reconnect).
///
/// ```no_run
/// use meshx::node::{Backoff, Node, Reconnect};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let node = Node::builder("bridge@h3")
///     .cookie("secret")
///     .reconnect(Reconnect::Keep(Backoff::default()))
///     .start()
///     .await?;
/// // Also when it is not there yet; until `node.disconnect("shop@h1")`.
/// if let Err(error) = node.connect("shop@h1").await {
///     eprintln!("not yet: {error}");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reconnect {
    /// Only [`Node::connect`](super::Node::connect) dials. Whatever else needs a connection that does not stand fails
    /// with [`ConnectError::NotConnected`].
    Never,
    /// Sending, monitoring, linking and calling dial as well, as in Erlang.
    #[default]
    OnDemand,
    /// As `OnDemand`; and a node that [`Node::connect`](super::Node::connect) was called for is dialled again whenever
    /// the connection to it ends or cannot be made, until [`Node::disconnect`](super::Node::disconnect).
    Keep(Backoff),
}

/// The nodes that are kept connected.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<HashMap<Atom, CancellationToken>>);

impl Kept {
    /// True when this node was not kept yet.
    fn add(&self, node: &Atom, token: &CancellationToken) -> bool {
        match self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(node.clone())
        {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(token.clone());
                true
            }
        }
    }

    pub(crate) fn remove(&self, node: &Atom) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(node);
        if let Some(token) = kept {
            token.cancel();
        }
    }
}

impl Inner {
    /// What `Node::connect` does.
    pub(crate) async fn connect_for_good(self: &Arc<Self>, node: &Atom) -> Result<(), ConnectError> {
        if *node == self.name {
            return Ok(());
        }
        let Reconnect::Keep(backoff) = self.reconnect else {
            return self.dial_or_wait(node).await.map(drop);
        };
        if !is_node_name(node.as_str()) {
            return Err(ConnectError::InvalidName(node.as_str().to_owned()));
        }
        // Before anything is waited for: it is kept also when this caller gives up.
        let token = self.stop.child_token();
        let added = self.kept.add(node, &token);
        if added {
            self.spawn(Arc::clone(self).keep(node.clone(), backoff, token));
        }
        // The attempt that `keep` begins with is the same.
        let first = self.dial_or_wait(node).await;
        if added && matches!(first, Err(ConnectError::NodeDown)) {
            self.kept.remove(node);
        }
        first.map(drop)
    }

    async fn keep(self: Arc<Self>, node: Atom, backoff: Backoff, token: CancellationToken) {
        let mut attempts = Attempts::new(backoff);
        let keeping = async {
            loop {
                // A failure is in the log; the next attempt may go better.
                if let Ok(connection) = self.dial_or_wait(&node).await {
                    let since = Instant::now();
                    connection.over().await;
                    attempts.succeeded(since.elapsed());
                }
                tokio::time::sleep(attempts.wait()).await;
            }
        };
        token.run_until_cancelled(keeping).await;
    }
}
