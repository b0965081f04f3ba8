//! What an agent is told: command line, then environment, then a TOML file, then defaults.
//!
//! Everything is read and checked before any port opens, and every bad value is reported at once.

use std::{
    fmt, fs,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use super::{
    dir::Access,
    hosts, paths,
    registry::options::SidecarKind,
    trust::{AllowRule, Trust},
};
use crate::epmd::{EpmdConfig, Patterns, TOOLS};
use crate::mesh::{
    NameError, ServiceName,
    consul::{ConsulArgs, ConsulFile, ConsulSettings},
};
use crate::proxy::Balance;

/// The agent's options. In the file they have the same names, with `_` for `-`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct AgentArgs {
    /// The service mesh: consul, or embedded (this machine and user only)
    #[arg(long, value_name = "MESH")]
    pub mesh: Option<String>,
    /// Directory of the embedded mesh [default: $MESHX_MESH_DIR, $XDG_RUNTIME_DIR/meshx-mesh, /tmp/meshx-mesh-UID]
    #[arg(long, value_name = "DIR")]
    pub mesh_dir: Option<PathBuf>,
    /// The agent's directory [default: $MESHX_DIR, $XDG_RUNTIME_DIR/meshx, /tmp/meshx-UID]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Host part of node names that this agent owns; may be given more than once [default: the short and the full host name]
    #[arg(long, value_name = "NAME")]
    pub host: Vec<String>,
    /// Where other agents connect [default: 127.0.0.1:0]
    #[arg(long, value_name = "IP:PORT")]
    pub bind: Option<String>,
    /// The address that other agents are told; port 0 stands for the bound one [default: the bound address]
    #[arg(long, value_name = "IP:PORT")]
    pub advertise: Option<String>,
    /// Serve /metrics, /health and /ready there over plain HTTP [default: off]
    #[arg(long, value_name = "IP:PORT")]
    pub http: Option<String>,
    /// Which services another user may be, as uid:1000=shop*,cart or gid:50=search; may be given more than once [default: the agent's own user alone]
    #[arg(long, value_name = "RULE")]
    pub allow_register: Vec<String>,
    /// Permission bits of the sockets, in octal [default: 0600]
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<String>,
    /// Group of the sockets, by name or number [default: the agent's own]
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// The service of a node: name (the part before the @) or node (one for each node, as needed behind sidecars) [default: name]
    #[arg(long, value_name = "HOW")]
    pub node_service: Option<String>,
    /// What carries the traffic of nodes and services that do not say: native, connect_proxy or envoy [default: native]
    #[arg(long, value_name = "KIND")]
    pub data_plane: Option<String>,
    /// Give each instance an inbound port of its own out of this range, for foreign proxies that send no SNI [default: none, all share one]
    #[arg(long, value_name = "FIRST-LAST")]
    pub instance_ports: Option<String>,
    /// Which instance of a service is dialled first: least-loaded, or round-robin; both by weight [default: least-loaded]
    #[arg(long, value_name = "HOW")]
    pub balance: Option<String>,
    /// The consul program, for sidecars of the kind connect_proxy [default: consul, out of PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub consul_program: Option<PathBuf>,
    /// The Envoy program, for sidecars of the kind envoy [default: envoy, out of PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub envoy_program: Option<PathBuf>,
    /// Let nodes behind foreign sidecars in, whose names nobody has proved
    #[arg(long)]
    pub allow_unverified_peers: bool,
    /// Stand in for EPMD on loopback, for nodes of plain distribution; =PORT or =IP:PORT for another place than port 4369 of 127.0.0.1 and ::1 [default: off]
    #[arg(long, value_name = "PLACE", num_args = 0..=1, require_equals = true, default_missing_value = "4369")]
    pub epmd: Vec<String>,
    /// Names that may be registered by EPMD, without a secret: the part before the @, as shop or shop*; may be given more than once [default: none]
    #[arg(long, value_name = "PATTERN")]
    pub epmd_nodes: Vec<String>,
    /// Names of tools that EPMD takes without telling the mesh; may be given more than once [default: epmd-starter-*, rabbitmqcli-*, rem-*, rpc-*, *_prelaunch_*, *_maint_*]
    #[arg(long, value_name = "PATTERN")]
    pub epmd_tools: Vec<String>,
    /// The host part of nodes that register by EPMD, one that the agent owns [default: the first of them]
    #[arg(long, value_name = "NAME")]
    pub epmd_host: Option<String>,
    /// What sessions (consoles, tools, nodes that do not listen) are beyond their own user's nodes here, and whose sessions are let in [default: none]
    #[arg(long, value_name = "SERVICE")]
    pub session_service: Option<String>,
    /// How Consul is reached.
    #[command(flatten)]
    pub consul: ConsulArgs,
    /// File with these options, in TOML; those about Consul in a table named consul
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How log lines look: text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// How long live links may go on after SIGTERM, in seconds [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub drain_time: Option<u64>,
    /// Take over from the agent that runs in the directory, which keeps its live links until they end; start as usual when none does
    #[arg(long)]
    pub takeover: bool,
}

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

/// Largest configuration file that is read.
const CONFIG_FILE_MAX: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSettings {
    mesh: Option<String>,
    mesh_dir: Option<PathBuf>,
    dir: Option<PathBuf>,
    #[serde(default)]
    host: Vec<String>,
    bind: Option<String>,
    advertise: Option<String>,
    http: Option<String>,
    #[serde(default)]
    allow_register: Vec<String>,
    socket_mode: Option<String>,
    socket_group: Option<String>,
    log_format: Option<String>,
    node_service: Option<String>,
    data_plane: Option<String>,
    instance_ports: Option<String>,
    balance: Option<String>,
    consul_program: Option<PathBuf>,
    envoy_program: Option<PathBuf>,
    #[serde(default)]
    allow_unverified_peers: bool,
    drain_time: Option<u64>,
    session_service: Option<String>,
    #[serde(default)]
    epmd: Vec<String>,
    #[serde(default)]
    epmd_nodes: Vec<String>,
    #[serde(default)]
    epmd_tools: Vec<String>,
    epmd_host: Option<String>,
    #[serde(default)]
    consul: ConsulFile,
}

impl AgentConfig {
    /// Reads the file that the arguments name and checks everything.
    ///
    /// # Errors
    /// Every bad value, with what was wanted.
    pub fn from_args(args: AgentArgs) -> Result<Self, ConfigErrors> {
        let mut faults = Faults(Vec::new());
        let file = args.config.as_deref().map(|path| faults.check(read_file(path)));
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
        let bind = faults.check(address("bind", &bind));
        let advertise = args.advertise.or(file.advertise);
        let advertise = advertise.and_then(|text| faults.check(address("advertise", &text)));
        let http = args.http.or(file.http);
        let http = http.and_then(|text| faults.check(address("http", &text)));
        if let Some(MeshKind::Embedded { .. }) = mesh {
            for (option, address) in [("bind", bind), ("advertise", advertise)] {
                faults.check(address.map_or(Ok(()), |address| loopback(option, address)));
            }
        }
        let hosts = match either(args.host, file.host) {
            hosts if hosts.is_empty() => hosts::own_hosts(),
            hosts => faults.check_all(hosts.into_iter().map(host)),
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
        let socket_mode = faults.check(socket_mode(&mode));
        let group = args.socket_group.or(file.socket_group);
        let group = group.and_then(|group| faults.check(find_group(&group)));
        let log_format = args.log_format.or(file.log_format);
        let log_format = faults.check(
            log_format
                .as_deref()
                .map_or(Ok(LogFormat::Text), parse_log_format),
        );
        let node_service = args.node_service.or(file.node_service);
        let node_service = faults.check(parse_node_service(node_service.as_deref()));
        let data_plane = args.data_plane.or(file.data_plane);
        let data_plane = faults.check(parse_data_plane(data_plane.as_deref()));
        let session_service = args.session_service.or(file.session_service).and_then(|name| {
            let service = ServiceName::new(&name);
            faults.check(service.map_err(|error| format!("session-service {name:?}: {error}")))
        });
        let ports = args.instance_ports.or(file.instance_ports);
        let instance_ports = ports.and_then(|text| faults.check(port_range(&text)));
        let epmd = EpmdOptions {
            listen: either(args.epmd, file.epmd),
            nodes: either(args.epmd_nodes, file.epmd_nodes),
            tools: either(args.epmd_tools, file.epmd_tools),
            host: args.epmd_host.or(file.epmd_host),
        };
        let epmd = faults.check(epmd.checked(&hosts)).flatten();
        let balance = args.balance.or(file.balance);
        let balance = faults.check(parse_balance(balance.as_deref()));
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
                    takeover: args.takeover,
                })
            }
            _ => Err(ConfigErrors(faults.0)),
        }
    }
}

/// The options about EPMD, as they were given.
struct EpmdOptions {
    listen: Vec<String>,
    nodes: Vec<String>,
    tools: Vec<String>,
    host: Option<String>,
}

impl EpmdOptions {
    fn checked(self, hosts: &[String]) -> Result<Option<EpmdConfig>, String> {
        if self.listen.is_empty() {
            return match (self.nodes.is_empty(), self.host) {
                (true, None) => Ok(None),
                _ => Err("epmd-nodes and epmd-host mean nothing without epmd".to_owned()),
            };
        }
        let mut listen = Vec::new();
        for place in &self.listen {
            listen.extend(epmd_place(place)?);
        }
        let patterns = |option: &str, patterns: Vec<String>| {
            Patterns::new(patterns).map_err(|error| format!("{option}: {error}"))
        };
        let tools = match self.tools.is_empty() {
            true => TOOLS.map(str::to_owned).into(),
            false => self.tools,
        };
        let host = match self.host {
            Some(host) if hosts.contains(&host) => host,
            Some(host) => {
                return Err(format!(
                    "epmd-host {host:?}: wanted one of the hosts that the agent owns: {}",
                    hosts.join(", ")
                ));
            }
            None => hosts.first().cloned().unwrap_or_default(),
        };
        Ok(Some(EpmdConfig {
            listen,
            nodes: patterns("epmd-nodes", self.nodes)?,
            tools: patterns("epmd-tools", tools)?,
            host,
        }))
    }
}

/// A port of both loopback addresses, or an address and a port.
fn epmd_place(text: &str) -> Result<Vec<SocketAddr>, String> {
    if let Ok(port) = text.parse() {
        return Ok(EpmdConfig::loopback(port));
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(vec![address]),
        _ => Err(format!(
            "epmd {text:?}: wanted a port, or a loopback address and a port such as 127.0.0.1:4369: who asks proves \
             nothing but that he is on this host"
        )),
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

fn read_file(path: &Path) -> Result<FileSettings, String> {
    let name = path.display();
    let size = fs::metadata(path)
        .map_err(|error| format!("config {name}: {error}"))?
        .len();
    if size > CONFIG_FILE_MAX {
        return Err(format!(
            "config {name}: {size} bytes, at most {CONFIG_FILE_MAX} are read"
        ));
    }
    let text = fs::read_to_string(path).map_err(|error| format!("config {name}: {error}"))?;
    toml::from_str(&text).map_err(|error| format!("config {name}: {error}"))
}

/// The option when it was given on the command line; none, when the environment answers; else the file's.
fn prefer_environment(option: Option<PathBuf>, variable: &str, in_file: Option<PathBuf>) -> Option<PathBuf> {
    let set = std::env::var_os(variable).is_some_and(|value| !value.is_empty());
    option.or(if set { None } else { in_file })
}

fn either<T>(options: Vec<T>, in_file: Vec<T>) -> Vec<T> {
    if options.is_empty() { in_file } else { options }
}

fn address(option: &str, text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{option} {text:?}: wanted an address and port such as 127.0.0.1:0"))
}

fn loopback(option: &str, address: SocketAddr) -> Result<(), String> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    Err(format!(
        "{option} {address}: the embedded mesh is for one machine, wanted a loopback address such as 127.0.0.1:0"
    ))
}

fn host(name: String) -> Result<String, String> {
    if hosts::is_valid(&name) {
        return Ok(name);
    }
    Err(format!(
        "host {name:?}: wanted a host name or address of at most {} bytes, without @",
        hosts::HOST_MAX
    ))
}

/// Execute bits mean nothing on a socket, and the owner must be able to connect.
fn socket_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode & !0o666 == 0 && mode & 0o600 == 0o600 => Ok(mode),
        _ => Err(format!(
            "socket-mode {text:?}: wanted octal permission bits such as 0600, 0660 or 0666"
        )),
    }
}

/// A group's number, looked up in group(5).
fn find_group(group: &str) -> Result<u32, String> {
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

fn parse_node_service(text: Option<&str>) -> Result<NodeService, String> {
    match text {
        None | Some("name") => Ok(NodeService::Name),
        Some("node") => Ok(NodeService::Node),
        Some(other) => Err(format!("node-service {other:?}: wanted name or node")),
    }
}

fn parse_data_plane(text: Option<&str>) -> Result<SidecarKind, String> {
    let text = text.unwrap_or("native");
    SidecarKind::parse(text)
        .ok_or_else(|| format!("data-plane {text:?}: wanted native, connect_proxy or envoy"))
}

fn parse_balance(text: Option<&str>) -> Result<Balance, String> {
    let text = text.unwrap_or("least-loaded");
    Balance::parse(text).ok_or_else(|| format!("balance {text:?}: wanted least-loaded or round-robin"))
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let ends = text.split_once('-').and_then(|(first, last)| {
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        (first > 0 && first <= last).then_some(first..=last)
    });
    ends.ok_or_else(|| format!("instance-ports {text:?}: wanted a range such as 21000-21255"))
}

fn parse_log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(format!("log-format {other:?}: wanted text or json")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn embedded() -> AgentArgs {
        AgentArgs {
            mesh: Some("embedded".into()),
            ..AgentArgs::default()
        }
    }

    #[test]
    fn defaults() {
        let config = AgentConfig::from_args(embedded()).unwrap();
        assert_eq!(config.bind, "127.0.0.1:0".parse().unwrap());
        assert_eq!(config.access, Access::default());
        assert!(!config.hosts.is_empty());
        assert_eq!(config.mesh.name(), "embedded");
    }

    #[test]
    fn every_bad_value_is_told_at_once() {
        let args = AgentArgs {
            mesh: Some("istio".into()),
            host: vec!["h1".into(), "a@b".into()],
            bind: Some("localhost".into()),
            advertise: Some("h1:x".into()),
            http: Some("9465".into()),
            allow_register: vec!["uid:1000=shop".into(), "bob=shop".into()],
            socket_mode: Some("0777".into()),
            socket_group: Some("no-such-group".into()),
            config: Some("/no/such/file".into()),
            log_format: Some("xml".into()),
            node_service: Some("host".into()),
            data_plane: Some("nginx".into()),
            instance_ports: Some("9-8".into()),
            balance: Some("at will".into()),
            ..AgentArgs::default()
        };
        let text = AgentConfig::from_args(args).unwrap_err().to_string();
        for seen in [
            "istio",
            "a@b",
            "localhost",
            "h1:x",
            "http \"9465\"",
            "bob=shop",
            "0777",
            "no-such-group",
            "/no/such/file",
            "xml",
            "host",
            "nginx",
            "9-8",
            "at will",
        ] {
            assert!(text.contains(seen), "{seen} not in {text}");
        }
        assert_eq!(text.lines().count(), 14, "{text}");
    }

    #[test]
    fn the_embedded_mesh_stays_on_loopback() {
        for (bind, advertise) in [
            ("0.0.0.0:0", None),
            ("127.0.0.1:0", Some("10.0.0.1:1")),
            ("[::]:0", None),
        ] {
            let args = AgentArgs {
                bind: Some(bind.into()),
                advertise: advertise.map(str::to_owned),
                ..embedded()
            };
            let text = AgentConfig::from_args(args).unwrap_err().to_string();
            assert!(text.contains("wanted a loopback address"), "{text}");
        }
        for bind in ["127.0.0.2:0", "[::1]:0"] {
            AgentConfig::from_args(AgentArgs {
                bind: Some(bind.into()),
                ..embedded()
            })
            .unwrap();
        }
    }

    #[test]
    fn epmd_is_off_unless_switched_on_and_stays_on_loopback() {
        let with = |epmd: &[&str], nodes: &[&str], host: Option<&str>| {
            AgentConfig::from_args(AgentArgs {
                epmd: epmd.iter().map(|text| (*text).to_owned()).collect(),
                epmd_nodes: nodes.iter().map(|text| (*text).to_owned()).collect(),
                epmd_host: host.map(str::to_owned),
                host: vec!["h1".into(), "h1.lan".into()],
                ..embedded()
            })
        };
        assert!(with(&[], &[], None).unwrap().epmd.is_none());
        let epmd = with(&["4369"], &["shop*"], None).unwrap().epmd.unwrap();
        assert_eq!(epmd.listen, EpmdConfig::loopback(4369));
        assert!(epmd.nodes.matches("shop2") && !epmd.nodes.matches("cart"));
        assert!(epmd.tools.matches("rpc-1-shop") && epmd.host == "h1");
        let one = with(&["127.0.0.1:7"], &[], Some("h1.lan")).unwrap().epmd.unwrap();
        assert_eq!((one.listen.len(), one.host.as_str()), (1, "h1.lan"));
        assert!(!one.nodes.matches("shop"), "no name is taken that is not listed");
        for (epmd, nodes, host, seen) in [
            (&["0.0.0.0:4369"][..], &[][..], None, "loopback"),
            (&["10.0.0.1:4369"], &[], None, "loopback"),
            (&["x"], &[], None, "loopback"),
            (&["4369"], &["shop@h1"], None, "pattern"),
            (&["4369"], &[], Some("h2"), "h1, h1.lan"),
            (&[], &["shop"], None, "without epmd"),
        ] {
            let text = with(epmd, nodes, host).unwrap_err().to_string();
            assert!(text.contains(seen), "{text}");
        }
    }

    #[test]
    fn a_file_is_read_and_the_command_line_comes_first() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent.toml");
        fs::write(
            &path,
            "mesh = \"embedded\"\nhost = [\"h1\", \"h2\"]\nbind = \"127.0.0.2:7\"\nhttp = \"127.0.0.1:9\"\n\
             allow_register = [\"uid:1=a\"]\nsocket_mode = \"0660\"\nsocket_group = \"root\"\n\
             log_format = \"json\"\n",
        )
        .unwrap();
        let args = AgentArgs {
            config: Some(path.clone()),
            bind: Some("127.0.0.3:0".into()),
            dir: Some("/d".into()),
            ..AgentArgs::default()
        };
        let config = AgentConfig::from_args(args).unwrap();
        assert_eq!(config.hosts, ["h1", "h2"]);
        assert_eq!(config.bind, "127.0.0.3:0".parse().unwrap());
        assert_eq!(config.http, Some("127.0.0.1:9".parse().unwrap()));
        assert_eq!(
            config.access,
            Access {
                socket_mode: 0o660,
                group: Some(0)
            }
        );
        assert_eq!(
            (config.log_format, config.dir),
            (LogFormat::Json, PathBuf::from("/d"))
        );

        fs::write(&path, "mesh = \"embedded\"\nbindd = \"x\"\n").unwrap();
        let args = AgentArgs {
            config: Some(path),
            ..AgentArgs::default()
        };
        let text = AgentConfig::from_args(args).unwrap_err().to_string();
        assert!(text.contains("bindd"), "{text}");
    }
}
