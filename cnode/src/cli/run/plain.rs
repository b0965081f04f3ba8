//! Nodes of plain distribution: what they are told of the agent that is their EPMD.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use meshx_etf::Term;

use crate::{
    agent::{
        client::ControlClient,
        control::message::{map, text},
    },
    cli::{AgentOption, EX_IOERR, EX_SOFTWARE, EX_UNAVAILABLE, Failure, answer, block_on, connect, print},
};

/// Variables and their values.
pub(super) type Environment = Vec<(&'static str, OsString)>;

/// How a node speaks, when not by our own carrier.
#[derive(Debug, clap::Args)]
pub(super) struct PlainArgs {
    /// Speak plain distribution (inet_tcp_dist) on loopback; the module meshx_epmd leads it through the agent
    #[arg(long, conflicts_with = "epmd")]
    pub(super) plain: bool,
    /// Run an unmodified VM, which takes the agent for its EPMD; the agent must have been started with --epmd
    #[arg(long)]
    pub(super) epmd: bool,
    /// With --plain or --epmd: IPv6 (inet6_tcp_dist)
    #[arg(long)]
    pub(super) inet6: bool,
    /// With --epmd: a host that the node is to reach, besides those that have nodes in the mesh now; may be given more than once
    #[arg(long, value_name = "HOST", requires = "epmd")]
    reach: Vec<String>,
}

/// Print the file by which unmodified VMs find other hosts (ERL_INETRC)
///
/// Each host gets a loopback address on which the agent answers for it: the hosts that have nodes in the mesh, and those
/// that are named. The agent must have been started with --epmd.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct InetrcArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Write the file there instead
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Hosts that are to be reached, besides those that have nodes in the mesh now
    #[arg(value_name = "HOST")]
    hosts: Vec<String>,
}

impl PlainArgs {
    /// What the environment of an unmodified VM needs.
    pub(super) async fn environment(
        &self,
        client: &ControlClient,
        name: &str,
    ) -> Result<Environment, Failure> {
        if self.inet6 && !self.plain && !self.epmd {
            return Err(Failure::usage("--inet6 needs --plain or --epmd"));
        }
        if !self.epmd {
            return Ok(Vec::new());
        }
        let epmd = Epmd::ask(client, &self.reach).await?;
        if let Some((_, host)) = name.split_once('@')
            && host != epmd.host
        {
            return Err(Failure::usage(format!(
                "host_not_owned: by EPMD nodes of the host {} are registered, and {name} is of another; name it so, or \
                 start the agent with --epmd-host {host}",
                epmd.host
            )));
        }
        Ok(vec![
            ("ERL_EPMD_PORT", epmd.port.to_string().into()),
            ("ERL_INETRC", epmd.inetrc.into()),
        ])
    }
}

pub(in crate::cli) fn inetrc(args: &InetrcArgs) -> Result<ExitCode, Failure> {
    let path = block_on(async {
        let client = connect(args.agent.dir.as_deref()).await?;
        Ok(Epmd::ask(&client, &args.hosts).await?.inetrc)
    })?;
    let told = |path: &Path, error: std::io::Error| {
        Failure::new(EX_UNAVAILABLE, format!("{}: {error}", path.display()))
    };
    let contents = fs::read_to_string(&path).map_err(|error| told(&path, error))?;
    match &args.out {
        None => print(&contents)?,
        Some(out) => fs::write(out, contents)
            .map_err(|error| Failure::new(EX_IOERR, format!("{}: {error}", out.display())))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What the agent says of itself as EPMD.
struct Epmd {
    port: u16,
    host: String,
    inetrc: PathBuf,
}

impl Epmd {
    async fn ask(client: &ControlClient, hosts: &[String]) -> Result<Self, Failure> {
        let hosts = Term::list(hosts.iter().map(text));
        let told = client.request("epmd", map([("hosts", hosts)])).await?;
        let port = told.map_get("port").and_then(Term::as_int);
        let port = port.and_then(|port| u16::try_from(port).ok());
        Ok(Self {
            port: port.ok_or_else(|| Failure::new(EX_SOFTWARE, "the agent's answer has no port"))?,
            host: answer::text(&told, "host"),
            inetrc: answer::text(&told, "inetrc").into(),
        })
    }
}
