//! A bar chart as SVG: horizontal bars, one group a row of the table, a line at 1.

use std::fmt::Write as _;

use super::Quartiles;

/// One peer: its name and, row by row, its ratios' quartiles (`None`: not measured).
#[derive(Debug, Clone)]
pub struct Series {
    /// Shown in the legend.
    pub name: String,
    /// One per row.
    pub values: Vec<Option<Quartiles>>,
}

const COLORS: [&str; 6] = ["#1b6ca8", "#d1495b", "#66a182", "#edae49", "#6d597a", "#7f7f7f"];
const LEFT: f64 = 330.0;
const WIDTH: f64 = 620.0;
const BAR: f64 = 13.0;

/// Draws ratios on a logarithmic scale from 1/8 to 16; whiskers are quartiles.
pub fn bars(title: &str, rows: &[String], series: &[Series]) -> String {
    let x = |ratio: f64| LEFT + (ratio.clamp(0.125, 16.0).log2() + 3.0) / 7.0 * WIDTH;
    let group = BAR * series.len() as f64 + 12.0;
    let top = 50.0 + 18.0 * series.len() as f64;
    let height = top + group * rows.len() as f64 + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{height}\" viewBox=\"0 0 {w} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\">{}</text>\n",
        escape(title),
        w = LEFT + WIDTH + 90.0,
    );
    for (i, one) in series.iter().enumerate() {
        let y = 44.0 + 18.0 * i as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"16\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"34\" y=\"{}\">{}</text>",
            y,
            COLORS[i % COLORS.len()],
            y + 10.5,
            escape(&one.name)
        );
    }
    for ratio in [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0] {
        let color = if ratio == 1.0 { "#333" } else { "#ddd" };
        let _ = writeln!(
            svg,
            "<line x1=\"{0:.1}\" y1=\"{top}\" x2=\"{0:.1}\" y2=\"{1}\" stroke=\"{color}\"/>\
             <text x=\"{0:.1}\" y=\"{2}\" text-anchor=\"middle\" fill=\"#555\">{ratio}</text>",
            x(ratio),
            height - 34.0,
            height - 16.0
        );
    }
    for (number, row) in rows.iter().enumerate() {
        let y = top + group * number as f64 + 6.0;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            y + (group - 12.0) / 2.0 + 4.0,
            escape(row)
        );
        for (i, one) in series.iter().enumerate() {
            let Some(Some(q)) = one.values.get(number) else {
                continue;
            };
            let (y, from, to) = (y + BAR * i as f64, x(1.0), x(q.median));
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"/>\
                 <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{mid:.1}\" y2=\"{mid:.1}\" stroke=\"black\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\">{:.2}</text>",
                from.min(to),
                (to - from).abs().max(1.0),
                BAR - 2.0,
                COLORS[i % COLORS.len()],
                x(q.low),
                x(q.high),
                x(q.high).max(from) + 5.0,
                y + BAR - 3.5,
                q.median,
                mid = y + (BAR - 2.0) / 2.0,
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_bar() {
        let q = Quartiles {
            low: 1.5,
            median: 2.0,
            high: 3.0,
        };
        let series = [Series {
            name: "a<b".into(),
            values: vec![Some(q), None, Some(q)],
        }];
        let svg = bars("t & u", &["1".into(), "2".into(), "3".into()], &series);
        assert_eq!(svg.matches(">2.00<").count(), 2);
        assert!(svg.contains("a&lt;b") && svg.contains("t &amp; u"));
    }
}
