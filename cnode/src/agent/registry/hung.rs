//! Registrations of a VM that does not answer its agent: the mesh has them as critical until it does.

use std::time::Duration;

use futures::future::join_all;
use tracing::{info, warn};

use super::{Owner, Phase, Registry, answer};

impl Registry {
    /// What this connection has registered hangs, for so long at least, or does not any more. What the mesh did not
    /// take is told again by the next call.
    pub(in crate::agent) async fn mark_hung(&self, owner: Owner, silent: Option<Duration>) {
        let text = silent.map(|silent| {
            format!(
                "the VM has not answered its agent for {} ms: it hangs or is stopped",
                silent.as_millis()
            )
        });
        let ids: Vec<String> = {
            let state = self.lock();
            let others = state.ids.iter().filter(|(_, entry)| {
                entry.owner == owner.id && entry.phase == Phase::Live && entry.hung != text.is_some()
            });
            others.map(|(id, _)| id.clone()).collect()
        };
        let marks = ids.iter().map(|id| self.mark(owner, id, text.as_deref()));
        join_all(marks).await;
    }

    async fn mark(&self, owner: Owner, id: &str, hung: Option<&str>) {
        self.local.set_hung(id, owner.id, hung.is_some());
        if let Err(refusal) = answer(self.mesh.set_critical(id, hung)).await {
            warn!(id, cause = %refusal.cause, text = refusal.text, "the mesh does not take how its VM is, trying on");
            return;
        }
        if let Some(entry) = self.lock().ids.get_mut(id)
            && entry.owner == owner.id
        {
            entry.hung = hung.is_some();
        }
        match hung {
            Some(text) => warn!(id, client = owner.id, text, "does not pass any more"),
            None => info!(id, client = owner.id, "its VM answers again, it passes"),
        }
    }
}
