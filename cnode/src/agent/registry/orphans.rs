//! Links that an earlier process of this agent holds for what is not registered any more.
//!
//! The control connection had ended before this process served: within the time that its client has to come back, or
//! while nobody served. Nobody else knows of it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tracing::info;

use super::Registry;
use crate::{
    agent::takeover::{Order, ShownLink},
    proxy::{cause::Cause, links::Purpose},
};

/// Orders in a row, and the pause after them: they wait in a queue with an end.
const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);

impl Registry {
    /// A predecessor has come with these links. Those of what is not registered are cut, unless it is registered again
    /// by the time that clients have for that.
    pub(in crate::agent) fn cut_orphans_later(self: &Arc<Self>, links: &[ShownLink]) {
        let orphans = self.orphans(links);
        if orphans.is_empty() {
            return;
        }
        let (registry, reclaim) = (Arc::downgrade(self), self.reclaim);
        tokio::spawn(async move {
            tokio::time::sleep(reclaim).await;
            for (at, (id, cause)) in orphans.into_iter().enumerate() {
                if at % AT_ONCE == AT_ONCE - 1 {
                    tokio::time::sleep(PAUSE).await;
                }
                let Some(registry) = registry.upgrade() else {
                    return;
                };
                if registry.has(&id) {
                    continue;
                }
                info!(
                    id,
                    "the links that a predecessor holds for it end: it was not registered again"
                );
                let text = format!("{id} was not registered again");
                registry
                    .predecessors
                    .order(&Order::CutInstance { id, cause, text });
            }
        });
    }

    /// What these links are of and nobody has registered, and why they are to end.
    fn orphans(&self, links: &[ShownLink]) -> BTreeMap<String, Cause> {
        let mut orphans = BTreeMap::new();
        for ShownLink { link, .. } in links {
            let cause = match link.info.purpose {
                Purpose::Dist => Cause::NoSuchNode,
                Purpose::Rpc | Purpose::Tcp => Cause::NoSuchService,
            };
            let gone = link.info.instances.iter().filter(|id| !self.has(id));
            orphans.extend(gone.map(|id| (id.clone(), cause)));
        }
        orphans
    }

    fn has(&self, id: &str) -> bool {
        self.local.by_id(id).is_some() || self.local.session(id).is_some()
    }
}
