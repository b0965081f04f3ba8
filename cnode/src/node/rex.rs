//! The process `rex`, which serves what `rpc` does not do by spawn requests, and C nodes that use `ei_rpc`.
//!
//! A call is a `gen_server:call` of `{call | block_call, Module, Function, Args, GroupLeader}`; a C node sends
//! `{From, {call, ...}}` and awaits `{rex, Result}` (`rpc.erl` in kernel, `ei_rpc` in erl_interface). Each call runs
//! in a process of its own, block calls included.

use std::sync::Arc;

use meshx_etf::{Atom, Term};

use super::address::Address;
use super::call::{Caller, Request};
use super::error::SendError;
use super::exposed::Raised;
use super::inner::Inner;
use super::mailbox::{Mailbox, Message};
use super::spawned::{self, Call, UNSENDABLE_RESULT};

/// Runs until the node shuts down.
pub(crate) async fn run(mut mailbox: Mailbox) {
    let rex = Rex(Arc::clone(mailbox.inner()));
    while let Some((message, bytes, peer)) = mailbox.recv_from().await {
        // What a message says of its sender is the word of the peer that it comes from.
        let asked = (peer.unwrap_or_else(|| rex.0.name.clone()), bytes);
        match Request::from_message(message, &mailbox) {
            Request::Call(request, caller) => {
                if let Some(reply) = rex.call(request, &caller, &asked) {
                    answer(&caller, reply).await;
                }
            }
            Request::Cast(request) => rex.cast(request, &asked),
            Request::Info(message) => rex.info(message, &asked),
        }
    }
}

/// Who a function that is to run counts for, and the bytes of the request.
type Asked = (Atom, usize);

struct Rex(Arc<Inner>);

impl Rex {
    /// What to answer at once.
    fn call(&self, request: Term, caller: &Caller, (peer, bytes): &Asked) -> Option<Term> {
        let Some(call) = labelled(request, &["call", "block_call"]) else {
            return Some(badrpc(Term::atom("badarg")));
        };
        let Some(slot) = self.0.slot(peer, *bytes) else {
            return Some(badrpc(Term::atom("system_limit")));
        };
        let (inner, caller) = (Arc::clone(&self.0), caller.clone());
        self.0.spawn(async move {
            let result = apply(&inner, call).await;
            answer(&caller, result).await;
            drop(slot);
        });
        None
    }

    fn cast(&self, request: Term, (peer, bytes): &Asked) {
        let Some(call) = labelled(request, &["cast", "block_cast"]) else {
            return;
        };
        if let Some(slot) = self.0.slot(peer, *bytes) {
            let inner = Arc::clone(&self.0);
            self.0.spawn(async move {
                apply(&inner, call).await;
                drop(slot);
            });
        }
    }

    fn info(&self, message: Message, (peer, bytes): &Asked) {
        let Message::Term {
            term: Term::Tuple(parts),
            ..
        } = message
        else {
            return;
        };
        let Ok([Term::Pid(from), request]) = <[Term; 2]>::try_from(parts) else {
            return;
        };
        let Some(call) = labelled(request, &["call"]) else {
            return;
        };
        let Some(slot) = self.0.slot(peer, *bytes) else {
            return;
        };
        let inner = Arc::clone(&self.0);
        self.0.spawn(async move {
            let result = apply(&inner, call).await;
            let Some(own) = inner.processes.by_name("rex") else {
                return;
            };
            let to = Address::Pid(from);
            let message = |result| Term::tuple([Term::atom("rex"), result]);
            let sent = inner.reply(&own.pid, &to, &message(result)).await;
            if let Some(instead) = unsent(sent) {
                unsent(inner.reply(&own.pid, &to, &message(instead)).await);
            }
            drop(slot);
        });
    }
}

/// Answers a call, be it that the answer cannot be sent.
async fn answer(caller: &Caller, result: Term) {
    if let Some(instead) = unsent(caller.reply(result).await) {
        unsent(caller.reply(instead).await);
    }
}

/// What to answer when that which was to be answered cannot be sent.
fn unsent(sent: Result<(), SendError>) -> Option<Term> {
    let error = sent.err()?;
    if !error.is_unsendable() {
        tracing::debug!(%error, "an answer was not sent");
        return None;
    }
    tracing::warn!(%error, "an answer cannot be sent");
    Some(exit(Term::tuple([Term::atom(UNSENDABLE_RESULT), Term::list([])])))
}

/// `{Label, Module, Function, Args, _}`.
fn labelled(request: Term, labels: &[&str]) -> Option<Call> {
    let Term::Tuple(mut parts) = request else {
        return None;
    };
    let label = parts.first().and_then(Term::as_atom)?;
    if parts.len() != 5 || !labels.contains(&label) {
        return None;
    }
    parts.truncate(4);
    spawned::of_terms(parts.split_off(1)).ok()
}

/// What `rex` answers: the value, what was thrown, or `{badrpc, {'EXIT', Reason}}`.
async fn apply(inner: &Arc<Inner>, call: Call) -> Term {
    let reason = match spawned::apply_alone(inner, call).await {
        Ok(value) | Err((Raised::Throw(value), _)) => return value,
        Err((Raised::Exit(reason), _)) => reason,
        Err((Raised::Error(reason), stack)) => Term::tuple([reason, stack]),
    };
    exit(reason)
}

fn exit(reason: Term) -> Term {
    badrpc(Term::tuple([Term::atom("EXIT"), reason]))
}

fn badrpc(reason: Term) -> Term {
    Term::tuple([Term::atom("badrpc"), reason])
}
