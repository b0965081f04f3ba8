//! What was measured, as tables and a plot.

use std::fmt::Write as _;
use std::time::Duration;

use meshx_tests::bench::{Limit, Quartiles, Series, Table, Way, bars, judge, median, ratios};

use crate::peers::{Kind, NEWEST_OTP, Peer};
use crate::{Far, Sample};

const MIB: f64 = 1_048_576.0;
const GIB: f64 = MIB * 1024.0;

type Field = fn(&Sample) -> f64;

/// The figures: ours, theirs, rate at least and aim, median of the round trip at most.
const LIMITS: &[(Kind, Kind, f64, f64, f64)] = &[
    (Kind::Native, Kind::Tls, 4.0, 6.0, 1.0),
    (Kind::Native, Kind::TlsTuned, 1.3, 2.0, 1.0),
    (Kind::Native, Kind::Proxies, 2.0, 3.0, 0.8),
    (Kind::Native, Kind::Envoys, 1.2, 1.5, 1.0),
    (Kind::Carrier, Kind::Tcp, 0.95, 1.0, 1.1),
];

/// Of what a long way carries.
const SHARE: Limit = Limit::AtLeast(0.8);

/// Everything that was measured.
pub(crate) struct Measured {
    pub(crate) facts: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) ms: u64,
    pub(crate) took: Duration,
    pub(crate) peers: Vec<Peer>,
    /// Peer by peer, as all that follows.
    pub(crate) samples: Vec<Vec<Sample>>,
    /// Bytes of an idle link.
    pub(crate) idle: Vec<Option<f64>>,
    pub(crate) far: Vec<(Way, Far)>,
}

/// The text and the plot.
pub(crate) fn report(measured: &Measured) -> (String, String) {
    let Measured { peers, samples, .. } = measured;
    let mut text = format!(
        "# Distribution over the mesh\n\n{} interleaved rounds, {} ms for each figure, {:.0} s in all. Ratios are \
         paired, shown as median (lower-upper quartile); a limit is met when its worse quartile keeps it.\n\n",
        measured.rounds,
        measured.ms,
        measured.took.as_secs_f64()
    );
    for fact in &measured.facts {
        let _ = writeln!(text, "- {fact}");
    }
    let column = |peer: Peer, field: Field| -> Option<Vec<f64>> {
        let at = peers.iter().position(|known| *known == peer)?;
        Some(samples.get(at)?.iter().map(field).collect())
    };
    let ratio =
        |ours: Peer, theirs: Peer, field: Field| Some(ratios(&column(ours, field)?, &column(theirs, field)?));

    let mut all = Table::new(&[
        "one link",
        "MiB/s",
        "CPU s/GiB",
        "of it between the VMs",
        "p50 us",
        "p99 us",
        "new links/s",
        "KiB of an idle link",
    ]);
    for (peer, idle) in peers.iter().zip(&measured.idle) {
        let show = |field: Field, unit: f64, digits: usize| {
            column(*peer, field).map_or_else(String::new, |v| format!("{:.digits$}", median(&v) / unit))
        };
        all.row(vec![
            peer.to_string(),
            show(bulk, MIB, 0),
            show(|s| s.cpu, 1.0 / GIB, 2),
            show(|s| s.between, 1.0 / GIB, 2),
            show(p50, 1.0, 0),
            show(|s| s.p99, 1.0, 0),
            show(|s| s.links, 1.0, 0),
            idle.map_or_else(String::new, |idle| format!("{:.0}", idle / 1024.0)),
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
        "sealing relays: MiB/s",
        "bare relays: MiB/s",
        "p50",
    ]);
    let (mut names, mut series) = (Vec::new(), [Vec::new(), Vec::new()]);
    let held_on = |otp| LIMITS.iter().map(move |limits| (otp, limits));
    for (otp, (ours, theirs, at_least, aim, trip)) in held_on(None).chain(held_on(Some(NEWEST_OTP))) {
        let [ours, theirs, bare, sealing] =
            [*ours, *theirs, Kind::Relays, Kind::Sealed].map(|kind| Peer { kind, otp });
        let figures = (
            ratio(ours, theirs, bulk),
            ratio(ours, theirs, p50),
            ratio(ours, theirs, |s| s.cpu),
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
        // Between the nodes of the carrier alone there is no proxy.
        for (relays, field) in [(sealing, bulk as Field), (bare, bulk), (bare, p50)] {
            let beside = (ours.kind == Kind::Native)
                .then(|| ratio(relays, theirs, field))
                .flatten();
            cells.push(beside.map_or_else(String::new, |beside| Quartiles::of(&beside).to_string()));
        }
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
    if !measured.far.is_empty() {
        text.push_str(&far(&measured.far));
    }
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

fn far(ways: &[(Way, Far)]) -> String {
    let mut table = Table::new(&[
        "between two network namespaces",
        "",
        "part of its rate, messages of 1 MiB",
        "at least",
        "",
        "p50 ms",
    ]);
    for (way, peers) in ways {
        for (peer, samples) in peers {
            let share: Vec<f64> = samples.iter().map(|sample| sample.share).collect();
            let trips: Vec<f64> = samples.iter().map(|sample| sample.p50 / 1000.0).collect();
            table.row(vec![
                format!("{:?} each way, {} Mbit/s", way.delay, way.rate / 1_000_000),
                peer.to_string(),
                Quartiles::of(&share).to_string(),
                SHARE.to_string(),
                judge(&share, SHARE).to_string(),
                format!("{:.1}", median(&trips)),
            ]);
        }
    }
    format!("\n## Long ways\n\n{}\n", table.markdown())
}

fn bulk(sample: &Sample) -> f64 {
    sample.bulk
}

fn p50(sample: &Sample) -> f64 {
    sample.p50
}
