//! Log lines that a peer can cause at will: so many a second are written, the rest are counted and told.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// Lines of one kind that are written each second.
pub(crate) const LINES_PER_SECOND: u32 = 50;
const WINDOW: Duration = Duration::from_secs(1);
/// How long one line is not written again.
const AGAIN: Duration = Duration::from_secs(60);

/// The limit for one kind of lines. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct LogLimit {
    /// What the lines are of.
    kind: &'static str,
    per_second: u32,
    // Held for a look, never across an await.
    window: Arc<Mutex<Window>>,
}

#[derive(Debug, Default)]
struct Window {
    ends: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl LogLimit {
    /// `kind` is what is counted, as in "refusals".
    pub(crate) fn new(kind: &'static str) -> Self {
        Self {
            kind,
            per_second: LINES_PER_SECOND,
            window: Arc::default(),
        }
    }

    /// Whether the caller may write its line. Must be called within a tokio runtime: how many were left out is told when
    /// the second is over, whether or not more of them come.
    pub(crate) fn admit(&self) -> bool {
        let now = Instant::now();
        let mut window = self.lock();
        let ends = match window.ends {
            Some(ends) if now < ends => ends,
            _ => {
                let ends = now + WINDOW;
                window.ends = Some(ends);
                window.written = 0;
                ends
            }
        };
        if window.written < self.per_second {
            window.written += 1;
            return true;
        }
        window.left_out += 1;
        if window.left_out == 1 {
            let limit = self.clone();
            tokio::spawn(async move {
                sleep_until(ends).await;
                limit.tell();
            });
        }
        false
    }

    fn tell(&self) {
        let left_out = std::mem::take(&mut self.lock().left_out);
        tracing::warn!(
            kind = self.kind,
            left_out,
            per_second = self.per_second,
            "more log lines than are written each second"
        );
    }

    fn lock(&self) -> MutexGuard<'_, Window> {
        // Nothing that can panic runs under the lock.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last line of somebody who may cause the same one again and again.
#[derive(Debug, Default)]
pub(crate) struct LastLine(
    // Held for a look, never across an await.
    Mutex<Option<(u64, Instant)>>,
);

impl LastLine {
    /// Whether `line` is another one than the last, or that is a minute ago.
    pub(crate) fn differs(&self, line: impl Hash) -> bool {
        let mut hasher = DefaultHasher::new();
        line.hash(&mut hasher);
        let (line, now) = (hasher.finish(), Instant::now());
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = last.is_some_and(|(last, at)| last == line && now < at + AGAIN);
        if !same {
            *last = Some((line, now));
        }
        !same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_beyond_the_limit_are_counted_and_told_when_the_second_is_over() {
        let limit = LogLimit::new("refusals");
        let lines = u64::from(LINES_PER_SECOND);
        let began = Instant::now();
        let written = (0..lines + 7).filter(|_| limit.admit()).count() as u64;
        if began.elapsed() < WINDOW {
            assert_eq!((written, limit.lock().left_out), (lines, 7));
        }
        let told = async {
            while limit.lock().left_out > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), told).await.ok();
        assert_eq!(limit.lock().left_out, 0);
        assert!(limit.admit(), "a new second");
    }

    #[test]
    fn the_same_line_is_written_once_a_minute() {
        let last = LastLine::default();
        assert!(last.differs(("register", 1)) && !last.differs(("register", 1)));
        assert!(last.differs(("register", 2)) && last.differs(("register", 1)));
        let minute_ago = |(line, at): (u64, Instant)| Some((line, at.checked_sub(AGAIN)?));
        let mut written = last.0.lock().unwrap_or_else(PoisonError::into_inner);
        *written = written.and_then(minute_ago);
        drop(written);
        assert!(last.differs(("register", 1)) && !last.differs(("register", 1)));
    }
}
