//! How many clients there may be at a time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::proxy::cause::{Cause, Refusal};

/// Control connections that one agent serves at a time.
pub const CLIENTS_MAX: usize = 1024;
/// Control connections that one other user than the agent's own may have, so that none can use up all.
pub const CLIENTS_PER_USER_MAX: usize = 256;

/// The connections that are open. Clones share the count.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    own_uid: u32,
    // Held for a look-up or a change, never across an await.
    by_uid: Arc<Mutex<HashMap<u32, usize>>>,
}

/// One open connection; free again when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Slots,
    uid: u32,
}

impl Slots {
    pub(super) fn new(own_uid: u32) -> Self {
        Self {
            own_uid,
            by_uid: Arc::default(),
        }
    }

    pub(super) fn take(&self, uid: u32) -> Result<Slot, Refusal> {
        let mut by_uid = self.lock();
        if by_uid.values().sum::<usize>() >= CLIENTS_MAX {
            return Err(Cause::Limit.because(format!(
                "{CLIENTS_MAX} control connections are open, more are not taken (CLIENTS_MAX)"
            )));
        }
        let count = by_uid.entry(uid).or_default();
        if uid != self.own_uid && *count >= CLIENTS_PER_USER_MAX {
            return Err(Cause::Limit.because(format!(
                "uid {uid} has {CLIENTS_PER_USER_MAX} control connections, more are not taken (CLIENTS_PER_USER_MAX)"
            )));
        }
        *count += 1;
        drop(by_uid);
        Ok(Slot {
            slots: self.clone(),
            uid,
        })
    }

    /// Whether no connection is open.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.by_uid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut by_uid = self.slots.lock();
        if let Some(count) = by_uid.get_mut(&self.uid) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                by_uid.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn one_user_cannot_take_all_and_a_slot_is_free_again() {
        let slots = Slots::new(7);
        let mut others: Vec<Slot> = (0..CLIENTS_PER_USER_MAX)
            .map(|_| slots.take(8).unwrap())
            .collect();
        assert!(slots.take(8).unwrap_err().text.contains("CLIENTS_PER_USER_MAX"));
        let _own: Vec<Slot> = (0..CLIENTS_MAX - CLIENTS_PER_USER_MAX)
            .map(|_| slots.take(7).unwrap())
            .collect();
        assert!(slots.take(7).unwrap_err().text.contains("CLIENTS_MAX"));
        others.pop();
        assert!(slots.take(7).is_ok());
    }
}
