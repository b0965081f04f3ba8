//! `make bench-mesh`: distribution between two BEAM nodes through two agents, beside what else could carry it, in
//! interleaved rounds.
//!
//! Prints tables as Markdown and writes them with a plot into `target/bench`. What is held against a limit is a ratio
//! of two peers in the same round; see [`meshx_tests::bench`].

mod peers;
mod tables;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use meshx_tests::Result;
use meshx_tests::bench::{machine, rounds, write_report};

use peers::{Kind, Pair, Stage};

/// Measures distribution over the mesh.
#[derive(Debug, Parser)]
struct Arguments {
    /// Interleaved rounds; fewer than nine decide nothing
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// How long each measurement lasts, in milliseconds
    #[arg(long, default_value_t = 1000)]
    ms: u64,
    /// Only these peers; native is always there
    #[arg(long, value_delimiter = ',')]
    peers: Vec<Kind>,
}

/// What one peer did in one round.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    /// Bytes per second of messages of 1 MiB.
    bulk: f64,
    /// CPU seconds per byte, of the VMs and all that stands between them.
    cpu: f64,
    /// Microseconds of 64 B there and back: median and 99th percentile.
    p50: f64,
    p99: f64,
    /// New links per second.
    links: f64,
}

/// Links that are made for one figure.
const LINKS: u32 = 10;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-mesh: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let facts = machine();
    let wanted =
        |kind: &Kind| *kind == Kind::Native || arguments.peers.is_empty() || arguments.peers.contains(kind);
    let kinds: Vec<Kind> = Kind::ALL.iter().copied().filter(wanted).collect();
    let stage = Stage::new(&kinds)?;
    let mut pairs = Vec::new();
    for kind in &kinds {
        eprintln!("starting {kind}");
        pairs.push(stage.start(*kind)?);
    }
    let ms = arguments.ms;
    pairs
        .iter_mut()
        .try_for_each(|pair| measure(pair, ms / 4 + 1).map(drop))?;
    let samples = rounds(&mut pairs, arguments.rounds, "distribution", |pair| {
        measure(pair, ms)
    })?;
    let (text, svg) = tables::report(&facts, arguments.rounds, ms, started.elapsed(), &kinds, &samples);
    println!("{text}");
    println!("written: {}", write_report("mesh.md", &text)?.display());
    println!("written: {}", write_report("mesh.svg", &svg)?.display());
    Ok(())
}

fn measure(pair: &mut Pair, ms: u64) -> Result<Sample> {
    pair.settle()?;
    let cpu = pair.cpu()?;
    let [bytes, micros] = pair.ask(&format!("bulk {ms}"))?;
    let cpu = cpu.seconds()?;
    let [_, p50, p99] = pair.ask(&format!("trip {ms}"))?;
    let [links, links_took] = pair.ask(&format!("links {LINKS}"))?;
    Ok(Sample {
        bulk: bytes * 1e6 / micros,
        cpu: cpu / bytes,
        p50,
        p99,
        links: links * 1e6 / links_took,
    })
}
