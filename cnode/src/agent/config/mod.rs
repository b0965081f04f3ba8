//! What an agent is told: command line, then environment, then a TOML file, then defaults.
//!
//! Everything is read and checked before any port opens, and every bad value is reported at once.

mod args;
mod epmd;
mod file;
mod values;

use std::{fmt, net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

pub use args::AgentArgs;
use epmd::EpmdOptions;

use super::{
    dir::Access,
    hosts, paths,
    registry::options::SidecarKind,
    trust::{AllowRule, Trust},
};
use crate::{
    epmd::EpmdConfig,
    mesh::{NameError, ServiceName, consul::ConsulSettings},
    proxy::Balance,
};

/// How long live links may go on after SIGTERM when nothing else is said.
pub const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Everything an agent needs to know to start.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Which mesh.
    pub mesh: MeshKind,
    /// The agent's directory.
    pub dir: PathBuf,
    /// Host parts that it owns, at least one.
    pub hosts: Vec<String>,
    /// Where other agents connect.
    pub bind: SocketAddr,
    /// What they are told instead of the bound address; port 0 stands for the bound one.
    pub advertise: Option<SocketAddr>,
    /// Where metrics and health are served, if at all.
    pub http: Option<SocketAddr>,
    /// Which user may be which service.
    pub trust: Trust,
    /// Who may open the sockets.
    pub access: Access,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which service a node is an instance of.
    pub node_service: NodeService,
    /// What carries the traffic of what does not say.
    pub data_plane: SidecarKind,
    /// Which instance of a service is dialled first.
    pub balance: Balance,
    /// How long a thread that passed a small message on looks for the next before it sleeps; none: as the machine allows.
    pub busy_poll: Option<Duration>,
    /// The consul program: a name for PATH, or a path.
    pub consul_program: PathBuf,
    /// The Envoy program, likewise.
    pub envoy_program: PathBuf,
    /// Ports that instances have of their own.
    pub instance_ports: Option<RangeInclusive<u16>>,
    /// Links of nodes behind foreign sidecars are taken.
    pub allow_unverified_peers: bool,
    /// How long live links may go on once the agent is told to end.
    pub drain_time: Duration,
    /// How long nobody may use the agent until it ends by itself; none: for ever.
    pub idle_exit: Option<Duration>,
    /// Take over from the agent that runs in the directory, if one does.
    pub takeover: bool,
    /// The agent stands in for EPMD.
    pub epmd: Option<EpmdConfig>,
    /// What sessions are beyond their own user's nodes here, and whose sessions are let in.
    pub session_service: Option<ServiceName>,
}

/// Which service a node is an instance of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NodeService {
    /// That of the part before the `@`: all `shop@...` are instances of `shop`.
    #[default]
    Name,
    /// One of its own.
    Node,
}

impl NodeService {
    /// The service of this node.
    ///
    /// # Errors
    /// When it is not `name@host`.
    pub fn of(self, node: &str) -> Result<ServiceName, NameError> {
        match self {
            Self::Name => ServiceName::from_node(node),
            Self::Node => ServiceName::of_single_node(node),
        }
    }
}

/// The mesh that answers.
#[derive(Debug, Clone)]
pub enum MeshKind {
    /// One directory on this machine.
    Embedded {
        /// That directory.
        dir: PathBuf,
    },
    /// A Consul.
    Consul(Box<ConsulSettings>),
}

impl MeshKind {
    /// Its name in options and replies.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embedded { .. } => "embedded",
            Self::Consul(_) => "consul",
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// All bad values, one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.join("\n"))
    }
}

impl std::error::Error for ConfigErrors {}

impl AgentConfig {
    /// Reads the file that the arguments name and checks everything.
    ///
    /// # Errors
    /// Every bad value, with what was wanted.
    pub fn from_args(args: AgentArgs) -> Result<Self, ConfigErrors> {
        let mut faults = Faults(Vec::new());
        let file = args
            .config
            .as_deref()
            .map(|path| faults.check(file::read_file(path)));
        let file = file.flatten().unwrap_or_default();

        let mesh = match args.mesh.or(file.mesh).as_deref() {
            Some("embedded") => {
                let dir = prefer_environment(args.mesh_dir, paths::MESH_DIR_VARIABLE, file.mesh_dir);
                let dir = paths::mesh_dir(dir.as_deref());
                Some(MeshKind::Embedded { dir })
            }
            Some("consul") => {
                let settings = ConsulSettings::read(args.consul, file.consul, |name| std::env::var_os(name));
                let settings = settings.map_err(|mut bad| faults.0.append(&mut bad)).ok();
                settings.map(|settings| MeshKind::Consul(Box::new(settings)))
            }
            other => {
                let seen = other.map_or("no mesh".to_owned(), |other| format!("mesh {other:?}"));
                faults
                    .0
                    .push(format!("{seen}; wanted --mesh consul or --mesh embedded"));
                None
            }
        };
        let bind = args
            .bind
            .or(file.bind)
            .unwrap_or_else(|| "127.0.0.1:0".to_owned());
        let bind = faults.check(values::address("bind", &bind));
        let advertise = args.advertise.or(file.advertise);
        let advertise = advertise.and_then(|text| faults.check(values::address("advertise", &text)));
        let http = args.http.or(file.http);
        let http = http.and_then(|text| faults.check(values::address("http", &text)));
        if let Some(MeshKind::Embedded { .. }) = mesh {
            for (option, address) in [("bind", bind), ("advertise", advertise)] {
                faults.check(address.map_or(Ok(()), |address| values::loopback(option, address)));
            }
        }
        let hosts = match either(args.host, file.host) {
            hosts if hosts.is_empty() => hosts::own_hosts(),
            hosts => faults.check_all(hosts.into_iter().map(values::host)),
        };
        let rules = either(args.allow_register, file.allow_register);
        let rules = faults.check_all(rules.iter().map(|rule| {
            rule.parse::<AllowRule>()
                .map_err(|error| format!("allow-register: {error}"))
        }));
        let mode = args
            .socket_mode
            .or(file.socket_mode)
            .unwrap_or_else(|| "0600".to_owned());
        let socket_mode = faults.check(values::socket_mode(&mode));
        let group = args.socket_group.or(file.socket_group);
        let group = group.and_then(|group| faults.check(values::find_group(&group)));
        let log_format = args.log_format.or(file.log_format);
        let log_format = faults.check(
            log_format
                .as_deref()
                .map_or(Ok(LogFormat::Text), values::parse_log_format),
        );
        let node_service = args.node_service.or(file.node_service);
        let node_service = faults.check(values::parse_node_service(node_service.as_deref()));
        let data_plane = args.data_plane.or(file.data_plane);
        let data_plane = faults.check(values::parse_data_plane(data_plane.as_deref()));
        let session_service = args.session_service.or(file.session_service).and_then(|name| {
            let service = ServiceName::new(&name);
            faults.check(service.map_err(|error| format!("session-service {name:?}: {error}")))
        });
        let ports = args.instance_ports.or(file.instance_ports);
        let instance_ports = ports.and_then(|text| faults.check(values::port_range(&text)));
        let epmd = EpmdOptions {
            listen: either(args.epmd, file.epmd),
            nodes: either(args.epmd_nodes, file.epmd_nodes),
            tools: either(args.epmd_tools, file.epmd_tools),
            host: args.epmd_host.or(file.epmd_host),
        };
        let epmd = faults.check(epmd.checked(&hosts)).flatten();
        let idle_exit = args.idle_exit.or(file.idle_exit);
        let idle_exit = idle_exit.and_then(|seconds| faults.check(values::idle_exit(seconds)));
        let balance = args.balance.or(file.balance);
        let balance = faults.check(values::parse_balance(balance.as_deref()));
        let busy_poll = args.busy_poll.or(file.busy_poll);
        let busy_poll = busy_poll.and_then(|micros| faults.check(values::busy_poll(micros)));
        if let (Some(mesh), Some(kind)) = (&mesh, &data_plane)
            && matches!(mesh, MeshKind::Embedded { .. })
            && *kind != SidecarKind::Native
        {
            faults.0.push(format!(
                "data-plane {}: the embedded mesh has no sidecars, wanted native",
                kind.as_str()
            ));
        }

        match (mesh, bind, socket_mode, log_format) {
            (Some(mesh), Some(bind), Some(socket_mode), Some(log_format)) if faults.0.is_empty() => {
                Ok(Self {
                    node_service: node_service.unwrap_or_default(),
                    data_plane: data_plane.unwrap_or(SidecarKind::Native),
                    balance: balance.unwrap_or_default(),
                    busy_poll,
                    consul_program: args
                        .consul_program
                        .or(file.consul_program)
                        .unwrap_or_else(|| "consul".into()),
                    envoy_program: args
                        .envoy_program
                        .or(file.envoy_program)
                        .unwrap_or_else(|| "envoy".into()),
                    instance_ports,
                    allow_unverified_peers: args.allow_unverified_peers || file.allow_unverified_peers,
                    epmd,
                    session_service,
                    mesh,
                    dir: paths::agent_dir(
                        prefer_environment(args.dir, paths::DIR_VARIABLE, file.dir).as_deref(),
                    ),
                    hosts,
                    bind,
                    advertise,
                    http,
                    trust: Trust::new(paths::uid(), rules),
                    access: Access { socket_mode, group },
                    log_format,
                    drain_time: args
                        .drain_time
                        .or(file.drain_time)
                        .map_or(DRAIN_TIME, Duration::from_secs),
                    idle_exit,
                    takeover: args.takeover,
                })
            }
            _ => Err(ConfigErrors(faults.0)),
        }
    }
}

/// Collects what is wrong, so that all of it is told at once.
struct Faults(Vec<String>);

impl Faults {
    fn check<T>(&mut self, result: Result<T, String>) -> Option<T> {
        result.map_err(|fault| self.0.push(fault)).ok()
    }

    fn check_all<T>(&mut self, results: impl Iterator<Item = Result<T, String>>) -> Vec<T> {
        results.filter_map(|result| self.check(result)).collect()
    }
}

/// The option when it was given on the command line; none, when the environment answers; else the file's.
fn prefer_environment(option: Option<PathBuf>, variable: &str, in_file: Option<PathBuf>) -> Option<PathBuf> {
    let set = std::env::var_os(variable).is_some_and(|value| !value.is_empty());
    option.or(if set { None } else { in_file })
}

fn either<T>(options: Vec<T>, in_file: Vec<T>) -> Vec<T> {
    if options.is_empty() { in_file } else { options }
}

#[cfg(test)]
mod tests;
