//! What was measured, as a table and a plot.

use std::fmt::Write as _;
use std::time::Duration;

use meshx_tests::bench::{Limit, Quartiles, Series, Table, bars, judge, median, ratios};

/// One line of the table.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) against: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) ours: Vec<f64>,
    pub(crate) theirs: Vec<f64>,
    /// Round by round; of times how often ours goes into theirs, else ours to theirs.
    pub(crate) ratio: Vec<f64>,
    /// At least, and the aim.
    pub(crate) limits: Option<(Limit, Limit)>,
}

impl Line {
    /// The ratio is ours to theirs.
    pub(crate) fn new(
        name: String,
        against: &'static str,
        unit: &'static str,
        ours: Vec<f64>,
        theirs: Vec<f64>,
        limits: Option<(Limit, Limit)>,
    ) -> Self {
        Self {
            ratio: ratios(&ours, &theirs),
            name,
            against,
            unit,
            ours,
            theirs,
            limits,
        }
    }
}

/// The text and the plot. `memory`: what our node made, how many, and by how many bytes it grew.
pub(crate) fn report(
    facts: &[String],
    rounds: usize,
    took: Duration,
    lines: &[Line],
    memory: &[(&str, u32, f64)],
) -> (String, String) {
    let mut text = format!(
        "# The C node beside libei, eetf and BEAM\n\n{rounds} interleaved rounds, {:.0} s in all. Ratios are paired, shown as \
         median (lower-upper quartile); a limit is met when its worse quartile keeps it. For terms the ratio says how many \
         times as fast ours is, for the rest it is ours to theirs.\n\n",
        took.as_secs_f64()
    );
    for fact in facts {
        let _ = writeln!(text, "- {fact}");
    }
    text.push('\n');
    let mut table = Table::new(&[
        "", "ours", "theirs", "against", "ratio", "at least", "", "aim", "",
    ]);
    for line in lines {
        let figure = |values: &[f64]| format!("{:.2} {}", median(values), line.unit);
        let mut cells = vec![
            line.name.clone(),
            figure(&line.ours),
            figure(&line.theirs),
            line.against.to_owned(),
            Quartiles::of(&line.ratio).to_string(),
        ];
        if let Some((least, aim)) = line.limits {
            for limit in [least, aim] {
                cells.extend([limit.to_string(), judge(&line.ratio, limit).to_string()]);
            }
        }
        table.row(cells);
    }
    text.push_str(&table.markdown());
    text.push('\n');
    for (what, count, bytes) in memory {
        let _ = writeln!(
            text,
            "- {count} {what} in our node: {:.0} KiB, {:.0} bytes each (resident memory, once)",
            bytes / 1024.0,
            bytes / f64::from(*count)
        );
    }
    let rows: Vec<String> = lines
        .iter()
        .map(|line| format!("{} ({})", line.name, line.against))
        .collect();
    let series = Series {
        name: "ours, as a ratio".into(),
        values: lines
            .iter()
            .map(|line| Some(Quartiles::of(&line.ratio)))
            .collect(),
    };
    let plot = bars("The C node beside libei, eetf and BEAM", &rows, &[series]);
    (text, plot)
}
