//! What was measured, as tables and a plot.

use std::fmt::Write as _;
use std::time::Duration;

use meshx_tests::bench::{Limit, Quartiles, Series, Table, bars, judge, median, ratios};

use crate::measure::{CPU_ROW, MEMORY_ROW, MIXED, Row, Sample};
use crate::peers::Kind;

const MIB: f64 = 1_048_576.0;

/// Row by row, peer by peer, round by round.
type Rows = [Vec<Vec<Sample>>];

/// The text and the plot.
#[allow(clippy::too_many_arguments, reason = "all that was measured")]
pub(crate) fn report(
    facts: &[String],
    rounds: usize,
    ms: u64,
    took: Duration,
    kinds: &[Kind],
    rows: &[&Row],
    samples: &Rows,
    mixed: &[Vec<Sample>],
) -> (String, String) {
    let mut text = format!(
        "# MeshxRpc beside :erpc\n\n{rounds} interleaved rounds of {ms} ms each, {:.0} s in all. Ratios are paired, shown as \
         median (lower-upper quartile); a limit is met when its worse quartile keeps it.\n\n",
        took.as_secs_f64()
    );
    for fact in facts {
        let _ = writeln!(text, "- {fact}");
    }
    let view = View {
        kinds,
        rows,
        samples,
        mixed,
    };
    for table in [
        view.speed(),
        view.limits(),
        view.variants(),
        view.mesh(),
        view.mixed(),
    ] {
        text.push_str(&table);
    }
    (text, view.plot())
}

struct View<'a> {
    kinds: &'a [Kind],
    rows: &'a [&'a Row],
    samples: &'a Rows,
    mixed: &'a [Vec<Sample>],
}

impl View<'_> {
    fn column<'a>(&self, peers: &'a [Vec<Sample>], kind: Kind) -> Option<&'a [Sample]> {
        let at = self.kinds.iter().position(|k| *k == kind)?;
        peers.get(at).map(Vec::as_slice)
    }

    /// Paired ratios of a field of two peers.
    fn ratio(
        &self,
        peers: &[Vec<Sample>],
        ours: Kind,
        theirs: Kind,
        field: fn(&Sample) -> f64,
    ) -> Option<Vec<f64>> {
        Some(ratios(
            &values(self.column(peers, ours)?, field),
            &values(self.column(peers, theirs)?, field),
        ))
    }

    /// Calls per second, MeshxRpc's against the figures, and what sockets of the VM's are good for.
    fn speed(&self) -> String {
        let mut table = Table::new(&[
            "calls/s",
            "erpc",
            "MeshxRpc",
            "ratio",
            "at least",
            "",
            "aim",
            "",
            "bare sockets",
            "to erpc",
        ]);
        for (row, peers) in self.rows.iter().zip(self.samples) {
            let Some(ratio) = self.ratio(peers, Kind::Rpc, Kind::Erpc, rate) else {
                continue;
            };
            let mut cells = vec![row.name.to_owned()];
            cells.extend([Kind::Erpc, Kind::Rpc].map(|kind| self.rate(peers, kind)));
            cells.push(Quartiles::of(&ratio).to_string());
            for limit in [Limit::AtLeast(row.at_least), Limit::AtLeast(row.aim)] {
                cells.extend([limit.to_string(), judge(&ratio, limit).to_string()]);
            }
            cells.push(self.rate(peers, Kind::Socket));
            cells.push(shown(self.ratio(peers, Kind::Socket, Kind::Erpc, rate)));
            table.row(cells);
        }
        section("Speed", &table)
    }

    /// CPU and memory: no more than erpc's.
    fn limits(&self) -> String {
        let mut table = Table::new(&[
            "",
            "CPU us/call: erpc",
            "MeshxRpc",
            "ratio",
            "MiB, both VMs: erpc",
            "MeshxRpc",
            "ratio",
            "limit",
            "",
            "longest NIF call, us",
        ]);
        for (row, peers) in self.rows.iter().zip(self.samples) {
            let (Some(cpu_ratio), Some(memory_ratio)) = (
                self.ratio(peers, Kind::Rpc, Kind::Erpc, cpu),
                self.ratio(peers, Kind::Rpc, Kind::Erpc, memory),
            ) else {
                continue;
            };
            let show = |kind, field: fn(&Sample) -> f64, unit: f64| {
                self.column(peers, kind).map_or_else(String::new, |s| {
                    format!("{:.1}", median(&values(s, field)) / unit)
                })
            };
            let limit = Limit::AtMost(1.0);
            let (wanted, verdict) = match row.name {
                CPU_ROW => (format!("CPU {limit}"), judge(&cpu_ratio, limit).to_string()),
                MEMORY_ROW => (format!("memory {limit}"), judge(&memory_ratio, limit).to_string()),
                _ => (String::new(), String::new()),
            };
            table.row(vec![
                row.name.to_owned(),
                show(Kind::Erpc, cpu, 1.0),
                show(Kind::Rpc, cpu, 1.0),
                Quartiles::of(&cpu_ratio).to_string(),
                show(Kind::Erpc, memory, MIB),
                show(Kind::Rpc, memory, MIB),
                Quartiles::of(&memory_ratio).to_string(),
                wanted,
                verdict,
                self.column(peers, Kind::Rpc).map_or_else(String::new, |samples| {
                    format!(
                        "{:.0}",
                        values(samples, |s| s.slice).into_iter().fold(0.0, f64::max)
                    )
                }),
            ]);
        }
        section("CPU and peak memory", &table)
    }

    /// With checksums, and without the NIF.
    fn variants(&self) -> String {
        let limit = Limit::AtLeast(0.9);
        let mut table = Table::new(&[
            "to MeshxRpc without",
            "crc32",
            &limit.to_string(),
            "NIF off",
            "NIF off to erpc",
        ]);
        for (row, peers) in self.rows.iter().zip(self.samples) {
            let crc32 = self.ratio(peers, Kind::Crc32, Kind::Rpc, rate);
            let off = self.ratio(peers, Kind::Elixir, Kind::Rpc, rate);
            let beside = self.ratio(peers, Kind::Elixir, Kind::Erpc, rate);
            if crc32.is_none() && off.is_none() {
                continue;
            }
            let verdict = crc32
                .as_deref()
                .map_or_else(String::new, |r| judge(r, limit).to_string());
            table.row(vec![
                row.name.to_owned(),
                shown(crc32),
                verdict,
                shown(off),
                shown(beside),
            ]);
        }
        section("Checksums, and the codec in Elixir", &table)
    }

    /// Over the mesh.
    fn mesh(&self) -> String {
        let mut table = Table::new(&[
            "calls/s",
            "erpc, inet_tls",
            "256 KiB buffers",
            "MeshxRpc, agents",
            "to inet_tls",
            "to 256 KiB",
            "CPU to 256 KiB",
        ]);
        for (row, peers) in self.rows.iter().zip(self.samples) {
            if self.column(peers, Kind::Mesh).is_none() {
                continue;
            }
            let mut cells = vec![row.name.to_owned()];
            cells.extend([Kind::Tls, Kind::TlsTuned, Kind::Mesh].map(|kind| self.rate(peers, kind)));
            cells.push(shown(self.ratio(peers, Kind::Mesh, Kind::Tls, rate)));
            cells.push(shown(self.ratio(peers, Kind::Mesh, Kind::TlsTuned, rate)));
            cells.push(shown(self.ratio(peers, Kind::Mesh, Kind::TlsTuned, cpu)));
            table.row(cells);
        }
        section("Over the mesh, TLS 1.3", &table)
    }

    /// Small calls beside large ones.
    fn mixed(&self) -> String {
        if self.mixed.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&[
            "peer",
            "small p50 us",
            "small p99 us",
            "p99 to erpc's",
            "bulk MB/s",
            "bulk to alone",
        ]);
        for (kind, samples) in self.kinds.iter().zip(self.mixed) {
            let bulk = ratios(&values(samples, rate), &values(samples, |s| s.alone));
            let p99 = self.ratio(self.mixed, *kind, Kind::Erpc, |s| s.p99);
            table.row(vec![
                kind.to_string(),
                format!("{:.0}", median(&values(samples, |s| s.p50))),
                format!("{:.0}", median(&values(samples, |s| s.p99))),
                shown(p99),
                format!("{:.0}", median(&values(samples, rate)) * 16.0 * MIB / 1e6),
                Quartiles::of(&bulk).to_string(),
            ]);
        }
        let mut text = section(MIXED, &table);
        if let (Some(p99), Some(samples)) = (
            self.ratio(self.mixed, Kind::Rpc, Kind::Erpc, |s| s.p99),
            self.column(self.mixed, Kind::Rpc),
        ) {
            let bulk = ratios(&values(samples, rate), &values(samples, |s| s.alone));
            for (what, ratios, limit) in [
                ("p99 of small calls to erpc's", &p99, Limit::AtMost(0.5)),
                ("the same, aim", &p99, Limit::AtMost(0.25)),
                ("bulk to its rate alone", &bulk, Limit::AtLeast(0.85)),
            ] {
                let _ = writeln!(text, "- {what}, {limit}: {}", judge(ratios, limit));
            }
        }
        text
    }

    fn rate(&self, peers: &[Vec<Sample>], kind: Kind) -> String {
        self.column(peers, kind)
            .map_or_else(String::new, |samples| number(median(&values(samples, rate))))
    }

    fn plot(&self) -> String {
        let series: Vec<Series> = self
            .kinds
            .iter()
            .filter(|kind| **kind != Kind::Erpc)
            .map(|kind| Series {
                name: kind.to_string(),
                values: self
                    .samples
                    .iter()
                    .map(|peers| Some(Quartiles::of(&self.ratio(peers, *kind, Kind::Erpc, rate)?)))
                    .collect(),
            })
            .collect();
        let names: Vec<String> = self.rows.iter().map(|row| row.name.to_owned()).collect();
        bars(
            "Calls per second, ratio to :erpc over inet_tcp_dist",
            &names,
            &series,
        )
    }
}

fn rate(sample: &Sample) -> f64 {
    sample.rate
}

fn cpu(sample: &Sample) -> f64 {
    sample.cpu
}

fn memory(sample: &Sample) -> f64 {
    sample.memory
}

fn values(samples: &[Sample], field: impl Fn(&Sample) -> f64) -> Vec<f64> {
    samples.iter().map(field).collect()
}

fn shown(ratios: Option<Vec<f64>>) -> String {
    ratios.map_or_else(String::new, |ratios| Quartiles::of(&ratios).to_string())
}

fn number(value: f64) -> String {
    if value < 1000.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

fn section(title: &str, table: &Table) -> String {
    format!("\n## {title}\n\n{}", table.markdown())
}
