//! The options about EPMD, checked.

use std::net::SocketAddr;

use crate::epmd::{EpmdConfig, Patterns, TOOLS};

/// The options about EPMD, as they were given.
pub(super) struct EpmdOptions {
    pub(super) listen: Vec<String>,
    pub(super) nodes: Vec<String>,
    pub(super) tools: Vec<String>,
    pub(super) host: Option<String>,
}

impl EpmdOptions {
    pub(super) fn checked(self, hosts: &[String]) -> Result<Option<EpmdConfig>, String> {
        if self.listen.is_empty() {
            return match (self.nodes.is_empty(), self.host) {
                (true, None) => Ok(None),
                _ => Err("epmd-nodes and epmd-host mean nothing without epmd".to_owned()),
            };
        }
        let mut listen = Vec::new();
        for place in &self.listen {
            listen.extend(epmd_place(place)?);
        }
        let patterns = |option: &str, patterns: Vec<String>| {
            Patterns::new(patterns).map_err(|error| format!("{option}: {error}"))
        };
        let tools = match self.tools.is_empty() {
            true => TOOLS.map(str::to_owned).into(),
            false => self.tools,
        };
        let host = match self.host {
            Some(host) if hosts.contains(&host) => host,
            Some(host) => {
                return Err(format!(
                    "epmd-host {host:?}: wanted one of the hosts that the agent owns: {}",
                    hosts.join(", ")
                ));
            }
            None => hosts.first().cloned().unwrap_or_default(),
        };
        Ok(Some(EpmdConfig {
            listen,
            nodes: patterns("epmd-nodes", self.nodes)?,
            tools: patterns("epmd-tools", tools)?,
            host,
        }))
    }
}

/// A port of both loopback addresses, or an address and a port.
fn epmd_place(text: &str) -> Result<Vec<SocketAddr>, String> {
    if let Ok(port) = text.parse() {
        return Ok(EpmdConfig::loopback(port));
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(vec![address]),
        _ => Err(format!(
            "epmd {text:?}: wanted a port, or a loopback address and a port such as 127.0.0.1:4369: who asks proves \
             nothing but that he is on this host"
        )),
    }
}
