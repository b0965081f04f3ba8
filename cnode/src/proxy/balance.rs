//! Which instance of a service is dialled first, and which ones only when no other answers.
//!
//! Instances of the same agent come before all others. An instance that could not be reached a few times in a row is
//! ejected for a while: it comes last, and once its time is over it is tried like the others. So a service of which all
//! instances fail is still tried.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::mesh::{Instance, ServiceName};

/// Failures in a row after which an instance is ejected.
const EJECT_AFTER: u32 = 3;
/// For how long, the first time. Doubled by each failure from then on.
const EJECTED: Duration = Duration::from_secs(10);
/// Not for longer than this.
const EJECTED_MAX: Duration = Duration::from_secs(300);
/// Instances whose failures are remembered, and services whose turns are.
const REMEMBERED_MAX: usize = 4096;

/// How the next instance is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Balance {
    /// The one with the fewest live links of this agent for its weight.
    #[default]
    LeastLoaded,
    /// Each in its turn, as often as its weight says.
    RoundRobin,
}

impl Balance {
    /// The way of this name.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "least-loaded" => Some(Self::LeastLoaded),
            "round-robin" => Some(Self::RoundRobin),
            _ => None,
        }
    }
}

/// An instance that may be dialled.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) instance: Instance,
    pub(super) here: bool,
    /// Its share of the service's links, at least 1.
    pub(super) weight: u32,
    /// Live links of this agent to it.
    pub(super) links: usize,
}

/// What is remembered of instances.
#[derive(Debug)]
pub(super) struct Balancer {
    how: Balance,
    // Held for a look or a change, never across an await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    troubles: HashMap<String, Trouble>,
    /// What each instance has saved up for its next turn.
    turns: HashMap<ServiceName, HashMap<String, i64>>,
}

#[derive(Debug)]
struct Trouble {
    failures: u32,
    ejected_until: Instant,
}

impl Balancer {
    pub(super) fn new(how: Balance) -> Self {
        Self {
            how,
            state: Mutex::default(),
        }
    }

    /// The order in which they are tried.
    pub(super) fn order(&self, target: &ServiceName, candidates: Vec<Candidate>) -> Vec<Instance> {
        let now = Instant::now();
        let mut state = self.lock();
        let keyed: Vec<_> = candidates
            .into_iter()
            .map(|candidate| {
                let trouble = state.troubles.get(&candidate.instance.id);
                let ejected = trouble.is_some_and(|trouble| trouble.ejected_until > now);
                ((ejected, !candidate.here), candidate)
            })
            .collect();
        let best = keyed.iter().map(|(class, _)| *class).min();
        let turn = match self.how {
            Balance::LeastLoaded => None,
            Balance::RoundRobin => {
                let in_turn = keyed.iter().filter(|(class, _)| Some(*class) == best);
                state.take_turn(target, in_turn.map(|(_, candidate)| candidate))
            }
        };
        drop(state);
        // Without random numbers those that are equal stay in the catalogue's order.
        let mut order: Vec<_> = keyed
            .into_iter()
            .map(|(class, candidate)| {
                let waits = turn.as_ref().is_some_and(|turn| *turn != candidate.instance.id);
                let random = getrandom::u32().unwrap_or_default();
                ((class, waits, candidate.load(), random), candidate.instance)
            })
            .collect();
        order.sort_by_key(|(key, _)| *key);
        order.into_iter().map(|(_, instance)| instance).collect()
    }

    /// An instance took a link.
    pub(super) fn succeeded(&self, instance: &str) {
        self.lock().troubles.remove(instance);
    }

    /// An instance could not be reached.
    pub(super) fn failed(&self, instance: &str) {
        let now = Instant::now();
        let mut state = self.lock();
        if state.troubles.len() >= REMEMBERED_MAX && !state.troubles.contains_key(instance) {
            state.troubles.retain(|_, trouble| trouble.ejected_until > now);
            if state.troubles.len() >= REMEMBERED_MAX {
                return;
            }
        }
        let trouble = state.troubles.entry(instance.to_owned()).or_insert(Trouble {
            failures: 0,
            ejected_until: now,
        });
        trouble.failures = trouble.failures.saturating_add(1);
        if let Some(times) = trouble.failures.checked_sub(EJECT_AFTER) {
            let time = EJECTED.saturating_mul(1 << times.min(16)).min(EJECTED_MAX);
            trouble.ejected_until = now + time;
            tracing::info!(
                instance,
                failures = trouble.failures,
                ?time,
                "an instance is ejected"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Candidate {
    /// What it would carry with one more link, for its weight.
    fn load(&self) -> i64 {
        const SCALE: i64 = 1 << 20;
        let links = i64::try_from(self.links).unwrap_or(i64::MAX).saturating_add(1);
        links.saturating_mul(SCALE) / i64::from(self.weight.max(1))
    }
}

impl State {
    /// Everybody saves up its weight, and whoever then has most pays for a turn with what all have saved: turns are
    /// spread evenly (nginx calls it smooth weighted round-robin).
    fn take_turn<'a>(
        &mut self,
        target: &ServiceName,
        candidates: impl Iterator<Item = &'a Candidate>,
    ) -> Option<String> {
        if self.turns.len() >= REMEMBERED_MAX && !self.turns.contains_key(target) {
            self.turns.clear();
        }
        let before = self.turns.remove(target).unwrap_or_default();
        let (mut now, mut all) = (HashMap::new(), 0);
        for Candidate { instance, weight, .. } in candidates {
            let weight = i64::from((*weight).max(1));
            let saved = before.get(&instance.id).copied().unwrap_or_default();
            now.insert(instance.id.clone(), saved + weight);
            all += weight;
        }
        let richest = now
            .iter_mut()
            .max_by_key(|(id, saved)| (**saved, Reverse(id.as_str())));
        let turn = richest.map(|(id, saved)| {
            *saved -= all;
            id.clone()
        });
        self.turns.insert(target.clone(), now);
        turn
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::mesh::Protocol;

    fn candidate(id: &str, here: bool, weight: u32, links: usize) -> Candidate {
        let instance = Instance {
            id: id.to_owned(),
            service: echo(),
            node: None,
            agent: "a".to_owned(),
            address: "127.0.0.1:1".parse().unwrap(),
            protocol: Protocol::Meshx,
            meta: Default::default(),
        };
        Candidate {
            instance,
            here,
            weight,
            links,
        }
    }

    fn echo() -> ServiceName {
        ServiceName::new("echo").unwrap()
    }

    fn ids(order: Vec<Instance>) -> Vec<String> {
        order.into_iter().map(|instance| instance.id).collect()
    }

    #[test]
    fn the_least_loaded_for_its_weight_comes_first() {
        let balancer = Balancer::new(Balance::LeastLoaded);
        let order = |candidates| ids(balancer.order(&echo(), candidates));
        let all = vec![
            candidate("busy", false, 1, 9),
            candidate("big", false, 10, 9),
            candidate("idle", false, 1, 1),
            candidate("far-too-busy", false, 2, 99),
        ];
        assert_eq!(order(all), ["big", "idle", "busy", "far-too-busy"]);
        // Whatever it carries, who is here comes first.
        let all = vec![candidate("far", false, 9, 0), candidate("near", true, 1, 50)];
        assert_eq!(order(all), ["near", "far"]);
        // Links go where the weights say.
        let mut links = [0, 0];
        for _ in 0..400 {
            let both = vec![
                candidate("a", false, 3, links[0]),
                candidate("b", false, 1, links[1]),
            ];
            links[usize::from(order(both)[0] == "b")] += 1;
        }
        assert!((295..=305).contains(&links[0]), "{links:?}");
        // Equals are taken in any order.
        let firsts: std::collections::HashSet<String> = (0..64)
            .map(|_| {
                let equals = vec![candidate("a", false, 1, 3), candidate("b", false, 1, 3)];
                order(equals).remove(0)
            })
            .collect();
        assert_eq!(firsts.len(), 2);
        assert!(order(Vec::new()).is_empty());
    }

    #[test]
    fn turns_are_taken_as_often_as_the_weights_say_and_spread_evenly() {
        let balancer = Balancer::new(Balance::RoundRobin);
        let next = || {
            let all = vec![
                candidate("a", false, 5, 0),
                candidate("b", false, 1, 7),
                candidate("c", false, 1, 0),
            ];
            ids(balancer.order(&echo(), all)).remove(0)
        };
        let turns: String = (0..14).map(|_| next()).collect();
        assert_eq!(turns, "aabacaaaabacaa");
        // Who is no more has no turn, and who is new gets one soon.
        let mut seen = String::new();
        for _ in 0..4 {
            let others = vec![candidate("b", false, 1, 0), candidate("d", false, 1, 0)];
            seen += &ids(balancer.order(&echo(), others)).remove(0);
        }
        assert_eq!((seen.matches('b').count(), seen.matches('d').count()), (2, 2));
    }

    #[test]
    fn who_fails_in_a_row_comes_last_for_a_while() {
        for how in [Balance::LeastLoaded, Balance::RoundRobin] {
            let balancer = Balancer::new(how);
            let order = || {
                let all = vec![candidate("bad", true, 100, 0), candidate("good", false, 1, 9)];
                ids(balancer.order(&echo(), all))
            };
            for _ in 1..EJECT_AFTER {
                balancer.failed("bad");
            }
            assert_eq!(order(), ["bad", "good"]);
            balancer.succeeded("bad");
            balancer.failed("bad");
            assert_eq!(order(), ["bad", "good"], "only failures in a row count");
            let fails = |times, ejected| {
                let began = Instant::now();
                for _ in 0..times {
                    balancer.failed("bad");
                }
                let until = balancer.lock().troubles["bad"].ejected_until;
                assert!((began + ejected..=Instant::now() + ejected).contains(&until));
            };
            fails(EJECT_AFTER - 1, EJECTED);
            assert_eq!(order(), ["good", "bad"], "it is tried all the same, at last");
            fails(1, 2 * EJECTED);
            fails(100, EJECTED_MAX);
            balancer.lock().troubles.get_mut("bad").unwrap().ejected_until = Instant::now();
            assert_eq!(order(), ["bad", "good"], "its time is over");
            balancer.succeeded("bad");
            assert!(balancer.lock().troubles.is_empty());
        }
    }

    #[test]
    fn so_many_are_remembered_and_no_more() {
        let balancer = Balancer::new(Balance::RoundRobin);
        for at in 0..REMEMBERED_MAX + 10 {
            balancer.failed(&format!("i{at}"));
            let service = ServiceName::new(&format!("s{at}")).unwrap();
            balancer.order(&service, vec![candidate("a", false, 1, 0)]);
        }
        let state = balancer.lock();
        assert!(state.troubles.len() <= REMEMBERED_MAX && state.turns.len() <= REMEMBERED_MAX);
    }
}
