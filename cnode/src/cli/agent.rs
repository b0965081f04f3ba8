//! `meshx agent`.

use std::{
    fmt,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, ErrorKind, Read},
    os::{fd::AsFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::Mode,
    process::{Resource, Rlimit, getrlimit, setrlimit, setsid, umask},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use super::{
    EX_OSERR, EX_SOFTWARE, EX_UNAVAILABLE, Failure, background, copying, log_writer::Log, notify, print,
};
use crate::agent::{
    Agent, Event, STOP_TIME, StartError,
    config::{AgentArgs, AgentConfig, LogFormat},
    dir::{Access, AgentDir},
    paths::{self, DirError, LOG_FILE, MESH_DIR_VARIABLE, VM_DIR},
};

/// Pause between two tries for the directory of an agent that ends.
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// Directories of private agents that a new one looks at.
const LEFT_MAX: usize = 256;

/// An agent, and how it is run.
#[derive(Debug, clap::Args)]
pub(super) struct AgentCommand {
    #[command(flatten)]
    agent: AgentArgs,
    /// Leave the terminal: a session of its own, and the log goes to agent.log in the agent's directory
    #[arg(long)]
    detached: bool,
    /// Be the agent of one VM, detached, in a new directory and on an embedded mesh of its own (or the one that MESHX_MESH_DIR names); ends when standard input does, and removes the directory
    #[arg(long, conflicts_with_all = ["mesh", "dir", "config", "takeover"])]
    private: bool,
}

pub(super) fn run(command: AgentCommand) -> Result<ExitCode, Failure> {
    let AgentCommand {
        mut agent,
        detached,
        private,
    } = command;
    copying::by_vectors();
    // Between making a socket or a file and setting its mode, nobody else may open it.
    umask(Mode::RWXG | Mode::RWXO);
    let private = private.then(PrivateDir::make).transpose()?;
    if let Some(PrivateDir(dir)) = &private {
        agent.mesh = Some("embedded".to_owned());
        agent.dir = Some(dir.clone());
        if std::env::var_os(MESH_DIR_VARIABLE).is_none_or(|value| value.is_empty()) {
            agent.mesh_dir = agent.mesh_dir.or_else(|| Some(dir.join("mesh")));
        }
    }
    let config = AgentConfig::from_args(agent).map_err(|errors| Failure::usage(errors.to_string()))?;
    let detached = detached || private.is_some();
    let log = match detached {
        true => leave_terminal(&config)?,
        false => standard_error()?,
    };
    let log = start_log(config.log_format, log)?;
    raise_descriptor_limit();
    let life = private.as_ref().map(|_| until_stdin_ends());
    let ended = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(EX_OSERR, format!("cannot start: {error}")))?
        .block_on(serve(config, detached, life.unwrap_or_default()));
    drop(private);
    // Last, for what all the others have said.
    drop(log);
    ended
}

/// A private agent's directory, made by it and removed with it.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn make() -> Result<Self, Failure> {
        let random = getrandom::u32().map_err(io::Error::other);
        let random = random.map_err(|error| Failure::new(EX_OSERR, error.to_string()))?;
        let base = paths::private_base();
        Self::clear_up(&base);
        let dir = base.join(format!("{}{random:08x}", Self::prefix()));
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => Ok(Self(dir)),
            Err(error) => Err(Failure::new(
                EX_OSERR,
                format!("directory {}: {error}", dir.display()),
            )),
        }
    }

    fn prefix() -> String {
        format!("meshx-{}-", paths::uid())
    }

    /// Removes the directories of private agents that were killed. Nobody else would.
    fn clear_up(base: &Path) {
        let prefix = Self::prefix();
        let is_private = |name: &str| {
            let random = name.strip_prefix(&prefix).unwrap_or_default();
            random.len() == 8 && random.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        let entries = fs::read_dir(base).into_iter().flatten().flatten();
        let named = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_private));
        for dir in named.take(LEFT_MAX).map(|entry| entry.path()) {
            // An agent makes this under its lock, and takes it away under it: one that begins or ends is none that died.
            let vm = dir.join(VM_DIR);
            if !vm.is_dir() {
                continue;
            }
            // Without its agent the socket of a node that lives stays.
            if let Ok(_dead) = AgentDir::open(&dir, Access::default())
                && fs::read_dir(&vm).is_ok_and(|mut sockets| sockets.next().is_none())
            {
                drop(Self(dir));
            }
        }
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(dir = %self.0.display(), %error, "could not be removed");
        }
    }
}

/// No terminal's signals from here on, and a file for the log. What keeps the agent from starting is still said on
/// standard error.
fn leave_terminal(config: &AgentConfig) -> Result<fs::File, Failure> {
    // Refused to a process that leads its group: then it is nobody's foreground job either.
    let _ = setsid();
    let failed =
        |error: io::Error| Failure::new(EX_UNAVAILABLE, format!("{}: {error}", config.dir.display()));
    match DirBuilder::new().mode(0o700).create(&config.dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let dir = paths::checked_client_dir(&config.dir);
    let dir = dir.map_err(|error| Failure::new(EX_UNAVAILABLE, error.to_string()))?;
    let file =
        background::private_file(OpenOptions::new().append(true), &dir.join(LOG_FILE)).map_err(failed)?;
    // The log is of one agent; one that still ends there goes on behind what is cut off.
    file.set_len(0).map_err(failed)?;
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "this is a bug, please report it"),
    ));
    Ok(file)
}

fn standard_error() -> Result<fs::File, Failure> {
    let same = io::stderr().as_fd().try_clone_to_owned();
    same.map(fs::File::from)
        .map_err(|error| Failure::new(EX_OSERR, format!("standard error: {error}")))
}

/// Waits until the log takes something, or nobody can read it any more: then the next write says so.
fn wait_writable(log: &fs::File) {
    let _ = poll(&mut [PollFd::new(log, PollFlags::OUT)], None);
}

/// Fires when nobody holds the other end of standard input any more.
fn until_stdin_ends() -> CancellationToken {
    let ended = CancellationToken::new();
    let tell = ended.clone();
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut bytes = [0; 256];
        loop {
            match stdin.read(&mut bytes) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => break tell.cancel(),
            }
        }
    });
    ended
}

/// One that is detached waits for an agent that ends.
async fn start(config: AgentConfig, detached: bool) -> Result<Agent, StartError> {
    let until = Instant::now() + STOP_TIME;
    loop {
        match Agent::start(config.clone()).await {
            Err(StartError::Dir(DirError::Taken(_))) if detached && Instant::now() < until => {
                sleep(LOCK_RETRY).await;
            }
            started => return started,
        }
    }
}

async fn serve(config: AgentConfig, detached: bool, life: CancellationToken) -> Result<ExitCode, Failure> {
    // From here on a signal ends the agent in order.
    let mut signals = Signals::listen().map_err(|error| Failure::new(EX_OSERR, error.to_string()))?;
    let started = start(config, detached).await;
    let mut agent = started.map_err(|error| Failure::new(EX_UNAVAILABLE, error.to_string()))?;
    if let Err(error) = notify::ready() {
        tracing::warn!(%error, "systemd cannot be told that the agent serves");
    }
    let result = match print(&format!("{}\n", agent.ready_line())) {
        Err(failure) => Err(failure),
        Ok(()) => run_until(&mut agent, &mut signals, life).await,
    };
    agent.stop().await;
    result
}

async fn run_until(
    agent: &mut Agent,
    signals: &mut Signals,
    life: CancellationToken,
) -> Result<ExitCode, Failure> {
    loop {
        tokio::select! {
            signal = signals.next() => {
                tracing::info!(signal, "ending");
                tokio::select! {
                    () = agent.drain() => {}
                    signal = signals.next() => tracing::info!(signal, "ending now"),
                }
                return Ok(ExitCode::SUCCESS);
            }
            () = life.cancelled() => {
                tracing::info!("the VM has ended: ending");
                return Ok(ExitCode::SUCCESS);
            }
            event = agent.run() => match event {
                Event::Successor(successor) => agent.hand_over(successor).await,
                Event::Ended => return Ok(ExitCode::SUCCESS),
                Event::Failed => {
                    return Err(Failure::new(EX_SOFTWARE, "the agent failed, the log says how"));
                }
            },
        }
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// Held, so that a file that may not grow is an error of its write, which is told, and not the end of the agent.
    _file_size: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            _file_size: signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "SIGHUP",
        }
    }
}

fn start_log(format: LogFormat, out: fs::File) -> Result<Log, Failure> {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .from_env()
        .map_err(|error| Failure::usage(format!("RUST_LOG: {error}")))?;
    let failed = |error: &dyn fmt::Display| Failure::new(EX_OSERR, format!("cannot log: {error}"));
    let tell_lost = |lost| tracing::warn!("{lost} lines of the log were lost: nobody read it");
    let written = Log::start(out, wait_writable, tell_lost).map_err(|error| failed(&error))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(written.lines())
        // A log that takes no more, on a full disk say, is no reason to panic: these errors would go to the same place.
        .log_internal_errors(false)
        .with_ansi(false);
    let set = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    set.map_err(|error| failed(&error))?;
    Ok(written)
}

/// Each link takes two descriptors, and the usual soft limit is 1024. More is the operator's decision.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, soft = limit.current, "cannot raise the limit of open files");
    }
}
