//! Servers: processes that answer calls, one at a time and in order, as a `gen_server` does.

use std::future::Future;

use meshx_etf::Term;

use super::call::{Caller, Request};
use super::context::Context;
use super::mailbox::{Mailbox, Message};

/// A process that answers `gen_server:call/2,3` and takes `gen_server:cast/2` and messages.
///
/// One request at a time: while a method runs, the next one waits in the mailbox. A call that takes long is best
/// answered later: spawn a task with the [`Caller`], and return `None`.
///
/// ```
/// # use meshx::node::{Caller, Node, RegisterError, Server};
/// # use meshx_etf::Term;
/// struct Counter(i64);
///
/// impl Server for Counter {
///     // GenServer.call({:counter, :"search@h3"}, :get)
///     async fn call(&mut self, request: Term, caller: Caller) -> Option<Term> {
///         match request.as_atom() {
///             Some("get") => Some(Term::Int(self.0)),
///             _ => {
///                 // Answered by another task, whenever it is done; the next request need not wait for it.
///                 tokio::spawn(async move { caller.reply(Term::atom("at_last")).await });
///                 None
///             }
///         }
///     }
///
///     // GenServer.cast({:counter, :"search@h3"}, 40)
///     async fn cast(&mut self, request: Term) {
///         self.0 += request.as_int().unwrap_or_default();
///     }
/// }
///
/// # fn start(node: &Node) -> Result<(), RegisterError> {
/// node.start_server("counter", Counter(0))?;
/// # Ok(())
/// # }
/// ```
pub trait Server: Send + 'static {
    /// Runs first, before anything that has come is looked at. A server that monitors, links or sends as the process
    /// that it is keeps the `context`. Does nothing by default.
    ///
    /// ```
    /// # use std::collections::HashMap;
    /// # use meshx::node::{Caller, Context, Message, Server};
    /// # use meshx_etf::{Reference, Term};
    /// /// Counts the callers that live: `{:ok, n}`.
    /// #[derive(Default)]
    /// struct Callers {
    ///     context: Option<Context>,
    ///     alive: HashMap<Reference, Term>,
    /// }
    ///
    /// impl Server for Callers {
    ///     async fn init(&mut self, context: Context) {
    ///         self.context = Some(context);
    ///     }
    ///
    ///     async fn call(&mut self, request: Term, caller: Caller) -> Option<Term> {
    ///         if let Some(context) = &self.context {
    ///             self.alive.insert(context.monitor(caller.pid().clone()).await, request);
    ///         }
    ///         Some(Term::tuple([Term::atom("ok"), Term::from(self.alive.len() as i64)]))
    ///     }
    ///
    ///     async fn info(&mut self, message: Message) {
    ///         if let Message::Down { reference, .. } = message {
    ///             self.alive.remove(&reference);
    ///         }
    ///     }
    /// }
    /// ```
    fn init(&mut self, context: Context) -> impl Future<Output = ()> + Send {
        let _ = context;
        async {}
    }

    /// Answers a call; `None` when the answer is given later with [`Caller::reply`].
    fn call(&mut self, request: Term, caller: Caller) -> impl Future<Output = Option<Term>> + Send;

    /// Takes a cast. Ignored by default.
    fn cast(&mut self, request: Term) -> impl Future<Output = ()> + Send {
        let _ = request;
        async {}
    }

    /// Takes anything else: plain messages, exit signals, and `DOWN`s of what the [`Context`] monitors. Ignored by
    /// default.
    fn info(&mut self, message: Message) -> impl Future<Output = ()> + Send {
        let _ = message;
        async {}
    }
}

/// A server that is a function from request to answer.
pub(crate) struct Handler<F>(pub(crate) F);

impl<F, R> Server for Handler<F>
where
    F: FnMut(Term) -> R + Send + 'static,
    R: Future<Output = Term> + Send,
{
    async fn call(&mut self, request: Term, _caller: Caller) -> Option<Term> {
        Some((self.0)(request).await)
    }
}

/// Runs until the node shuts down.
pub(crate) async fn run(mut mailbox: Mailbox, mut server: impl Server) {
    server.init(Context::of(&mailbox)).await;
    while let Some(message) = mailbox.recv().await {
        match Request::from_message(message, &mailbox) {
            Request::Call(request, caller) => {
                if let Some(reply) = server.call(request, caller.clone()).await
                    && let Err(error) = caller.reply(reply).await
                {
                    // That a caller has gone is its own affair; an answer that nobody can be sent is a fault here.
                    if error.is_unsendable() {
                        tracing::warn!(caller = ?caller.pid(), %error, "an answer cannot be sent");
                    } else {
                        tracing::debug!(caller = ?caller.pid(), %error, "an answer was not sent");
                    }
                }
            }
            Request::Cast(request) => server.cast(request).await,
            Request::Info(message) => server.info(message).await,
        }
    }
}
