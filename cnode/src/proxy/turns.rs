//! Turns: how many links may be made to one place at a time. Further ones wait.
//!
//! An agent that is dialled by all of a cluster at once is asked no faster than it decides, and none of its diallers is
//! refused for it. The wait counts in the time of the link.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::admission::of_one;

/// All turns of one agent.
#[derive(Debug)]
pub(super) struct Turns {
    max: usize,
    // Held for a look-up or a change, never across an await.
    places: Mutex<HashMap<SocketAddr, Place>>,
}

#[derive(Debug, Default)]
struct Place {
    next: u64,
    /// Those whose turn it is.
    running: HashMap<String, usize>,
    /// The others, the first first.
    waiting: BTreeMap<u64, (String, oneshot::Sender<()>)>,
}

impl Turns {
    pub(super) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max: max.max(1),
            places: Mutex::default(),
        })
    }

    /// Waits until `who` may make a link to `address`. Those who make fewest go first, and one has never more than
    /// three quarters of the turns.
    pub(super) async fn take(self: &Arc<Self>, address: SocketAddr, who: &str) -> Turn {
        let (sender, granted) = oneshot::channel();
        let turn = {
            let mut places = self.lock();
            let place = places.entry(address).or_default();
            let id = place.next;
            place.next += 1;
            place.waiting.insert(id, (who.to_owned(), sender));
            place.grant(self.max);
            Turn {
                turns: self.clone(),
                address,
                who: who.to_owned(),
                id,
            }
        };
        // Whoever lets it go has taken it out of those that wait.
        let _ = granted.await;
        turn
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Place>> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Lets as many go as there is room for.
    fn grant(&mut self, max: usize) {
        while self.running.values().sum::<usize>() < max {
            let has = |who: &String| self.running.get(who).copied().unwrap_or_default();
            let next = self.waiting.iter().map(|(id, (who, _))| (has(who), *id)).min();
            let Some((has, id)) = next.filter(|(has, _)| *has < of_one(max)) else {
                return;
            };
            if let Some((who, granted)) = self.waiting.remove(&id) {
                self.running.insert(who, has + 1);
                let _ = granted.send(());
            }
        }
    }
}

/// One link that is being made, or waits for its turn; the next one's turn when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    address: SocketAddr,
    who: String,
    id: u64,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut places = self.turns.lock();
        let Some(place) = places.get_mut(&self.address) else {
            return;
        };
        if place.waiting.remove(&self.id).is_none()
            && let Some(running) = place.running.get_mut(&self.who)
        {
            *running = running.saturating_sub(1);
            if *running == 0 {
                place.running.remove(&self.who);
            }
        }
        place.grant(self.turns.max);
        if place.running.is_empty() && place.waiting.is_empty() {
            places.remove(&self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// The turn, when it is there at once.
    fn now(take: Pin<&mut impl Future<Output = Turn>>) -> Option<Turn> {
        match take.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(turn) => Some(turn),
            Poll::Pending => None,
        }
    }

    #[test]
    fn who_makes_fewest_goes_first_and_nobody_has_all() {
        let (here, there) = ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:1".parse().unwrap());
        let turns = Turns::new(4);
        let mut busy: Vec<_> = (0..3)
            .map(|_| now(pin!(turns.take(here, "busy"))).unwrap())
            .collect();
        let mut fourth = Box::pin(turns.take(here, "busy"));
        assert!(now(fourth.as_mut()).is_none(), "three quarters");
        let other = now(pin!(turns.take(here, "other"))).expect("a quarter is left for others");
        let elsewhere = now(pin!(turns.take(there, "busy"))).expect("another place");
        let mut late = Box::pin(turns.take(here, "late"));
        assert!(now(late.as_mut()).is_none(), "all turns are taken");
        busy.pop();
        assert!(now(fourth.as_mut()).is_none());
        let late = now(late.as_mut()).expect("who makes none goes before who makes two");
        drop((other, late));
        let fourth = now(fourth.as_mut()).expect("its turn");
        drop((busy, fourth, elsewhere));
        assert!(turns.lock().is_empty());
    }

    #[test]
    fn who_gives_up_waiting_holds_nothing() {
        let here = "10.0.0.1:1".parse().unwrap();
        let turns = Turns::new(1);
        let first = now(pin!(turns.take(here, "a"))).unwrap();
        let mut gave_up = Box::pin(turns.take(here, "b"));
        assert!(now(gave_up.as_mut()).is_none());
        drop(gave_up);
        let mut granted = Box::pin(turns.take(here, "c"));
        let mut last = Box::pin(turns.take(here, "d"));
        assert!(now(granted.as_mut()).is_none() && now(last.as_mut()).is_none());
        drop(first);
        // It has its turn by now, and never heard of it.
        drop(granted);
        assert!(now(last.as_mut()).is_some());
        drop(last);
        assert!(turns.lock().is_empty());
    }
}
