//! The node that a command joins the cluster with.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use meshx_dist::handshake::HandshakeError;

use super::{AgentOption, EX_NOPERM, EX_UNAVAILABLE, EX_USAGE, Failure, connect};
use crate::node::{CallError, ConnectError, Node, RpcError, SendError, StartError, read_cookie};

/// Exit code when the remote function failed.
pub(super) const EX_REMOTE: u8 = 1;
/// Environment variable with the EPMD's port, as Erlang has it.
const EPMD_PORT_VARIABLE: &str = "ERL_EPMD_PORT";
const EPMD_PORT: u16 = 4369;

/// How a command reaches nodes.
#[derive(Debug, clap::Args)]
pub(super) struct RoadArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Join by plain TCP and the EPMD at this address, without agent or mesh [default address: 127.0.0.1:$ERL_EPMD_PORT or 4369]
    #[arg(
        long,
        value_name = "IP:PORT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        value_parser = epmd_address,
        conflicts_with = "dir"
    )]
    epmd: Option<SocketAddr>,
    /// Let --epmd leave loopback: whoever is on the network can read everything
    #[arg(long, requires = "epmd")]
    insecure_plain_beyond_loopback: bool,
}

/// Who calls, and for how long it waits.
#[derive(Debug, clap::Args)]
pub(super) struct CallerArgs {
    /// Name of the node that joins for this command [default: tool-PID@ and the agent's first host, or the called node's with --epmd]
    #[arg(long, value_name = "NODE")]
    name: Option<String>,
    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u32,
    #[command(flatten)]
    member: MemberArgs,
}

/// What any node needs to join.
#[derive(Debug, clap::Args)]
pub(super) struct MemberArgs {
    #[command(flatten)]
    pub(super) road: RoadArgs,
    /// The cluster's cookie; other users of this host can see it in the process list
    #[arg(long, value_name = "COOKIE", conflicts_with = "cookie_file")]
    cookie: Option<String>,
    /// File with the cluster's cookie [default: ~/.erlang.cookie]
    #[arg(long, value_name = "FILE")]
    cookie_file: Option<PathBuf>,
}

/// An empty text is the EPMD that Erlang would ask on this host.
fn epmd_address(text: &str) -> Result<SocketAddr, String> {
    if !text.is_empty() {
        let error = |_| "wanted an address and a port, 127.0.0.1:4369 for example".to_owned();
        return text.parse().map_err(error);
    }
    let port = match std::env::var(EPMD_PORT_VARIABLE) {
        Ok(port) => port
            .parse()
            .map_err(|_| format!("{EPMD_PORT_VARIABLE} is {port:?}, wanted a port"))?,
        Err(_) => EPMD_PORT,
    };
    Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
}

impl RoadArgs {
    pub(super) fn agent_dir(&self) -> Option<&std::path::Path> {
        self.agent.dir.as_deref()
    }

    pub(super) fn epmd(&self) -> Option<SocketAddr> {
        self.epmd
    }

    /// Whether the EPMD may be asked: off this host only when that was said.
    pub(super) fn check_epmd(&self) -> Result<(), Failure> {
        match self.epmd {
            Some(epmd) if !epmd.ip().is_loopback() && !self.insecure_plain_beyond_loopback => {
                Err(Failure::usage(StartError::NotLoopback(epmd).to_string()))
            }
            _ => Ok(()),
        }
    }
}

impl CallerArgs {
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.into())
    }

    /// Joins to reach `target`.
    pub(super) async fn join(&self, target: &str) -> Result<Node, Failure> {
        let name = match (&self.name, self.member.road.epmd) {
            (Some(name), _) => name.clone(),
            (None, Some(_)) => {
                let host = target.split_once('@').map_or("localhost", |(_, host)| host);
                format!("tool-{}@{host}", std::process::id())
            }
            (None, None) => {
                let agent = connect(self.member.road.agent_dir()).await?;
                let host = agent.hello().hosts.first();
                let host = host.ok_or_else(|| Failure::usage("the agent owns no host: give --name"))?;
                format!("tool-{}@{host}", std::process::id())
            }
        };
        self.member.join(&name).await
    }
}

impl MemberArgs {
    pub(super) async fn join(&self, name: &str) -> Result<Node, Failure> {
        let cookie = match &self.cookie {
            Some(cookie) => cookie.clone(),
            None => read_cookie(self.cookie_file.as_deref())
                .map_err(|error| Failure::usage(format!("{error}; or give --cookie")))?,
        };
        let mut builder = Node::builder(name).cookie(cookie);
        match (self.road.epmd, &self.road.agent.dir) {
            (Some(epmd), _) => {
                builder = builder.plain_epmd(epmd);
                if self.road.insecure_plain_beyond_loopback {
                    builder = builder.insecure_plain_beyond_loopback();
                }
            }
            (None, Some(dir)) => builder = builder.agent_dir(dir),
            (None, None) => {}
        }
        builder.start().await.map_err(|error| {
            let code = match error {
                StartError::InvalidName(_) | StartError::NoCookie | StartError::NotLoopback(_) => EX_USAGE,
                _ => EX_UNAVAILABLE,
            };
            Failure::new(code, error.to_string())
        })
    }
}

pub(super) fn send_failure(error: SendError) -> Failure {
    let code = match &error {
        SendError::Connect(ConnectError::Refused { cause, .. })
            if cause == "intention_denied" || cause == "not_permitted" =>
        {
            EX_NOPERM
        }
        SendError::Connect(ConnectError::Handshake {
            error: HandshakeError::CookieMismatch { .. },
            ..
        }) => EX_NOPERM,
        SendError::Connect(ConnectError::InvalidName(_)) => EX_USAGE,
        _ => EX_UNAVAILABLE,
    };
    Failure::new(code, error.to_string())
}

pub(super) fn call_failure(error: CallError) -> Failure {
    match error {
        CallError::Send(error) => send_failure(error),
        CallError::Exit(_) => Failure::new(EX_REMOTE, error.to_string()),
        _ => Failure::new(EX_UNAVAILABLE, error.to_string()),
    }
}

pub(super) fn rpc_failure(error: RpcError) -> Failure {
    match error {
        RpcError::Call(error) => call_failure(error),
        // With the term as Erlang prints it.
        RpcError::Error { mfa, reason, .. } => Failure::new(EX_REMOTE, format!("{mfa} raised {reason}")),
        RpcError::Exit { mfa, reason } => Failure::new(EX_REMOTE, format!("{mfa} exited with {reason}")),
        RpcError::Throw { mfa, value } => Failure::new(EX_REMOTE, format!("{mfa} threw {value}")),
        other => Failure::new(EX_REMOTE, other.to_string()),
    }
}
