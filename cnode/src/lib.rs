//! Meshx: Erlang distribution and RPC over a service mesh.
//!
//! - [`node`]: a node in Rust that joins an Erlang cluster through an agent.
//! - [`mesh`]: what a service mesh must answer, and the embedded mesh.
//! - [`proxy`]: the data plane: mutual TLS between agents, and the checks on every link.
//! - [`http`]: health and metrics.
//! - [`epmd`]: the agent in EPMD's place, for nodes of plain distribution.
//! - [`agent`]: the daemon that ties them together, one per host.
//! - [`way`]: whether others could swap a directory that is trusted.

pub mod agent;
pub mod cli;
pub mod epmd;
pub mod http;
mod listeners;
mod log_limit;
pub mod mesh;
pub mod node;
pub mod proxy;
pub mod way;
