//! What a server can do as the process that it is.

use std::fmt;
use std::sync::Arc;

use meshx_etf::{Pid, Reference, Term};

use super::address::Address;
use super::error::SendError;
use super::inner::Inner;
use super::mailbox::Mailbox;
use super::process::Process;

/// The process of a [`Server`](super::Server): what is monitored, linked or asked for by it comes to
/// [`Server::info`](super::Server::info).
///
/// The methods do what those of [`Mailbox`] with the same names do. Once the server has ended nothing comes to it any more.
pub struct Context {
    inner: Arc<Inner>,
    process: Arc<Process>,
}

impl Context {
    pub(crate) fn of(mailbox: &Mailbox) -> Self {
        Self {
            inner: Arc::clone(mailbox.inner()),
            process: Arc::clone(mailbox.process()),
        }
    }

    /// Its identifier, `self()`.
    #[must_use]
    pub fn pid(&self) -> &Pid {
        &self.process.pid
    }

    /// Sends a message; see [`Mailbox::send`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send(&self, to: impl Into<Address>, term: &Term) -> Result<(), SendError> {
        self.inner.send(self.pid(), &to.into(), term).await
    }

    /// Monitors a process; see [`Mailbox::monitor`].
    pub async fn monitor(&self, target: impl Into<Address>) -> Reference {
        let reference = self.inner.processes.make_reference();
        self.inner
            .monitor(&self.process, reference.clone(), target.into())
            .await;
        reference
    }

    /// Takes a monitor back; no `DOWN` of it comes any more.
    pub fn demonitor(&self, reference: &Reference) {
        self.inner.demonitor(&self.process, reference);
        self.process.flush_down(reference);
    }

    /// Links to a process; see [`Mailbox::link`].
    pub async fn link(&self, to: &Pid) {
        self.inner.link(&self.process, to).await;
    }

    /// Takes a link back.
    pub fn unlink(&self, to: &Pid) {
        self.inner.unlink(&self.process, to);
    }

    /// Sends an exit signal; to its own pid it ends the server: see [`Mailbox::exit`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn exit(&self, to: &Pid, reason: &Term) -> Result<(), SendError> {
        self.inner.exit(self.pid(), to, reason).await
    }

    /// Whether exit signals come as messages, as they do at first, or end the server; see [`Mailbox::trap_exit`].
    pub fn trap_exit(&self, traps: bool) -> bool {
        self.process.trap_exit(traps)
    }

    /// A reference under which the server can be sent to until [`Context::unalias`].
    pub fn alias(&self) -> Reference {
        self.inner.processes.add_alias(&self.process, false)
    }

    /// An alias that ends with the first message that comes by it; see [`Mailbox::reply_alias`].
    pub fn reply_alias(&self) -> Reference {
        self.inner.processes.add_alias(&self.process, true)
    }

    /// Ends an alias; false when it is none of this server.
    pub fn unalias(&self, alias: &Reference) -> bool {
        self.inner.processes.remove_alias(alias, &self.process)
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.process.pid).finish()
    }
}
