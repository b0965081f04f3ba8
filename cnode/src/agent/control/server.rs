//! Accepts control connections. A slow, broken or hostile client is nobody else's concern.

use std::{collections::HashMap, io, pin::pin, sync::Arc, time::Duration};

use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    commands::{Client, Context},
    heartbeat::Heart,
    idle::Idle,
    message::{event, map, text},
    session::{self, Parked},
    slots::Slots,
    watches::Watches,
};
use crate::{
    agent::{
        paths,
        registry::{MESH_TIME, Owner},
        trust::Peer,
    },
    mesh::ServiceName,
};

/// Pause after the system could not give a connection (no descriptor left): others may close meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long clients may take to come between two frames when they are frozen: a registration that waits for the mesh
/// is through by then. Who has not is dropped.
pub const FREEZE_TIME: Duration = MESH_TIME.saturating_add(Duration::from_secs(1));

/// The clients of an agent, while none of them is served.
pub(in crate::agent) struct Clients {
    pub(in crate::agent) parked: Vec<Parked>,
    /// The id of the next one's connection.
    pub(in crate::agent) next_id: u64,
    /// How long there may be none.
    pub(in crate::agent) idle: Idle,
    /// It was that long: the agent is to end.
    pub(in crate::agent) unused: bool,
    slots: Slots,
}

impl Clients {
    /// None yet; connections are counted from `next_id`.
    pub(in crate::agent) fn new(next_id: u64) -> Self {
        Self {
            parked: Vec::new(),
            next_id,
            idle: Idle::new(None),
            unused: false,
            slots: Slots::new(paths::uid()),
        }
    }

    /// A client of a predecessor of this process.
    ///
    /// # Errors
    /// When the system does not know who it is, or there are too many.
    pub(in crate::agent) fn resume(
        &mut self,
        stream: UnixStream,
        id: u64,
        greeted: bool,
        (watches, heartbeat): (HashMap<String, Vec<ServiceName>>, Option<Duration>),
        context: &Context,
    ) -> io::Result<Arc<Client>> {
        let peer = Peer::of(&stream)?;
        let slot = self.slots.take(peer.uid).map_err(io::Error::other)?;
        let client = Client::resume(Owner { id, peer }, Watches::of(watches), Heart::new(heartbeat));
        let parked = Parked::new(stream, client, greeted, slot, context);
        let client = parked.client.clone();
        self.parked.push(parked);
        Ok(client)
    }
}

/// Serves until `stop` fires, then until every session has given up what it registered; or until `freeze` fires, and
/// gives the clients back; or until nobody has used the agent for as long as `clients` says.
pub(in crate::agent) async fn serve(
    listener: Arc<UnixListener>,
    context: Arc<Context>,
    mut clients: Clients,
    stop: CancellationToken,
    freeze: CancellationToken,
) -> Clients {
    let all = stop.child_token();
    let mut sessions = JoinSet::new();
    let run = |parked| session::run(parked, context.clone(), all.child_token(), freeze.clone());
    for parked in clients.parked.drain(..) {
        sessions.spawn(run(parked));
    }
    let slots = clients.slots.clone();
    let used = || !slots.is_empty() || context.is_used();
    loop {
        let accepted = tokio::select! {
            // In this order: the last look before the agent ends unused is at who waits to be accepted.
            biased;
            () = stop.cancelled() => break,
            () = freeze.cancelled() => break,
            Some(ended) = sessions.join_next() => {
                clients.parked.extend(ended.ok().flatten());
                clients.idle.touch();
                continue;
            }
            accepted = listener.accept() => accepted,
            () = clients.idle.over(used) => {
                clients.unused = true;
                break;
            }
        };
        clients.idle.touch();
        match accepted.and_then(|(stream, _)| Ok((Peer::of(&stream)?, stream))) {
            Ok((peer, stream)) => match clients.slots.take(peer.uid) {
                Ok(slot) => {
                    let client = Client::new(Owner {
                        id: clients.next_id,
                        peer,
                    });
                    clients.next_id += 1;
                    sessions.spawn(run(Parked::new(stream, client, false, slot, &context)));
                }
                Err(refusal) => {
                    if context.log.admit() {
                        warn!(uid = peer.uid, pid = peer.pid, cause = %refusal.cause, text = refusal.text, "client refused");
                    }
                    turn_away(&stream, &refusal.text);
                }
            },
            Err(error) if is_the_clients(&error) => debug!(%error, "a client left before it was accepted"),
            Err(error) => {
                warn!(%error, "cannot accept control connections, trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let mut late = pin!(tokio::time::sleep(FREEZE_TIME));
    loop {
        tokio::select! {
            ended = sessions.join_next() => match ended {
                Some(ended) => clients.parked.extend(ended.ok().flatten()),
                None => return clients,
            },
            () = &mut late, if !all.is_cancelled() => {
                let left = sessions.len();
                warn!(left, "clients were not between two frames within {} s: dropped", FREEZE_TIME.as_secs());
                all.cancel();
            }
        }
    }
}

/// Says why, if the socket takes it at once, and closes.
fn turn_away(stream: &UnixStream, reason: &str) {
    if let Ok(frame) = event("protocol_error", map([("text", text(reason))])) {
        let _ = stream.try_write(&frame);
    }
}

fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}
