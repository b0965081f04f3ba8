//! `meshx run NAME -- COMMAND`: sets what a BEAM must find in its environment, then becomes the command.

mod ebin;
mod flags;
mod plain;

use std::{
    ffi::OsString,
    os::{
        fd::{IntoRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use flags::{Carrier, NodeFlags};
use plain::PlainArgs;
pub(super) use plain::{InetrcArgs, inetrc};
use rustix::process::{Pid, Signal, set_parent_process_death_signal, test_kill_process};

use super::{
    EX_OSERR, EX_UNAVAILABLE, Failure,
    background::{self, IdleOption},
    block_on, connect,
};
use crate::agent::{
    client::ControlClient,
    paths::{self, DIR_VARIABLE},
};

/// What the emulator reads before its own command line.
const ERL_FLAGS: &str = "ERL_FLAGS";
/// What this program put in front of `ERL_FLAGS`, so that a `meshx run` inside of another takes it out.
const OWN_FLAGS: &str = "MESHX_RUN_FLAGS";

/// Run a command whose Erlang or Elixir node joins the mesh
///
/// Sets ERL_FLAGS and MESHX_DIR, then executes COMMAND in this process. erl, elixir, iex and mix read
/// ERL_FLAGS. With --epmd it sets ERL_EPMD_PORT and ERL_INETRC, too.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// Node name, NAME@HOST with a host that the agent owns
    name: String,
    /// The agent's directory
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The agent: require (one must run), shared (one is started for this user when none runs) or private (one is started for this command)
    #[arg(long, value_name = "WHICH", value_enum, default_value_t = WhichAgent::Require)]
    agent: WhichAgent,
    #[command(flatten)]
    idle: IdleOption,
    /// Use short names (-sname) instead of long ones (-name)
    #[arg(long)]
    sname: bool,
    /// The node's cookie (-setcookie); other users of this host can see it in the process list
    #[arg(long, value_name = "COOKIE")]
    cookie: Option<String>,
    /// Start a hidden node
    #[arg(long)]
    hidden: bool,
    /// Label of the node's cluster: links to nodes of another label are hidden
    #[arg(long, value_name = "LABEL")]
    cluster: Option<String>,
    /// Metadata of the node in the catalogue; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    meta: Vec<String>,
    /// Where meshx's compiled Erlang modules are [default: $MESHX_EBIN, then the _build directory here]
    #[arg(long, value_name = "DIR")]
    ebin: Option<PathBuf>,
    #[command(flatten)]
    plain: PlainArgs,
    /// For programs that run this one: COMMAND gets SIGTERM when the parent process ends, has no standard input, and does not start when PID has ended
    #[arg(long, value_name = "PID", hide = true)]
    end_with: Option<i32>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Where the agent of the command comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WhichAgent {
    Require,
    Shared,
    Private,
}

pub(super) fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    flags::check_name(&args.name).map_err(Failure::usage)?;
    if let Some(cookie) = &args.cookie {
        flags::check_cookie(cookie).map_err(Failure::usage)?;
    }
    flags::check_labels(args.cluster.as_deref(), &args.meta).map_err(Failure::usage)?;
    if args.plain.epmd && (args.cluster.is_some() || !args.meta.is_empty()) {
        return Err(Failure::usage(
            "--cluster and --meta need our own modules in the VM, and --epmd starts it without: leave one of them out",
        ));
    }
    // What may take minutes comes before the agent.
    let ebin = match args.plain.epmd {
        true => PathBuf::new(),
        false => ebin::find(args.ebin.as_deref())?,
    };
    let Served {
        dir,
        environment,
        hold,
    } = agent_for(&args)?;
    let own = NodeFlags {
        name: &args.name,
        short: args.sname,
        cookie: args.cookie.as_deref(),
        hidden: args.hidden,
        cluster: args.cluster.as_deref(),
        meta: &args.meta,
        carrier: match (args.plain.epmd, args.plain.plain) {
            (true, _) => Carrier::Epmd,
            (false, true) => Carrier::Plain(&ebin),
            (false, false) => Carrier::Meshx(&ebin),
        },
        inet6: args.plain.inet6,
    }
    .to_erl_flags();
    let present = std::env::var_os(ERL_FLAGS).unwrap_or_default();
    let outer = std::env::var_os(OWN_FLAGS).unwrap_or_default();
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::usage("no command after --"));
    };
    if let Some(hold) = hold {
        keep(hold)?;
    }
    let mut command = Command::new(program);
    if let Some(pid) = args.end_with {
        end_with(pid)?;
        command.stdin(Stdio::null());
    }
    // Returns only when the command could not be started.
    let error = command
        .args(arguments)
        .env(ERL_FLAGS, flags::prepend(&own, &present, &outer))
        .env(OWN_FLAGS, &own)
        .env(DIR_VARIABLE, dir)
        .envs(environment)
        .exec();
    Err(Failure::new(
        127,
        format!("cannot execute {}: {error}", program.to_string_lossy()),
    ))
}

/// What a node needs of its agent.
struct Served {
    /// The agent's directory.
    dir: PathBuf,
    environment: plain::Environment,
    /// An agent that was started for nodes stays as long as somebody has this.
    hold: Option<OwnedFd>,
}

/// The agent that will serve this node: it answers and owns the host.
fn agent_for(args: &RunArgs) -> Result<Served, Failure> {
    let host = args.name.split_once('@').map(|(_, host)| host);
    block_on(async {
        let (client, hold) = match args.agent {
            WhichAgent::Require => (connect(args.dir.as_deref()).await?, None),
            WhichAgent::Shared => {
                let hosts: Vec<String> = host.iter().map(ToString::to_string).collect();
                let client = background::shared(args.dir.as_deref(), &hosts, &args.idle).await?;
                let hold = background::hold(client.dir())?;
                (client, Some(hold))
            }
            WhichAgent::Private if paths::is_configured(args.dir.as_deref()) => {
                return Err(Failure::usage(format!(
                    "--agent private: --dir or ${DIR_VARIABLE} names the agent of this host, and none is started beside \
                     it; leave --agent out, or unset ${DIR_VARIABLE}"
                )));
            }
            WhichAgent::Private => {
                let private = background::private(host).await?;
                (connect(Some(&private.dir)).await?, Some(private.life))
            }
        };
        check_host(&client, &args.name, args.agent)?;
        let environment = args.plain.environment(&client, &args.name).await?;
        Ok(Served {
            dir: client.dir().to_path_buf(),
            environment,
            hold,
        })
    })
}

fn check_host(client: &ControlClient, name: &str, agent: WhichAgent) -> Result<(), Failure> {
    let hosts = &client.hello().hosts;
    match name.split_once('@') {
        Some((_, host)) if !hosts.iter().any(|owned| owned == host) => Err(match agent {
            WhichAgent::Shared => background::not_owned(host, hosts),
            _ => Failure::usage(format!(
                "host_not_owned: host part {host:?} of {name:?} is not one of the agent's: {}; choose one of these or \
                 start the agent with --host {host}",
                hosts.join(", ")
            )),
        }),
        _ => Ok(()),
    }
}

/// SIGTERM once the parent has ended, which the command keeps (PR_SET_PDEATHSIG in prctl(2)). `pid` is what the parent
/// lives for: when it is there now, the parent's end is still to come.
fn end_with(pid: i32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| Failure::new(EX_OSERR, format!("cannot end with process {pid}: {error}")))?;
    match Pid::from_raw(pid).map(test_kill_process) {
        Some(Ok(())) => Ok(()),
        _ => Err(Failure::new(
            EX_UNAVAILABLE,
            format!("process {pid}, with which the command is to end, has ended"),
        )),
    }
}

/// The command inherits it, and whatever comes of the command; a BEAM closes it in the programs that it starts.
fn keep(hold: OwnedFd) -> Result<(), Failure> {
    rustix::io::fcntl_setfd(&hold, rustix::io::FdFlags::empty())
        .map_err(|error| Failure::new(EX_OSERR, format!("cannot hold the agent: {error}")))?;
    // Open until the command ends.
    let _ = hold.into_raw_fd();
    Ok(())
}
