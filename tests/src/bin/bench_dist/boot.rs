//! What a VM takes from its start until it is a node, and to its end, by different carriers.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use meshx_tests::bench::{Quartiles, Table, median, ratios, rounds};
use meshx_tests::{Agent, Context, Mesh, Result, ebin, program};

use crate::epmd::RealEpmd;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No distribution.
    Nameless,
    /// inet_tcp_dist with OTP's epmd.
    Tcp,
    /// `-proto_dist meshx -no_epmd`.
    Carrier,
    /// The same by `meshx run`.
    Run,
}

const KINDS: [Kind; 4] = [Kind::Nameless, Kind::Tcp, Kind::Carrier, Kind::Run];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nameless => "no distribution",
            Self::Tcp => "inet_tcp_dist, epmd",
            Self::Carrier => "-proto_dist meshx",
            Self::Run => "meshx run",
        })
    }
}

struct Peer<'a> {
    kind: Kind,
    dir: &'a Path,
    agent: &'a Agent,
    epmd: &'a RealEpmd,
    boots: usize,
}

/// The table.
pub(crate) fn measure(count: usize, dir: &Path) -> Result<String> {
    eprintln!("boots");
    let mesh = Mesh::new()?;
    let agent = mesh.agent("a", "127.0.0.2", &["h1"])?;
    let epmd = RealEpmd::start()?;
    let mut peers = KINDS.map(|kind| Peer {
        kind,
        dir,
        agent: &agent,
        epmd: &epmd,
        boots: 0,
    });
    // Once, for what the system reads from its disk.
    peers.iter_mut().try_for_each(|peer| peer.boot().map(drop))?;
    let samples = rounds(&mut peers, count, "boots", Peer::boot)?;
    let mut table = Table::new(&["from start to end", "ms", "by inet_tcp_dist's"]);
    for (kind, times) in KINDS.iter().zip(&samples) {
        table.row(vec![
            kind.to_string(),
            format!("{:.0}", median(times) * 1000.0),
            Quartiles::of(&ratios(times, &samples[1])).to_string(),
        ]);
    }
    Ok(format!(
        "## Boot\n\nA VM that ends as soon as it is a node. {count} interleaved rounds; ratios are paired, shown as median \
         (lower-upper quartile).\n\n{}",
        table.markdown()
    ))
}

impl Peer<'_> {
    /// Seconds.
    fn boot(&mut self) -> Result<f64> {
        self.boots += 1;
        let host = if self.kind == Kind::Tcp { "127.0.0.1" } else { "h1" };
        let node = format!("boot{}-{}@{host}", self.kind as u8, self.boots);
        let ebin = ebin().display().to_string();
        let (mut words, expected) = match self.kind {
            Kind::Nameless => (vec!["erl"], "nonode@nohost"),
            Kind::Tcp => (
                vec![
                    "erl",
                    "-name",
                    &node,
                    "-setcookie",
                    "bench",
                    "-start_epmd",
                    "false",
                ],
                node.as_str(),
            ),
            Kind::Carrier => (
                vec![
                    "erl",
                    "-pa",
                    &ebin,
                    "-proto_dist",
                    "meshx",
                    "-no_epmd",
                    "-name",
                    &node,
                    "-setcookie",
                    "bench",
                ],
                node.as_str(),
            ),
            Kind::Run => (
                vec![
                    "meshx", "run", &node, "--cookie", "bench", "--ebin", &ebin, "--", "erl",
                ],
                node.as_str(),
            ),
        };
        let dir = self.dir.display().to_string();
        words.extend(["-noshell", "-pa", &dir, "-s", "bench_dist", "boot"]);
        let first = match words[0] {
            "meshx" => program("meshx")?,
            other => other.into(),
        };
        let began = Instant::now();
        let output = Command::new(first)
            .args(&words[1..])
            .env("MESHX_DIR", self.agent.dir())
            .env("ERL_EPMD_PORT", self.epmd.port().to_string())
            .stdin(Stdio::null())
            .output()
            .context("start a VM")?;
        let took = began.elapsed().as_secs_f64();
        let (text, log) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        if text.lines().any(|line| line == format!("up {expected}")) {
            Ok(took)
        } else {
            Err(format!("{}: {}: {text}{log}", self.kind, output.status))
        }
    }
}
