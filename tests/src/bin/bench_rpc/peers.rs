//! The peers: for each kind of RPC a server VM and a client VM of its own, so that none pays for another's memory.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use meshx_tests::bench::{BUFFERS, CpuClock, ask, distribution_flags, free_port, tls_options};
use meshx_tests::{Agent, Context, Mesh, Process, Result, ebin, program, repository};

const START: Duration = Duration::from_secs(60);

/// A kind of RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// `:erpc.call` over inet_tcp_dist.
    Erpc,
    /// MeshxRpc over TCP, NIF codec, no checksums.
    Rpc,
    /// The same with CRC-32.
    Crc32,
    /// The same without checksums, its codec in plain Elixir: the NIF is off.
    Elixir,
    /// `:erpc.call` over inet_tls_dist: TLS 1.3, both sides verified, sockets with the system's defaults and nodelay.
    Tls,
    /// The same with the buffers that all others have.
    TlsTuned,
    /// MeshxRpc through two agents: mutual TLS 1.3 between them.
    Mesh,
    /// A plain socket for each caller: what two VMs can do.
    Socket,
}

impl Kind {
    /// In the order of the tables.
    pub(crate) const ALL: &[Self] = &[
        Self::Erpc,
        Self::Rpc,
        Self::Crc32,
        Self::Elixir,
        Self::Tls,
        Self::TlsTuned,
        Self::Mesh,
        Self::Socket,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Erpc => "erpc",
            Self::Rpc => "MeshxRpc",
            Self::Crc32 => "MeshxRpc, crc32",
            Self::Elixir => "MeshxRpc, NIF off",
            Self::Tls => "erpc, inet_tls",
            Self::TlsTuned => "erpc, inet_tls, 256 KiB",
            Self::Mesh => "MeshxRpc, agents",
            Self::Socket => "bare sockets",
        })
    }
}

/// What all peers stand on: an epmd of our own, certificates, and two agents.
pub(crate) struct Stage {
    dir: tempfile::TempDir,
    epmd_port: u16,
    _epmd: Process,
    agents: [Agent; 2],
    // Removed after what lives in it.
    _mesh: Mesh,
}

/// A client and a server of one kind.
pub(crate) struct Pair {
    pub(crate) kind: Kind,
    client: Process,
    server: Process,
    pids: [u32; 2],
    relays: Vec<u32>,
}

impl Stage {
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("mxb")
            .tempdir()
            .context("make a temporary directory")?;
        let epmd_port = free_port()?;
        let port = epmd_port.to_string();
        let epmd = Process::start(
            "epmd",
            "epmd",
            ["-d", "-port", &port, "-address", "127.0.0.1"],
            |_| {},
        )?;
        let listening = Duration::from_secs(10);
        epmd.wait_log("epmd running", listening)
            .or_else(|_| epmd.wait_log("entering the main select", listening))?;
        let mesh = Mesh::new()?;
        let agents = [
            mesh.agent("a", "127.0.0.2", &["h1"])?,
            mesh.agent("b", "127.0.0.3", &["h2"])?,
        ];
        tls_options(dir.path())?;
        Ok(Self {
            dir,
            epmd_port,
            _epmd: epmd,
            agents,
            _mesh: mesh,
        })
    }

    /// Starts the two VMs of a kind.
    pub(crate) fn start(&self, kind: Kind) -> Result<Pair> {
        let arguments: &[&str] = match kind {
            Kind::Erpc | Kind::Tls | Kind::TlsTuned => &["erpc"],
            Kind::Rpc => &["rpc", "none", "nif"],
            Kind::Crc32 => &["rpc", "crc32", "nif"],
            Kind::Elixir => &["rpc", "none", "elixir"],
            Kind::Mesh => &["mesh", "none"],
            Kind::Socket => &["socket"],
        };
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let (server, server_pid, place) = self.vm(kind, "server", &arguments)?;
        let arguments = [arguments, vec![place]].concat();
        let (client, client_pid, _) = self.vm(kind, "client", &arguments)?;
        let relays = match kind {
            Kind::Mesh => self.agents.iter().map(|agent| agent.process.pid()).collect(),
            _ => Vec::new(),
        };
        Ok(Pair {
            kind,
            client,
            server,
            pids: [client_pid, server_pid],
            relays,
        })
    }

    fn vm(&self, kind: Kind, role: &str, arguments: &[String]) -> Result<(Process, u32, String)> {
        let name = format!("{kind:?}_{role}").to_lowercase();
        let agent = &self.agents[usize::from(role == "server")];
        let mut words = vec![
            "-pa".to_owned(),
            ebin().join("../../*/ebin").display().to_string(),
        ];
        words.push(repository().join("tests/bench/rpc.exs").display().to_string());
        words.push(role.to_owned());
        words.extend_from_slice(arguments);
        let mut process = if kind == Kind::Mesh {
            // The agent gives identities to nodes: the service is registered by one.
            let node = format!(
                "{}@{}",
                name.replace('_', "-"),
                if role == "server" { "h2" } else { "h1" }
            );
            let ebin = ebin().display().to_string();
            let run = ["run", &node, "--cookie", "bench", "--ebin", &ebin, "--", "elixir"].map(str::to_owned);
            Process::start(
                &name,
                program("meshx")?,
                run.into_iter().chain(words),
                |command| {
                    command.env("MESHX_DIR", agent.dir());
                },
            )?
        } else {
            Process::start(&name, "elixir", words, |command| {
                command.env("ERL_FLAGS", self.flags(kind, &name));
                command.env("ERL_EPMD_PORT", self.epmd_port.to_string());
            })?
        };
        let line = process.wait_for(START, |line| line.strip_prefix("ready ").map(str::to_owned))?;
        let (pid, rest) = line
            .split_once(' ')
            .ok_or_else(|| format!("{name}: seen {line:?}"))?;
        Ok((
            process,
            pid.parse().context("the VM's process id")?,
            rest.to_owned(),
        ))
    }

    fn flags(&self, kind: Kind, name: &str) -> String {
        let node = format!("-name {name}@127.0.0.1 -setcookie bench -start_epmd false");
        let bind = "-kernel inet_dist_use_interface {127,0,0,1}";
        let tls = format!(
            "-proto_dist inet_tls -ssl_dist_optfile {}",
            self.path("tls.conf").display()
        );
        match kind {
            Kind::Erpc => format!("{node} {bind} {}", distribution_flags(BUFFERS)),
            Kind::Tls => format!("{node} {bind} {tls} {}", distribution_flags("{nodelay,true}")),
            Kind::TlsTuned => format!("{node} {bind} {tls} {}", distribution_flags(BUFFERS)),
            _ => String::new(),
        }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }
}

impl Pair {
    /// Gives a line to the client; its answer's words as numbers.
    pub(crate) fn ask(&mut self, line: &str) -> Result<Vec<f64>> {
        ask(&mut self.client, line)
    }

    /// Collects garbage in both VMs.
    pub(crate) fn settle(&mut self) -> Result<()> {
        ask(&mut self.client, "settle")?;
        ask(&mut self.server, "settle").map(drop)
    }

    /// The longest call of the NIF in either VM since this was asked before, in microseconds.
    pub(crate) fn slice(&mut self) -> Result<f64> {
        if !matches!(self.kind, Kind::Rpc | Kind::Crc32 | Kind::Mesh) {
            return Ok(0.0);
        }
        let longest = [&mut self.client, &mut self.server].map(|vm| ask(vm, "slice"));
        let mut nanoseconds = 0.0_f64;
        for answer in longest {
            nanoseconds = answer?.into_iter().fold(nanoseconds, f64::max);
        }
        Ok(nanoseconds / 1e3)
    }

    /// The two VMs.
    pub(crate) fn pids(&self) -> [u32; 2] {
        self.pids
    }

    /// Starts to count the CPU of both VMs and of what stands between them.
    pub(crate) fn cpu(&self) -> Result<CpuClock> {
        CpuClock::start(&[&self.pids[..], &self.relays].concat())
    }
}
