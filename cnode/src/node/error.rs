//! What can go wrong, by layer. Every error is cheap to clone: all who wait for one connection get the same.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use meshx_dist::handshake::HandshakeError;
use meshx_etf::{EncodeError, Term};

/// Why a node did not start.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The node name is not `name@host`.
    #[error("{0:?} is no node name: name@host wanted, at most 255 characters")]
    InvalidName(String),
    /// No cookie was set.
    #[error("no cookie is set: all nodes of a cluster share one, give the same here")]
    NoCookie,
    /// Ticks must be at most a quarter of the tick time apart, or the peer believes that this node is down.
    #[error(
        "a tick every {tick_interval:?} is too seldom for a net_ticktime of {net_ticktime:?}: at most a quarter of it"
    )]
    TickInterval {
        /// What was asked for.
        tick_interval: Duration,
        /// The tick time that it must fit.
        net_ticktime: Duration,
    },
    /// Plain distribution is not encrypted, so it stays on loopback unless the builder was told otherwise.
    #[error("{0} is not a loopback address, and plain distribution is not encrypted: join through an agent")]
    NotLoopback(std::net::SocketAddr),
    /// The agent, or the EPMD, was not reached or refused.
    #[error("{what}: {reason}")]
    Registration {
        /// What was asked of whom.
        what: String,
        /// What came back.
        reason: String,
    },
    /// The node's own socket could not be made.
    #[error("cannot listen on {at}: {error}")]
    Listen {
        /// The address or path.
        at: String,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// The system has no random numbers.
    #[error("the system gave no random numbers: {0}")]
    Random(String),
}

/// Why there is no connection to a node.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The name is not `name@host`.
    #[error("{0:?} is no node name: name@host wanted")]
    InvalidName(String),
    /// There is no connection, and [`Reconnect::Never`](super::Reconnect::Never) is set.
    #[error("there is no connection to {0}, and this node dials only when it is told to")]
    NotConnected(String),
    /// The agent refused, or the agent at the other end did. The causes are those of docs/mesh-protocol.md.
    #[error("{node} was refused: {cause}: {text}")]
    Refused {
        /// The node that was dialled.
        node: String,
        /// One word, `no_such_node` or `intention_denied` for example.
        cause: String,
        /// The reason in words.
        text: String,
    },
    /// EPMD knows no such node.
    #[error("no node {node} is registered with the epmd at {epmd}")]
    NoSuchNode {
        /// The node that was dialled.
        node: String,
        /// The EPMD that was asked.
        epmd: std::net::SocketAddr,
    },
    /// A socket failed.
    #[error("{node}: {step}: {error}")]
    Io {
        /// The node that was dialled.
        node: String,
        /// What was being done.
        step: &'static str,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// A step did not end in time.
    #[error("{node}: {step} took longer than {after:?}")]
    Timeout {
        /// The node that was dialled.
        node: String,
        /// What was being done.
        step: &'static str,
        /// The time it had.
        after: Duration,
    },
    /// The handshake failed.
    #[error("{node}: {error}")]
    Handshake {
        /// The node that was dialled.
        node: String,
        /// What was wrong with it.
        error: HandshakeError,
    },
    /// Something that was no handshake came.
    #[error("{node}: {text}")]
    Protocol {
        /// The node that was dialled.
        node: String,
        /// What was seen and what was wanted.
        text: String,
    },
    /// [`Limits::connections`](super::Limits::connections) are open.
    #[error("{node}: {max} connections are open, no more are allowed (limit `connections`)")]
    TooManyConnections {
        /// The node that was dialled.
        node: String,
        /// The limit.
        max: usize,
    },
    /// This node has been shut down.
    #[error("this node has shut down")]
    NodeDown,
}

/// Why a message was not sent. A message that was sent may still be lost with its connection, as in Erlang.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// There is no connection, and none could be made.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection ended while the message waited for room.
    #[error("the connection to {0} ended before the message was sent")]
    Disconnected(String),
    /// The term has no encoding.
    #[error("the term cannot be sent: {0}")]
    Term(String),
    /// The message is larger than [`Limits::message_bytes`](super::Limits::message_bytes).
    #[error("a message of {len} bytes, at most {max} are sent (limit `message_bytes`)")]
    TooLarge {
        /// Its bytes on the wire.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The peer does not understand this kind of message.
    #[error("{node} does not understand {what}")]
    Unsupported {
        /// The peer.
        node: String,
        /// The kind of message.
        what: &'static str,
    },
}

impl SendError {
    /// Whether it is the message that cannot be sent, and another one could be.
    pub(crate) const fn is_unsendable(&self) -> bool {
        matches!(self, Self::Term(_) | Self::TooLarge { .. })
    }
}

impl From<EncodeError> for SendError {
    fn from(error: EncodeError) -> Self {
        Self::Term(error.to_string())
    }
}

/// Why a mailbox has no message.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// None came in time.
    #[error("no message within {0:?}")]
    Timeout(Duration),
    /// An exit signal has ended the mailbox; the reason.
    #[error("the mailbox has ended: {0:?}")]
    Ended(Term),
    /// This node has been shut down.
    #[error("this node has shut down")]
    NodeDown,
}

/// Why a call has no result.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The request was not sent: it is safe to call again.
    #[error(transparent)]
    Send(#[from] SendError),
    /// No process has this name there, or it is gone: `noproc`. It is safe to call again.
    #[error("no such process: {0}")]
    NoProcess(String),
    /// The process ended before it answered.
    #[error("the called process ended: {0:?}")]
    Exit(Term),
    /// The connection ended before the answer came. Whether the request was served is unknown.
    #[error("the connection to {0} ended before the answer came")]
    Disconnected(String),
    /// No answer in time. The request may still be served.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// This node has been shut down.
    #[error("this node has shut down")]
    NodeDown,
}

/// Why a remote function gave no result.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// The request did not get there, or the answer did not come back.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The function raised an error (`error:Reason`).
    #[error("{mfa} raised {reason:?}")]
    Error {
        /// Module, function and arity.
        mfa: String,
        /// The reason.
        reason: Term,
        /// The stack trace.
        stack: Term,
    },
    /// The function exited (`exit:Reason`), or was killed.
    #[error("{mfa} exited with {reason:?}")]
    Exit {
        /// Module, function and arity.
        mfa: String,
        /// The reason.
        reason: Term,
    },
    /// The function threw and nobody caught it.
    #[error("{mfa} threw {value:?}")]
    Throw {
        /// Module, function and arity.
        mfa: String,
        /// What was thrown.
        value: Term,
    },
    /// The node refused to start the function.
    #[error("{node} did not start {mfa}: {reason:?}")]
    NotStarted {
        /// The peer.
        node: String,
        /// Module, function and arity.
        mfa: String,
        /// Its reason.
        reason: Term,
    },
}

impl RpcError {
    /// Whether the node has no such function: an error `undef` that the called function itself raised, not one that
    /// it called.
    #[must_use]
    pub fn is_undef(&self) -> bool {
        let Self::Error { mfa, reason, stack } = self else {
            return false;
        };
        let top = match stack {
            Term::List(entries) => entries.first().and_then(Term::as_tuple),
            _ => None,
        };
        let called = match top {
            Some([Term::Atom(module), Term::Atom(function), Term::List(args), ..]) => {
                format!("{}:{}/{}", module.as_str(), function.as_str(), args.len())
            }
            _ => return false,
        };
        reason.as_atom() == Some("undef") && called == *mfa
    }
}
