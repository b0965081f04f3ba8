//! The data plane: mutual TLS between agents, and the checks on every link.

pub mod cause;
pub mod links;
pub mod local;
