//! One measurement: what a peer did, and what it used.

use meshx_tests::Result;
use meshx_tests::bench::{peak_memory, reset_peak_memory};

use crate::peers::Pair;

/// A row of the speed table: payload, callers, and the ratios to erpc's calls per second that are wanted.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    payload: &'static str,
    callers: u32,
    pub(crate) at_least: f64,
    pub(crate) aim: f64,
}

const fn wanted(name: &'static str, payload: &'static str, callers: u32, at_least: f64, aim: f64) -> Row {
    Row {
        name,
        payload,
        callers,
        at_least,
        aim,
    }
}

pub(crate) const ROWS: &[Row] = &[
    wanted("64 B x 1", "64", 1, 0.95, 1.0),
    wanted("64 B x 16", "64", 16, 1.4, 2.0),
    wanted("64 B x 128", "64", 128, 2.5, 4.0),
    wanted("16 KiB x 16", "16384", 16, 1.4, 2.0),
    wanted("1 MiB x 1", "1048576", 1, 1.4, 1.5),
    wanted("1 MiB x 16", "1048576", 16, 1.5, 2.0),
    wanted("16 MiB x 16", "16777216", 16, 2.0, 3.0),
    wanted("{:ok, %{id, body: 1 KiB}} x 16", "reply", 16, 1.2, 1.5),
    wanted("10k small maps x 1", "maps:10000", 1, 0.9, 1.0),
];

/// The row whose CPU per call has a limit.
pub(crate) const CPU_ROW: &str = "64 B x 128";
/// The row whose peak memory has a limit.
pub(crate) const MEMORY_ROW: &str = "16 MiB x 16";
/// Small calls beside large ones.
pub(crate) const MIXED: &str = "mixed: 64 B beside 16 MiB";
const BULK: &str = "16777216";

/// What one peer did in one round.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sample {
    /// Calls per second; in the mixed row, of the large ones beside small ones.
    pub(crate) rate: f64,
    /// CPU microseconds per call, client, server and relays together.
    pub(crate) cpu: f64,
    /// Peak resident bytes of both VMs together.
    pub(crate) memory: f64,
    /// The longest call of the NIF, in microseconds.
    pub(crate) slice: f64,
    /// Microseconds of a small call: median and 99th percentile. Mixed row only.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Large calls per second without small ones. Mixed row only.
    pub(crate) alone: f64,
}

/// Measures a row for `ms` milliseconds.
pub(crate) fn row(pair: &mut Pair, row: &Row, ms: u64) -> Result<Sample> {
    pair.settle()?;
    for pid in pair.pids() {
        reset_peak_memory(pid)?;
    }
    pair.slice()?;
    let cpu = pair.cpu()?;
    let answer = pair.ask(&format!("run {} {} {ms}", row.payload, row.callers))?;
    let cpu = cpu.seconds()?;
    let &[calls, micros] = &answer[..] else {
        return Err(format!(
            "{}: seen {answer:?}, wanted calls and microseconds",
            row.name
        ));
    };
    let memory = pair
        .pids()
        .iter()
        .map(|pid| peak_memory(*pid))
        .sum::<Result<u64>>()?;
    Ok(Sample {
        rate: calls * 1e6 / micros,
        cpu: cpu * 1e6 / calls,
        memory: memory as f64,
        slice: pair.slice()?,
        ..Sample::default()
    })
}

/// Measures small calls beside large ones, and large ones alone, for `ms` milliseconds each.
pub(crate) fn mixed(pair: &mut Pair, ms: u64) -> Result<Sample> {
    pair.settle()?;
    let alone = pair.ask(&format!("run {BULK} 1 {ms}"))?;
    pair.settle()?;
    let both = pair.ask(&format!("mixed {BULK} {ms}"))?;
    let (&[calls, micros], &[p50, p99, bulk, took]) = (&alone[..], &both[..]) else {
        return Err(format!("{MIXED}: seen {alone:?} and {both:?}"));
    };
    Ok(Sample {
        rate: bulk * 1e6 / took,
        p50,
        p99,
        alone: calls * 1e6 / micros,
        ..Sample::default()
    })
}
