//! A process of this node: what it receives, and what it can ask for.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use meshx_etf::{Atom, Pid, Reference, Term};

use super::address::Address;
use super::call;
use super::error::{CallError, RecvError, RpcError, SendError};
use super::inner::{Alive, Inner};
use super::process::{Item, Process, RegisterError};
use super::route::Route;

/// What a mailbox receives.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Message {
    /// A message that somebody sent.
    Term {
        /// The sender, when the road of the message tells it.
        from: Option<Pid>,
        /// The message.
        term: Term,
    },
    /// A link broke, or somebody called `exit/2`; only mailboxes that [trap exits](Mailbox::trap_exit) receive it.
    Exit {
        /// The process that ended, or the one that called `exit/2`.
        from: Pid,
        /// Its reason; `noconnection` when the connection ended.
        reason: Term,
    },
    /// A monitored process ended: `noproc` when there was none, `noconnection` when the connection ended.
    Down {
        /// What [`Mailbox::monitor`] or [`Mailbox::spawn_request`] returned.
        reference: Reference,
        /// The process.
        target: Address,
        /// Its reason.
        reason: Term,
    },
    /// A process that [`Mailbox::spawn_request`] asked for was started, or not.
    Spawned {
        /// What [`Mailbox::spawn_request`] returned.
        reference: Reference,
        /// The process, or why there is none (an atom like `system_limit` or `noconnection`).
        result: Result<Pid, Term>,
    },
}

/// What a process that is to be started elsewhere has to do with the one that asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpawnOptions {
    pub(crate) link: bool,
    pub(crate) monitor: bool,
}

impl SpawnOptions {
    /// Neither linked nor monitored.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Links the two, before the new one runs.
    #[must_use]
    pub fn link(mut self) -> Self {
        self.link = true;
        self
    }

    /// Monitors the new one, before it runs.
    #[must_use]
    pub fn monitor(mut self) -> Self {
        self.monitor = true;
        self
    }
}

/// A process of this node.
///
/// It ends when it is dropped, or with [`Mailbox::close`]: its names are free again, whoever monitors it gets a
/// `DOWN`, whoever is linked to it an exit signal.
///
/// **Exit signals** do what they do in Erlang. A mailbox that [traps exits](Mailbox::trap_exit), as every new one
/// does, receives them as [`Message::Exit`]. One that does not is ended by any reason but `normal`, and by that too if
/// it sends it to itself. `exit(Pid, kill)` ends either kind, with the reason `killed`. A mailbox that was ended loses
/// what it had not received;
/// [`Mailbox::recv`] gives `None`, and [`Mailbox::ended`] the reason.
///
/// **A mailbox is bounded** ([`Limits::mailbox_messages`](super::Limits::mailbox_messages) and
/// [`Limits::mailbox_bytes`](super::Limits::mailbox_bytes)). A message that finds it full is dropped, counted
/// ([`Mailbox::dropped`]) and reported in the log; its sender sees what it would see if the message was lost with a
/// connection: a call times out. So is an exit signal that a peer sent with `exit/2` or over a link of its own
/// making. The ends of this mailbox's own links and monitors are never dropped. Connections are always read on, so
/// a full mailbox holds up no other.
///
/// ```
/// # use std::time::Duration;
/// # use meshx::node::{Message, Node, RecvError};
/// # use meshx_etf::Term;
/// # async fn wait(node: &Node) -> Result<(), Box<dyn std::error::Error>> {
/// let mut mailbox = node.register("results")?;
/// // `receive {done, _} = Done -> Done after 5000 -> ... end`: what else has come stays, in order.
/// let is_done = |message: &Message| matches!(message, Message::Term { term, .. }
///     if term.as_tuple().is_some_and(|parts| parts.first().and_then(Term::as_atom) == Some("done")));
/// match mailbox.recv_where(Duration::from_secs(5), is_done).await {
///     Ok(message) => println!("{message:?}"),
///     Err(RecvError::Timeout(_)) => println!("not done"),
///     Err(ended) => return Err(ended.into()),
/// }
/// # Ok(())
/// # }
/// ```
pub struct Mailbox {
    inner: Arc<Inner>,
    process: Arc<Process>,
    /// Keeps the node up. The node's own processes do without.
    _alive: Option<Arc<Alive>>,
    /// Messages that a selective receive passed over, and what they count for in the queue.
    aside: VecDeque<(Message, usize)>,
    reason: Option<Term>,
    /// Whether the process ends with this: one that a peer spawned ends with its function.
    owner: bool,
}

impl Mailbox {
    pub(crate) fn new(inner: Arc<Inner>, alive: Option<Arc<Alive>>) -> Self {
        let process = inner.processes.spawn(true, alive.is_none());
        Self {
            inner,
            process,
            _alive: alive,
            aside: VecDeque::new(),
            reason: None,
            owner: true,
        }
    }

    /// The mailbox of a process that somebody else ends.
    pub(crate) fn of(inner: Arc<Inner>, process: Arc<Process>) -> Self {
        Self {
            inner,
            process,
            _alive: None,
            aside: VecDeque::new(),
            reason: None,
            owner: false,
        }
    }

    /// Its identifier, to be put into messages.
    #[must_use]
    pub fn pid(&self) -> &Pid {
        &self.process.pid
    }

    /// Messages dropped because the mailbox was full.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.process.dropped()
    }

    /// Whether exit signals come as messages (the way of every new mailbox) or end it, as
    /// `process_flag(trap_exit, _)` does. Gives what it was before.
    pub fn trap_exit(&self, traps: bool) -> bool {
        self.process.trap_exit(traps)
    }

    /// Why an exit signal ended it; `None` while it lives, and when the whole node ended.
    #[must_use]
    pub fn ended(&self) -> Option<Term> {
        self.process.killed()
    }

    /// The next message; `None` once the node has shut down, or an exit signal has ended the mailbox. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Message> {
        self.forget_when_killed();
        if let Some((message, cost)) = self.aside.pop_front() {
            self.process.give_out(cost);
            return Some(message);
        }
        self.next().await.map(|(message, _)| message)
    }

    /// As [`Mailbox::recv`], for at most this long.
    ///
    /// # Errors
    /// [`RecvError`].
    pub async fn recv_timeout(&mut self, timeout: Duration) -> Result<Message, RecvError> {
        self.recv_where(timeout, |_| true).await
    }

    /// The oldest message that is `wanted`, waiting for it at most this long. Messages that are not wanted stay, in
    /// order, and count towards the mailbox's bounds as before. Cancel-safe.
    ///
    /// # Errors
    /// [`RecvError`].
    pub async fn recv_where(
        &mut self,
        timeout: Duration,
        mut wanted: impl FnMut(&Message) -> bool,
    ) -> Result<Message, RecvError> {
        self.forget_when_killed();
        if let Some(message) = self.take_aside(&mut wanted) {
            return Ok(message);
        }
        let search = async {
            while let Some((message, cost)) = self.next().await {
                if wanted(&message) {
                    return Ok(message);
                }
                self.process.set_aside(cost);
                self.aside.push_back((message, cost));
            }
            Err(match self.process.killed() {
                Some(reason) => RecvError::Ended(reason),
                None => RecvError::NodeDown,
            })
        };
        let found = tokio::time::timeout(timeout, search).await;
        found.map_err(|_| RecvError::Timeout(timeout))?
    }

    /// Drops the oldest message of this kind, if it has come. Others stay, in order.
    pub(crate) fn discard(&mut self, unwanted: impl Fn(&Message) -> bool) {
        self.forget_when_killed();
        if self.take_aside(&unwanted).is_some() {
            return;
        }
        while let Ok(Some(item)) = self.process.take() {
            let cost = item.cost();
            let Some(message) = self.decoded(item) else {
                continue;
            };
            if unwanted(&message) {
                return;
            }
            self.process.set_aside(cost);
            self.aside.push_back((message, cost));
        }
    }

    fn take_aside(&mut self, mut wanted: impl FnMut(&Message) -> bool) -> Option<Message> {
        let at = self.aside.iter().position(|(message, _)| wanted(message))?;
        let (message, cost) = self.aside.remove(at)?;
        self.process.give_out(cost);
        Some(message)
    }

    fn forget_when_killed(&mut self) {
        if !self.aside.is_empty() && self.process.killed().is_some() {
            self.aside.clear();
        }
    }

    /// As [`Mailbox::recv`], with what it counted for and the peer whose connection it came by, whatever it says of its
    /// sender; `None` when it is of this node. For who receives in no other way: what was set aside is not looked at.
    pub(crate) async fn recv_from(&mut self) -> Option<(Message, usize, Option<Atom>)> {
        loop {
            let item = self.take().await?;
            let cost = item.cost();
            let peer = match &item {
                Item::Encoded { peer: Some(peer), .. } => Some(peer.clone()),
                Item::Encoded { from, .. } => from.as_ref().map(|from| from.node.clone()),
                _ => None,
            };
            if let Some(message) = self.decoded(item) {
                return Some((message, cost, peer));
            }
        }
    }

    /// What comes next from the queue, and what it counted for there.
    async fn next(&mut self) -> Option<(Message, usize)> {
        loop {
            let item = self.take().await?;
            let cost = item.cost();
            if let Some(message) = self.decoded(item) {
                return Some((message, cost));
            }
        }
    }

    async fn take(&mut self) -> Option<Item> {
        loop {
            match self.process.take() {
                Err(()) => return None,
                Ok(Some(item)) => return Some(item),
                // A permit of `notify_one` is kept, so nothing that came in between is missed.
                Ok(None) => self.process.ready.notified().await,
            }
        }
    }

    fn decoded(&self, item: Item) -> Option<Message> {
        let message = self.decode(item);
        // Its form was checked when it came; what is left are keys that a map has twice.
        let warn = |error: &_| tracing::warn!(pid = ?self.process.pid, %error, "a message is dropped");
        message.inspect_err(warn).ok()
    }

    fn decode(&self, item: Item) -> Result<Message, meshx_etf::DecodeError> {
        let decode = |bytes: &[u8]| meshx_etf::decode(bytes, &self.inner.limits.terms);
        Ok(match item {
            Item::Ready(message) => message,
            Item::Encoded { from, payload, .. } => {
                let term = payload.decode(&self.inner.buffers, &self.inner.limits.terms)?;
                Message::Term { from, term }
            }
            Item::Exit { from, reason } => Message::Exit {
                from,
                reason: decode(&reason)?,
            },
            Item::Down {
                reference,
                target,
                reason,
            } => Message::Down {
                reference,
                target,
                reason: decode(&reason)?,
            },
        })
    }

    /// Registers a name for it, as `register(Name, self())` does. It may have several.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register(&self, name: &str) -> Result<(), RegisterError> {
        self.inner.processes.register(name, &self.process)
    }

    /// Gives a name up; false when this mailbox does not have it.
    pub fn unregister(&self, name: &str) -> bool {
        self.inner.processes.unregister(name, &self.process)
    }

    /// A reference under which this mailbox can be sent to until [`Mailbox::unalias`], as `alias/0` does.
    pub fn alias(&self) -> Reference {
        self.inner.processes.add_alias(&self.process, false)
    }

    /// An alias that ends with the first message that comes by it, as `alias([reply])` does: for one answer.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use meshx::node::{Message, Node, SendError};
    /// # use meshx_etf::Term;
    /// # async fn ask(node: &Node) -> Result<(), SendError> {
    /// let mut mailbox = node.mailbox();
    /// let alias = mailbox.reply_alias();
    /// mailbox.send(("clock", "shop@h1"), &Term::tuple([Term::atom("now"), alias.clone().into()])).await?;
    /// let answer = mailbox.recv_timeout(Duration::from_secs(1)).await;
    /// mailbox.unalias(&alias); // an answer that is still under way reaches nobody
    /// # drop(answer);
    /// # Ok(())
    /// # }
    /// ```
    pub fn reply_alias(&self) -> Reference {
        self.inner.processes.add_alias(&self.process, true)
    }

    /// Ends an alias; false when it is none of this mailbox.
    pub fn unalias(&self, alias: &Reference) -> bool {
        self.inner.processes.remove_alias(alias, &self.process)
    }

    /// Sends a message, connecting first if need be. Waits while the connection has no room for it.
    ///
    /// Messages to one receiver stay in order.
    ///
    /// # Errors
    /// [`SendError`]. A process that does not exist is no error, as in Erlang.
    pub async fn send(&self, to: impl Into<Address>, term: &Term) -> Result<(), SendError> {
        self.inner.send(self.pid(), &to.into(), term).await
    }

    /// `gen_server:call(Target, Request, Timeout)` from this process: a server sees its pid. Other messages stay where
    /// they are meanwhile. An answer that comes too late is dropped: it is sent to an alias that has ended, also when
    /// the call itself is dropped before its time.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn gen_call(
        &mut self,
        target: impl Into<Address>,
        request: Term,
        timeout: Duration,
    ) -> Result<Term, CallError> {
        call::gen_call_from(self, target.into(), request, timeout).await
    }

    /// A way to one receiver for many messages.
    #[must_use]
    pub fn route(&self, to: impl Into<Address>) -> Route {
        let from = self.pid().clone();
        Route::new(Arc::clone(&self.inner), self._alive.clone(), from, to.into())
    }

    /// Monitors a process. Exactly one [`Message::Down`] with the returned reference comes, at once when there is no
    /// such process or no connection to its node can be made.
    pub async fn monitor(&self, target: impl Into<Address>) -> Reference {
        let reference = self.inner.processes.make_reference();
        self.inner
            .monitor(&self.process, reference.clone(), target.into())
            .await;
        reference
    }

    /// Takes a monitor back; no `DOWN` of it comes any more (`demonitor(Ref, [flush])`).
    pub fn demonitor(&mut self, reference: &Reference) {
        self.inner.demonitor(&self.process, reference);
        self.process.flush_down(reference);
        let is_down =
            |message: &Message| matches!(message, Message::Down { reference: down, .. } if down == reference);
        self.take_aside(is_down);
    }

    /// Links to a process, as `link/1` does: when it ends, [`Message::Exit`] comes; when this mailbox ends, it gets an
    /// exit signal.
    ///
    /// ```
    /// # use meshx::node::{Mailbox, Message};
    /// # use meshx_etf::Pid;
    /// # async fn follow(mut mailbox: Mailbox, cart: &Pid) {
    /// mailbox.link(cart).await;
    /// while let Some(message) = mailbox.recv().await {
    ///     match message {
    ///         Message::Exit { from, reason } if from == *cart => return mailbox.close(reason),
    ///         other => println!("{other:?}"),
    ///     }
    /// }
    /// # }
    /// ```
    pub async fn link(&self, to: &Pid) {
        self.inner.link(&self.process, to).await;
    }

    /// Takes a link back.
    pub fn unlink(&self, to: &Pid) {
        self.inner.unlink(&self.process, to);
    }

    /// Sends an exit signal, as `exit/2` does.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn exit(&self, to: &Pid, reason: &Term) -> Result<(), SendError> {
        self.inner.exit(self.pid(), to, reason).await
    }

    /// Asks for `module:function(args...)` to be started as a process on another node (or on this one, where it must
    /// be [exposed](super::Node::expose)), as `spawn_request/5` does.
    ///
    /// First [`Message::Spawned`] comes with the returned reference. When the process has ended,
    /// [`SpawnOptions::monitor`] gives a [`Message::Down`] with the same reference, and [`SpawnOptions::link`] an
    /// exit signal.
    ///
    /// # Errors
    /// [`SendError`]; [`SendError::Unsupported`] when that node knows no spawn requests (before OTP 23).
    pub async fn spawn_request(
        &self,
        node: &str,
        module: &str,
        function: &str,
        args: Vec<Term>,
        options: SpawnOptions,
    ) -> Result<Reference, SendError> {
        self.inner
            .spawn_request(&self.process, node, module, function, args, options)
            .await
    }

    /// [`Mailbox::spawn_request`], and waits for the new process: its pid, and the reference of its monitor.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use meshx::node::{Message, Node, RpcError, SpawnOptions};
    /// # use meshx_etf::Term;
    /// # async fn spawn(node: &Node) -> Result<(), RpcError> {
    /// let mut mailbox = node.mailbox();
    /// let (options, timeout) = (SpawnOptions::new().link().monitor(), Duration::from_secs(5));
    /// let (pid, monitor) = mailbox.spawn("shop@h1", "timer", "sleep", vec![Term::Int(1000)], options, timeout).await?;
    /// while let Some(message) = mailbox.recv().await {
    ///     if matches!(&message, Message::Down { reference, .. } if *reference == monitor) {
    ///         break; // normal, after a second
    ///     }
    /// }
    /// # drop(pid);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`RpcError::NotStarted`] with that node's reason, or [`RpcError::Call`]. A process that is started after the
    /// timeout is not linked nor monitored; if it was to be linked, it is ended with the reason `abandoned`.
    pub async fn spawn(
        &mut self,
        node: &str,
        module: &str,
        function: &str,
        args: Vec<Term>,
        options: SpawnOptions,
        timeout: Duration,
    ) -> Result<(Pid, Reference), RpcError> {
        let mfa = format!("{module}:{function}/{}", args.len());
        let asked = tokio::time::Instant::now();
        let request = self.spawn_request(node, module, function, args, options);
        let request = tokio::time::timeout(timeout, request).await;
        let id = request.map_err(|_| CallError::Timeout(timeout))??;
        let _awaited = Awaited {
            inner: Arc::clone(&self.inner),
            node,
            id: &id,
        };
        let left = timeout.saturating_sub(asked.elapsed());
        let is_reply =
            |message: &Message| matches!(message, Message::Spawned { reference, .. } if *reference == id);
        let mut reply = self.recv_where(left, is_reply).await;
        if let Err(RecvError::Timeout(_)) = reply {
            if self.inner.abandon(node, &id) {
                return Err(CallError::Timeout(timeout).into());
            }
            // It was answered at this very moment, so the answer is in the queue.
            reply = self.recv_where(Duration::ZERO, is_reply).await;
        }
        match reply {
            Ok(Message::Spawned { result: Ok(pid), .. }) => Ok((pid, id.clone())),
            Ok(Message::Spawned {
                result: Err(reason), ..
            }) => Err(RpcError::NotStarted {
                node: node.to_owned(),
                mfa,
                reason,
            }),
            _ => Err(CallError::NodeDown.into()),
        }
    }

    /// Ends it with a reason, which monitors and links get. Dropping it does the same with the reason `normal`.
    pub fn close(mut self, reason: Term) {
        self.reason = Some(reason);
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    pub(crate) fn process(&self) -> &Arc<Process> {
        &self.process
    }
}

/// Forgets a spawn request when its answer is awaited no more. It does nothing once the answer has come.
struct Awaited<'a> {
    inner: Arc<Inner>,
    node: &'a str,
    id: &'a Reference,
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.inner.abandon(self.node, self.id);
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        let reason = match self.reason.take() {
            Some(reason) => reason,
            None if !self.owner => return,
            None if std::thread::panicking() => Term::Atom(Atom::from("panic")),
            None => Term::Atom(Atom::from("normal")),
        };
        self.inner.retire(&self.process, &reason);
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mailbox").field(&self.process.pid).finish()
    }
}
