//! Consul's built-in proxy.

use super::Consul;
use crate::{Process, Result};

impl Consul {
    /// Starts `consul connect proxy` for the registered service `id`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn connect_proxy(&self, id: &str, token: Option<&str>) -> Result<Process> {
        let environment = self.environment(token.or(self.management()))?;
        let arguments = ["connect", "proxy", "-sidecar-for", id];
        let mut process = Process::start(
            &format!("connect proxy of {id}"),
            super::program()?,
            arguments,
            |command| {
                command.envs(environment);
            },
        )?;
        process.wait_for(super::START, |line| {
            line.contains("Proxy loaded config and ready to serve")
                .then_some(())
        })?;
        Ok(process)
    }
}
