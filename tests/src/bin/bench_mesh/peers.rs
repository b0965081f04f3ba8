//! The carriers: for each a node that sends and one that answers, and what stands between them.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use meshx_tests::bench::{CpuClock, Way, ask, distribution_flags, free_port, tls_options};
use meshx_tests::consul::{Consul, Service};
use meshx_tests::envoy::Envoy;
use meshx_tests::network::ADDRESSES;
use meshx_tests::{
    Agent, Context, Mesh, Network, Process, Result, ebin_on, has_otp, otp_path, program, repository,
};
use tempfile::TempDir;

const START: Duration = Duration::from_secs(60);
/// The newest OTP that nodes run on.
pub(crate) const NEWEST_OTP: &str = "29";
/// The buffers that a node of Meshx gives its socket, for everybody.
const BUFFERS: &str = "{nodelay,true},{buffer,262144},{recbuf,262144},{sndbuf,1048576}";
/// Links that are made as soon as they are lost can leave OTP's `global` exchanging messages at both nodes without end,
/// over whatever carries them (erlang/otp issue 9117): all others would be measured beside that.
const WITHOUT_GLOBAL: &str = "-connect_all false";
/// Where TCP is to find its own: it grows them to what a long way needs, unless they are set.
const NO_BUFFERS: &str = "{nodelay,true}";

/// What carries the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Two agents, mutual TLS 1.3 between them.
    Native,
    /// The carrier alone: nodes that meet at a Unix socket, without agents.
    Carrier,
    /// The same through two relays that do nothing but hand on bytes: what no pair of proxies can beat.
    Relays,
    /// The same through two relays that besides seal and open records as TLS does: what no pair of proxies that encrypt
    /// in user space can beat.
    Sealed,
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
        Self::Relays,
        Self::Sealed,
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
            Self::Relays => "bare relays",
            Self::Sealed => "sealing relays",
            Self::Tcp => "inet_tcp_dist",
            Self::Tls => "inet_tls_dist",
            Self::TlsTuned => "inet_tls_dist, tuned",
            Self::Proxies => "built-in proxies",
            Self::Envoys => "Envoy pair",
        })
    }
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) kind: Kind,
    /// The OTP of its nodes, where it is not that of the search path.
    pub(crate) otp: Option<&'static str>,
}

impl Peer {
    /// All that can be measured here, in the order of the tables.
    pub(crate) fn all() -> Vec<Self> {
        let newest = [
            Kind::Native,
            Kind::Relays,
            Kind::Sealed,
            Kind::Tls,
            Kind::TlsTuned,
        ]
        .map(|kind| (kind, Some(NEWEST_OTP)));
        let own = Kind::ALL.iter().map(|kind| (*kind, None));
        own.chain(newest.into_iter().filter(|_| has_otp(NEWEST_OTP)))
            .map(|(kind, otp)| Self { kind, otp })
            .collect()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, otp } = self;
        write!(f, "{kind}")?;
        otp.map_or(Ok(()), |otp| write!(f, ", OTP {otp}"))
    }
}

/// What all of them stand on.
pub(crate) struct Stage {
    dir: TempDir,
    pub(crate) agents: [Agent; 2],
    consul: Option<Consul>,
    /// What is between the two sides; none where they are side by side.
    far: Option<(Way, Network)>,
    _relays: Vec<Process>,
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
    /// With a Consul where one of `peers` needs it, and a long way between the sides if one is given.
    pub(crate) fn new(peers: &[Peer], way: Option<Way>) -> Result<Self> {
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
        let mut far = None;
        if let Some(way) = way {
            let network = Network::new().map_err(|e| format!("{e}\n--near leaves out the long ways"))?;
            network.limit(way.rate)?;
            far = Some((way, network));
        }
        let agent = |side: usize, name, host, bind: &str, options: &[&str]| {
            let on = far
                .as_ref()
                .map_or_else(Vec::new, |(_, network)| network.on(side));
            mesh.agent_at(&on, name, bind, &[host], options)
        };
        let [first, second] = ADDRESSES;
        let first = agent(0, "a", "h1", &format!("{first}:0"), &[])?;
        let mut relays = Vec::new();
        let second = match &far {
            Some((way, network)) => {
                // Nobody else is on that host.
                let inbound = format!("{second}:7800");
                let (relay, advertised) = relay(*way, network, &inbound)?;
                relays.push(relay);
                agent(1, "b", "h2", &inbound, &["--advertise", &advertised.to_string()])?
            }
            None => agent(1, "b", "h2", &format!("{second}:0"), &[])?,
        };
        let proxied = |peer: &Peer| matches!(peer.kind, Kind::Proxies | Kind::Envoys);
        let consul = match peers.iter().any(proxied) {
            true => Some(Consul::start()?),
            false => None,
        };
        Ok(Self {
            dir,
            agents: [first, second],
            consul,
            far,
            _relays: relays,
            _mesh: mesh,
        })
    }

    /// Starts the two nodes of a peer, and connects them.
    pub(crate) fn start(&self, peer: Peer) -> Result<Pair> {
        let port = free_port()?;
        let (at, between) = self.between(peer, port)?;
        let [name, other] = [("answers", "h2"), ("sends", "h1")].map(|(role, host)| {
            let who = format!("{role}-{:?}{}", peer.kind, peer.otp.unwrap_or_default()).to_lowercase();
            match peer.kind {
                Kind::Native => format!("{who}@{host}"),
                // In the certificates of inet_tls_dist.
                _ => format!("{who}@127.0.0.1"),
            }
        });
        let (answers, answers_pid) = self.vm(peer, &name, 1, port, at)?;
        let (mut sender, sender_pid) = self.vm(peer, &other, 0, free_port()?, at)?;
        ask(&mut sender, &format!("connect {name}"))?;
        let pids = match peer.kind {
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
    fn between(&self, peer: Peer, port: u16) -> Result<(SocketAddr, Vec<Process>)> {
        let kind = peer.kind;
        if let Kind::Relays | Kind::Sealed = kind {
            let sealed: &[_] = match kind {
                Kind::Sealed => &["--sealed"],
                _ => &[],
            };
            let start = |arguments: &[&str]| started(&[], &[arguments, sealed].concat());
            let (exit, at) = start(&["--bare-exit", &self.dir_of(peer, 1)])?;
            let to = at.to_string();
            let (entrance, _) = start(&["--bare-entrance", &self.entrance(peer), "--relay", &to])?;
            return Ok((at, vec![entrance, exit]));
        }
        if let Kind::Proxies | Kind::Envoys = kind {
            let upstream = local(free_port()?);
            let processes = self.sidecars(kind, "dist", local(port), upstream)?;
            return Ok((upstream, processes));
        }
        let (Some((way, network)), Kind::Tcp | Kind::Tls | Kind::TlsTuned) = (&self.far, kind) else {
            return Ok((local(port), Vec::new()));
        };
        let (relay, at) = relay(*way, network, &format!("{}:{port}", ADDRESSES[1]))?;
        Ok((at, vec![relay]))
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

    /// A node on one of the two sides that listens at `port`, where that is its own, and finds its peer `at`.
    fn vm(&self, peer: Peer, name: &str, side: usize, port: u16, at: SocketAddr) -> Result<(Process, u32)> {
        let Peer { kind, otp } = peer;
        let ebin = ebin_on(otp);
        let path = otp.map(otp_path).transpose()?;
        let mut words = vec![
            "-pa".to_owned(),
            ebin.join("../../*/ebin").display().to_string(),
            repository().join("tests/bench/dist.exs").display().to_string(),
        ];
        match kind {
            Kind::Carrier => words.extend([name.into(), "adapter".into(), self.file("carrier")]),
            Kind::Relays | Kind::Sealed => {
                words.extend([name.into(), "adapter".into(), self.dir_of(peer, side)]);
                words.extend((side == 0).then(|| self.entrance(peer)));
            }
            _ => words.push("boot".into()),
        }
        let mut line = if kind == Kind::Native {
            let (meshx, ebin) = (
                program("meshx")?.display().to_string(),
                ebin.display().to_string(),
            );
            let run = [&meshx, "run", name, "--cookie", "bench", "--ebin", &ebin, "--"];
            run.map(str::to_owned).to_vec()
        } else {
            self.on(side)
        };
        line.push("elixir".into());
        line.extend(words);
        let mut process = Process::start(name, &line[0], &line[1..], |command| {
            command.envs(path.map(|path| ("PATH", path)));
            command.env("ERL_AFLAGS", WITHOUT_GLOBAL);
            match kind {
                Kind::Native => command.env("MESHX_DIR", self.agents[side].dir()),
                _ => command.env("ERL_FLAGS", self.flags(peer, name, side, port, at)),
            };
        })?;
        let line = process.wait_for(START, |line| line.strip_prefix("ready ").map(str::to_owned))?;
        let (pid, _) = line
            .split_once(' ')
            .ok_or_else(|| format!("{name}: seen {line:?}"))?;
        Ok((process, pid.parse().context("the VM's process id")?))
    }

    /// What starts a program on a side.
    fn on(&self, side: usize) -> Vec<String> {
        self.far
            .as_ref()
            .map_or_else(Vec::new, |(_, network)| network.on(side))
    }

    fn flags(&self, peer: Peer, name: &str, side: usize, port: u16, at: SocketAddr) -> String {
        let own = match self.far {
            Some(_) => ADDRESSES[side],
            None => "127.0.0.1",
        };
        let found = format!(
            "-name {name} -setcookie bench -start_epmd false -pa {} -epmd_module bench_epmd -bench_port {port} \
             -bench_peer {} -bench_address {} -kernel inet_dist_use_interface {{{}}}",
            self.dir.path().display(),
            at.port(),
            at.ip(),
            own.replace('.', ","),
        );
        let buffers = match self.far {
            Some(_) => NO_BUFFERS,
            None => BUFFERS,
        };
        let tls = format!("-proto_dist inet_tls -ssl_dist_optfile {}", self.file("tls.conf"));
        match peer.kind {
            Kind::Native => String::new(),
            Kind::Carrier | Kind::Relays | Kind::Sealed => format!(
                "-pa {} -proto_dist Elixir.MeshxNode -no_epmd",
                ebin_on(peer.otp).display()
            ),
            Kind::Tcp | Kind::Proxies | Kind::Envoys => format!("{found} {}", distribution_flags(buffers)),
            Kind::Tls => format!("{found} {tls} {}", distribution_flags(NO_BUFFERS)),
            Kind::TlsTuned => format!("{found} {tls} {}", distribution_flags(buffers)),
        }
    }

    /// Where a node behind bare relays listens, and nobody else.
    fn dir_of(&self, Peer { kind, otp }: Peer, side: usize) -> String {
        self.file(&format!("{kind:?}{}-{side}", otp.unwrap_or_default()))
    }

    fn entrance(&self, Peer { kind, otp }: Peer) -> String {
        self.file(&format!("{kind:?}{}.s", otp.unwrap_or_default()))
    }

    fn file(&self, name: &str) -> String {
        let path: PathBuf = self.dir.path().join(name);
        path.display().to_string()
    }
}

/// A process on the second host that leads to `target` there with the way's delay, and its address.
fn relay(way: Way, network: &Network, target: &str) -> Result<(Process, SocketAddr)> {
    let [delay, rate] = [way.delay.as_millis().to_string(), way.rate.to_string()];
    started(
        &network.on(1),
        &["--relay", target, "--delay-ms", &delay, "--rate", &rate],
    )
}

/// This program as a relay, and where it is reached.
fn started(on: &[String], arguments: &[&str]) -> Result<(Process, SocketAddr)> {
    let own = std::env::current_exe().context("find the running program")?;
    let mut line = on.to_vec();
    line.push(own.display().to_string());
    line.extend(arguments.iter().map(|&argument| argument.into()));
    let mut process = Process::start("relay", &line[0], &line[1..], |_| {})?;
    let address = process.wait_for(START, |line| line.strip_prefix("relay ").map(str::to_owned))?;
    Ok((process, address.parse().context("the relay's address")?))
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
