//! Accepts control connections. A slow, broken or hostile client is nobody else's concern.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::net::{UnixListener, UnixStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::{
    commands::Context,
    message::{event, map, text},
    session,
    slots::Slots,
};
use crate::agent::{paths, registry::Owner, trust::Peer};

/// Pause after the system could not give a connection (no descriptor left): others may close meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` fires, then until every session has given up what it registered.
pub(in crate::agent) async fn serve(listener: UnixListener, context: Arc<Context>, stop: CancellationToken) {
    let slots = Slots::new(paths::uid());
    let sessions = TaskTracker::new();
    let next_id = AtomicU64::new(1);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted.and_then(|(stream, _)| Ok((Peer::of(&stream)?, stream))) {
            Ok((peer, stream)) => match slots.take(peer.uid) {
                Ok(slot) => {
                    let owner = Owner {
                        id: next_id.fetch_add(1, Ordering::Relaxed),
                        peer,
                    };
                    let session = session::run(stream, owner, context.clone(), stop.child_token());
                    sessions.spawn(async move {
                        session.await;
                        drop(slot);
                    });
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
    sessions.close();
    sessions.wait().await;
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
