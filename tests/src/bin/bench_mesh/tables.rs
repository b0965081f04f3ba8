//! What was measured, as tables and a plot.

use std::fmt::Write as _;
use std::time::Duration;

use meshx_tests::bench::{Limit, Quartiles, Series, Table, bars, judge, median, ratios};

use crate::Sample;
use crate::peers::Kind;

const MIB: f64 = 1_048_576.0;
const GIB: f64 = MIB * 1024.0;

/// The figures: ours, theirs, rate at least and aim, median of the round trip at most.
const LIMITS: &[(Kind, Kind, f64, f64, f64)] = &[
    (Kind::Native, Kind::Tls, 4.0, 6.0, 1.0),
    (Kind::Native, Kind::TlsTuned, 1.3, 2.0, 1.0),
    (Kind::Native, Kind::Proxies, 2.0, 3.0, 0.8),
    (Kind::Native, Kind::Envoys, 1.2, 1.5, 1.0),
    (Kind::Carrier, Kind::Tcp, 0.95, 1.0, 1.1),
];

/// The text and the plot.
pub(crate) fn report(
    facts: &[String],
    rounds: usize,
    ms: u64,
    took: Duration,
    kinds: &[Kind],
    samples: &[Vec<Sample>],
) -> (String, String) {
    let mut text = format!(
        "# Distribution over the mesh\n\n{rounds} interleaved rounds, {ms} ms for each figure, {:.0} s in all. Ratios are \
         paired, shown as median (lower-upper quartile); a limit is met when its worse quartile keeps it.\n\n",
        took.as_secs_f64()
    );
    for fact in facts {
        let _ = writeln!(text, "- {fact}");
    }
    let column = |kind: Kind, field: fn(&Sample) -> f64| -> Option<Vec<f64>> {
        let at = kinds.iter().position(|known| *known == kind)?;
        Some(samples.get(at)?.iter().map(field).collect())
    };
    let ratio = |ours: Kind, theirs: Kind, field: fn(&Sample) -> f64| {
        Some(ratios(&column(ours, field)?, &column(theirs, field)?))
    };

    let mut all = Table::new(&[
        "one link",
        "MiB/s",
        "CPU s/GiB",
        "p50 us",
        "p99 us",
        "new links/s",
    ]);
    for kind in kinds {
        let show = |field: fn(&Sample) -> f64, unit: f64, digits: usize| {
            column(*kind, field).map_or_else(String::new, |v| format!("{:.digits$}", median(&v) / unit))
        };
        all.row(vec![
            kind.to_string(),
            show(bulk, MIB, 0),
            show(|s| s.cpu, 1.0 / GIB, 2),
            show(p50, 1.0, 0),
            show(|s| s.p99, 1.0, 0),
            show(|s| s.links, 1.0, 0),
        ]);
    }
    let mut held = Table::new(&[
        "",
        "MiB/s, ratio",
        "at least",
        "",
        "aim",
        "",
        "p50, ratio",
        "limit",
        "",
        "CPU per byte, ratio",
    ]);
    let (mut names, mut series) = (Vec::new(), [Vec::new(), Vec::new()]);
    for (ours, theirs, at_least, aim, trip) in LIMITS {
        let figures = (
            ratio(*ours, *theirs, bulk),
            ratio(*ours, *theirs, p50),
            ratio(*ours, *theirs, |s| s.cpu),
        );
        let (Some(rate), Some(times), Some(cpu)) = figures else {
            continue;
        };
        let mut cells = vec![format!("{ours} / {theirs}"), Quartiles::of(&rate).to_string()];
        for limit in [Limit::AtLeast(*at_least), Limit::AtLeast(*aim)] {
            cells.extend([limit.to_string(), judge(&rate, limit).to_string()]);
        }
        let limit = Limit::AtMost(*trip);
        cells.extend([
            Quartiles::of(&times).to_string(),
            limit.to_string(),
            judge(&times, limit).to_string(),
            Quartiles::of(&cpu).to_string(),
        ]);
        names.push(cells[0].clone());
        series[0].push(Some(Quartiles::of(&rate)));
        series[1].push(Some(Quartiles::of(&times)));
        held.row(cells);
    }
    let _ = write!(
        text,
        "\n## Figures\n\n{}\n## Held against the limits\n\n{}\n",
        all.markdown(),
        held.markdown()
    );
    let [rate, times] = series;
    let series = [
        Series {
            name: "MiB/s of messages of 1 MiB".into(),
            values: rate,
        },
        Series {
            name: "round trip of 64 B, median (less is better)".into(),
            values: times,
        },
    ];
    (text, bars("Distribution over the mesh: ratios", &names, &series))
}

fn bulk(sample: &Sample) -> f64 {
    sample.bulk
}

fn p50(sample: &Sample) -> f64 {
    sample.p50
}
