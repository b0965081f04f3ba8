//! Requests for links, monitors and processes at a peer.
//!
//! A request waits for room like any message, and enters the connection's [`Watch`] in the moment in which it is queued.
//! So whoever gives up waiting leaves nothing behind, and what the end of its process sends comes behind it.

use meshx_dist::control::Control;
use meshx_etf::{Pid, Reference, Term};

use super::connection::Connection;
use super::error::SendError;
use super::inner::disconnected;
use super::outbound::{Origin, QueueError, Reserved, Room};
use super::watch::{Outgoing, Spawning, Watch};
use super::wire;

/// What a request leaves in the [`Watch`].
pub(crate) enum Entry {
    /// (here, there)
    Link(Pid, Pid),
    Monitor(Reference, Outgoing),
    Spawn(Reference, Spawning),
}

impl Entry {
    /// A link that came about while this request waited: the peer's own, or that of another request.
    fn is_there(&self, watch: &Watch) -> bool {
        matches!(self, Self::Link(local, remote) if watch.is_linked(local, remote))
    }

    fn enter(self, watch: &mut Watch) {
        match self {
            Self::Link(local, remote) => drop(watch.link(&local, remote)),
            Self::Monitor(reference, outgoing) => watch.monitor(reference, outgoing),
            Self::Spawn(id, spawning) => watch.spawn(id, spawning),
        }
    }
}

/// Sends a request, waiting for room. An error says that it was not sent, and is in no [`Watch`].
pub(crate) async fn ask(
    connection: &Connection,
    control: Control,
    payload: Option<&Term>,
    entry: Entry,
) -> Result<(), SendError> {
    let closed = |_| disconnected(connection);
    let outbound = &connection.outbound;
    let waiting = wire::encode(connection, control, payload, |origin, frames| {
        Ok(match outbound.try_reserve(Room::Send, frames.len())? {
            Some(reserved) => {
                queue(connection, reserved, origin, frames, entry)?;
                None
            }
            None => Some((entry, origin, std::mem::take(frames))),
        })
    });
    if let Some((entry, origin, mut frames)) = waiting?.map_err(closed)? {
        let reserved = outbound.reserve(Room::Send, frames.len()).await;
        queue(connection, reserved.map_err(closed)?, origin, &mut frames, entry).map_err(closed)?;
    }
    Ok(())
}

fn queue(
    connection: &Connection,
    reserved: Reserved<'_>,
    origin: Origin,
    frames: &mut Vec<u8>,
    entry: Entry,
) -> Result<(), QueueError> {
    // Neither an answer nor the end of the process finds one without the other.
    let mut watch = connection.watch();
    if !entry.is_there(&watch) {
        connection.outbound.push_reserved(reserved, origin, frames)?;
    }
    entry.enter(&mut watch);
    Ok(())
}
