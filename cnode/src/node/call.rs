//! Calls in the manner of `gen_server`: asking, and answering.
//!
//! A request is `{'$gen_call', {Pid, Tag}, Request}`, its answer `{Tag, Reply}`. The tag is whatever the caller
//! chose; since OTP 24 it is `[alias | Ref]`, and the answer then goes to that alias instead of the pid, so that
//! an answer that comes too late reaches nobody (`gen:reply/2` in stdlib).

use std::sync::Arc;
use std::time::Duration;

use meshx_etf::{Atom, Pid, Reference, Term};

use super::address::Address;
use super::error::{CallError, SendError};
use super::inner::Inner;
use super::mailbox::{Mailbox, Message};

/// Whom an answer goes to. It can be kept and answered later, from any task.
#[derive(Clone)]
pub struct Caller {
    inner: Arc<Inner>,
    /// The process that answers.
    own: Pid,
    pid: Pid,
    tag: Term,
}

impl Caller {
    /// The calling process.
    #[must_use]
    pub fn pid(&self) -> &Pid {
        &self.pid
    }

    /// Answers, as `gen_server:reply/2` does.
    ///
    /// # Errors
    /// [`SendError`]: the caller's node is gone, or the answer cannot be encoded.
    pub async fn reply(&self, reply: Term) -> Result<(), SendError> {
        let to = match alias(&self.tag) {
            Some(reference) => Address::Alias(reference.clone()),
            None => Address::Pid(self.pid.clone()),
        };
        let message = Term::Tuple(vec![self.tag.clone(), reply]);
        self.inner.reply(&self.own, &to, &message).await
    }
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Caller").field(&self.pid).finish()
    }
}

/// The alias in a tag: `[alias | Ref]`, or `[[alias | Ref] | Anything]`.
fn alias(tag: &Term) -> Option<&meshx_etf::Reference> {
    match tag {
        Term::ImproperList(head, tail) => match (&**head, &**tail) {
            ([Term::Atom(atom)], Term::Reference(reference)) if atom.as_str() == "alias" => Some(reference),
            ([inner @ Term::ImproperList(..), ..], _) => only_alias(inner),
            _ => None,
        },
        Term::List(items) => items.first().and_then(only_alias),
        _ => None,
    }
}

fn only_alias(tag: &Term) -> Option<&meshx_etf::Reference> {
    match tag {
        Term::ImproperList(head, tail) => match (&**head, &**tail) {
            ([Term::Atom(atom)], Term::Reference(reference)) if atom.as_str() == "alias" => Some(reference),
            _ => None,
        },
        _ => None,
    }
}

/// What a server receives, told apart.
#[derive(Debug)]
pub enum Request {
    /// `gen_server:call`: an answer is awaited.
    Call(Term, Caller),
    /// `gen_server:cast`.
    Cast(Term),
    /// Anything else.
    Info(Message),
}

impl Request {
    /// Sorts a message that `mailbox` received.
    #[must_use]
    pub fn from_message(message: Message, mailbox: &Mailbox) -> Self {
        let (from, term) = match message {
            Message::Term { from, term } => (from, term),
            signal => return Self::Info(signal),
        };
        let Term::Tuple(mut parts) = term else {
            return Self::Info(Message::Term { from, term });
        };
        match parts.as_mut_slice() {
            [Term::Atom(label), Term::Tuple(caller), _] if label.as_str() == "$gen_call" => {
                if let [Term::Pid(pid), tag] = caller.as_slice() {
                    let caller = Caller {
                        inner: Arc::clone(mailbox.inner()),
                        own: mailbox.pid().clone(),
                        pid: pid.clone(),
                        tag: tag.clone(),
                    };
                    if let Some(request) = parts.pop() {
                        return Self::Call(request, caller);
                    }
                }
            }
            [Term::Atom(label), _] if label.as_str() == "$gen_cast" => {
                if let Some(request) = parts.pop() {
                    return Self::Cast(request);
                }
            }
            _ => {}
        }
        Self::Info(Message::Term {
            from,
            term: Term::Tuple(parts),
        })
    }
}

/// `gen_server:call` from a process of its own, so that an answer that comes too late finds nobody.
pub(crate) async fn gen_call(
    mut mailbox: Mailbox,
    target: Address,
    request: Term,
    timeout: Duration,
) -> Result<Term, CallError> {
    tokio::time::timeout(timeout, ask(&mut mailbox, target, request, None))
        .await
        .map_err(|_| CallError::Timeout(timeout))?
}

/// `gen_server:call` from a process that goes on: the answer comes by an alias that ends with the call.
pub(crate) async fn gen_call_from(
    mailbox: &mut Mailbox,
    target: Address,
    request: Term,
    timeout: Duration,
) -> Result<Term, CallError> {
    let alias = mailbox.reply_alias();
    let mut call = ByAlias {
        mailbox,
        alias,
        answered: false,
    };
    let asked = ask(call.mailbox, target, request, Some(&call.alias));
    let answer = tokio::time::timeout(timeout, asked).await;
    call.answered = matches!(answer, Ok(Ok(_)));
    answer.unwrap_or(Err(CallError::Timeout(timeout)))
}

/// Ends an alias when the call is over, or given up, also by a caller who drops it.
struct ByAlias<'a> {
    mailbox: &'a mut Mailbox,
    alias: Reference,
    answered: bool,
}

impl Drop for ByAlias<'_> {
    fn drop(&mut self) {
        self.mailbox.unalias(&self.alias);
        if !self.answered {
            // An answer that has come already waits for nobody any more.
            let tag = alias_tag(&self.alias);
            self.mailbox.discard(|message| is_answer(message, &tag));
        }
    }
}

/// Takes a monitor back when the call is over, or given up.
struct Monitor<'a> {
    mailbox: &'a mut Mailbox,
    reference: Reference,
}

impl Drop for Monitor<'_> {
    fn drop(&mut self) {
        self.mailbox.demonitor(&self.reference);
    }
}

async fn ask(
    mailbox: &mut Mailbox,
    target: Address,
    request: Term,
    alias: Option<&Reference>,
) -> Result<Term, CallError> {
    // Monitoring swallows a failed connection; the caller is to hear of that as what it is.
    mailbox
        .inner()
        .ensure_connected(target.node())
        .await
        .map_err(SendError::from)?;
    let reference = mailbox.monitor(target.clone()).await;
    let Monitor { mailbox, reference } = &mut Monitor { mailbox, reference };
    let tag = match alias {
        Some(alias) => alias_tag(alias),
        None => Term::from(reference.clone()),
    };
    let caller = Term::Tuple(vec![Term::Pid(mailbox.pid().clone()), tag.clone()]);
    let message = Term::Tuple(vec![Term::Atom(Atom::from("$gen_call")), caller, request]);
    mailbox.send(target.clone(), &message).await?;
    let is_end = |message: &Message| {
        is_answer(message, &tag)
            || matches!(message, Message::Down { reference: down, .. } if down == reference)
    };
    match mailbox.recv_where(Duration::MAX, is_end).await {
        Ok(Message::Term {
            term: Term::Tuple(mut parts),
            ..
        }) => Ok(parts.pop().unwrap_or_else(|| Term::atom("undefined"))),
        Ok(Message::Down { reason, .. }) => Err(ended(&target, reason)),
        _ => Err(CallError::NodeDown),
    }
}

/// `[alias | Alias]`.
fn alias_tag(alias: &Reference) -> Term {
    Term::ImproperList([Term::atom("alias")].into(), Box::new(Term::from(alias.clone())))
}

/// Whether a message is `{Tag, Reply}`.
fn is_answer(message: &Message, tag: &Term) -> bool {
    let Message::Term { term, .. } = message else {
        return false;
    };
    term.as_tuple()
        .is_some_and(|parts| parts.len() == 2 && parts.first() == Some(tag))
}

/// The error for a `DOWN` that came instead of an answer.
pub(crate) fn ended(target: &Address, reason: Term) -> CallError {
    match &reason {
        Term::Atom(atom) if atom.as_str() == "noproc" => CallError::NoProcess(target.to_string()),
        Term::Atom(atom) if atom.as_str() == "noconnection" => {
            CallError::Disconnected(target.node().as_str().to_owned())
        }
        _ => CallError::Exit(reason),
    }
}
