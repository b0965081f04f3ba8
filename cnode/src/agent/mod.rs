//! The daemon, one per host: directory, control socket, local trust, registrations.

pub mod client;
pub mod config;
pub mod control;
pub mod dir;
pub mod hosts;
pub mod paths;
pub mod trust;
