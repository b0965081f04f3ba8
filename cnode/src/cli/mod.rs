//! The command line of `meshx`.

mod agent;
mod answer;
mod background;
mod call;
mod caller;
mod check;
mod copying;
mod doctor;
mod json;
mod links;
mod log_writer;
mod mesh;
mod names;
mod node;
mod notify;
mod report;
mod rules;
mod run;
mod why;

use std::{
    fmt,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::agent::client::{ClientError, ControlClient};

/// Erlang distribution and RPC over a service mesh.
#[derive(Debug, Parser)]
#[command(name = "meshx", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this host
    ///
    /// Prints one line when it is ready: meshx agent ready dir=DIR inbound=IP:PORT hosts=NAME,.. mesh=MESH.
    /// Logs go to stderr, RUST_LOG says how much. SIGINT or SIGTERM ends it.
    Agent(Box<agent::AgentCommand>),
    Start(background::StartArgs),
    Run(run::RunArgs),
    Inetrc(run::InetrcArgs),
    Names(names::NamesArgs),
    Links(links::LinksArgs),
    Check(check::CheckArgs),
    Why(why::WhyArgs),
    Doctor(doctor::DoctorArgs),
    Services(mesh::ServicesArgs),
    Intentions(mesh::IntentionsArgs),
    Certs(mesh::CertsArgs),
    Allow(rules::PairArgs),
    Deny(rules::PairArgs),
    Rules(rules::RulesArgs),
    Rotate(rules::RotateArgs),
    Ping(call::PingArgs),
    Call(call::CallArgs),
    Send(call::SendArgs),
    Node(node::NodeArgs),
}

/// Which agent is asked.
#[derive(Debug, clap::Args)]
struct AgentOption {
    /// The agent's directory [default: $MESHX_DIR, $XDG_RUNTIME_DIR/meshx, /tmp/meshx-UID]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// What ends the program: a text for stderr and an exit code as in sysexits.h.
#[derive(Debug)]
struct Failure {
    code: u8,
    text: String,
}

/// Runs the command that the arguments of this process name.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors.
            let code = if error.use_stderr() { EX_USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let result = match cli.command {
        Command::Agent(args) => agent::run(*args),
        Command::Start(args) => background::start(&args),
        Command::Run(args) => run::run(args),
        Command::Inetrc(args) => run::inetrc(&args),
        Command::Names(args) => names::run(&args),
        Command::Links(args) => links::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Why(args) => why::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Services(args) => mesh::services(&args),
        Command::Intentions(args) => mesh::intentions(&args),
        Command::Certs(args) => mesh::certs(&args),
        Command::Allow(args) => rules::allow(&args),
        Command::Deny(args) => rules::deny(&args),
        Command::Rules(args) => rules::run(&args),
        Command::Rotate(args) => rules::rotate_certificates(&args),
        Command::Ping(args) => call::ping(&args),
        Command::Call(args) => call::call(&args),
        Command::Send(args) => call::send(&args),
        Command::Node(args) => node::run(&args),
    };
    result.unwrap_or_else(|failure| {
        complain(format!("meshx: {failure}\n"));
        ExitCode::from(failure.code)
    })
}

/// How long the end of the program waits for somebody to read why.
const COMPLAINT_TIME: Duration = Duration::from_secs(1);

/// Says it on standard error; a pipe that is full, and that nobody reads, does not keep the program.
fn complain(text: String) {
    let (written, said) = mpsc::channel();
    let say = move || {
        let _ = io::stderr().write_all(text.as_bytes());
        let _ = written.send(());
    };
    if thread::Builder::new().spawn(say).is_ok() {
        let _ = said.recv_timeout(COMPLAINT_TIME);
    }
}

/// The command line or a configuration file is wrong.
const EX_USAGE: u8 = 64;
/// Something that is needed is not there, for example the agent.
const EX_UNAVAILABLE: u8 = 69;
/// A fault of this program, or an answer that it does not understand.
const EX_SOFTWARE: u8 = 70;
/// The system refused something.
const EX_OSERR: u8 = 71;
/// Standard output could not be written, or standard input not be read.
const EX_IOERR: u8 = 74;
/// The agent, or the mesh, said no.
const EX_NOPERM: u8 = 77;

impl Failure {
    fn new(code: u8, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }

    fn usage(text: impl Into<String>) -> Self {
        Self::new(EX_USAGE, text)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::Refused { .. } | ClientError::NotAllowed { .. } => EX_NOPERM,
            ClientError::Protocol(_) | ClientError::Request(_) => EX_SOFTWARE,
            _ => EX_UNAVAILABLE,
        };
        Self::new(code, error.to_string())
    }
}

/// Runs a command that asks an agent.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(EX_OSERR, format!("cannot start: {error}")))?
        .block_on(work)
}

async fn connect(dir: Option<&Path>) -> Result<ControlClient, Failure> {
    Ok(ControlClient::connect(dir).await?)
}

/// Writes to standard output. A reader that has seen enough is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(EX_IOERR, format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Columns, each as wide as its widest cell, the first row in capitals.
fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head = head.map(str::to_owned);
    let line = |row: &[String; N]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    std::iter::once(&head).chain(rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn columns_are_as_wide_as_needed() {
        let rows = [
            ["shop@h1".to_owned(), "x".to_owned()],
            ["ä@h".to_owned(), String::new()],
        ];
        assert_eq!(table(["NODE", "S"], &rows), "NODE     S\nshop@h1  x\nä@h\n");
    }
}
