//! `make bench-mesh`: distribution between two BEAM nodes through two agents, beside what else could carry it, in
//! interleaved rounds.
//!
//! Prints tables as Markdown and writes them with a plot into `target/bench`. What is held against a limit is a ratio
//! of two peers in the same round; see [`meshx_tests::bench`].

mod idle;
mod peers;
mod tables;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use meshx_tests::Result;
use meshx_tests::bench::{Way, machine, rounds, write_report};

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
    /// Not over the long ways
    #[arg(long)]
    near: bool,
}

/// What one peer did in one round.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    /// Bytes per second of messages of 1 MiB.
    bulk: f64,
    /// CPU seconds per byte, of the VMs and all that stands between them.
    cpu: f64,
    /// The part of what stands between them.
    between: f64,
    /// Microseconds of 64 B there and back: median and 99th percentile.
    p50: f64,
    p99: f64,
    /// New links per second.
    links: f64,
}

/// Links that are made for one figure.
const LINKS: u32 = 10;

/// The long ways that are measured too, and who goes over them.
const WAYS: [Way; 2] = [
    Way {
        delay: Duration::from_millis(1),
        rate: 1_000_000_000,
    },
    Way {
        delay: Duration::from_millis(50),
        rate: 200_000_000,
    },
];
const FAR: [Kind; 3] = [Kind::Native, Kind::Tcp, Kind::TlsTuned];
/// A second of the slowest way is hardly more than what is under way at its start.
const FAR_MS: u64 = 4000;

/// What one peer did over a long way in one round.
#[derive(Debug, Clone, Copy)]
struct FarSample {
    /// Bytes of messages of 1 MiB, as a part of what the way carries.
    share: f64,
    /// Microseconds of 64 B there and back, median.
    p50: f64,
}

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
    let stage = Stage::new(&kinds, None)?;
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
    drop(pairs);
    let mut idle = Vec::new();
    for kind in &kinds {
        idle.push(idle::idle(&stage, *kind)?);
    }
    drop(stage);
    let mut far = Vec::new();
    for way in WAYS.into_iter().filter(|_| !arguments.near) {
        far.push((way, over(way, &kinds, arguments.rounds, ms)?));
    }
    let (text, svg) = tables::report(&tables::Measured {
        facts,
        rounds: arguments.rounds,
        ms,
        took: started.elapsed(),
        kinds,
        samples,
        idle,
        far,
    });
    println!("{text}");
    println!("written: {}", write_report("mesh.md", &text)?.display());
    println!("written: {}", write_report("mesh.svg", &svg)?.display());
    Ok(())
}

/// Who goes over a long way, and how.
type Far = Vec<(Kind, Vec<FarSample>)>;

fn over(way: Way, kinds: &[Kind], count: usize, ms: u64) -> Result<Far> {
    let kinds: Vec<Kind> = kinds.iter().copied().filter(|kind| FAR.contains(kind)).collect();
    let stage = Stage::new(&kinds, Some(way))?;
    let mut pairs = Vec::new();
    for kind in &kinds {
        eprintln!("starting {kind} over {:?} each way", way.delay);
        pairs.push(stage.start(*kind)?);
    }
    let samples = rounds(&mut pairs, count, "a long way", |pair| {
        pair.settle()?;
        let [bytes, micros] = pair.ask(&format!("bulk {FAR_MS}"))?;
        let [_, p50, _] = pair.ask(&format!("trip {ms}"))?;
        Ok(FarSample {
            share: bytes * 8e6 / micros / way.rate as f64,
            p50,
        })
    })?;
    Ok(kinds.into_iter().zip(samples).collect())
}

fn measure(pair: &mut Pair, ms: u64) -> Result<Sample> {
    pair.settle()?;
    let cpu = pair.cpu()?;
    let [bytes, micros] = pair.ask(&format!("bulk {ms}"))?;
    let [vms, between] = [cpu[0].seconds()?, cpu[1].seconds()?];
    let [_, p50, p99] = pair.ask(&format!("trip {ms}"))?;
    let [links, links_took] = pair.ask(&format!("links {LINKS}"))?;
    Ok(Sample {
        bulk: bytes * 1e6 / micros,
        cpu: (vms + between) / bytes,
        between: between / bytes,
        p50,
        p99,
        links: links * 1e6 / links_took,
    })
}
