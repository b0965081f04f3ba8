//! `meshx doctor`.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::ExitCode;

use meshx_etf::Term;
use serde_json::{Value, json};

use super::answer::{self, print_json};
use super::report::{Row, report};
use super::{AgentOption, EX_UNAVAILABLE, Failure, block_on, connect, print};
use crate::agent::client::{ClientError, ControlClient};
use crate::agent::control::PROGRAM;
use crate::agent::control::message::{map, text};
use crate::agent::paths::{self, DIST_SOCKET, DirError};
use crate::epmd::EPMD_PORT;
use crate::listeners;

/// Look for what is wrong with the agent, the mesh and this host, and say what to do
///
/// One finding a line: ok, warning or error, what was looked at, what was seen, and what to do. Works without an agent,
/// too. Exit code 0 without errors, 1 with warnings and --strict, 69 with errors.
#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Exit with code 1 when there are warnings
    #[arg(long)]
    strict: bool,
    /// The port where a stray EPMD would listen
    #[arg(long, value_name = "PORT", env = "ERL_EPMD_PORT", default_value_t = EPMD_PORT)]
    epmd_port: u16,
    /// Say only what a denial of this pair of services would do to clusters of nodes, before it is applied
    #[arg(long, num_args = 2, value_names = ["SOURCE", "DESTINATION"])]
    deny: Option<Vec<String>>,
    /// Print a JSON array with one object per finding
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    let mut rows = vec![];
    match args.deny.as_deref() {
        Some([source, destination]) => {
            let pair = Term::tuple([text(source), text(destination)]);
            rows.extend(block_on(async {
                let client = connect(args.agent.dir.as_deref()).await?;
                findings(&client.request("doctor", map([("deny", pair)])).await?)
            })?);
        }
        _ => {
            block_on(agent(args.agent.dir.as_deref(), &mut rows))?;
            rows.push(epmd(args.epmd_port));
        }
    }
    let count = |level: &str| rows.iter().filter(|row| row.level == level).count();
    let (errors, warnings) = (count("error"), count("warning"));
    if args.json {
        let object =
            |row: &Row| json!({"level": row.level, "what": row.what, "text": row.text, "fix": row.fix});
        print_json(&rows.iter().map(object).collect::<Value>())?;
    } else {
        print(&report(&rows))?;
    }
    Ok(match (errors, warnings) {
        (1.., _) => ExitCode::from(EX_UNAVAILABLE),
        (0, 1..) if args.strict => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

fn row(level: &str, what: &str, text: impl Into<String>, fix: impl Into<String>) -> Row {
    Row {
        level: level.to_owned(),
        what: what.to_owned(),
        text: text.into(),
        fix: fix.into(),
    }
}

/// The agent's directory, the agent, and what it finds itself.
async fn agent(dir: Option<&Path>, rows: &mut Vec<Row>) -> Result<(), Failure> {
    let dir = paths::agent_dir(dir);
    let start = format!("start one: meshx agent --mesh embedded --dir {}", dir.display());
    match paths::checked_client_dir(&dir) {
        Ok(_) => rows.push(row(
            "ok",
            "directory",
            format!("{} is safe to use", dir.display()),
            "",
        )),
        Err(DirError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            rows.push(row(
                "error",
                "agent",
                format!("none on this host: {} is not there", dir.display()),
                start,
            ));
            return Ok(());
        }
        // Its text says what to do.
        Err(error) => {
            rows.push(row("error", "directory", error.to_string(), ""));
            return Ok(());
        }
    }
    let client = match ControlClient::connect(Some(&dir)).await {
        Ok(client) => client,
        Err(ClientError::NoAgent { source, .. }) => {
            rows.push(row(
                "error",
                "agent",
                format!("none answers in {}: {source}", dir.display()),
                start,
            ));
            return Ok(());
        }
        // Its text says what to do.
        Err(error @ ClientError::NotAllowed { .. }) => {
            rows.push(row("error", "agent", error.to_string(), ""));
            return Ok(());
        }
        Err(error) => {
            rows.push(row(
                "error",
                "agent",
                error.to_string(),
                "see the agent's log, or start it anew",
            ));
            return Ok(());
        }
    };
    let hello = client.hello();
    rows.push(match hello.agent == PROGRAM {
        true => {
            let text = format!(
                "{}, hosts {}, mesh {}",
                hello.agent,
                hello.hosts.join(" "),
                hello.mesh
            );
            row("ok", "agent", text, "")
        }
        false => {
            let text = format!("{} runs, and this program is {PROGRAM}", hello.agent);
            row("warning", "agent", text, "start the agent anew with this program")
        }
    });
    rows.push(dist_socket(&dir));
    match client.request("doctor", map([])).await {
        Ok(answer) => rows.extend(findings(&answer)?),
        Err(error) => rows.push(row(
            "error",
            "agent",
            error.to_string(),
            "see its log; one without doctor is older",
        )),
    }
    Ok(())
}

/// What the agent answered.
fn findings(answer: &Term) -> Result<Vec<Row>, Failure> {
    let finding = |finding: &Term| {
        let [level, what, text, fix] = ["level", "what", "text", "fix"].map(|key| answer::text(finding, key));
        Row {
            level,
            what,
            text,
            fix,
        }
    };
    Ok(answer::list(answer, "findings")?
        .into_iter()
        .map(finding)
        .collect())
}

fn dist_socket(dir: &Path) -> Row {
    let path = dir.join(DIST_SOCKET);
    let fix = "nodes dial through it: start the agent anew";
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            row("ok", "sockets", "control.sock and dist.sock are there", "")
        }
        Ok(_) => row(
            "error",
            "sockets",
            format!("{} is no socket", path.display()),
            fix,
        ),
        Err(error) => row("error", "sockets", format!("{}: {error}", path.display()), fix),
    }
}

/// An EPMD that somebody started tells everyone who can reach it which nodes there are.
fn epmd(port: u16) -> Row {
    let found = match listeners::on_port(port) {
        Ok(found) => found,
        Err(error) => {
            let text = format!("who listens on port {port} cannot be seen: {error}");
            return row("warning", "epmd", text, "look with ss -ltnp");
        }
    };
    let Some(first) = found.first() else {
        return row("ok", "epmd", format!("none listens on port {port}"), "");
    };
    let places: Vec<_> = found
        .iter()
        .map(|listener| listener.address.to_string())
        .collect();
    let text = format!("{} listens on {}", first.owner(), places.join(" and "));
    match found.iter().all(|listener| listener.address.ip().is_loopback()) {
        true => row(
            "ok",
            "epmd",
            format!("{text}, loopback only; nodes of the mesh need none"),
            "",
        ),
        false => row(
            "warning",
            "epmd",
            format!("{text}, beyond loopback: whoever reaches it sees and can take node names"),
            format!(
                "nodes of the mesh need none: epmd -kill, and start nodes with meshx run; or set ERL_EPMD_ADDRESS={}",
                Ipv4Addr::LOCALHOST
            ),
        ),
    }
}
