//! Looking for what comes next before a thread goes to sleep.
//!
//! An agent stands in the way of a question and of its answer, so a round trip has four times an agent that is to be
//! woken. On an idle processor that costs more than all that the agent does, most of all on a virtual one, and the node
//! behind it sleeps meanwhile and is to be woken as well. So a thread that has passed something small on asks the kernel
//! for more again and again for a while, as `net.core.busy_poll` does for a socket. Before each look it lets whoever
//! else wants the processor have it.
//!
//! Where nothing comes in time that is wasted: after each such wait twice as many messages pass before the next one.
//! Where others want the processor for longer it is worse: who sleeps is let in before them by what wakes him, who looks
//! waits for his turn among them, for milliseconds. One such turn holds it back as eight waits for nothing do. Bulk never waits
//! so: there the other processes of its way have more to do with the processor.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::sched_getaffinity;

/// The most that a message has, in bytes, after which it pays to look for an answer.
const SMALL: usize = 4 << 10;
/// So many waits in a row that were worth it make up for one that was not.
const REGAINED: u32 = 4;
/// By so many doublings it is held back when others have had the processor for all the time that it would look.
const CROWDED: u32 = 8;
/// At most 2 to the power of so many messages pass before it is tried again.
const DOUBLED_MAX: u32 = 10;

/// How long unless the operator says: longer than an answer by way of another agent of the same network takes with
/// everybody asleep.
const TIME: Duration = Duration::from_micros(200);

thread_local! {
    static HERE: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// How long threads look when nobody says, where so many may run at once. What looks uses processor time that a limit
/// (`cpu.max` of cgroups) would take away from what comes then, and a single processor is needed by whoever is to answer.
#[must_use]
pub fn busy_poll_of(threads: usize) -> Duration {
    let processors = sched_getaffinity(None).map_or(0, |set| set.count());
    match usize::try_from(processors) {
        Ok(processors) if threads > 1 && threads >= processors => TIME,
        _ => Duration::ZERO,
    }
}

/// What a thread that looks knows.
#[derive(Debug, Default)]
struct Watch {
    pace: Pace,
    /// Of [`run`], while it has nothing to look for.
    asleep: Option<Waker>,
}

/// Tells that a way has passed so many bytes on. Nothing comes of it on a thread where [`run`] does not.
pub(super) fn passed(bytes: usize) {
    HERE.with_borrow_mut(|here| {
        if let Some(watch) = here
            && watch.pace.passed(bytes)
            && let Some(waker) = watch.asleep.take()
        {
            waker.wake();
        }
    });
}

/// Keeps the thread of the runtime that this runs on awake for so long after each small message. Never ends. The runtime
/// must be one of a single thread.
pub(super) async fn run(time: Duration) {
    HERE.set(Some(Watch::default()));
    loop {
        let since =
            poll_fn(|cx| HERE.with_borrow_mut(|here| here.get_or_insert_default().poll_since(cx.waker())))
                .await;
        let before = since.elapsed();
        thread::yield_now();
        let after = since.elapsed();
        if after < time {
            // Here the runtime asks the kernel, and does not wait.
            tokio::task::yield_now().await;
            continue;
        }
        let doublings = if after - before < time { 1 } else { CROWDED };
        HERE.with_borrow_mut(|here| here.get_or_insert_default().pace.missed(doublings));
    }
}

impl Watch {
    fn poll_since(&mut self, waker: &Waker) -> Poll<Instant> {
        match self.pace.look() {
            Some(since) => Poll::Ready(since),
            None => {
                self.asleep = Some(waker.clone());
                Poll::Pending
            }
        }
    }
}

/// When it pays.
#[derive(Debug, Default)]
struct Pace {
    /// When the message passed after which it looks.
    since: Option<Instant>,
    /// It has looked since, at least once.
    looked: bool,
    /// How often in a row something came in time.
    hits: u32,
    /// By how many doublings it is held back.
    misses: u32,
    /// So many messages still pass before it looks again.
    pass_over: u32,
}

impl Pace {
    /// Whether it is to look out from now on.
    fn passed(&mut self, bytes: usize) -> bool {
        let looked = std::mem::take(&mut self.looked);
        if bytes > SMALL {
            self.since = None;
            return false;
        }
        if self.since.is_some() {
            // What came together with the one before was not waited for.
            self.hits += u32::from(looked);
            if self.hits >= REGAINED {
                (self.hits, self.misses) = (0, self.misses.saturating_sub(1));
            }
        } else if self.pass_over > 0 {
            self.pass_over -= 1;
            return false;
        }
        self.since = Some(Instant::now());
        true
    }

    /// Since when it looks, if it does.
    fn look(&mut self) -> Option<Instant> {
        self.looked = self.since.is_some();
        self.since
    }

    /// Nothing came in time, which is to hold it back by so many doublings more.
    fn missed(&mut self, doublings: u32) {
        self.misses = (self.misses + doublings).min(DOUBLED_MAX);
        *self = Self {
            misses: self.misses,
            pass_over: (1 << self.misses) - 1,
            ..Self::default()
        };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use tokio::task::yield_now;

    /// A message to which an answer comes in time, or none.
    fn message(pace: &mut Pace, answered: bool) -> bool {
        let looks = pace.passed(64);
        if looks && pace.look().is_some() && !answered {
            pace.missed(1);
        }
        looks
    }

    #[test]
    fn after_each_wait_for_nothing_twice_as_many_messages_pass() {
        let mut pace = Pace::default();
        let mut until_next = || (0..).take_while(|_| !message(&mut pace, false)).count();
        let passed: Vec<usize> = (0..13).map(|_| until_next()).collect();
        assert_eq!(passed, [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 1023, 1023]);
    }

    #[test]
    fn answers_in_time_make_up_for_waits_for_nothing() {
        let mut pace = Pace::default();
        for _ in 0..15 {
            message(&mut pace, false);
        }
        assert_eq!((pace.misses, pace.pass_over), (4, 15));
        let looked = (0..15 + 4).filter(|_| message(&mut pace, true)).count();
        assert_eq!((looked, pace.misses), (4, 4));
        assert!(message(&mut pace, true));
        assert_eq!(pace.misses, 3);
        // Fewer in a row do not.
        message(&mut pace, false);
        assert_eq!((pace.misses, pace.pass_over), (4, 15));
    }

    #[test]
    fn where_others_want_the_processor_it_is_held_back_at_once() {
        let mut pace = Pace::default();
        assert!(pace.passed(64));
        for passed in [255, 1023] {
            pace.missed(CROWDED);
            assert_eq!((0..).take_while(|_| !pace.passed(64)).count(), passed);
        }
    }

    #[test]
    fn what_comes_together_was_not_waited_for() {
        let mut pace = Pace::default();
        message(&mut pace, false);
        assert!(!pace.passed(64));
        for _ in 0..100 {
            assert!(pace.passed(64));
        }
        assert_eq!((pace.hits, pace.misses), (0, 1));
    }

    #[test]
    fn bulk_is_neither() {
        let mut pace = Pace::default();
        assert!(pace.passed(SMALL));
        assert!(pace.look().is_some());
        assert!(!pace.passed(SMALL + 1));
        assert!(pace.look().is_none());
        assert_eq!((pace.hits, pace.misses, pace.pass_over), (0, 0, 0));
    }

    #[test]
    fn a_limit_of_time_or_a_single_processor_leaves_none_for_it() {
        let processors = sched_getaffinity(None).unwrap().count() as usize;
        assert!(busy_poll_of(1).is_zero());
        assert!(busy_poll_of(processors - 1).is_zero());
        assert_eq!(busy_poll_of(processors).is_zero(), processors < 2);
    }

    fn here<T>(asked: impl Fn(&Watch) -> T) -> Option<T> {
        HERE.with_borrow(|here| here.as_ref().map(asked))
    }

    #[tokio::test]
    async fn a_thread_looks_after_a_small_message_until_nothing_came_for_too_long() {
        passed(1);
        assert!(here(|_| ()).is_none());
        let time = Duration::from_millis(50);
        tokio::spawn(run(time));
        yield_now().await;
        assert_eq!(here(|watch| watch.asleep.is_some()), Some(true));
        let began = Instant::now();
        passed(1);
        while here(|watch| watch.pace.misses) == Some(0) {
            yield_now().await;
        }
        assert!(began.elapsed() >= time, "{:?}", began.elapsed());
        yield_now().await;
        assert_eq!(here(|watch| watch.asleep.is_some()), Some(true));
    }
}
