//! `make bench-dist`: what many nodes in one mesh cost, what a boot takes with the carrier, and how fast the agent is EPMD.
//!
//! Prints tables as Markdown and writes them into `target/bench`. Boots and EPMD are measured in interleaved rounds beside
//! OTP's own; see [`meshx_tests::bench`].

mod boot;
mod crowd;
mod epmd;
mod peers;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;
use meshx_tests::bench::{machine, write_report};
use meshx_tests::{Context, Result, repository};

/// Measures many nodes, boots and EPMD.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many nodes are in the mesh, one after the other
    #[arg(long, value_delimiter = ',', default_value = "25,50,100,200")]
    nodes: Vec<usize>,
    /// So many of them are VMs at most [default: as many as the free memory holds]; the others are C-nodes
    #[arg(long)]
    vms: Option<usize>,
    /// Interleaved rounds of boots and EPMD; fewer than nine decide nothing
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// How long nothing is done, and lookups are, in milliseconds
    #[arg(long, default_value_t = 2000)]
    ms: u64,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.split_first() {
        Some((first, rest)) if first == peers::WORD => peers::run(rest),
        _ => run(&Arguments::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-dist: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let facts = machine();
    let dir = tempfile::Builder::new()
        .prefix("mxd")
        .tempdir()
        .context("make a temporary directory")?;
    compile(dir.path())?;
    let crowd = crowd::measure(&arguments.nodes, arguments.vms, arguments.ms, dir.path())?;
    let boot = boot::measure(arguments.rounds, dir.path())?;
    let epmd = epmd::measure(arguments.rounds, arguments.ms)?;
    let mut text = format!(
        "# Many nodes in one mesh\n\n{:.0} s in all.\n\n",
        started.elapsed().as_secs_f64()
    );
    for fact in facts {
        let _ = writeln!(text, "- {fact}");
    }
    for part in [crowd, boot, epmd] {
        let _ = write!(text, "\n{part}");
    }
    println!("{text}");
    println!("written: {}", write_report("dist.md", &text)?.display());
    Ok(())
}

/// The module of the VMs, into `dir`.
fn compile(dir: &Path) -> Result<()> {
    let source: PathBuf = repository().join("tests/bench/bench_dist.erl");
    let compiled = Command::new("erlc")
        .arg("-o")
        .arg(dir)
        .arg(&source)
        .status()
        .context("run erlc")?;
    match compiled.success() {
        true => Ok(()),
        false => Err(format!("erlc {}: {compiled}", source.display())),
    }
}
