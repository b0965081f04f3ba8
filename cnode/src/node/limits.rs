//! Every bound on what a peer can make a node spend.

use std::time::Duration;

/// Bounds on what peers control. All of them hold for every node; set them with
/// [`NodeBuilder::limits`](super::NodeBuilder::limits).
///
/// ```
/// use meshx::node::{Limits, Node};
///
/// let limits = Limits { message_bytes: 1 << 20, spawned_per_peer: 10, ..Limits::default() };
/// let builder = Node::builder("search@h3").limits(limits);
/// # drop(builder);
/// ```
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest message taken from or sent to a peer, in bytes of the external term format and after fragments
    /// were put together. A larger one from a peer ends its connection. Default 128 MiB.
    pub message_bytes: usize,
    /// Depth, element counts and sizes within a received term.
    pub terms: meshx_etf::Limits,
    /// Connections at one time, in both directions together. Further ones are refused. Default 1,024.
    pub connections: usize,
    /// Accepted connections whose handshake is not done yet. Beyond that the oldest of whoever has most is closed; one
    /// peer has at most three quarters. At least 1, whatever is set. Default 256: a cluster that comes back dials at once.
    pub handshakes: usize,
    /// Time for a whole handshake, in which no single peer can hold a slot longer. Default 7 s, as in OTP.
    pub handshake_time: Duration,
    /// Messages in one mailbox. A message that finds it full is dropped and counted, and so is an exit signal of a
    /// peer that none of the mailbox's own links brought. Default 100,000.
    pub mailbox_messages: usize,
    /// Encoded bytes in one mailbox; a message that finds it empty is always taken. Default 256 MiB.
    pub mailbox_bytes: usize,
    /// Links and monitors that one peer may hold on this node. One more ends its connection. Default 65,536.
    pub watches_per_connection: usize,
    /// Bytes that wait to be written to one peer; senders wait for room. Default 1 MiB, as a BEAM's busy limit.
    /// A message takes at most a quarter of it, so that a large one leaves room for others.
    pub send_queue_bytes: usize,
    /// Bytes of answers to a peer's calls that wait to be written to it. A server waits at most
    /// [`Limits::reply_wait`] for room. Default 64 MiB.
    pub reply_queue_bytes: usize,
    /// How long a server waits for a caller that does not read its answers; then that connection ends.
    /// Default 5 s.
    pub reply_wait: Duration,
    /// Bytes of signals that a peer's own signals caused and that it does not read. More ends its connection.
    /// Default 4 MiB.
    pub answer_queue_bytes: usize,
    /// Bytes of exit signals and `DOWN`s that the ends of processes cause at a peer and that it does not read. More
    /// ends its connection. Default 64 MiB.
    pub notice_queue_bytes: usize,
    /// Processes that peers have started here and that run: by spawn requests, `erpc` and `rpc`. Further ones are
    /// refused (`system_limit`). Default 10,000.
    pub spawned_processes: usize,
    /// As [`Limits::spawned_processes`], for one peer. Default 1,000.
    pub spawned_per_peer: usize,
    /// Bytes of the requests of one peer whose processes run, or whose results wait to be written to it; further ones
    /// are refused as above. One that finds none running is always taken. Default 128 MiB.
    pub spawned_bytes_per_peer: usize,
    /// Messages that a peer may send in fragments at the same time; a BEAM sends one for each of its processes that
    /// is sending. Default 1,024.
    pub fragmented_messages: usize,
    /// Bytes of all of a peer's messages in fragments that are not complete. Default 256 MiB.
    pub reassembly_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 128 << 20,
            terms: meshx_etf::Limits::default(),
            connections: 1024,
            handshakes: 256,
            handshake_time: Duration::from_secs(7),
            mailbox_messages: 100_000,
            mailbox_bytes: 256 << 20,
            watches_per_connection: 65_536,
            send_queue_bytes: 1 << 20,
            reply_queue_bytes: 64 << 20,
            reply_wait: Duration::from_secs(5),
            answer_queue_bytes: 4 << 20,
            notice_queue_bytes: 64 << 20,
            spawned_processes: 10_000,
            spawned_per_peer: 1000,
            spawned_bytes_per_peer: 128 << 20,
            fragmented_messages: 1024,
            reassembly_bytes: 256 << 20,
        }
    }
}
