//! The agent's options on the command line.

use std::path::PathBuf;

use crate::mesh::consul::ConsulArgs;

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
    /// How long a thread that passed a small message on looks for the next before it sleeps, in microseconds; 0 for not at all [default: 200, and 0 under a limit of CPU time]
    #[arg(long, value_name = "MICROSECONDS")]
    pub busy_poll: Option<u64>,
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
    /// End when for this time, in seconds, nobody has used the agent: no control connection, no registered node, no link [default: never]
    #[arg(long, value_name = "SECONDS")]
    pub idle_exit: Option<u64>,
    /// Take over from the agent that runs in the directory, which keeps its live links until they end; start as usual when none does
    #[arg(long)]
    pub takeover: bool,
}
