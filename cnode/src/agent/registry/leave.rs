//! The ways out: a registration is taken back, its connection ends, or the agent does.

use std::sync::Arc;

use futures::future::join_all;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{Entry, MESH_TIME, Owner, Phase, Registry, State};
use crate::{
    agent::takeover::Order,
    mesh::Instance,
    proxy::{
        cause::{Cause, Refusal},
        gone,
        local::LocalInstance,
    },
};

impl Registry {
    /// Takes away one registration of this connection.
    ///
    /// # Errors
    /// `invalid_request` when it has none of this id.
    pub async fn deregister(self: &Arc<Self>, owner: Owner, id: &str) -> Result<(), Refusal> {
        let leaving = match self.lock().ids.get_mut(id) {
            Some(entry) if entry.owner == owner.id && entry.phase == Phase::Live => {
                entry.phase = Phase::Leaving;
                true
            }
            _ => false,
        };
        if !leaving {
            return Err(
                Cause::InvalidRequest.because(format!("{id:?} is not registered through this connection"))
            );
        }
        self.drop_local(id);
        self.renamed.notify_one();
        self.leave(id).await;
        Ok(())
    }

    /// The agent ends: what is registered goes from the mesh, and nothing more is registered. Live links stay.
    pub async fn leave_mesh(&self) {
        let ids: Vec<String> = {
            let mut state = self.lock();
            state.closing = true;
            let live = state.ids.iter().filter(|(_, entry)| entry.phase == Phase::Live);
            live.map(|(id, _)| id.clone()).collect()
        };
        join_all(ids.iter().map(|id| self.take_out_of_mesh(id))).await;
    }

    /// A control connection has ended: what it registered goes. Says how much that was.
    pub async fn release(self: &Arc<Self>, owner: u64) -> usize {
        let ids: Vec<String> = {
            let mut state = self.lock();
            state.owners.remove(&owner);
            let of_owner = |entry: &&mut Entry| entry.owner == owner && entry.phase == Phase::Live;
            let live = state.ids.iter_mut().filter(|(_, entry)| of_owner(entry));
            live.map(|(id, entry)| {
                entry.phase = Phase::Leaving;
                id.clone()
            })
            .collect()
        };
        self.release_sessions(owner);
        self.cut_links_later(ids.iter().filter_map(|id| self.local.remove(id)).collect());
        self.renamed.notify_one();
        // What is pending takes itself away when it finds its owner gone.
        join_all(ids.iter().map(|id| self.leave(id))).await;
        ids.len()
    }

    /// Takes it away, and its links with it.
    pub(super) fn drop_local(&self, id: &str) {
        if let Some(local) = self.local.remove(id) {
            self.cut_links(&local.instance);
        }
    }

    fn cut_links(&self, instance: &Instance) {
        let Refusal { cause, text } = gone(instance);
        let cut = self.links.cut_instance(&instance.id, cause, &text);
        self.predecessors.order(&Order::CutInstance {
            id: instance.id.clone(),
            cause,
            text,
        });
        if cut > 0 {
            info!(
                id = instance.id,
                links = cut,
                "links of a deregistered instance were cut"
            );
        }
    }

    /// Unless they are registered again by then.
    fn cut_links_later(self: &Arc<Self>, left: Vec<Arc<LocalInstance>>) {
        if left.is_empty() {
            return;
        }
        let (registry, reclaim) = (Arc::downgrade(self), self.reclaim);
        tokio::spawn(async move {
            tokio::time::sleep(reclaim).await;
            let Some(registry) = registry.upgrade() else {
                return;
            };
            for local in left {
                // A successor of this process sees to it when this one comes with its links.
                let ours = !registry.carriers.proxy.is_closed();
                if ours && registry.local.by_id(&local.instance.id).is_none() {
                    registry.cut_links(&local.instance);
                }
            }
        });
    }

    /// It is gone from this agent; the name is free when the mesh has let it go.
    async fn leave(self: &Arc<Self>, id: &str) {
        let (registry, owned) = (self.clone(), id.to_owned());
        let leaving = tokio::spawn(async move {
            let entry = |state: &mut State| state.ids.get_mut(&owned)?.carried.take();
            let carried = entry(&mut registry.lock());
            if let Some(carried) = carried {
                carried.end().await;
            }
            registry.take_out_of_mesh(&owned).await;
            registry.lock().forget(&owned);
            info!(id = owned, "deregistered");
        });
        if timeout(MESH_TIME, leaving).await.is_err() {
            warn!(id, cause = %Cause::NotReady, "the mesh has not answered yet, the name stays reserved");
        }
    }

    /// When the mesh does not take it, its own check of this agent's entries must.
    pub(super) async fn take_out_of_mesh(&self, id: &str) {
        if let Err(error) = self.mesh.deregister(id).await {
            warn!(id, cause = %Cause::NotReady, %error, "could not be deregistered from the mesh");
        }
    }
}
