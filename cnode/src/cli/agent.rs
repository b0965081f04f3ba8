//! `meshx agent`.

use std::process::ExitCode;

use rustix::{
    fs::Mode,
    process::{Resource, Rlimit, getrlimit, setrlimit, umask},
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use super::{EX_OSERR, EX_SOFTWARE, EX_UNAVAILABLE, Failure, notify, print};
use crate::agent::{
    Agent, Event,
    config::{AgentArgs, AgentConfig, LogFormat},
};

pub(super) fn run(args: AgentArgs) -> Result<ExitCode, Failure> {
    let config = AgentConfig::from_args(args).map_err(|errors| Failure::usage(errors.to_string()))?;
    log_to_stderr(config.log_format)?;
    // Between making a socket and setting its mode, nobody else may open it.
    umask(Mode::RWXG | Mode::RWXO);
    raise_descriptor_limit();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(EX_OSERR, format!("cannot start: {error}")))?
        .block_on(serve(config))
}

async fn serve(config: AgentConfig) -> Result<ExitCode, Failure> {
    // From here on a signal ends the agent in order.
    let mut signals = Signals::listen().map_err(|error| Failure::new(EX_OSERR, error.to_string()))?;
    let started = Agent::start(config).await;
    let mut agent = started.map_err(|error| Failure::new(EX_UNAVAILABLE, error.to_string()))?;
    if let Err(error) = notify::ready() {
        tracing::warn!(%error, "systemd cannot be told that the agent serves");
    }
    let result = match print(&format!("{}\n", agent.ready_line())) {
        Err(failure) => Err(failure),
        Ok(()) => run_until(&mut agent, &mut signals).await,
    };
    agent.stop().await;
    result
}

async fn run_until(agent: &mut Agent, signals: &mut Signals) -> Result<ExitCode, Failure> {
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
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
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

fn log_to_stderr(format: LogFormat) -> Result<(), Failure> {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .from_env()
        .map_err(|error| Failure::usage(format!("RUST_LOG: {error}")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    let set = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    set.map_err(|error| Failure::new(EX_OSERR, format!("cannot log: {error}")))
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
