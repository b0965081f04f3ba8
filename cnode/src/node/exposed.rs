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
    by_peer: HashMap<Atom, usize>,
}

/// The right of one function to run, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Mutex<Slots>>,
    peer: Atom,
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

    /// A slot for a peer, if it has fewer than `per_peer` and all together have fewer than `total`.
    pub(crate) fn slot(&self, peer: &Atom, per_peer: usize, total: usize) -> Option<Slot> {
        let mut slots = lock(&self.slots);
        let held = slots.by_peer.get(peer).copied().unwrap_or_default();
        if held >= per_peer || slots.total >= total {
            return None;
        }
        slots.total += 1;
        slots.by_peer.insert(peer.clone(), held + 1);
        Some(Slot {
            slots: Arc::clone(&self.slots),
            peer: peer.clone(),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut slots = lock(&self.slots);
        slots.total = slots.total.saturating_sub(1);
        if let Some(held) = slots.by_peer.get_mut(&self.peer) {
            *held = held.saturating_sub(1);
            if *held == 0 {
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
        let slot = |peer: &str| exposed.slot(&Atom::from(peer), 2, 3);
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
}
