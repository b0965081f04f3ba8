//! The processes that are measured: BEAMs, a node of ours, a C node of libei.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use meshx_tests::bench::CpuClock;
use meshx_tests::{COOKIE, Context, Process, Result};

use crate::terms::libei;

const PATIENCE: Duration = Duration::from_secs(120);
const PEER: &str = include_str!("bench_peer.erl");
const EI_NODE: &str = include_str!("../../../libei/ei_node.c");
/// The BEAM that all talk to.
const BEAM: &str = "beam@127.0.0.1";

/// What one command took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Took {
    pub(crate) seconds: f64,
    /// CPU seconds of the process that is measured.
    pub(crate) cpu: f64,
}

/// An EPMD of its own, and the peers.
pub(crate) struct Stage {
    beam: Process,
    other: Process,
    ours: Process,
    ei: Process,
    _epmd: Process,
    _dir: tempfile::TempDir,
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Ours,
    Ei,
    Beam,
    /// The C node of libei, which sends frames that it made before, or reads without looking: what its socket can do.
    Socket,
}

impl Who {
    fn node(self) -> &'static str {
        match self {
            Self::Ours => "ours@127.0.0.1",
            Self::Ei | Self::Socket => "ei@127.0.0.1",
            Self::Beam => "other@127.0.0.1",
        }
    }
}

impl Stage {
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::tempdir().context("make a temporary directory")?;
        let source = dir.path().join("bench_peer.erl");
        std::fs::write(&source, PEER).context("write the BEAM's program")?;
        let compiled = std::process::Command::new("erlc")
            .arg("-o")
            .arg(dir.path())
            .arg(&source)
            .status()
            .context("run erlc")?;
        if !compiled.success() {
            return Err("erlc does not compile bench_peer.erl".into());
        }
        let (epmd, port) = epmd()?;
        let beam = |node: &str| -> Result<Process> {
            let path = dir.path().display().to_string();
            let arguments = [
                "-noshell",
                "-start_epmd",
                "false",
                "-setcookie",
                COOKIE,
                "-name",
                node,
                "-pa",
                &path,
                "-s",
                "bench_peer",
                "main",
            ];
            ready(Process::start(node, "erl", arguments, |command| {
                command.env("ERL_EPMD_PORT", &port);
                command.env("ERL_EPMD_ADDRESS", "127.0.0.1");
            })?)
        };
        let (beam, other) = (beam(BEAM)?, beam(Who::Beam.node())?);
        let me = std::env::current_exe().context("find the running program")?;
        let ours = ready(Process::start(
            "ours",
            me,
            ["peer", Who::Ours.node(), COOKIE, BEAM, &port],
            |_| (),
        )?)?;
        let program = libei::compile(EI_NODE);
        let ei = Process::start("ei", &program, [Who::Ei.node(), COOKIE, BEAM], |command| {
            command.env("ERL_EPMD_PORT", &port);
        })?;
        let ei = ready(ei)?;
        std::fs::remove_file(program).context("remove the C node")?;
        Ok(Self {
            beam,
            other,
            ours,
            ei,
            _epmd: epmd,
            _dir: dir,
        })
    }

    /// Messages from `who` to the BEAM.
    pub(crate) fn send(&mut self, who: Who, count: u32, size: u32) -> Result<Took> {
        let command = match who {
            Who::Beam => format!("send {BEAM} {count} {size}"),
            Who::Socket => format!("flood {count} {size}"),
            Who::Ours | Who::Ei => format!("send {count} {size}"),
        };
        let process = self.process(who);
        measured(process, |process| ask(process, &command))
    }

    /// Messages from the BEAM to `who`.
    pub(crate) fn blast(&mut self, who: Who, count: u32, size: u32) -> Result<Took> {
        // Between BEAMs both directions are the same.
        if who == Who::Beam {
            return self.send(who, count, size);
        }
        let command = format!("blast {} {count} {size}", who.node());
        let process = match who {
            Who::Ours => &mut self.ours,
            Who::Ei | Who::Socket | Who::Beam => &mut self.ei,
        };
        let take = if who == Who::Socket { "drain" } else { "receive" };
        let beam = &mut self.beam;
        measured(process, |process| {
            process.write_line(&format!("{take} {count}"))?;
            ask(beam, &command)?;
            process.wait_for(PATIENCE, |line| line.starts_with("done").then_some(()))
        })
    }

    /// Calls from the BEAM to `who`, one after the other.
    pub(crate) fn calls(&mut self, who: Who, count: u32) -> Result<Took> {
        let command = format!("calls {} {count}", who.node());
        let pid = self.process(who).pid();
        let clock = CpuClock::start(&[pid])?;
        let began = Instant::now();
        ask(&mut self.beam, &command)?;
        Ok(Took {
            seconds: began.elapsed().as_secs_f64(),
            cpu: clock.seconds()?,
        })
    }

    /// Lets our node make so many of something, and says by how many bytes it grew.
    pub(crate) fn grow(&mut self, what: &str, count: u32) -> Result<f64> {
        let before = resident(self.ours.pid())?;
        ask(&mut self.ours, &format!("{what} {count}"))?;
        let after = resident(self.ours.pid())?;
        ask(&mut self.ours, "drop 0")?;
        Ok(after as f64 - before as f64)
    }

    fn process(&mut self, who: Who) -> &mut Process {
        match who {
            Who::Ours => &mut self.ours,
            Who::Ei | Who::Socket => &mut self.ei,
            Who::Beam => &mut self.other,
        }
    }
}

fn measured(process: &mut Process, run: impl FnOnce(&mut Process) -> Result<()>) -> Result<Took> {
    let clock = CpuClock::start(&[process.pid()])?;
    let began = Instant::now();
    run(process)?;
    Ok(Took {
        seconds: began.elapsed().as_secs_f64(),
        cpu: clock.seconds()?,
    })
}

fn ask(process: &mut Process, command: &str) -> Result<()> {
    process.write_line(command)?;
    process.wait_for(PATIENCE, |line| line.starts_with("done").then_some(()))
}

fn ready(mut process: Process) -> Result<Process> {
    process.wait_for(PATIENCE, |line| (line == "ready").then_some(()))?;
    Ok(process)
}

fn resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).context(&path)?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()
    });
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| format!("{path}: no line VmRSS"))
}

fn epmd() -> Result<(Process, String)> {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    let port = free.local_addr().context("find a free port")?.port();
    drop(free);
    let arguments = ["-address", "127.0.0.1", "-port", &port.to_string()].map(str::to_owned);
    let process = Process::start("epmd", "epmd", arguments, |_| ())?;
    let began = Instant::now();
    while TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).is_err() {
        if began.elapsed() > PATIENCE {
            return Err("epmd does not listen".into());
        }
        std::thread::yield_now();
    }
    Ok((process, port.to_string()))
}
