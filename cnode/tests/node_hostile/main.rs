//! Peers that misbehave: each gets a clear end, within its limit, and nobody else notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod connections;
mod mailboxes;
#[path = "../node_support/mod.rs"]
mod node_support;
mod rex;
mod scene;
mod watches;
