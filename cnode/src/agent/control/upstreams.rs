//! The upstreams of one control connection: local sockets that lead to services of the mesh.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::proxy::{
    UpstreamHandle,
    cause::{Cause, Refusal},
};

/// Upstreams that one control connection may have open.
pub const UPSTREAMS_PER_CLIENT_MAX: usize = 256;
/// Upstreams that one agent may have open.
pub const UPSTREAMS_MAX: usize = 2048;

/// How many upstreams the agent may still open.
#[derive(Debug, Clone)]
pub(in crate::agent) struct Budget(Arc<Semaphore>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(UPSTREAMS_MAX)))
    }
}

/// Those of one client; all close when it is dropped.
#[derive(Debug)]
pub(super) struct Upstreams {
    /// None once the client has gone: what is opened late closes at once.
    // Held for a look-up or a change, never across an await.
    open: Mutex<Option<HashMap<String, Open>>>,
}

#[derive(Debug)]
struct Open {
    _handle: UpstreamHandle,
    _permit: OwnedSemaphorePermit,
}

impl Upstreams {
    pub(super) fn new() -> Self {
        Self {
            open: Mutex::new(Some(HashMap::new())),
        }
    }

    /// Opens one under this id.
    pub(super) fn open(
        &self,
        id: &str,
        budget: &Budget,
        open: impl FnOnce() -> Result<UpstreamHandle, Refusal>,
    ) -> Result<(), Refusal> {
        let mut guard = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(upstreams) = guard.as_mut() else {
            return Err(Cause::InvalidRequest.because("the connection that asked for it has ended"));
        };
        if upstreams.len() >= UPSTREAMS_PER_CLIENT_MAX {
            return Err(Cause::Limit.because(format!(
                "{UPSTREAMS_PER_CLIENT_MAX} upstreams of this connection, more are not opened \
                 (UPSTREAMS_PER_CLIENT_MAX)"
            )));
        }
        let permit = budget.0.clone().try_acquire_owned().map_err(|_| {
            Cause::Limit.because(format!(
                "{UPSTREAMS_MAX} upstreams are open, more are not opened (UPSTREAMS_MAX)"
            ))
        })?;
        upstreams.insert(
            id.to_owned(),
            Open {
                _handle: open()?,
                _permit: permit,
            },
        );
        Ok(())
    }

    /// False when there is none of this id.
    pub(super) fn close(&self, id: &str) -> bool {
        let mut guard = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        guard.as_mut().and_then(|open| open.remove(id)).is_some()
    }

    pub(super) fn close_all(&self) -> usize {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        open.map_or(0, |open| open.len())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn the_agents_budget_and_the_end_of_the_client_hold() {
        let budget = Budget::default();
        let all = budget
            .0
            .clone()
            .try_acquire_many_owned(UPSTREAMS_MAX as u32)
            .unwrap();
        let upstreams = Upstreams::new();
        let refusal = upstreams
            .open("x", &budget, || panic!("not to be opened"))
            .unwrap_err();
        assert!(
            refusal.cause == Cause::Limit && refusal.text.contains("UPSTREAMS_MAX"),
            "{refusal}"
        );
        drop(all);
        let fault = || Err(Cause::NotReady.because("no"));
        assert_eq!(
            upstreams.open("x", &budget, fault).unwrap_err().cause,
            Cause::NotReady
        );
        assert_eq!(
            budget.0.available_permits(),
            UPSTREAMS_MAX,
            "a failure costs nothing"
        );
        upstreams.close_all();
        let late = upstreams
            .open("x", &budget, || panic!("not to be opened"))
            .unwrap_err();
        assert_eq!(late.cause, Cause::InvalidRequest);
    }
}
