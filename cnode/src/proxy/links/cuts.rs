//! Cuts: a link is ended, and the owners of its ends are told why.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::live::Live;
use super::{LinkId, LinkTable, lock};
use crate::proxy::cause::Cause;

/// Cut events that may wait for one control connection; a link is closed all the same.
pub const MAX_CUT_EVENTS: usize = 256;

/// Tells the owner of an end to close a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutEvent {
    /// The link.
    pub link: LinkId,
    /// Why.
    pub cause: Cause,
    /// Why, for people.
    pub text: String,
}

impl LinkTable {
    /// Ends a link: tells the owners of its ends, then stops it. False when there is none, or it was cut before.
    pub fn cut(&self, id: LinkId, cause: Cause, text: &str) -> bool {
        let Some(live) = lock(&self.inner.live).by_id.get(&id).cloned() else {
            return false;
        };
        if live.cut.is_cancelled() {
            return false;
        }
        let event = CutEvent {
            link: id,
            cause,
            text: text.to_owned(),
        };
        {
            let owners = lock(&self.inner.owners);
            for sender in live.info.owners.iter().filter_map(|owner| owners.get(owner)) {
                // A full queue loses only the reason; the link ends either way.
                let _ = sender.try_send(event.clone());
            }
        }
        live.cut.cancel();
        if let Some(count) = self.inner.cuts.get(cause.index()) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        tracing::info!(link = %id, %cause, text, local = live.info.local, remote = live.info.remote, "link cut");
        true
    }

    /// Ends all links of an instance of this agent that is no more; says how many.
    pub fn cut_instance(&self, instance: &str, cause: Cause, text: &str) -> usize {
        let of_instance = |live: &&Arc<Live>| live.info.instances.iter().any(|id| id == instance);
        let links: Vec<LinkId> = lock(&self.inner.live)
            .by_id
            .values()
            .filter(of_instance)
            .map(|live| live.info.id)
            .collect();
        links.into_iter().filter(|id| self.cut(*id, cause, text)).count()
    }

    /// Cuts all links. Says how many.
    pub fn cut_all(&self, cause: Cause, text: &str) -> usize {
        let all: Vec<LinkId> = lock(&self.inner.live).by_id.keys().copied().collect();
        all.into_iter().filter(|id| self.cut(*id, cause, text)).count()
    }

    /// Hands a cut event that another table's link has brought to a control connection of this one.
    pub(crate) fn tell(&self, owner: u64, event: CutEvent) {
        if let Some(sender) = lock(&self.inner.owners).get(&owner) {
            // A full queue loses only the reason; the link ends either way.
            let _ = sender.try_send(event);
        }
    }

    /// The cut events for one control connection, until the receiver is dropped.
    pub fn subscribe(&self, owner: u64) -> mpsc::Receiver<CutEvent> {
        let (sender, receiver) = mpsc::channel(MAX_CUT_EVENTS);
        let mut owners = lock(&self.inner.owners);
        owners.retain(|_, sender| !sender.is_closed());
        owners.insert(owner, sender);
        receiver
    }
}
