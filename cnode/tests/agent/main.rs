//! The real agent, spoken to over its real control socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod diagnosis;
mod heartbeat;
mod hostile;
mod library;
mod lifecycle;
mod log;
mod registration;
mod sessions;
mod support;
mod takeover;
mod takeover_epmd;
mod trust;
mod watches;
