//! Sockets for what the crate does without: an EPMD, a link, a BEAM.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

pub mod beam;
pub mod epmd;
pub mod peer;

use std::future::Future;
use std::time::Duration;

/// Far above what anything here takes: it ends a test that hangs, nothing depends on it.
const STUCK: Duration = Duration::from_secs(60);

/// Waits for `future`, but not for ever.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(STUCK, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing came in {STUCK:?}"))
}
