//! Functions of other nodes, called as `erpc:call/5` does it.
//!
//! The function runs in a process of its own, `erpc:execute_call/4`, which the caller starts with a spawn request
//! and monitors; its outcome is the exit reason (`erpc.erl` in kernel, OTP 23 and later):
//!
//! | Exit reason | Outcome |
//! |---|---|
//! | `{Ref, return, Value}` | a result |
//! | `{Ref, throw, Value}`, `{Ref, exit, Reason}` | the function threw or exited |
//! | `{Ref, error, Reason, Stack}` | the function raised an error |
//! | anything else | the process was killed, or never ran |

use std::time::Duration;

use meshx_etf::{Atom, Reference, Term};

use super::address::Address;
use super::call::ended;
use super::error::{CallError, RpcError, SendError};
use super::mailbox::{Mailbox, Message, SpawnOptions};

/// A call under way.
struct Call {
    mailbox: Mailbox,
    node: String,
    mfa: String,
    /// Marks the outcome as that of this call.
    mark: Reference,
}

pub(crate) async fn call(
    mailbox: Mailbox,
    node: &str,
    module: &str,
    function: &str,
    args: Vec<Term>,
    timeout: Duration,
) -> Result<Term, RpcError> {
    let mark = mailbox.inner().processes.make_reference();
    let mfa = format!("{module}:{function}/{}", args.len());
    let call = Call {
        mailbox,
        node: node.to_owned(),
        mfa,
        mark,
    };
    let outcome = tokio::time::timeout(timeout, call.run(module, function, args)).await;
    outcome.map_err(|_| CallError::Timeout(timeout))?
}

impl Call {
    async fn run(mut self, module: &str, function: &str, args: Vec<Term>) -> Result<Term, RpcError> {
        let mark = Term::from(self.mark.clone());
        let args = vec![mark, Term::atom(module), Term::atom(function), Term::List(args)];
        let options = SpawnOptions::new().monitor();
        let id = self
            .mailbox
            .spawn_request(&self.node, "erpc", "execute_call", args, options)
            .await;
        let id = id.map_err(CallError::Send)?;
        loop {
            match self.mailbox.recv().await {
                None => return Err(CallError::NodeDown.into()),
                Some(Message::Spawned {
                    reference,
                    result: Err(reason),
                }) if reference == id => {
                    if reason.as_atom() == Some("noconnection") {
                        return Err(CallError::Disconnected(self.node).into());
                    }
                    return Err(RpcError::NotStarted {
                        node: self.node,
                        mfa: self.mfa,
                        reason,
                    });
                }
                Some(Message::Down {
                    reference,
                    target,
                    reason,
                }) if reference == id => {
                    return self.outcome(&target, reason);
                }
                Some(_) => {}
            }
        }
    }

    fn outcome(self, target: &Address, reason: Term) -> Result<Term, RpcError> {
        let mfa = self.mfa;
        let parts = match reason {
            Term::Tuple(parts) => parts,
            other => {
                return Err(match ended(target, other) {
                    CallError::Exit(reason) => RpcError::Exit { mfa, reason },
                    lost => RpcError::Call(lost),
                });
            }
        };
        let is_ours = parts.first().and_then(Term::as_reference) == Some(&self.mark);
        let class = parts
            .get(1)
            .and_then(Term::as_atom)
            .unwrap_or_default()
            .to_owned();
        if !is_ours {
            return Err(RpcError::Exit {
                mfa,
                reason: Term::Tuple(parts),
            });
        }
        let mut parts = parts.into_iter().skip(2);
        let first = parts
            .next()
            .unwrap_or_else(|| Term::Atom(Atom::from("undefined")));
        match class.as_str() {
            "return" => Ok(first),
            "throw" => Err(RpcError::Throw { mfa, value: first }),
            "error" => {
                let stack = parts.next().unwrap_or_else(|| Term::List(Vec::new()));
                Err(RpcError::Error {
                    mfa,
                    reason: first,
                    stack,
                })
            }
            _ => Err(RpcError::Exit { mfa, reason: first }),
        }
    }
}

impl From<SendError> for RpcError {
    fn from(error: SendError) -> Self {
        Self::Call(CallError::Send(error))
    }
}
