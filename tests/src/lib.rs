//! What the end-to-end tests and the demo share: real agents, real BEAMs and C-nodes, started and ended for sure.
//!
//! Every process runs in a process group of its own and dies with the thread that started it
//! (`setpriv --pdeathsig`), so an aborted run leaves nothing behind.

mod agent;
mod beam;
pub mod bench;
pub mod consul;
pub mod control;
mod echo;
pub mod envoy;
pub mod epmd;
pub mod fuzz;
pub mod network;
mod process;
pub mod tls;
pub mod traffic;
pub mod upgrade;

pub use agent::{Agent, Mesh};
pub use beam::{Beam, BeamBuilder, COOKIE, ebin, ebin_on, has_otp, otp_path};
pub use echo::{EchoClient, EchoServer};
pub use network::Network;
pub use process::{Process, kill_all, processes_with, wait_until};

/// A failure in words: what was done, what was seen.
pub type Result<T> = std::result::Result<T, String>;

/// Adds what was being done to a failure.
pub trait Context<T> {
    /// `what` in front of the error's own text.
    fn context(self, what: impl std::fmt::Display) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl std::fmt::Display) -> Result<T> {
        self.map_err(|e| format!("{what}: {e}"))
    }
}

/// The repository's root, as it was when this crate was built.
pub fn repository() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A program of this workspace, built beside the running one.
///
/// # Errors
/// When it has not been built: the text says how.
pub fn program(name: &str) -> Result<std::path::PathBuf> {
    let exe = std::env::current_exe().context("find the running program")?;
    // target/PROFILE/demo or target/PROFILE/deps/test-HASH
    exe.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!(
                "{name} is not built beside {}: run `make build` or `make test`",
                exe.display()
            )
        })
}

/// A program that `scripts/SCRIPT` fetched into target/, or the one that the variable names.
fn fetched(variable: &str, path: &str, script: &str) -> Result<std::path::PathBuf> {
    if let Some(named) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
        return Ok(named.into());
    }
    let exe = std::env::current_exe().context("find the running program")?;
    // target/PROFILE/deps/test-HASH
    exe.ancestors()
        .skip(2)
        .take(2)
        .map(|dir| dir.join(path))
        .find(|path| path.is_file())
        .ok_or_else(|| format!("no {path} in target/: run scripts/{script}, or set {variable}"))
}
