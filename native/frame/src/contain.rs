//! The last line of defence where a panic would take more than this connection with it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Cause, Failure};

/// Runs `work`; should it panic, that is a [`Failure`] with [`Cause::Internal`].
///
/// A decoder has no panic that a peer is known to reach. Whoever holds one inside a process that must go on (a VM)
/// feeds it in here, behind a lock that the panic poisons, and ends the connection.
///
/// # Errors
/// What `work` returns, or the panic.
pub fn contain<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let text = "the decoder failed, please report it".to_owned();
        Err(Failure {
            cause: Cause::Internal,
            text,
        })
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_panic_is_a_failure_and_poisons_the_lock() {
        let lock = Mutex::new(());
        let work = || {
            let _held = lock.lock().unwrap();
            panic!("as a test");
        };
        assert_eq!(contain::<()>(work).unwrap_err().cause, Cause::Internal);
        assert!(lock.is_poisoned());
    }

    #[test]
    fn results_pass() {
        assert_eq!(contain(|| Ok(1)), Ok(1));
        let failure = Failure {
            cause: Cause::Protocol,
            text: "no".to_owned(),
        };
        assert_eq!(contain::<()>(|| Err(failure.clone())), Err(failure));
    }
}
