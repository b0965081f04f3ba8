//! A full mesh of more and more nodes on four hosts: what it takes until all are connected, and what the agents hold then.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use meshx_tests::bench::{CpuClock, Table};
use meshx_tests::{Agent, Context, Mesh, Process, Result, ebin, program, wait_until};

use crate::peers;

const COOKIE: &str = "bench";
const START: Duration = Duration::from_secs(120);
/// Hundreds of nodes on two processors.
const MEET: Duration = Duration::from_secs(1800);
/// What a VM of this benchmark has when it is one of two hundred.
const VM_MIB: u64 = 80;
const MIB: f64 = 1024.0;
/// C-nodes of one process: each has a file open for every other node.
const C_NODES: usize = 50;
/// Agents: so many that the links of 200 nodes keep within 20,000 open files each.
const HOSTS: usize = 4;

struct Sample {
    nodes: usize,
    vms: usize,
    links: usize,
    again: f64,
    /// From the first to the last registration of those that came for this row, for each of them.
    join: f64,
    full: f64,
    cpu: f64,
    /// KiB of all agents with no link, and with all.
    empty: u64,
    resident: u64,
    descriptors: usize,
    idle: f64,
    leave: f64,
}

struct Crowd<'a> {
    dir: &'a Path,
    agents: Vec<Agent>,
    names: Vec<String>,
    members: Vec<Process>,
    vms: usize,
    _mesh: Mesh,
}

/// The table.
pub(crate) fn measure(sizes: &[usize], vms: Option<usize>, ms: u64, dir: &Path) -> Result<String> {
    let most = match vms {
        Some(most) => most,
        None => usize::try_from(available_mib()? * 7 / 10 / VM_MIB).context("memory")?,
    };
    let mesh = Mesh::new()?;
    let http = ["--http", "127.0.0.1:0"];
    let agent = |host| {
        let (ip, name) = (format!("127.0.0.{}", host + 1), format!("h{host}"));
        mesh.agent_with(&format!("a{host}"), &ip, &[&name], &http)
    };
    let mut crowd = Crowd {
        dir,
        agents: (1..=HOSTS).map(agent).collect::<Result<_>>()?,
        names: Vec::new(),
        members: Vec::new(),
        vms: 0,
        _mesh: mesh,
    };
    let mut samples = Vec::new();
    for size in sizes {
        eprintln!("{size} nodes");
        let join = crowd.grow(*size, most)?;
        samples.push(crowd.sample(join, ms)?);
    }
    Ok(report(&samples, ms))
}

impl Crowd<'_> {
    /// Starts as many more as there shall be, one after the other. Seconds for each.
    fn grow(&mut self, size: usize, most: usize) -> Result<f64> {
        let (began, before) = (Instant::now(), self.names.len());
        let mut others = Vec::new();
        while self.names.len() < size {
            let at = self.names.len();
            let name = format!("n{at}@h{}", at % HOSTS + 1);
            let agent = &self.agents[at % HOSTS];
            if self.vms < most && others.is_empty() {
                let vm = self.vm(&name, agent)?;
                self.members.push(vm);
                self.vms += 1;
            } else {
                others.extend([agent.dir().display().to_string(), name.clone()]);
            }
            self.names.push(name);
        }
        for part in others.chunks(2 * C_NODES) {
            let exe = std::env::current_exe().context("find the running program")?;
            let words = [peers::WORD, COOKIE]
                .into_iter()
                .chain(part.iter().map(String::as_str));
            let mut process = Process::start("C-nodes", exe, words, |_| {})?;
            process.wait_for(START, |line| line.starts_with("ready ").then_some(()))?;
            self.members.push(process);
        }
        let came = self.names.len() - before;
        Ok(began.elapsed().as_secs_f64() / came.max(1) as f64)
    }

    fn vm(&self, name: &str, agent: &Agent) -> Result<Process> {
        let ebin = ebin().display().to_string();
        // `global` would connect all by itself, and count its own work as ours.
        let flags = "-noshell -connect_all false +S 1:1 +SDcpu 1:1 +SDio 1 +A 1 -s bench_dist";
        let run = [
            "run", name, "--cookie", COOKIE, "--ebin", &ebin, "--", "erl", "-pa",
        ]
        .map(str::to_owned);
        let words = run
            .into_iter()
            .chain([self.dir.display().to_string()])
            .chain(flags.split(' ').map(str::to_owned));
        let mut process = Process::start(name, program("meshx")?, words, |command| {
            command.env("MESHX_DIR", agent.dir());
        })?;
        process.wait_for(START, |line| line.starts_with("ready ").then_some(()))?;
        Ok(process)
    }

    fn sample(&mut self, join: f64, ms: u64) -> Result<Sample> {
        let pids: Vec<u32> = self.agents.iter().map(|agent| agent.process.pid()).collect();
        let nodes = self.names.len();
        let links = nodes * (nodes - 1) / 2;
        let empty = self.resident()?;
        let (cpu, began) = (CpuClock::start(&pids)?, Instant::now());
        let again = self.all(&format!("meet {}", self.names.join(" ")))?;
        let (full, cpu) = (began.elapsed().as_secs_f64(), cpu.seconds()?);
        let there = self.links()?;
        // One between two hosts is one of each agent's.
        let within = |host| (nodes + HOSTS - 1 - host) / HOSTS;
        let local: usize = (0..HOSTS)
            .map(|host| within(host) * within(host).saturating_sub(1) / 2)
            .sum();
        let wanted = 2 * links - local;
        if there != wanted as f64 {
            return Err(format!("{there} links at all agents, wanted {wanted}"));
        }
        let (resident, descriptors) = (self.resident()?, self.descriptors()?);
        let idle = CpuClock::start(&pids)?;
        let began_idle = Instant::now();
        std::thread::sleep(Duration::from_millis(ms));
        let idle = idle.seconds()? / began_idle.elapsed().as_secs_f64();
        let began = Instant::now();
        self.all("leave")?;
        wait_until(START, || self.links().is_ok_and(|links| links == 0.0)).map_err(|()| "links stayed")?;
        Ok(Sample {
            nodes,
            vms: self.vms,
            links,
            again,
            join,
            full,
            cpu,
            empty,
            resident,
            descriptors,
            idle,
            leave: began.elapsed().as_secs_f64(),
        })
    }

    /// Gives all the same line at once, and waits for all answers: their sum.
    fn all(&mut self, line: &str) -> Result<f64> {
        for member in &mut self.members {
            member.write_line(line)?;
        }
        let mut sum = 0.0;
        for member in &mut self.members {
            let answer = member.wait_for(MEET, |line| line.strip_prefix("done").map(str::to_owned))?;
            sum += answer.trim().parse::<f64>().unwrap_or(0.0);
        }
        Ok(sum)
    }

    fn links(&self) -> Result<f64> {
        self.agents.iter().map(|agent| agent.figure("meshx_links")).sum()
    }

    fn resident(&self) -> Result<u64> {
        self.agents.iter().map(Agent::resident).sum()
    }

    fn descriptors(&self) -> Result<usize> {
        let open = |agent: &Agent| {
            let path = format!("/proc/{}/fd", agent.process.pid());
            std::fs::read_dir(&path).context(path).map(Iterator::count)
        };
        self.agents.iter().map(open).sum()
    }
}

fn available_mib() -> Result<u64> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).context(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .ok_or("no MemAvailable")?;
    Ok(kib.parse::<u64>().context("MemAvailable")? / 1024)
}

fn report(samples: &[Sample], ms: u64) -> String {
    let mut table = Table::new(&[
        "nodes",
        "of them VMs",
        "links",
        "join, s/node",
        "connected after, s",
        "links/s",
        "attempts again",
        "agents' CPU, ms/link",
        "agents, MiB",
        "KiB/link",
        "descriptors",
        "CPU idle, %",
        "gone after, s",
    ]);
    for s in samples {
        let links = s.links.max(1) as f64;
        table.row(vec![
            s.nodes.to_string(),
            s.vms.to_string(),
            s.links.to_string(),
            format!("{:.2}", s.join),
            format!("{:.2}", s.full),
            format!("{:.0}", links / s.full),
            format!("{:.0}", s.again),
            format!("{:.2}", s.cpu * 1000.0 / links),
            format!("{:.0}", s.resident as f64 / MIB),
            format!("{:.1}", s.resident.saturating_sub(s.empty) as f64 / links),
            s.descriptors.to_string(),
            format!("{:.1}", s.idle * 100.0),
            format!("{:.2}", s.leave),
        ]);
    }
    let mut text = format!(
        "## A full mesh on four hosts of one machine\n\nEach node dials those behind it, eight at a time, all nodes at once, without \
         `global`. Memory, CPU and descriptors are of the four agents together; idle is a rest of {ms} ms with all links up.\n\n{}",
        table.markdown()
    );
    if let (Some(first), Some(last)) = (samples.first(), samples.last())
        && last.links > first.links
    {
        // 1 is in proportion to the links, 2 their square.
        let grows = |of: fn(&Sample) -> f64| {
            (of(last) / of(first)).ln() / (last.links as f64 / first.links as f64).ln()
        };
        let _ = writeln!(
            text,
            "\nFrom {} to {} links they grow by this power of the number of links: time {:.2}, CPU {:.2}, memory {:.2}, \
             descriptors {:.2}.",
            first.links,
            last.links,
            grows(|s| s.full),
            grows(|s| s.cpu),
            grows(|s| s.resident.saturating_sub(s.empty).max(1) as f64),
            grows(|s| s.descriptors as f64),
        );
    }
    text
}
