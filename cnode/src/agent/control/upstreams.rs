//! The upstreams of one control connection: local sockets that lead to services of the mesh.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::proxy::{
    Listen, Upstream, UpstreamHandle, UpstreamLinks,
    cause::{Cause, Refusal},
};

/// Upstreams that one control connection may have open.
pub const UPSTREAMS_PER_CLIENT_MAX: usize = 256;
/// Upstreams that one agent may have open.
pub const UPSTREAMS_MAX: usize = 2048;

/// And those of one user other than the agent's own and root.
const UPSTREAMS_PER_USER_MAX: usize = 512;

/// How many upstreams the agent may still open, and each user whose share is limited.
#[derive(Debug, Clone)]
pub(in crate::agent) struct Budget {
    all: Arc<Semaphore>,
    // Held for a look-up.
    users: Arc<Mutex<HashMap<u32, Arc<Semaphore>>>>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(UPSTREAMS_MAX)),
            users: Arc::default(),
        }
    }
}

/// The place of one upstream.
#[derive(Debug)]
struct Place {
    _of_all: OwnedSemaphorePermit,
    _of_user: Option<OwnedSemaphorePermit>,
}

impl Budget {
    fn place(&self, user: Option<u32>) -> Result<Place, Refusal> {
        let _of_user = match user {
            Some(uid) => Some(self.of_user(uid).try_acquire_owned().map_err(|_| {
                Cause::Limit.because(format!(
                    "{UPSTREAMS_PER_USER_MAX} upstreams of uid {uid} are open, more are not opened \
                     (UPSTREAMS_PER_USER_MAX)"
                ))
            })?),
            None => None,
        };
        let _of_all = self.all.clone().try_acquire_owned().map_err(|_| {
            Cause::Limit.because(format!(
                "{UPSTREAMS_MAX} upstreams are open, more are not opened (UPSTREAMS_MAX)"
            ))
        })?;
        Ok(Place { _of_all, _of_user })
    }

    fn of_user(&self, uid: u32) -> Arc<Semaphore> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || Arc::new(Semaphore::new(UPSTREAMS_PER_USER_MAX));
        users.entry(uid).or_insert_with(fresh).clone()
    }
}

/// Those of one client; all close when it is dropped.
#[derive(Debug)]
pub(in crate::agent) struct Upstreams {
    /// None once the client has gone: what is opened late closes at once.
    // Held for a look-up or a change, never across an await.
    open: Mutex<Option<HashMap<String, Open>>>,
}

#[derive(Debug)]
struct Open {
    state: Listening,
    place: Place,
}

#[derive(Debug)]
enum Listening {
    Yes(UpstreamHandle),
    /// Closed by its client, whose live links go on.
    No(UpstreamLinks),
}

impl Upstreams {
    pub(super) fn new() -> Self {
        Self {
            open: Mutex::new(Some(HashMap::new())),
        }
    }

    /// Opens one under this id, and says where it takes connections. `user` is whose share is limited.
    pub(in crate::agent) fn open(
        &self,
        id: &str,
        budget: &Budget,
        user: Option<u32>,
        open: impl FnOnce() -> Result<UpstreamHandle, Refusal>,
    ) -> Result<Listen, Refusal> {
        let mut guard = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(upstreams) = guard.as_mut() else {
            return Err(Cause::InvalidRequest.because("the connection that asked for it has ended"));
        };
        upstreams.retain(|_, open| !matches!(&open.state, Listening::No(links) if links.is_finished()));
        if upstreams.len() >= UPSTREAMS_PER_CLIENT_MAX {
            return Err(Cause::Limit.because(format!(
                "{UPSTREAMS_PER_CLIENT_MAX} upstreams of this connection, more are not opened \
                 (UPSTREAMS_PER_CLIENT_MAX)"
            )));
        }
        let place = budget.place(user)?;
        let handle = open()?;
        let address = handle.address().clone();
        upstreams.insert(
            id.to_owned(),
            Open {
                state: Listening::Yes(handle),
                place,
            },
        );
        Ok(address)
    }

    /// Takes no more connections at it; its live links end with `cut`. False when none of this id takes any.
    pub(in crate::agent) fn close(&self, id: &str, cut: bool) -> bool {
        let mut guard = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(upstreams) = guard.as_mut() else {
            return false;
        };
        match upstreams.remove(id) {
            Some(Open {
                state: Listening::Yes(handle),
                place,
            }) => {
                // They keep their place until they have ended.
                if let Some(links) = handle.close(cut) {
                    let state = Listening::No(links);
                    upstreams.insert(id.to_owned(), Open { state, place });
                }
                true
            }
            Some(closed) => {
                if !cut {
                    upstreams.insert(id.to_owned(), closed);
                }
                false
            }
            None => false,
        }
    }

    /// Those that take connections, for a successor of this process.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::agent) fn handed(&self) -> io::Result<Vec<(String, Upstream, OwnedFd)>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let listening = open.iter().flatten().filter_map(|(id, open)| match &open.state {
            Listening::Yes(handle) => Some((id, handle)),
            Listening::No(_) => None,
        });
        listening
            .map(|(id, handle)| {
                let (upstream, listener) = handle.handed()?;
                Ok((id.clone(), upstream, listener))
            })
            .collect()
    }

    pub(in crate::agent) fn close_all(&self) -> usize {
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
            .all
            .clone()
            .try_acquire_many_owned(UPSTREAMS_MAX as u32)
            .unwrap();
        let upstreams = Upstreams::new();
        let refusal = upstreams
            .open("x", &budget, None, || panic!("not to be opened"))
            .unwrap_err();
        assert!(
            refusal.cause == Cause::Limit && refusal.text.contains("UPSTREAMS_MAX"),
            "{refusal}"
        );
        drop(all);
        let fault = || Err(Cause::NotReady.because("no"));
        assert_eq!(
            upstreams.open("x", &budget, None, fault).unwrap_err().cause,
            Cause::NotReady
        );
        assert_eq!(
            budget.all.available_permits(),
            UPSTREAMS_MAX,
            "a failure costs nothing"
        );
        upstreams.close_all();
        let late = upstreams
            .open("x", &budget, None, || panic!("not to be opened"))
            .unwrap_err();
        assert_eq!(late.cause, Cause::InvalidRequest);
    }

    #[test]
    fn one_user_leaves_room_for_others() {
        let budget = Budget::default();
        let his: Vec<_> = (0..UPSTREAMS_PER_USER_MAX)
            .map(|_| budget.place(Some(1000)).unwrap())
            .collect();
        let refusal = budget.place(Some(1000)).unwrap_err();
        assert!(
            refusal.cause == Cause::Limit && refusal.text.contains("UPSTREAMS_PER_USER_MAX"),
            "{refusal}"
        );
        assert!(budget.place(Some(1001)).is_ok() && budget.place(None).is_ok());
        drop(his);
        assert!(budget.place(Some(1000)).is_ok());
    }
}
