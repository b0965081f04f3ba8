//! `make bench-rpc`: MeshxRpc beside `:erpc`, over plain TCP and over the mesh, in interleaved rounds.
//!
//! Prints tables as Markdown and writes them with a plot into `target/bench`. What is held against a limit is a ratio
//! of two peers in the same round; see [`meshx_tests::bench`].

mod measure;
mod peers;
mod tables;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use meshx_tests::Result;
use meshx_tests::bench::{machine, rounds, write_report};

use measure::{MIXED, ROWS};
use peers::{Kind, Stage};

/// Measures MeshxRpc against :erpc.
#[derive(Debug, Parser)]
struct Arguments {
    /// Interleaved rounds; fewer than nine decide nothing
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// How long each measurement lasts, in milliseconds
    #[arg(long, default_value_t = 600)]
    ms: u64,
    /// Only rows whose name holds this text
    #[arg(long)]
    row: Option<String>,
    /// Only these peers; erpc is always there
    #[arg(long, value_delimiter = ',')]
    peers: Vec<Kind>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-rpc: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let facts = machine();
    let stage = Stage::new()?;
    let mut pairs = Vec::new();
    for kind in Kind::ALL {
        if *kind == Kind::Erpc || arguments.peers.is_empty() || arguments.peers.contains(kind) {
            eprintln!("starting {kind}");
            pairs.push(stage.start(*kind)?);
        }
    }
    let wanted = |name: &str| {
        arguments
            .row
            .as_ref()
            .is_none_or(|text| name.contains(text.as_str()))
    };
    let rows: Vec<_> = ROWS.iter().filter(|row| wanted(row.name)).collect();
    let ms = arguments.ms;

    let mut samples = Vec::new();
    for row in &rows {
        pairs
            .iter_mut()
            .try_for_each(|pair| measure::row(pair, row, ms / 4).map(drop))?;
        samples.push(rounds(&mut pairs, arguments.rounds, row.name, |pair| {
            measure::row(pair, row, ms)
        })?);
    }
    let mixed = if wanted(MIXED) {
        pairs
            .iter_mut()
            .try_for_each(|pair| measure::mixed(pair, ms / 4).map(drop))?;
        rounds(&mut pairs, arguments.rounds, MIXED, |pair| {
            measure::mixed(pair, ms * 2)
        })?
    } else {
        Vec::new()
    };

    let kinds: Vec<Kind> = pairs.iter().map(|pair| pair.kind).collect();
    let took = started.elapsed();
    let (text, svg) = tables::report(
        &facts,
        arguments.rounds,
        ms,
        took,
        &kinds,
        &rows,
        &samples,
        &mixed,
    );
    println!("{text}");
    println!("written: {}", write_report("rpc.md", &text)?.display());
    println!("written: {}", write_report("rpc.svg", &svg)?.display());
    Ok(())
}
