//! What a sidecar is, what it does, and what may be wrong with it.

use std::{
    ffi::OsString,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    mesh::{MeshError, ServiceName, SidecarUpstream, Token},
    node::Backoff,
};

/// Restarts within a minute after which a sidecar is given up, unless its registration says otherwise.
pub const RESTARTS_DEFAULT: u32 = 5;
/// How long a sidecar may take to end after SIGTERM, before it is killed.
pub const STOP_GRACE: Duration = Duration::from_secs(5);
/// How long the mesh may take to give what a sidecar needs before it can start.
pub const START_TIME: Duration = Duration::from_secs(5);
/// Upstreams that one sidecar may have.
pub const UPSTREAMS_PER_SIDECAR_MAX: usize = 256;

/// What all sidecars of an agent share. No `Debug`: environments may hold secrets.
#[derive(Clone)]
pub struct Settings {
    /// Consul's program and how it reaches its agent; without it only [`SidecarKind::Command`] and Envoys that
    /// this agent drives can be had.
    pub consul: Option<ConsulProgram>,
    /// The Envoy program: a name that is looked for in `PATH`, or an absolute path.
    pub envoy: PathBuf,
    /// Worker threads of each Envoy that this agent drives.
    pub envoy_workers: u32,
    /// Variables that every sidecar gets beside `PATH`, `HOME`, `LANG` and its own.
    pub environment: Vec<(OsString, OsString)>,
    /// Waits before restarts.
    pub backoff: Backoff,
    /// How long the mesh may take to give what a sidecar needs before it can start.
    pub start_time: Duration,
    /// How long a sidecar may take to end after SIGTERM.
    pub grace: Duration,
}

impl Default for Settings {
    /// `envoy` from `PATH` with 2 workers, no Consul, waits from 200 ms to 10 s, [`START_TIME`], [`STOP_GRACE`].
    fn default() -> Self {
        Self {
            consul: None,
            envoy: "envoy".into(),
            envoy_workers: 2,
            environment: Vec::new(),
            backoff: Backoff {
                min: Duration::from_millis(200),
                max: Duration::from_secs(10),
            },
            start_time: START_TIME,
            grace: STOP_GRACE,
        }
    }
}

/// Consul's program, for `consul connect proxy` and `consul connect envoy`.
#[derive(Debug, Clone)]
pub struct ConsulProgram {
    /// A name that is looked for in `PATH`, or an absolute path.
    pub program: PathBuf,
    /// `CONSUL_HTTP_ADDR`, `CONSUL_HTTP_SSL`, `CONSUL_CACERT`, `CONSUL_CLIENT_CERT`, `CONSUL_CLIENT_KEY`,
    /// `CONSUL_TLS_SERVER_NAME`, `CONSUL_NAMESPACE`, `CONSUL_PARTITION`, `CONSUL_GRPC_ADDR`, as far as they are
    /// set (Consul: "Commands", environment variables). No token: see [`ConsulProgram::token`].
    pub environment: Vec<(String, String)>,
    /// The agent's token; [`SidecarSpec::token`] goes before it. It is handed on as `CONSUL_HTTP_TOKEN`.
    pub token: Option<Token>,
}

/// Which program carries a service's traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SidecarKind {
    /// `consul connect proxy -sidecar-for ID`. The registration must hold the sidecar's.
    ConnectProxy,
    /// Envoy: driven by Consul where that speaks xDS v3, else by this agent.
    Envoy,
    /// The user's own program and its arguments. It runs with the agent's rights and decides itself whom it lets
    /// in: the agent only hands it `MESHX_ALLOWED`. So whoever may ask for one may do what the agent may.
    Command(Vec<String>),
}

/// A sidecar to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SidecarSpec {
    /// Id of the instance that it carries.
    pub id: String,
    /// The instance's service.
    pub service: ServiceName,
    /// What runs.
    pub kind: SidecarKind,
    /// Where inbound connections are handed to, on loopback.
    pub local: SocketAddr,
    /// Where the mesh connects to it.
    pub public: SocketAddr,
    /// What it offers locally, at first.
    pub upstreams: Vec<SidecarUpstream>,
    /// Restarts within a minute after which it is given up.
    pub max_restarts: u32,
    /// Whether its lines come as events.
    pub output: bool,
    /// The client's own token.
    pub token: Option<Token>,
    /// `-log-level` of Consul's own commands.
    pub log_level: Option<String>,
}

impl SidecarSpec {
    /// A sidecar without upstreams and with the defaults.
    pub fn new(
        id: impl Into<String>,
        service: ServiceName,
        kind: SidecarKind,
        local: SocketAddr,
        public: SocketAddr,
    ) -> Self {
        Self {
            id: id.into(),
            service,
            kind,
            local,
            public,
            upstreams: Vec::new(),
            max_restarts: RESTARTS_DEFAULT,
            output: false,
            token: None,
            log_level: None,
        }
    }
}

/// Something that a sidecar did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SidecarEvent {
    /// The instance's id.
    pub id: String,
    /// What.
    pub kind: SidecarEventKind,
}

/// What a sidecar did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SidecarEventKind {
    /// It printed a line, without its end, at most 4 KiB of it. When the channel is full lines are left out.
    Output {
        /// Where.
        stream: Stream,
        /// The line.
        line: Vec<u8>,
    },
    /// It ended without being asked to, or could not be started.
    Down {
        /// How, in words.
        text: String,
        /// Whether it is not started again.
        final_: bool,
    },
}

/// A standard stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Why a sidecar cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SidecarError {
    /// The program is not there.
    #[error("no program {program:?} {wanted}; install it, or name its path")]
    NoProgram {
        /// What was looked for.
        program: String,
        /// Where, and what it must be.
        wanted: String,
    },
    /// The kind asks for Consul's program.
    #[error(
        "{0} asks for Consul's program and agent, which this agent's mesh has not: use envoy, a command, or Consul"
    )]
    NoConsul(&'static str),
    /// The specification is at fault.
    #[error("{0}")]
    Invalid(String),
    /// Its directory or files cannot be written.
    #[error("{path}: {source}", path = path.display())]
    Files {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The mesh did not give what the sidecar needs to start.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// A limit was reached.
    #[error("{0}")]
    Limit(String),
    /// The system lacks something.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

pub(super) fn check(spec: &SidecarSpec) -> Result<(), SidecarError> {
    if spec.id.is_empty() || spec.id.chars().any(char::is_control) {
        return Err(SidecarError::Invalid(format!(
            "sidecar id {:?} is empty or holds control characters",
            spec.id
        )));
    }
    loopback("the local address of a sidecar", spec.local)?;
    check_upstreams(&spec.upstreams)
}

pub(super) fn check_upstreams(upstreams: &[SidecarUpstream]) -> Result<(), SidecarError> {
    if upstreams.len() > UPSTREAMS_PER_SIDECAR_MAX {
        return Err(SidecarError::Limit(format!(
            "{} upstreams of one sidecar, wanted at most {UPSTREAMS_PER_SIDECAR_MAX} (UPSTREAMS_PER_SIDECAR_MAX)",
            upstreams.len()
        )));
    }
    for upstream in upstreams {
        loopback("an upstream's bind address", upstream.bind)?;
        if upstreams
            .iter()
            .filter(|other| other.bind == upstream.bind)
            .count()
            > 1
        {
            return Err(SidecarError::Invalid(format!(
                "two upstreams at {}: give each its own port",
                upstream.bind
            )));
        }
    }
    Ok(())
}

fn loopback(what: &str, address: SocketAddr) -> Result<(), SidecarError> {
    if address.ip().is_loopback() && address.port() != 0 {
        return Ok(());
    }
    Err(SidecarError::Invalid(format!(
        "{what} is {address}, wanted a loopback address with a port: it is plain text without a check of who connects"
    )))
}

/// The error of a file or directory.
pub(super) fn at(path: &Path) -> impl Fn(io::Error) -> SidecarError + '_ {
    move |source| SidecarError::Files {
        path: path.to_path_buf(),
        source,
    }
}
