//! Single values: read, and what was wanted instead.

use std::{fs, net::SocketAddr, ops::RangeInclusive, time::Duration};

use super::{LogFormat, NodeService};
use crate::{
    agent::{hosts, registry::options::SidecarKind},
    proxy::Balance,
};

pub(super) fn address(option: &str, text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{option} {text:?}: wanted an address and port such as 127.0.0.1:0"))
}

pub(super) fn loopback(option: &str, address: SocketAddr) -> Result<(), String> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    Err(format!(
        "{option} {address}: the embedded mesh is for one machine, wanted a loopback address such as 127.0.0.1:0"
    ))
}

pub(super) fn host(name: String) -> Result<String, String> {
    // A list, or a pattern, would be one host whose nodes nobody can name.
    if hosts::is_valid(&name) && !name.contains([',', '*']) {
        return Ok(name);
    }
    Err(format!(
        "host {name:?}: wanted one host name or address of at most {} bytes, without @; give each of several by itself",
        hosts::HOST_MAX
    ))
}

/// The most that is any use, in microseconds: who waits for longer is not held up by being woken.
const BUSY_POLL_MAX: u64 = 1_000;

pub(super) fn busy_poll(micros: u64) -> Result<Duration, String> {
    match micros {
        0..=BUSY_POLL_MAX => Ok(Duration::from_micros(micros)),
        more => Err(format!(
            "busy-poll {more}: wanted at most {BUSY_POLL_MAX} microseconds"
        )),
    }
}

pub(super) fn idle_exit(seconds: u64) -> Result<Duration, String> {
    match seconds {
        0 => Err("idle-exit 0: wanted at least one second".to_owned()),
        seconds => Ok(Duration::from_secs(seconds)),
    }
}

/// Execute bits mean nothing on a socket, and the owner must be able to connect.
pub(super) fn socket_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode & !0o666 == 0 && mode & 0o600 == 0o600 => Ok(mode),
        _ => Err(format!(
            "socket-mode {text:?}: wanted octal permission bits such as 0600, 0660 or 0666"
        )),
    }
}

/// A group's number, looked up in group(5).
pub(super) fn find_group(group: &str) -> Result<u32, String> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let table =
        fs::read_to_string("/etc/group").map_err(|error| format!("socket-group: /etc/group: {error}"))?;
    table
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find_map(|fields| match fields.as_slice() {
            [name, _, number, ..] if *name == group => number.parse().ok(),
            _ => None,
        })
        .ok_or_else(|| format!("socket-group {group:?}: there is no such group"))
}

pub(super) fn parse_node_service(text: Option<&str>) -> Result<NodeService, String> {
    match text {
        None | Some("name") => Ok(NodeService::Name),
        Some("node") => Ok(NodeService::Node),
        Some(other) => Err(format!("node-service {other:?}: wanted name or node")),
    }
}

pub(super) fn parse_data_plane(text: Option<&str>) -> Result<SidecarKind, String> {
    let text = text.unwrap_or("native");
    SidecarKind::parse(text)
        .ok_or_else(|| format!("data-plane {text:?}: wanted native, connect_proxy or envoy"))
}

pub(super) fn parse_balance(text: Option<&str>) -> Result<Balance, String> {
    let text = text.unwrap_or("least-loaded");
    Balance::parse(text).ok_or_else(|| format!("balance {text:?}: wanted least-loaded or round-robin"))
}

pub(super) fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let ends = text.split_once('-').and_then(|(first, last)| {
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        (first > 0 && first <= last).then_some(first..=last)
    });
    ends.ok_or_else(|| format!("instance-ports {text:?}: wanted a range such as 21000-21255"))
}

pub(super) fn parse_log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(format!("log-format {other:?}: wanted text or json")),
    }
}
