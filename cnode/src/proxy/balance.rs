//! Which instance of a service is dialled first, and which ones only when no other answers.
//!
//! Instances of the same agent come before all others. An instance that could not be reached a few times in a row is
//! ejected for a while: it comes last, and once its time is over one link tries whether it is back. So a service of which
//! all instances fail is still tried.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::mesh::{Instance, ServiceName};

/// Failures in a row after which an instance is ejected.
const EJECT_AFTER: u32 = 3;
/// For how long, the first time. Doubled each time that it then still fails.
const EJECTED: Duration = Duration::from_secs(10);
/// Not for longer than this.
const EJECTED_MAX: Duration = Duration::from_secs(300);
/// How long others leave an instance alone that one link tries again.
const TRIED: Duration = Duration::from_secs(5);
/// Instances whose failures are remembered, and services whose turns are.
const REMEMBERED_MAX: usize = 4096;

/// How the next instance is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Balance {
    /// The one with the fewest live links of this agent for its weight; of equals any, as often as its weight says.
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

/// A link that is being made to an instance: it counts like one that lives. Dropped when it does, or failed.
pub(super) struct Dialling<'a> {
    balancer: &'a Balancer,
    instance: String,
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
    /// How many links to each instance are being made.
    dialled: HashMap<String, usize>,
}

#[derive(Debug)]
struct Trouble {
    failures: u32,
    ejected_until: Instant,
    /// One link tries whether it is back.
    tried: bool,
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
            .map(|mut candidate| {
                candidate.links += state
                    .dialled
                    .get(&candidate.instance.id)
                    .copied()
                    .unwrap_or_default();
                let ejected = state.is_ejected(&candidate.instance.id, now);
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
        let mut order: Vec<_> = keyed
            .into_iter()
            .map(|(class, candidate)| {
                let waits = turn.as_ref().is_some_and(|turn| *turn != candidate.instance.id);
                let key = (class, waits, candidate.load());
                (key, candidate.chance(), candidate.instance)
            })
            .collect();
        order.sort_by(|(a, a_chance, _), (b, b_chance, _)| a.cmp(b).then(a_chance.total_cmp(b_chance)));
        order.into_iter().map(|(_, _, instance)| instance).collect()
    }

    /// Whether others are to be tried first.
    pub(super) fn is_ejected(&self, instance: &str) -> bool {
        self.lock().is_ejected(instance, Instant::now())
    }

    /// Counts a link that is being made to an instance.
    pub(super) fn dialling(&self, instance: &str) -> Dialling<'_> {
        let mut state = self.lock();
        *state.dialled.entry(instance.to_owned()).or_default() += 1;
        let now = Instant::now();
        if let Some(trouble) = state.troubles.get_mut(instance)
            && trouble.failures >= EJECT_AFTER
            && trouble.ejected_until <= now
        {
            (trouble.tried, trouble.ejected_until) = (true, now + TRIED);
        }
        drop(state);
        Dialling {
            balancer: self,
            instance: instance.to_owned(),
        }
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
            tried: false,
        });
        // Of the links that were being made when it was ejected each may fail, by the same fault.
        if trouble.ejected_until > now && !trouble.tried {
            return;
        }
        trouble.tried = false;
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

impl Drop for Dialling<'_> {
    fn drop(&mut self) {
        let mut state = self.balancer.lock();
        if let Some(dialled) = state.dialled.get_mut(&self.instance) {
            *dialled = dialled.saturating_sub(1);
            if *dialled == 0 {
                state.dialled.remove(&self.instance);
            }
        }
    }
}

impl Candidate {
    /// What it carries, for its weight.
    fn load(&self) -> i64 {
        const SCALE: i64 = 1 << 20;
        let links = i64::try_from(self.links).unwrap_or(i64::MAX);
        links.saturating_mul(SCALE) / i64::from(self.weight.max(1))
    }

    /// A random time until its turn: of any candidates each has the shortest one as often as its weight says. Without
    /// random numbers the one with most weight has it.
    fn chance(&self) -> f64 {
        let random = f64::from(getrandom::u32().unwrap_or(u32::MAX / 2));
        let share = (random + 1.0) / (f64::from(u32::MAX) + 1.0);
        -share.ln() / f64::from(self.weight.max(1))
    }
}

impl State {
    fn is_ejected(&self, instance: &str, now: Instant) -> bool {
        let trouble = self.troubles.get(instance);
        trouble.is_some_and(|trouble| trouble.ejected_until > now)
    }

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
        assert!(order(Vec::new()).is_empty());
    }

    /// Short links, one after the other: none lives when the next one is made.
    #[test]
    fn of_equals_each_is_first_as_often_as_its_weight_says() {
        let balancer = Balancer::new(Balance::LeastLoaded);
        let mut firsts = HashMap::new();
        for _ in 0..10_000 {
            let all = vec![candidate("a", false, 3, 0), candidate("b", false, 1, 0)];
            *firsts
                .entry(ids(balancer.order(&echo(), all)).remove(0))
                .or_insert(0) += 1;
        }
        // Twelve times the standard deviation.
        assert!((6_980..=8_020).contains(&firsts["a"]), "{firsts:?}");
    }

    #[test]
    fn links_that_are_being_made_count_like_those_that_live() {
        let balancer = Balancer::new(Balance::LeastLoaded);
        let mut dialling = Vec::new();
        for _ in 0..400 {
            let all = vec![candidate("a", false, 3, 0), candidate("b", false, 1, 0)];
            let first = ids(balancer.order(&echo(), all)).remove(0);
            dialling.push(balancer.dialling(&first));
        }
        let to_a = balancer.lock().dialled["a"];
        assert!((295..=305).contains(&to_a), "{to_a}");
        drop(dialling);
        assert!(balancer.lock().dialled.is_empty());
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
            let until = || balancer.lock().troubles["bad"].ejected_until;
            let set = |time, change: &dyn Fn()| {
                let began = Instant::now();
                change();
                assert!((began + time..=Instant::now() + time).contains(&until()));
            };
            let fail = || balancer.failed("bad");
            (2..EJECT_AFTER).for_each(|_| fail());
            set(EJECTED, &fail);
            assert_eq!(order(), ["good", "bad"], "it is tried all the same, at last");
            let before = until();
            fail();
            assert_eq!(until(), before, "by the fault that it is ejected for");
            let serve = || balancer.lock().troubles.get_mut("bad").unwrap().ejected_until = Instant::now();
            for times in [2, 4, 8, 16, 30, 30] {
                serve();
                assert_eq!(order(), ["bad", "good"], "its time is over");
                let tried = balancer.dialling("bad");
                assert_eq!(order(), ["good", "bad"], "one link is enough to try it");
                set(times * EJECTED, &fail);
                drop(tried);
            }
            serve();
            // Who tried it gave up.
            set(TRIED, &|| drop(balancer.dialling("bad")));
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
