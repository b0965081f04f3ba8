//! The carriers: for each a node that sends and one that answers, and what stands between them.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use meshx_tests::bench::{CpuClock, Way, ask, distribution_flags, free_port, relay, tls_options};
use meshx_tests::consul::{Consul, Service};
use meshx_tests::envoy::Envoy;
use meshx_tests::{Agent, Context, Mesh, Process, Result, ebin, program, repository};
use tempfile::TempDir;

const START: Duration = Duration::from_secs(60);
/// The buffers that a node of Meshx gives its socket, for everybody.
const BUFFERS: &str = "{nodelay,true},{buffer,262144},{recbuf,262144},{sndbuf,1048576}";
/// Where TCP is to find its own: it grows them to what a long way needs, unless they are set.
const NO_BUFFERS: &str = "{nodelay,true}";

/// What carries the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Two agents, mutual TLS 1.3 between them.
    Native,
    /// The carrier alone: nodes that meet at a Unix socket, without agents.
    Carrier,
    /// inet_tcp_dist.
    Tcp,
    /// inet_tls_dist: TLS 1.3, both sides verified, sockets with the system's defaults and nodelay.
    Tls,
    /// The same with the buffers that all others have.
    TlsTuned,
    /// inet_tcp_dist through two of Consul's built-in proxies.
    Proxies,
    /// inet_tcp_dist through two Envoys that are set up by files.
    Envoys,
}

impl Kind {
    /// In the order of the tables.
    pub(crate) const ALL: &[Self] = &[
        Self::Native,
        Self::Carrier,
        Self::Tcp,
        Self::Tls,
        Self::TlsTuned,
        Self::Proxies,
        Self::Envoys,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Carrier => "carrier alone",
            Self::Tcp => "inet_tcp_dist",
            Self::Tls => "inet_tls_dist",
            Self::TlsTuned => "inet_tls_dist, tuned",
            Self::Proxies => "built-in proxies",
            Self::Envoys => "Envoy pair",
        })
    }
}

/// What all of them stand on.
pub(crate) struct Stage {
    dir: TempDir,
    pub(crate) agents: [Agent; 2],
    consul: Option<Consul>,
    /// What is between the two sides; none where they are side by side.
    way: Option<Way>,
    // Removed after what lives in it.
    _mesh: Mesh,
}

/// Two nodes with a link between them.
pub(crate) struct Pair {
    sender: Process,
    /// The two VMs.
    vms: [u32; 2],
    /// What stands between them.
    between: Vec<u32>,
    _others: Vec<Process>,
}

impl Stage {
    /// With a Consul where one of `kinds` needs it, and a long way between the sides if one is given.
    pub(crate) fn new(kinds: &[Kind], way: Option<Way>) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("mxb")
            .tempdir()
            .context("make a temporary directory")?;
        tls_options(dir.path())?;
        let source = repository().join("tests/bench/bench_epmd.erl");
        let compiled = std::process::Command::new("erlc")
            .arg("-o")
            .arg(dir.path())
            .arg(&source)
            .status()
            .context("run erlc")?;
        if !compiled.success() {
            return Err(format!("erlc {}: {compiled}", source.display()));
        }
        let mesh = Mesh::new()?;
        let first = mesh.agent("a", "127.0.0.2", &["h1"])?;
        let second = match way {
            Some(way) => {
                let inbound = SocketAddr::from(([127, 0, 0, 3], free_port()?));
                let advertised = relay(way, inbound)?.to_string();
                mesh.agent_at(
                    &[],
                    "b",
                    &inbound.to_string(),
                    &["h2"],
                    &["--advertise", &advertised],
                )?
            }
            None => mesh.agent("b", "127.0.0.3", &["h2"])?,
        };
        let proxied = |kind: &Kind| matches!(kind, Kind::Proxies | Kind::Envoys);
        let consul = match kinds.iter().any(proxied) {
            true => Some(Consul::start()?),
            false => None,
        };
        Ok(Self {
            dir,
            agents: [first, second],
            consul,
            way,
            _mesh: mesh,
        })
    }

    /// Starts the two nodes of a kind, and connects them.
    pub(crate) fn start(&self, kind: Kind) -> Result<Pair> {
        let port = free_port()?;
        let (peer, between) = self.between(kind, port)?;
        let [name, other] = ["answers", "sends"].map(|role| match kind {
            Kind::Native => format!("{role}@{}", if role == "answers" { "h2" } else { "h1" }),
            _ => format!("{role}-{}@127.0.0.1", format!("{kind:?}").to_lowercase()),
        });
        let (answers, answers_pid) = self.vm(kind, &name, &self.agents[1], port, peer)?;
        let (mut sender, sender_pid) = self.vm(kind, &other, &self.agents[0], free_port()?, peer)?;
        ask(&mut sender, &format!("connect {name}"))?;
        let pids = match kind {
            Kind::Native => self.agents.iter().map(|agent| agent.process.pid()).collect(),
            _ => between.iter().map(Process::pid).collect(),
        };
        let mut others = between;
        others.push(answers);
        Ok(Pair {
            sender,
            vms: [answers_pid, sender_pid],
            between: pids,
            _others: others,
        })
    }

    /// What stands before the node that answers at `port`, and where it is reached.
    fn between(&self, kind: Kind, port: u16) -> Result<(u16, Vec<Process>)> {
        if let Kind::Proxies | Kind::Envoys = kind {
            let upstream = local(free_port()?);
            let processes = self.sidecars(kind, "dist", local(port), upstream)?;
            return Ok((upstream.port(), processes));
        }
        let (Some(way), Kind::Tcp | Kind::Tls | Kind::TlsTuned) = (self.way, kind) else {
            return Ok((port, Vec::new()));
        };
        Ok((relay(way, local(port))?.port(), Vec::new()))
    }

    /// Two sidecars: who connects to `upstream` reaches `application` through both.
    pub(crate) fn sidecars(
        &self,
        kind: Kind,
        what: &str,
        application: SocketAddr,
        upstream: SocketAddr,
    ) -> Result<Vec<Process>> {
        let consul = self.consul.as_ref().ok_or("no Consul was started")?;
        let name = |role: &str| format!("{what}-{role}-{}", format!("{kind:?}").to_lowercase());
        let [sends, answers] = [name("sends"), name("answers")];
        let [inbound, unused] = [free_port()?, free_port()?].map(local);
        let server = Service::new(&answers, application, inbound);
        let client = Service::new(&sends, application, unused).upstream(&answers, upstream);
        Ok(if kind == Kind::Proxies {
            consul.register(&server)?;
            consul.register(&client)?;
            vec![
                consul.connect_proxy(&answers, None)?,
                consul.connect_proxy(&sends, None)?,
            ]
        } else {
            let allowed = [consul.spiffe(&sends)?];
            vec![
                Envoy::new(consul, &answers)?
                    .inbound(inbound, application, &allowed)
                    .start(consul)?,
                Envoy::new(consul, &sends)?
                    .upstream(&answers, &consul.spiffe(&answers)?, upstream, inbound)
                    .start(consul)?,
            ]
        })
    }

    fn vm(&self, kind: Kind, name: &str, agent: &Agent, port: u16, peer: u16) -> Result<(Process, u32)> {
        let mut words = vec![
            "-pa".to_owned(),
            ebin().join("../../*/ebin").display().to_string(),
            repository().join("tests/bench/dist.exs").display().to_string(),
        ];
        match kind {
            Kind::Carrier => words.extend([name.into(), "adapter".into(), self.file("carrier")]),
            _ => words.push("boot".into()),
        }
        let mut process = if kind == Kind::Native {
            let ebin = ebin().display().to_string();
            let run = ["run", name, "--cookie", "bench", "--ebin", &ebin, "--", "elixir"].map(str::to_owned);
            Process::start(name, program("meshx")?, run.into_iter().chain(words), |command| {
                command.env("MESHX_DIR", agent.dir());
            })?
        } else {
            Process::start(name, "elixir", words, |command| {
                command.env("ERL_FLAGS", self.flags(kind, name, port, peer));
            })?
        };
        let line = process.wait_for(START, |line| line.strip_prefix("ready ").map(str::to_owned))?;
        let (pid, _) = line
            .split_once(' ')
            .ok_or_else(|| format!("{name}: seen {line:?}"))?;
        Ok((process, pid.parse().context("the VM's process id")?))
    }

    fn flags(&self, kind: Kind, name: &str, port: u16, peer: u16) -> String {
        let found = format!(
            "-name {name} -setcookie bench -start_epmd false -pa {} -epmd_module bench_epmd -bench_port {port} \
             -bench_peer {peer} -kernel inet_dist_use_interface {{127,0,0,1}}",
            self.dir.path().display()
        );
        let buffers = match self.way {
            Some(_) => NO_BUFFERS,
            None => BUFFERS,
        };
        let tls = format!("-proto_dist inet_tls -ssl_dist_optfile {}", self.file("tls.conf"));
        match kind {
            Kind::Native => String::new(),
            Kind::Carrier => format!("-pa {} -proto_dist Elixir.MeshxNode -no_epmd", ebin().display()),
            Kind::Tcp | Kind::Proxies | Kind::Envoys => format!("{found} {}", distribution_flags(buffers)),
            Kind::Tls => format!("{found} {tls} {}", distribution_flags(NO_BUFFERS)),
            Kind::TlsTuned => format!("{found} {tls} {}", distribution_flags(buffers)),
        }
    }

    fn file(&self, name: &str) -> String {
        let path: PathBuf = self.dir.path().join(name);
        path.display().to_string()
    }
}

pub(crate) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

impl Pair {
    /// Gives a line to the node that sends; its answer's words as numbers, of which there must be as many as wanted.
    pub(crate) fn ask<const N: usize>(&mut self, line: &str) -> Result<[f64; N]> {
        let answer = ask(&mut self.sender, line)?;
        answer
            .try_into()
            .map_err(|seen| format!("{line}: seen {seen:?}, wanted {N} numbers"))
    }

    /// Collects garbage in the node that sends.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.ask::<0>("settle").map(drop)
    }

    /// Starts to count the CPU of both VMs, and that of what stands between them.
    pub(crate) fn cpu(&self) -> Result<[CpuClock; 2]> {
        Ok([CpuClock::start(&self.vms)?, CpuClock::start(&self.between)?])
    }
}
