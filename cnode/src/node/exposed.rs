//! Functions of the program that peers may call by module, name and arity.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use meshx_etf::{Atom, Term};

use super::mailbox::Mailbox;

/// How an [exposed](super::Node::expose) function fails: the three ways of Erlang, and their reasons.
#[derive(Debug, Clone, PartialEq)]
pub enum Raised {
    /// `error(Reason)`.
    Error(Term),
    /// `exit(Reason)`.
    Exit(Term),
    /// `throw(Value)`.
    Throw(Term),
}

pub(crate) type Outcome = Result<Term, Raised>;
type Running = Pin<Box<dyn Future<Output = Outcome> + Send>>;
pub(crate) type Function = dyn Fn(Mailbox, Vec<Term>) -> Running + Send + Sync;

/// Module, function, arity.
type Key = (Atom, Atom, u8);

/// What is exposed, and how much of it runs.
#[derive(Default)]
pub(crate) struct Exposed {
    functions: RwLock<HashMap<Key, Arc<Function>>>,
    slots: Arc<Mutex<Slots>>,
}

#[derive(Debug, Default)]
struct Slots {
    total: usize,
    by_peer: HashMap<Atom, Held>,
}

/// What one peer has running.
#[derive(Debug, Default)]
struct Held {
    count: usize,
    bytes: usize,
}

/// How much may run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) per_peer: usize,
    pub(crate) bytes_per_peer: usize,
    pub(crate) total: usize,
}

/// The right of one function to run, given back when it is dropped: not before its outcome is queued, which takes the
/// memory that its arguments took.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Mutex<Slots>>,
    peer: Atom,
    bytes: usize,
}

impl Exposed {
    pub(crate) fn add<F, R>(&self, key: Key, function: F)
    where
        F: Fn(Mailbox, Vec<Term>) -> R + Send + Sync + 'static,
        R: Future<Output = Outcome> + Send + 'static,
    {
        let function: Arc<Function> = Arc::new(move |mailbox, args| Box::pin(function(mailbox, args)));
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.insert(key, function);
    }

    pub(crate) fn remove(&self, key: &Key) -> bool {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.remove(key).is_some()
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Function>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(key).cloned()
    }

    /// A slot for a request of so many bytes, if it is within the bounds. The first of a peer may be of any size.
    pub(crate) fn slot(&self, peer: &Atom, bytes: usize, bounds: Bounds) -> Option<Slot> {
        let mut slots = lock(&self.slots);
        if slots.total >= bounds.total || bounds.per_peer == 0 {
            return None;
        }
        let held = slots.by_peer.entry(peer.clone()).or_default();
        let sum = held.bytes.saturating_add(bytes);
        if held.count >= bounds.per_peer || (held.count > 0 && sum > bounds.bytes_per_peer) {
            return None;
        }
        held.count += 1;
        held.bytes = sum;
        slots.total += 1;
        Some(Slot {
            slots: Arc::clone(&self.slots),
            peer: peer.clone(),
            bytes,
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut slots = lock(&self.slots);
        slots.total = slots.total.saturating_sub(1);
        if let Some(held) = slots.by_peer.get_mut(&self.peer) {
            held.count = held.count.saturating_sub(1);
            held.bytes = held.bytes.saturating_sub(self.bytes);
            if held.count == 0 {
                slots.by_peer.remove(&self.peer);
            }
        }
    }
}

fn lock(slots: &Mutex<Slots>) -> MutexGuard<'_, Slots> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn slots_are_bounded_for_each_peer_and_for_all() {
        let exposed = Exposed::default();
        let bounds = Bounds {
            per_peer: 2,
            bytes_per_peer: 100,
            total: 3,
        };
        let slot = |peer: &str| exposed.slot(&Atom::from(peer), 0, bounds);
        let first = slot("a@h").unwrap();
        let _second = slot("a@h").unwrap();
        assert!(slot("a@h").is_none(), "per peer");
        let third = slot("b@h").unwrap();
        assert!(slot("c@h").is_none(), "in all");
        drop(first);
        assert!(slot("a@h").is_some());
        drop(third);
        assert_eq!(lock(&exposed.slots).by_peer.len(), 1);
    }

    #[test]
    fn bytes_are_bounded_for_each_peer() {
        let exposed = Exposed::default();
        let bounds = Bounds {
            per_peer: 10,
            bytes_per_peer: 100,
            total: 10,
        };
        let slot = |peer: &str, bytes| exposed.slot(&Atom::from(peer), bytes, bounds);
        let first = slot("a@h", 60).unwrap();
        assert!(slot("a@h", 41).is_none());
        let second = slot("a@h", 40).unwrap();
        assert!(slot("b@h", 40).is_some(), "another peer has its own");
        drop(first);
        assert!(slot("a@h", 60).is_some());
        drop(second);
        let _large = slot("a@h", 1000).unwrap();
        assert!(slot("a@h", 0).is_none());
        assert_eq!(lock(&exposed.slots).by_peer.len(), 1);
    }
}
