//! The daemon, one per host: directory, control socket, local trust, registrations.

mod certificate;
pub mod client;
mod clusters;
pub mod config;
pub mod control;
mod daemon;
pub mod dir;
mod doctor;
pub mod hosts;
pub mod paths;
pub mod registry;
pub mod sidecar;
pub mod takeover;
pub mod trust;

pub(crate) use daemon::quoted;
pub use daemon::{Agent, Event, STOP_TIME, StartError};
