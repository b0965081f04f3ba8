//! What a node tells about its connections.

use std::time::Duration;

/// Something that happened to a connection. See [`Node::events`](super::Node::events).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeEvent {
    /// A connection stands.
    Up {
        /// The other node.
        node: String,
        /// Who opened it.
        direction: Direction,
        /// The SPIFFE URI that the agent verified for it; none over a plain EPMD, and behind a foreign sidecar.
        identity: Option<String>,
    },
    /// A connection ended.
    Down {
        /// The other node.
        node: String,
        /// Why.
        reason: DownReason,
    },
    /// The EPMD that this node was registered with is gone, so it cannot be found. Connections that stand are not
    /// touched, and it registers again by itself.
    RegistrationLost,
    /// It is registered again.
    RegisteredAgain,
    /// A tick came: the peer lives, and had nothing else to say.
    Tick {
        /// The other node.
        node: String,
        /// Ticks that came on this connection so far.
        received: u64,
    },
}

/// Who opened a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// This node dialled.
    Outbound,
    /// The other node dialled.
    Inbound,
}

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DownReason {
    /// The peer closed it, or died.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing came for the tick time.
    #[error("nothing came for {0:?} (net_ticktime)")]
    Silent(Duration),
    /// The peer took no bytes for the tick time.
    #[error("the peer took no bytes for {0:?} (net_ticktime)")]
    Stalled(Duration),
    /// The peer sent what the protocol does not allow.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// The peer passed a limit.
    #[error("limit {name} of {value} passed")]
    Limit {
        /// The field of [`Limits`](super::Limits).
        name: &'static str,
        /// Its value.
        value: usize,
    },
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(String),
    /// The mesh no longer allows it, or its identity is gone.
    #[error("cut by the mesh: {cause}: {text}")]
    Cut {
        /// One word; the causes are those of docs/mesh-protocol.md.
        cause: String,
        /// The reason in words.
        text: String,
    },
    /// This node disconnected.
    #[error("disconnected by this node")]
    Disconnected,
    /// The peer connected anew and said that this connection was dead.
    #[error("replaced by a newer connection")]
    Replaced,
}

/// One connection, as it is at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerInfo {
    /// The other node.
    pub node: String,
    /// Who opened it.
    pub direction: Direction,
    /// Whether the other node is hidden.
    pub hidden: bool,
    /// The SPIFFE URI that the agent verified for it; none over a plain EPMD, and behind a foreign sidecar.
    pub identity: Option<String>,
    /// Bytes read, handshake not counted.
    pub bytes_in: u64,
    /// Bytes written, handshake not counted.
    pub bytes_out: u64,
    /// Ticks that came.
    pub ticks_in: u64,
    /// Ticks sent.
    pub ticks_out: u64,
}
