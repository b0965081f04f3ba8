//! How a node is described and started.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use meshx_dist::flags::DistFlags;
use meshx_dist::handshake::{Cookie, LocalNode};
use meshx_etf::Atom;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Node;
use super::buffers::Buffers;
use super::carrier::{Carrier, Listener};
use super::connections::{Connections, is_node_name};
use super::error::StartError;
use super::exposed::Exposed;
use super::inner::{Alive, Inner};
use super::limits::Limits;
use super::mailbox::Mailbox;
use super::mesh::Mesh;
use super::net_kernel::NetKernel;
use super::plain::{self, Plain};
use super::policy::{Kept, Reconnect};
use super::process::Processes;
use super::rex;
use super::server;
use super::watch::Watch;

/// Events that wait for one slow listener; older ones are lost to it.
const EVENTS: usize = 1024;

/// Describes a node. See [`Node::builder`].
#[derive(Debug, Clone)]
pub struct NodeBuilder {
    name: String,
    cookie: Option<Secret>,
    hidden: bool,
    agent_dir: Option<PathBuf>,
    plain_epmd: Option<SocketAddr>,
    listen: Option<IpAddr>,
    beyond_loopback: bool,
    reconnect: Reconnect,
    net_ticktime: Duration,
    tick_interval: Option<Duration>,
    limits: Limits,
}

/// Not shown by `Debug`.
#[derive(Clone)]
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl NodeBuilder {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            cookie: None,
            hidden: true,
            agent_dir: None,
            plain_epmd: None,
            listen: None,
            beyond_loopback: false,
            reconnect: Reconnect::default(),
            net_ticktime: Duration::from_secs(60),
            tick_interval: None,
            limits: Limits::default(),
        }
    }

    /// The cookie that all nodes of a cluster share. Required. It keeps clusters apart; what keeps strangers out is
    /// the mesh.
    #[must_use]
    pub fn cookie(mut self, cookie: impl Into<String>) -> Self {
        self.cookie = Some(Secret(cookie.into()));
        self
    }

    /// Whether the node is hidden: not in `nodes()`, and not part of `global`. Default true, which suits a node
    /// that is not a BEAM: `global` would wait for a process that this node does not have.
    #[must_use]
    pub fn hidden(mut self, hidden: bool) -> Self {
        self.hidden = hidden;
        self
    }

    /// The agent's directory. Default: `$MESHX_DIR`, `$XDG_RUNTIME_DIR/meshx`, `/tmp/meshx-UID`.
    #[must_use]
    pub fn agent_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.agent_dir = Some(dir.into());
        self
    }

    /// Joins without a mesh: plain, unencrypted TCP on loopback, between nodes that this EPMD knows. The node listens
    /// on a port that the system chooses, registers it, and registers again whenever that EPMD was away. Every name is
    /// looked up at this EPMD, whatever its host part.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), meshx::node::StartError> {
    /// let epmd = ([127, 0, 0, 1], 4369).into();
    /// let node = meshx::node::Node::builder("search@127.0.0.1")
    ///     .cookie("secret")
    ///     .plain_epmd(epmd)
    ///     .start()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn plain_epmd(mut self, epmd: SocketAddr) -> Self {
        self.plain_epmd = Some(epmd);
        self
    }

    /// The address that a node of [`NodeBuilder::plain_epmd`] listens on. Default: loopback.
    #[must_use]
    pub fn plain_listen(mut self, address: IpAddr) -> Self {
        self.listen = Some(address);
        self
    }

    /// Lets [`NodeBuilder::plain_epmd`] and [`NodeBuilder::plain_listen`] leave loopback. Other nodes are then looked
    /// up as OTP does it: at the EPMD of the host that their name says, on the same port as this node's EPMD.
    ///
    /// Whoever is on the network can then read all, and whoever guesses the cookie can run code on every BEAM.
    #[must_use]
    pub fn insecure_plain_beyond_loopback(mut self) -> Self {
        self.beyond_loopback = true;
        self
    }

    /// When the node dials of its own accord. Default: [`Reconnect::OnDemand`].
    #[must_use]
    pub fn reconnect(mut self, reconnect: Reconnect) -> Self {
        self.reconnect = reconnect;
        self
    }

    /// A peer that sends nothing for this long is down. Default 60 s, as in OTP; set the same on all nodes.
    #[must_use]
    pub fn net_ticktime(mut self, time: Duration) -> Self {
        self.net_ticktime = time;
        self
    }

    /// How long this node may be silent before it sends a tick: at most a quarter of the tick time, which is the
    /// default.
    #[must_use]
    pub fn tick_interval(mut self, interval: Duration) -> Self {
        self.tick_interval = Some(interval);
        self
    }

    /// Bounds on what peers control.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Largest message that is taken or sent, in bytes: [`Limits::message_bytes`], default 128 MiB. Whatever goes
    /// between nodes of a cluster must fit, replies to calls included.
    #[must_use]
    pub fn max_message(mut self, bytes: usize) -> Self {
        self.limits.message_bytes = bytes;
        self
    }

    /// Registers the node, and begins to accept connections.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(self) -> Result<Node, StartError> {
        if !is_node_name(&self.name) {
            return Err(StartError::InvalidName(self.name));
        }
        let net_ticktime = self.net_ticktime;
        let tick_interval = self.tick_interval.unwrap_or(net_ticktime / 4);
        if tick_interval > net_ticktime / 4 || tick_interval.is_zero() {
            return Err(StartError::TickInterval {
                tick_interval,
                net_ticktime,
            });
        }
        let Secret(cookie) = self
            .cookie
            .filter(|Secret(text)| !text.is_empty())
            .ok_or(StartError::NoCookie)?;
        let (carrier, listener, creation) = match self.plain_epmd {
            Some(epmd) => {
                let settings = plain::Settings {
                    epmd,
                    listen: self.listen,
                    loopback_only: !self.beyond_loopback,
                    limit: self.limits.handshake_time,
                };
                let (plain, listener, creation) = Plain::start(&self.name, self.hidden, settings).await?;
                (Carrier::Plain(plain), Listener::Plain(listener), creation)
            }
            None => {
                let mesh = Mesh::start(&self.name, self.hidden, self.agent_dir.as_deref());
                let (mesh, listener, creation) = mesh.await?;
                (Carrier::Mesh(Box::new(mesh)), Listener::Mesh(listener), creation)
            }
        };
        let mut local = LocalNode::hidden(self.name.clone(), creation);
        local.flags = local.flags.with(DistFlags::SEND_SENDER);
        if !self.hidden {
            local.flags = local.flags.with(DistFlags::PUBLISHED);
        }
        let name = Atom::from(self.name);
        let limits = self.limits;
        let inner = Arc::new(Inner {
            local,
            cookie: Cookie::new(cookie),
            net_ticktime,
            tick_interval,
            processes: Processes::new(
                name.clone(),
                creation,
                limits.mailbox_messages,
                limits.mailbox_bytes,
            ),
            connections: Connections::new(limits.connections),
            carrier,
            events: broadcast::Sender::new(EVENTS),
            stop: CancellationToken::new(),
            reconnect: self.reconnect,
            kept: Kept::default(),
            tasks: TaskTracker::new(),
            exposed: Exposed::default(),
            // What this node's own processes hold on each other is no peer's doing.
            own_watch: Watch::new(usize::MAX).into(),
            buffers: Buffers::default(),
            name,
            limits,
        });
        let own = |name| {
            let mailbox = Mailbox::new(Arc::clone(&inner), None);
            // The table is empty, so the name is free.
            let _ = mailbox.register(name);
            mailbox
        };
        inner.spawn(server::run(own("net_kernel"), NetKernel));
        inner.spawn(rex::run(own("rex")));
        inner.spawn(Arc::clone(&inner).accept_all(listener));
        match &inner.carrier {
            Carrier::Mesh(_) => inner.spawn(super::mesh::keep(Arc::clone(&inner))),
            Carrier::Plain(_) => inner.spawn(super::epmd::keep(Arc::clone(&inner))),
        };
        Ok(Node {
            inner: Arc::clone(&inner),
            alive: Arc::new(Alive(inner)),
        })
    }
}
