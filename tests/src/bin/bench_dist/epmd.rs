//! The agent as EPMD beside OTP's: registrations and lookups, one after the other.

use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use meshx_tests::bench::{Quartiles, Table, free_port, median, ratios, rounds};
use meshx_tests::epmd::{Alive, names, port_please};
use meshx_tests::{Mesh, Process, Result, wait_until};

const SOON: Duration = Duration::from_secs(30);
/// Registered at a time.
const NAMES: usize = 100;

/// OTP's epmd, on a port of its own.
pub(crate) struct RealEpmd {
    port: u16,
    _process: Process,
}

impl RealEpmd {
    pub(crate) fn start() -> Result<Self> {
        let port = free_port()?;
        let words = [
            "-port".to_owned(),
            port.to_string(),
            "-address".into(),
            "127.0.0.1".into(),
        ];
        let process = Process::start("epmd", "epmd", words, |_| {})?;
        let answers = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
        wait_until(SOON, answers).map_err(|()| format!("epmd does not answer\n{}", process.log()))?;
        Ok(Self {
            port,
            _process: process,
        })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

/// The table.
pub(crate) fn measure(count: usize, ms: u64) -> Result<String> {
    eprintln!("EPMD");
    let real = RealEpmd::start()?;
    let mesh = Mesh::new()?;
    let options = ["--epmd=127.0.0.1:0", "--epmd-nodes", "*"];
    let agent = mesh.agent_with("a", "127.0.0.2", &["h1"], &options)?;
    let mut ports = [agent.epmd()?, real.port()];
    let samples = rounds(&mut ports, count, "EPMD", |port| once(*port, ms))?;
    let mut table = Table::new(&["a second", "the agent", "epmd", "ratio"]);
    for (what, at) in [("registrations", 0), ("lookups", 1)] {
        let [ours, theirs] =
            [0, 1].map(|who: usize| samples[who].iter().map(|s| s[at]).collect::<Vec<f64>>());
        table.row(vec![
            what.into(),
            format!("{:.0}", median(&ours)),
            format!("{:.0}", median(&theirs)),
            Quartiles::of(&ratios(&ours, &theirs)).to_string(),
        ]);
    }
    Ok(format!(
        "## EPMD\n\n{NAMES} nodes register one after the other, then one after the other is looked up for {ms} ms, each on a \
         connection of its own. The agent has each registration in the mesh before it answers. {count} interleaved rounds.\n\n{}",
        table.markdown()
    ))
}

/// Registrations and lookups of a second.
fn once(port: u16, ms: u64) -> Result<[f64; 2]> {
    let began = Instant::now();
    let alive = (0..NAMES)
        .map(|number| Alive::register(port, &format!("bench{number}")))
        .collect::<Result<Vec<_>>>()?;
    let registered = NAMES as f64 / began.elapsed().as_secs_f64();
    let (began, mut lookups) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_millis(ms) {
        let name = format!("bench{}", lookups % NAMES);
        if port_please(IpAddr::V4(Ipv4Addr::LOCALHOST), port, &name)?.is_none() {
            return Err(format!("{name} is not there"));
        }
        lookups += 1;
    }
    let looked_up = lookups as f64 / began.elapsed().as_secs_f64();
    drop(alive);
    wait_until(SOON, || names(port).is_ok_and(|names| names.is_empty())).map_err(|()| "names stayed")?;
    Ok([registered, looked_up])
}
