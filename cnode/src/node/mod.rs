//! A node in Rust that joins an Erlang cluster.
//!
//! To the BEAMs it is a (hidden) node like others: they ping it, monitor and link to its processes, and call its
//! servers with `GenServer.call({name, node}, request)`. It can do the same to them, and call their functions.
//!
//! ```no_run
//! use meshx::node::Node;
//! use meshx_etf::Term;
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let node = Node::builder("search@h3").cookie("secret").start().await?;
//!     node.serve("search", |request: Term| async move { Term::tuple([Term::atom("found"), request]) })?;
//!     std::future::pending().await // serves until it is killed
//! }
//! ```
//!
//! # How it works
//! The node registers with the [agent](crate::agent) of its host, which finds other nodes in the mesh, proves who
//! they are, and carries the connections. Each connection has a task that reads and one that writes. The reader never
//! waits for anybody: messages go to bounded [mailboxes](Mailbox) and signals are answered at once. The writer joins
//! what is queued, and sends a tick when there was nothing to send for [`NodeBuilder::tick_interval`].
//!
//! Peers are believed nothing: see [`Limits`] for what each of them can make this node spend.
//!
//! # Processes
//! A [`Mailbox`] is a process: it has a pid, receives messages and signals, and is linked and monitored like any
//! other. A [`Server`] answers `gen_server` calls. Functions that the program [exposes](Node::expose) are what peers
//! can spawn here and call with `erpc` and `rpc`; whatever else they ask for is `undef`.
//!
//! ```
//! # use std::time::Duration;
//! # use meshx::node::{Message, Node};
//! # use meshx_etf::Term;
//! # async fn watch(node: &Node) -> Result<(), Box<dyn std::error::Error>> {
//! let mut mailbox = node.mailbox();
//! let cart = ("cart", "shop@h1");
//! let monitor = mailbox.monitor(cart).await;
//! mailbox.send(cart, &Term::tuple([Term::atom("subscribe"), mailbox.pid().clone().into()])).await?;
//! while let Some(message) = mailbox.recv().await {
//!     match message {
//!         Message::Term { term, .. } => println!("{term}"),
//!         Message::Down { reference, reason, .. } if reference == monitor => {
//!             println!("the cart is gone: {reason}");
//!             break;
//!         }
//!         _ => {}
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Not supported
//! `global`, dynamic node names, names of `{global, _}` or `{via, _, _}`, and `sys` messages to servers.

mod address;
pub(crate) mod backoff;
mod buffers;
mod builder;
mod call;
mod carrier;
mod connection;
mod connections;
mod context;
mod cookie;
mod dispatch;
mod epmd;
mod error;
mod event;
mod exits;
mod exposed;
mod handshake;
mod inner;
mod limits;
mod mailbox;
mod mesh;
mod net_kernel;
mod outbound;
mod payload;
mod plain;
mod policy;
mod process;
mod request;
mod rex;
mod route;
mod rpc;
mod server;
mod spawned;
mod watch;
mod wire;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use meshx_etf::{Atom, Pid, Reference, Term};
use tokio::sync::broadcast;

pub use address::Address;
pub use backoff::Backoff;
pub use builder::NodeBuilder;
pub use call::{Caller, Request};
pub use context::Context;
pub use cookie::{CookieError, read_cookie};
pub use error::{CallError, ConnectError, RecvError, RpcError, SendError, StartError};
pub use event::{Direction, DownReason, NodeEvent, PeerInfo};
pub use exposed::Raised;
pub use limits::Limits;
pub use mailbox::{Mailbox, Message, SpawnOptions};
pub use policy::Reconnect;
pub use process::RegisterError;
pub use route::Route;
pub use server::Server;

use inner::{Alive, Inner};
use server::Handler;

/// A node that runs. Clones are handles to the same node.
///
/// It ends with [`Node::stop`], or when the last handle, mailbox and server are gone.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
    alive: Arc<Alive>,
}

impl Node {
    /// Describes a node with this full name (`name@host`). The host part need not be known to DNS; the agent must
    /// own it.
    pub fn builder(name: impl Into<String>) -> NodeBuilder {
        NodeBuilder::new(name.into())
    }

    /// Its full name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.inner.name.as_str()
    }

    /// Its creation: what tells its pids from those of an earlier node of the same name.
    #[must_use]
    pub fn creation(&self) -> u32 {
        self.inner.local.creation
    }

    /// A new process without a name.
    #[must_use]
    pub fn mailbox(&self) -> Mailbox {
        Mailbox::new(Arc::clone(&self.inner), Some(Arc::clone(&self.alive)))
    }

    /// A new process with a name.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register(&self, name: &str) -> Result<Mailbox, RegisterError> {
        let mailbox = self.mailbox();
        mailbox.register(name).map(|()| mailbox)
    }

    /// The process that has a name here.
    #[must_use]
    pub fn whereis(&self, name: &str) -> Option<Pid> {
        self.inner
            .processes
            .by_name(name)
            .map(|process| process.pid.clone())
    }

    /// A reference that is equal to no other.
    #[must_use]
    pub fn make_reference(&self) -> Reference {
        self.inner.processes.make_reference()
    }

    /// Connects to a node; at once when there is a connection. With [`Reconnect::Keep`] the node stays connected from
    /// then on, also when this first attempt fails.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(&self, node: &str) -> Result<(), ConnectError> {
        self.inner.connect_for_good(&Atom::from(node)).await
    }

    /// Ends the connection to a node, and no longer keeps it; false when there is no connection.
    pub fn disconnect(&self, node: &str) -> bool {
        let node = Atom::from(node);
        self.inner.kept.remove(&node);
        let connection = self.inner.connections.up(&node);
        connection.is_some_and(|connection| {
            connection.close(DownReason::Disconnected);
            self.inner.ended(&connection);
            true
        })
    }

    /// The names of all nodes that are connected, hidden ones too, as `nodes(connected)`; sorted.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        let connections = self.inner.connections.all();
        let mut nodes: Vec<_> = connections.iter().map(|it| it.node.as_str().to_owned()).collect();
        nodes.sort_unstable();
        nodes
    }

    /// The connections that stand, with what is known of each.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerInfo> {
        self.inner
            .connections
            .all()
            .iter()
            .map(|connection| connection.info())
            .collect()
    }

    /// Connections coming up, going down, and ticking, from now on. A listener that is slow loses the oldest.
    ///
    /// ```
    /// # use meshx::node::{Node, NodeEvent};
    /// # async fn watch(node: &Node) {
    /// let mut events = node.events();
    /// while let Ok(event) = events.recv().await {
    ///     match event {
    ///         NodeEvent::Up { node, .. } => println!("{node} is there"),
    ///         NodeEvent::Down { node, reason } => println!("{node} is gone: {reason}"),
    ///         _ => {}
    ///     }
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<NodeEvent> {
        self.inner.events.subscribe()
    }

    /// Sends a message from a process of no further use. To send many, or to be answered, use
    /// [`Mailbox::send`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send(&self, to: impl Into<Address>, term: &Term) -> Result<(), SendError> {
        self.mailbox().send(to, term).await
    }

    /// Answers `gen_server:call`s to `name` with a function from request to answer, until the node stops.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn serve<F, R>(&self, name: &str, handler: F) -> Result<Pid, RegisterError>
    where
        F: FnMut(Term) -> R + Send + 'static,
        R: Future<Output = Term> + Send,
    {
        self.start_server(name, Handler(handler))
    }

    /// Runs a [`Server`] under a name, until the node stops.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn start_server(&self, name: &str, server: impl Server) -> Result<Pid, RegisterError> {
        let mailbox = self.register(name)?;
        let pid = mailbox.pid().clone();
        self.inner.spawn(server::run(mailbox, server));
        Ok(pid)
    }

    /// `gen_server:call(Target, Request, Timeout)`.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use meshx::node::{CallError, Node};
    /// # use meshx_etf::Term;
    /// # async fn price(node: &Node) -> Result<Term, CallError> {
    /// let request = Term::tuple([Term::atom("price"), Term::binary("lamp")]);
    /// node.gen_call(("prices", "shop@h1"), request, Duration::from_secs(5)).await
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn gen_call(
        &self,
        target: impl Into<Address>,
        request: Term,
        timeout: Duration,
    ) -> Result<Term, CallError> {
        call::gen_call(self.mailbox(), target.into(), request, timeout).await
    }

    /// `gen_server:cast(Target, Request)`.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn gen_cast(&self, target: impl Into<Address>, request: Term) -> Result<(), SendError> {
        self.send(target, &Term::tuple([Term::atom("$gen_cast"), request]))
            .await
    }

    /// Lets peers call a function: `Node.spawn`, `:erpc.call`, `:rpc.call` and the like find it under this module,
    /// name and arity, as if the node had such a module. Exposed again, the new one takes the old one's place.
    ///
    /// It gets the arguments, as many as its arity says. Calls run at the same time, each in a process of its own and
    /// at most [`Limits::spawned_per_peer`] for one peer; a panic ends its process with the reason `panic`. What is
    /// not exposed is `undef`.
    ///
    /// ```
    /// # use meshx::node::{Node, Raised};
    /// # use meshx_etf::Term;
    /// # fn expose(node: &Node) {
    /// // :erpc.call(:"search@h3", :math, :halve, [84])   # 42
    /// node.expose("math", "halve", 1, |args: Vec<Term>| async move {
    ///     match args.first().and_then(Term::as_int) {
    ///         Some(n) if n % 2 == 0 => Ok(Term::Int(n / 2)),
    ///         _ => Err(Raised::Error(Term::atom("badarg"))),
    ///     }
    /// });
    /// # }
    /// ```
    pub fn expose<F, R>(&self, module: &str, function: &str, arity: u8, handler: F)
    where
        F: Fn(Vec<Term>) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Term, Raised>> + Send + 'static,
    {
        self.expose_process(module, function, arity, move |_, args| handler(args));
    }

    /// As [`Node::expose`], for a function that is a process: it gets the mailbox of the pid that `spawn` returned.
    ///
    /// It does not trap exits unless it says so. An exit signal that ends it drops its future where it waits.
    pub fn expose_process<F, R>(&self, module: &str, function: &str, arity: u8, handler: F)
    where
        F: Fn(Mailbox, Vec<Term>) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Term, Raised>> + Send + 'static,
    {
        let key = (Atom::from(module), Atom::from(function), arity);
        self.inner.exposed.add(key, handler);
    }

    /// Takes [`Node::expose`] back: calls from now on are `undef`, those under way go on. False when there is none.
    pub fn unexpose(&self, module: &str, function: &str, arity: u8) -> bool {
        let key = (Atom::from(module), Atom::from(function), arity);
        self.inner.exposed.remove(&key)
    }

    /// Calls a function on another node, as `erpc:call/5` does. A call that times out goes on there.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use meshx::node::{CallError, Node, RpcError};
    /// # use meshx_etf::Term;
    /// # async fn call(node: &Node) {
    /// let args = vec![Term::Int(1), Term::Int(5)];
    /// match node.rpc("shop@h1", "lists", "seq", args, Duration::from_secs(5)).await {
    ///     Ok(numbers) => println!("{numbers}"),
    ///     Err(error) if error.is_undef() => println!("that node has no such function"),
    ///     Err(RpcError::Error { reason, .. }) => println!("it raised {reason}"),
    ///     Err(RpcError::Exit { reason, .. }) => println!("it exited with {reason}"),
    ///     Err(RpcError::Throw { value, .. }) => println!("it threw {value}"),
    ///     Err(RpcError::Call(CallError::Timeout(after))) => println!("no answer within {after:?}"),
    ///     Err(other) => println!("not called, or not answered: {other}"),
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`RpcError`].
    pub async fn rpc(
        &self,
        node: &str,
        module: &str,
        function: &str,
        args: Vec<Term>,
        timeout: Duration,
    ) -> Result<Term, RpcError> {
        rpc::call(self.mailbox(), node, module, function, args, timeout).await
    }

    /// [`Node::rpc`] on several nodes at the same time, as `erpc:multicall/5` does: their results, in the order of
    /// the nodes.
    pub async fn rpc_all(
        &self,
        nodes: &[&str],
        module: &str,
        function: &str,
        args: &[Term],
        timeout: Duration,
    ) -> Vec<Result<Term, RpcError>> {
        let calls = nodes
            .iter()
            .map(|node| self.rpc(node, module, function, args.to_vec(), timeout));
        futures::future::join_all(calls).await
    }

    /// Has a function called on another node, its result and its failure dropped there, as `erpc:cast/4` does.
    ///
    /// # Errors
    /// [`SendError`]: the request did not get away.
    pub async fn rpc_cast(
        &self,
        node: &str,
        module: &str,
        function: &str,
        args: Vec<Term>,
    ) -> Result<(), SendError> {
        let args = vec![Term::atom(module), Term::atom(function), Term::List(args)];
        let options = SpawnOptions::new();
        let mailbox = self.mailbox();
        let asked = mailbox.spawn_request(node, "erpc", "execute_cast", args, options);
        asked.await.map(drop)
    }

    /// `net_adm:ping(Node)`: whether a connection stands or can be made, and the node answers.
    ///
    /// # Errors
    /// [`CallError`]: why it does not.
    pub async fn ping(&self, node: &str, timeout: Duration) -> Result<(), CallError> {
        let request = Term::tuple([Term::atom("is_auth"), Term::Atom(self.inner.name.clone())]);
        match self.gen_call(("net_kernel", node), request, timeout).await? {
            Term::Atom(answer) if answer.as_str() == "yes" => Ok(()),
            other => Err(CallError::Exit(other)),
        }
    }

    /// Ends the node: what is queued is still written, and the peers have time to read it, at most a second in all; then
    /// all connections are closed, the name is free again, and every mailbox says that the node is down. When it
    /// returns, all sockets are closed and all tasks have ended, but for servers that are busy with a request for more
    /// than another second.
    pub async fn stop(self) {
        self.inner.stop(Duration::from_secs(1)).await;
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name())
            .field("creation", &self.creation())
            .finish()
    }
}
