//! A process of this node: what it receives, and what it can ask for.

use std::fmt;
use std::sync::Arc;

use meshx_etf::{Atom, Pid, Reference, Term};

use super::address::Address;
use super::error::SendError;
use super::inner::{Alive, Inner};
use super::process::{Item, Process, RegisterError};

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
    /// A link broke, or somebody called `exit/2`. A mailbox is never ended by it: it traps exits, `kill` included.
    Exit {
        /// The process that ended, or the one that called `exit/2`.
        from: Pid,
        /// Its reason; `noconnection` when the connection ended.
        reason: Term,
    },
    /// A monitored process ended: `noproc` when there was none, `noconnection` when the connection ended.
    Down {
        /// What [`Mailbox::monitor`] or [`Mailbox::spawn_monitor`] returned.
        reference: Reference,
        /// The process.
        target: Address,
        /// Its reason.
        reason: Term,
    },
    /// A process that [`Mailbox::spawn_monitor`] asked for was started, or not.
    Spawned {
        /// What [`Mailbox::spawn_monitor`] returned.
        reference: Reference,
        /// The process, or why there is none (an atom like `notsup` or `noconnection`).
        result: Result<Pid, Term>,
    },
}

/// A process of this node.
///
/// It ends when it is dropped, or with [`Mailbox::close`]: its names are free again, whoever monitors it gets a
/// `DOWN`, whoever is linked to it an exit signal.
///
/// **A mailbox is bounded** ([`Limits::mailbox_messages`](super::Limits::mailbox_messages) and
/// [`Limits::mailbox_bytes`](super::Limits::mailbox_bytes)). A message that finds it full is dropped, counted
/// ([`Mailbox::dropped`]) and reported in the log; its sender sees what it would see if the message was lost with a
/// connection: a call times out. Exit signals and `DOWN`s are never dropped. Connections are always read on, so a
/// full mailbox holds up no other.
pub struct Mailbox {
    inner: Arc<Inner>,
    process: Arc<Process>,
    /// Keeps the node up. The node's own processes do without.
    _alive: Option<Arc<Alive>>,
    reason: Option<Term>,
}

impl Mailbox {
    pub(crate) fn new(inner: Arc<Inner>, alive: Option<Arc<Alive>>) -> Self {
        let process = inner.processes.spawn();
        Self {
            inner,
            process,
            _alive: alive,
            reason: None,
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

    /// The next message; `None` once the node has shut down. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Message> {
        loop {
            match self.process.take() {
                Err(()) => return None,
                Ok(Some(Item::Ready(message))) => return Some(message),
                Ok(Some(Item::Encoded { from, payload })) => {
                    match meshx_etf::decode(&payload, &self.inner.limits.terms) {
                        Ok(term) => return Some(Message::Term { from, term }),
                        // Its form was checked when it came; what is left are keys that a map has twice.
                        Err(error) => tracing::warn!(pid = ?self.process.pid, %error, "a message is dropped"),
                    }
                }
                // A permit of `notify_one` is kept, so nothing that came in between is missed.
                Ok(None) => self.process.ready.notified().await,
            }
        }
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
        self.inner.processes.add_alias(&self.process)
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

    /// Monitors a process. Exactly one [`Message::Down`] with the returned reference comes, at once when there is no
    /// such process or no connection to its node can be made.
    pub async fn monitor(&self, target: impl Into<Address>) -> Reference {
        let reference = self.inner.processes.make_reference();
        self.inner
            .monitor(&self.process, reference.clone(), target.into())
            .await;
        reference
    }

    /// Takes a monitor back. A `DOWN` that was under way may already be in the mailbox.
    pub fn demonitor(&self, reference: &Reference) {
        self.inner.demonitor(&self.process, reference);
    }

    /// Links to a process: when it ends, [`Message::Exit`] comes; when this mailbox ends, it gets an exit signal.
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

    /// Starts `module:function(args...)` as a process on another node and monitors it.
    ///
    /// First [`Message::Spawned`] comes, then, when the process has ended, [`Message::Down`].
    ///
    /// # Errors
    /// [`SendError`]; [`SendError::Unsupported`] when that node knows no spawn requests (before OTP 23).
    pub async fn spawn_monitor(
        &self,
        node: &str,
        module: &str,
        function: &str,
        args: Vec<Term>,
    ) -> Result<Reference, SendError> {
        self.inner
            .spawn_monitor(&self.process, node, module, function, args)
            .await
    }

    /// Ends it with a reason, which monitors and links get. Dropping it does the same with the reason `normal`.
    pub fn close(mut self, reason: Term) {
        self.reason = Some(reason);
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        let reason = match self.reason.take() {
            Some(reason) => reason,
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
