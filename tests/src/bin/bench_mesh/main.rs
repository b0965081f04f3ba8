//! `make bench-mesh`: distribution between two BEAM nodes through two agents, beside what else could carry it, in
//! interleaved rounds.
//!
//! Prints tables as Markdown and writes them with a plot into `target/bench`. What is held against a limit is a ratio
//! of two peers in the same round; see [`meshx_tests::bench`].

mod idle;
mod peers;
mod tables;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use meshx_tests::bench::{Way, bare_entrance, bare_exit, machine, relay, rounds, write_report};
use meshx_tests::{Context, Result};

use peers::{Kind, NEWEST_OTP, Pair, Peer, Stage};

/// Measures distribution over the mesh.
#[derive(Debug, Parser)]
struct Arguments {
    /// Interleaved rounds; fewer than nine decide nothing
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// How long each measurement lasts, in milliseconds
    #[arg(long, default_value_t = 1000)]
    ms: u64,
    /// Only these peers, on each OTP; native is always there
    #[arg(long, value_delimiter = ',')]
    peers: Vec<Kind>,
    /// Not over the long ways
    #[arg(long)]
    near: bool,
    /// How this program starts itself as a relay
    #[arg(long, hide = true)]
    relay: Option<SocketAddr>,
    #[arg(long, hide = true, requires = "relay")]
    bare_entrance: Option<PathBuf>,
    #[arg(long, hide = true)]
    bare_exit: Option<PathBuf>,
    #[arg(long, hide = true)]
    sealed: bool,
    #[arg(long, hide = true, default_value_t = 0)]
    delay_ms: u64,
    #[arg(long, hide = true, default_value_t = 0)]
    rate: u64,
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
    if let Some(address) = as_relay(arguments)? {
        println!("relay {address}");
        // As long as who started it has this open.
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).context("wait for the end")?;
        return Ok(());
    }
    let started = Instant::now();
    let mut facts = machine();
    let wanted = |peer: &Peer| {
        peer.kind == Kind::Native || arguments.peers.is_empty() || arguments.peers.contains(&peer.kind)
    };
    let mut peers = Peer::all();
    if peers.iter().all(|peer| peer.otp.is_none()) {
        facts.push(format!(
            "OTP {NEWEST_OTP}: not here, or Meshx not compiled for it, so not measured"
        ));
    }
    peers.retain(wanted);
    let stage = Stage::new(&peers, None)?;
    let mut pairs = Vec::new();
    for peer in &peers {
        eprintln!("starting {peer}");
        pairs.push(stage.start(*peer)?);
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
    for peer in &peers {
        // What stands between the nodes knows nothing of their OTP.
        idle.push(match peer.otp {
            None => idle::idle(&stage, peer.kind)?,
            Some(_) => None,
        });
    }
    drop(stage);
    let mut far = Vec::new();
    for way in WAYS.into_iter().filter(|_| !arguments.near) {
        far.push((way, over(way, &peers, arguments.rounds, ms)?));
    }
    let (text, svg) = tables::report(&tables::Measured {
        facts,
        rounds: arguments.rounds,
        ms,
        took: started.elapsed(),
        peers,
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
type Far = Vec<(Peer, Vec<FarSample>)>;

/// Where this is a relay, if it is to be one.
fn as_relay(arguments: &Arguments) -> Result<Option<SocketAddr>> {
    let way = Way {
        delay: Duration::from_millis(arguments.delay_ms),
        rate: arguments.rate,
    };
    Ok(
        match (arguments.relay, &arguments.bare_entrance, &arguments.bare_exit) {
            (Some(target), Some(socket), _) => {
                bare_entrance(socket, target, arguments.sealed)?;
                Some(target)
            }
            (Some(target), None, _) => Some(relay(way, target)?),
            (None, _, Some(dir)) => Some(bare_exit(dir.clone(), arguments.sealed)?),
            (None, _, None) => None,
        },
    )
}

fn over(way: Way, peers: &[Peer], count: usize, ms: u64) -> Result<Far> {
    let goes = |peer: &&Peer| peer.otp.is_none() && FAR.contains(&peer.kind);
    let peers: Vec<Peer> = peers.iter().filter(goes).copied().collect();
    let stage = Stage::new(&peers, Some(way))?;
    let mut pairs = Vec::new();
    for peer in &peers {
        eprintln!("starting {peer} over {:?} each way", way.delay);
        pairs.push(stage.start(*peer)?);
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
    Ok(peers.into_iter().zip(samples).collect())
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
