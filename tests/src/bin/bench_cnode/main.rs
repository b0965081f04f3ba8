//! `make bench-cnode`: our node and terms beside libei, `eetf` and BEAMs, in interleaved rounds.
//!
//! Prints a table as Markdown and writes it with a plot into `target/bench`. What is held against a limit is a ratio of
//! two peers in the same round; see [`meshx_tests::bench`]. All nodes are on plain TCP with an EPMD of their own: the
//! mesh's part is what `make bench-rpc` measures.

mod node;
mod peers;
mod report;
mod terms;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use meshx_tests::Result;
use meshx_tests::bench::{Limit, machine, ratios, write_report};

use peers::{Stage, Took, Who};
use report::Line;

/// Measures the C node against libei, eetf and BEAMs.
#[derive(Debug, Parser)]
struct Arguments {
    /// Interleaved rounds; fewer than nine decide nothing
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Messages and calls of one round, in percent of the usual number
    #[arg(long, default_value_t = 100)]
    percent: u32,
    /// Leave the terms out
    #[arg(long)]
    no_terms: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let done = match arguments.get(1).map(String::as_str) {
        Some("peer") => node::run(&arguments[2..]),
        _ => run(&Arguments::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-cnode: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let (started, facts) = (Instant::now(), machine());
    let mut lines = Vec::new();
    if !arguments.no_terms {
        eprintln!("terms");
        lines.extend(terms::rows(arguments.rounds).into_iter().map(|row| {
            Line {
                name: row.name.to_owned(),
                against: row.against,
                unit: "ms",
                ratio: ratios(&row.theirs, &row.ours),
                limits: row
                    .wanted
                    .map(|(least, aim)| (Limit::AtLeast(least), Limit::AtLeast(aim))),
                ours: row.ours.iter().map(|seconds| seconds * 1e3).collect(),
                theirs: row.theirs.iter().map(|seconds| seconds * 1e3).collect(),
            }
        }));
    }
    let mut stage = Stage::new()?;
    lines.extend(messages(&mut stage, arguments)?);
    let memory = [("monitors", 1_000), ("mailboxes", 10_000)]
        .map(|(what, count)| stage.grow(what, count).map(|bytes| (what, count, bytes)));
    let memory = memory.into_iter().collect::<Result<Vec<_>>>()?;
    let (text, plot) = report::report(&facts, arguments.rounds, started.elapsed(), &lines, &memory);
    println!("{text}");
    for (name, content) in [("cnode.md", &text), ("cnode.svg", &plot)] {
        println!("written: {}", write_report(name, content)?.display());
    }
    Ok(())
}

/// One kind of measurement, and the limits of its figures.
struct Row {
    name: &'static str,
    who: &'static [Who],
    count: u32,
    run: fn(&mut Stage, Who, u32) -> Result<Took>,
    /// Ratios of messages per second, then of CPU per message, against libei or, for calls, of time against BEAM.
    rate: Option<(Limit, Limit)>,
    cpu: Option<(Limit, Limit)>,
}

const ROWS: [Row; 4] = [
    Row {
        name: "to a BEAM, 64 B",
        who: &[Who::Ours, Who::Ei, Who::Beam, Who::Socket],
        count: 200_000,
        run: |stage, who, count| stage.send(who, count, 64),
        rate: Some((Limit::AtLeast(1.3), Limit::AtLeast(1.7))),
        cpu: Some((Limit::AtMost(0.2), Limit::AtMost(0.05))),
    },
    Row {
        name: "to a BEAM, 16 KiB",
        who: &[Who::Ours, Who::Ei, Who::Beam],
        count: 10_000,
        run: |stage, who, count| stage.send(who, count, 16_384),
        rate: None,
        cpu: None,
    },
    Row {
        name: "from a BEAM, 64 B",
        who: &[Who::Ours, Who::Ei],
        // No more than a mailbox holds: the BEAM may be faster for a while.
        count: 90_000,
        run: |stage, who, count| stage.blast(who, count, 64),
        rate: None,
        cpu: None,
    },
    Row {
        name: "from a BEAM, 16 KiB",
        who: &[Who::Ours, Who::Ei, Who::Beam, Who::Socket],
        count: 10_000,
        run: |stage, who, count| stage.blast(who, count, 16_384),
        rate: Some((Limit::AtLeast(1.0), Limit::AtLeast(1.3))),
        cpu: Some((Limit::AtMost(0.6), Limit::AtMost(0.5))),
    },
];
const CALLS: u32 = 5_000;

fn messages(stage: &mut Stage, arguments: &Arguments) -> Result<Vec<Line>> {
    let scaled = |count: u32| (u64::from(count) * u64::from(arguments.percent) / 100).max(1) as u32;
    let mut lines = Vec::new();
    for row in &ROWS {
        eprintln!("{}", row.name);
        let count = scaled(row.count);
        let took = rounds(stage, arguments.rounds, row.who, |stage, who| {
            (row.run)(stage, who, count)
        })?;
        let rate = |took: &Took| f64::from(count) / took.seconds;
        let cpu = |took: &Took| took.cpu / f64::from(count) * 1e6;
        for (at, who) in row.who.iter().enumerate().skip(1) {
            let limited = *who == Who::Ei;
            // What no program can do better says how near the limit is: so it stands where ours does, against libei.
            let (ours, theirs, suffix) = match who {
                Who::Socket => (at, 1, ", of a bare socket"),
                _ => (0, at, ""),
            };
            lines.push(Line::new(
                format!("messages/s {}{suffix}", row.name),
                name(row.who[theirs]),
                "k/s",
                figures(&took[ours], rate, 1e-3),
                figures(&took[theirs], rate, 1e-3),
                row.rate.filter(|_| limited),
            ));
            if limited || *who == Who::Socket {
                lines.push(Line::new(
                    format!("CPU per message {}{suffix}", row.name),
                    name(row.who[theirs]),
                    "us",
                    figures(&took[ours], cpu, 1.0),
                    figures(&took[theirs], cpu, 1.0),
                    row.cpu.filter(|_| limited),
                ));
            }
        }
    }
    eprintln!("calls");
    let count = scaled(CALLS);
    let took = rounds(stage, arguments.rounds, &[Who::Ours, Who::Beam], |stage, who| {
        stage.calls(who, count)
    })?;
    let trip = |took: &Took| took.seconds / f64::from(count) * 1e6;
    lines.push(Line::new(
        "GenServer.call round trip from a BEAM".into(),
        name(Who::Beam),
        "us",
        figures(&took[0], trip, 1.0),
        figures(&took[1], trip, 1.0),
        Some((Limit::AtMost(1.3), Limit::AtMost(1.0))),
    ));
    Ok(lines)
}

fn name(who: Who) -> &'static str {
    match who {
        Who::Ours => "ours",
        Who::Ei => "libei",
        Who::Beam => "BEAM",
        Who::Socket => "a bare socket",
    }
}

fn figures(took: &[Took], figure: impl Fn(&Took) -> f64, factor: f64) -> Vec<f64> {
    took.iter().map(|took| figure(took) * factor).collect()
}

/// Peer by peer, what it took in all rounds. One round more than asked for warms up; each begins with another peer.
fn rounds(
    stage: &mut Stage,
    rounds: usize,
    who: &[Who],
    mut each: impl FnMut(&mut Stage, Who) -> Result<Took>,
) -> Result<Vec<Vec<Took>>> {
    let mut all = vec![Vec::new(); who.len()];
    for round in 0..=rounds {
        for turn in 0..who.len() {
            let at = (turn + round) % who.len();
            let took = each(stage, who[at])?;
            if round > 0 {
                all[at].push(took);
            }
        }
    }
    Ok(all)
}
