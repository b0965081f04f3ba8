//! The control socket: framing, messages, sessions and commands.

mod args;
pub(in crate::agent) mod commands;
pub(in crate::agent) mod diagnosis;
pub mod frame;
mod heartbeat;
pub(in crate::agent) mod idle;
pub mod message;
mod options;
mod outbox;
pub(in crate::agent) mod server;
pub(in crate::agent) mod session;
mod slots;
pub(in crate::agent) mod upstreams;
mod watches;

pub use commands::PROGRAM;
pub use heartbeat::{HUNG_AFTER, HUNG_AFTER_MAX, HUNG_AFTER_MIN};
pub use outbox::{QUEUE_BYTES_MAX, QUEUE_FRAMES_MAX, WRITE_TIME};
pub use server::FREEZE_TIME;
pub use session::HELLO_TIME;
pub use slots::{CLIENTS_MAX, CLIENTS_PER_USER_MAX};
pub use upstreams::{UPSTREAMS_MAX, UPSTREAMS_PER_CLIENT_MAX};
pub use watches::{WATCHED_NODES_MAX, WATCHED_SERVICES_MAX, WATCHES_PER_CLIENT_MAX};

/// Requests of one client that may be unanswered at a time.
pub const UNANSWERED_MAX: usize = 64;
