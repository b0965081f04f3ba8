//! Connections that are not decided yet, and no more of them than a listener has room for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use super::cause::{Cause, Refusal};

/// Room for connections under way. The newest always gets in and the oldest has to go: whoever opens many
/// connections and leaves them half done pushes out his own, not the good one that takes a few milliseconds.
#[derive(Debug)]
pub(crate) struct Admission {
    max: usize,
    // Held for an insertion or a removal, never across an await.
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    next: u64,
    taken: BTreeMap<u64, CancellationToken>,
}

impl Admission {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max: max.max(1),
            slots: Mutex::default(),
        })
    }

    /// Takes a slot, the oldest one's when all are taken.
    pub(crate) fn enter(self: &Arc<Self>) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        while slots.taken.len() >= self.max
            && let Some((_, oldest)) = slots.taken.pop_first()
        {
            oldest.cancel();
        }
        let (id, evicted) = (slots.next, CancellationToken::new());
        slots.next += 1;
        slots.taken.insert(id, evicted.clone());
        Slot {
            admission: self.clone(),
            id,
            evicted,
        }
    }
}

/// A place among the connections under way, given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    admission: Arc<Admission>,
    id: u64,
    evicted: CancellationToken,
}

impl Slot {
    /// Waits until a newer connection needs the place.
    pub(crate) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// What an evicted connection is refused with.
    pub(crate) fn refusal(&self) -> Refusal {
        Cause::Limit.because(format!(
            "max_pending: {} newer connections wait",
            self.admission.max
        ))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut slots = self
            .admission
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        slots.taken.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_makes_room() {
        let admission = Admission::new(2);
        let (first, second) = (admission.enter(), admission.enter());
        drop(second);
        let third = admission.enter();
        assert!(!first.evicted.is_cancelled());
        let fourth = admission.enter();
        first.evicted().await;
        assert!(!third.evicted.is_cancelled() && !fourth.evicted.is_cancelled());
        drop(first);
        assert_eq!(
            admission.slots.lock().map(|slots| slots.taken.len()).ok(),
            Some(2)
        );
    }
}
