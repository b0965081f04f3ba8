//! An id between its reservation and its life.

use std::sync::Arc;

use super::{Phase, Registry, carrier::Carried};
use crate::mesh::Kept;

/// A reserved id; free again when dropped before it is live.
pub(super) struct Pending {
    registry: Arc<Registry>,
    id: String,
}

impl Pending {
    pub(super) fn new(registry: Arc<Registry>, id: String) -> Self {
        Self { registry, id }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// False when the owner has gone meanwhile; what the instance has for itself ends then.
    pub(super) fn to_live(&self, owner: u64, kept: Kept, carried: Carried) -> bool {
        let mut guard = self.registry.lock();
        let state = &mut *guard;
        match state.ids.get_mut(&self.id) {
            Some(entry) if state.owners.contains_key(&owner) => {
                entry.phase = Phase::Live;
                entry.kept = Some(kept);
                entry.carried = Some(carried);
                true
            }
            _ => false,
        }
    }
}

impl Pending {
    /// Takes it out of the mesh again, then frees the id.
    pub(super) async fn withdraw(self) {
        self.registry.take_out_of_mesh(&self.id).await;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut state = self.registry.lock();
        if state
            .ids
            .get(&self.id)
            .is_some_and(|entry| entry.phase == Phase::Pending)
        {
            state.forget(&self.id);
        }
    }
}
