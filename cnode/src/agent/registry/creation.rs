//! Creations: the number that tells a node's incarnations apart.

use std::io;

/// The lowest that a node may have: 0 stands for "this node", 1 to 3 are what old nodes had (distribution
/// protocol, `ALIVE2_X_RESP`).
pub(super) const LOWEST: u32 = 4;

/// Hands out creations. It begins anywhere, so that an agent that starts again does not repeat itself, and
/// counts up from there, so that no two registrations of its life have the same.
#[derive(Debug)]
pub(super) struct Creations {
    next: u32,
}

/// A creation that a node brought moves the counter past itself when it lies this close ahead.
const NEAR: u32 = 1 << 20;

impl Creations {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            next: getrandom::u32().map_err(io::Error::other)?.max(LOWEST),
        })
    }

    /// Goes on where a predecessor of this process stopped.
    pub(super) fn resume(next: u32) -> Self {
        Self {
            next: next.max(LOWEST),
        }
    }

    /// The one that comes next.
    pub(super) fn upcoming(&self) -> u32 {
        self.next
    }

    /// The one that a node runs with already, or a fresh one.
    pub(super) fn next(&mut self, brought: Option<u32>) -> u32 {
        match brought {
            Some(brought) => {
                if brought.wrapping_sub(self.next) < NEAR {
                    self.next = after(brought);
                }
                brought
            }
            None => {
                let creation = self.next;
                self.next = after(creation);
                creation
            }
        }
    }
}

fn after(creation: u32) -> u32 {
    creation.checked_add(1).unwrap_or(LOWEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_new_and_none_is_below_four() {
        let mut creations = Creations { next: u32::MAX - 1 };
        let given: Vec<u32> = (0..4).map(|_| creations.next(None)).collect();
        assert_eq!(given, [u32::MAX - 1, u32::MAX, 4, 5]);
    }

    #[test]
    fn one_that_was_brought_is_kept_and_not_given_again() {
        let mut creations = Creations { next: 100 };
        assert_eq!(creations.next(Some(100)), 100);
        assert_eq!(creations.next(None), 101);
        assert_eq!(creations.next(Some(150)), 150);
        assert_eq!(creations.next(None), 151);
        assert_eq!(creations.next(Some(7)), 7);
        assert_eq!(creations.next(None), 152);
    }

    #[test]
    fn agents_begin_at_different_numbers() -> io::Result<()> {
        let first = Creations::new()?.next(None);
        let differs = (0..4).map(|_| Creations::new().map(|mut c| c.next(None) != first));
        assert!(differs.collect::<io::Result<Vec<_>>>()?.contains(&true));
        Ok(())
    }
}
