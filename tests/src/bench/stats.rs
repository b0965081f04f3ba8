//! Medians, quartiles and verdicts.

use std::fmt;

/// Fewer rounds than this decide nothing.
pub(crate) const ROUNDS: usize = 9;

/// The middle half of some measurements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quartiles {
    /// A quarter is below.
    pub low: f64,
    /// Half is below.
    pub median: f64,
    /// A quarter is above.
    pub high: f64,
}

impl Quartiles {
    /// Of at least one value, linearly interpolated; NaN of none.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let Some(last) = sorted.len().checked_sub(1) else {
                return f64::NAN;
            };
            let place = part * last as f64;
            let (below, above) = (place.floor() as usize, place.ceil() as usize);
            sorted[below] + (sorted[above] - sorted[below]) * (place - place.floor())
        };
        Self {
            low: at(0.25),
            median: at(0.5),
            high: at(0.75),
        }
    }
}

impl fmt::Display for Quartiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ({:.2}-{:.2})", self.median, self.low, self.high)
    }
}

/// The middle of some measurements; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    Quartiles::of(values).median
}

/// Round by round, `ours` divided by `theirs`.
pub fn ratios(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(a, b)| a / b).collect()
}

/// What a ratio is held against.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// The ratio shall be this or more: rates.
    AtLeast(f64),
    /// The ratio shall be this or less: times, CPU, memory.
    AtMost(f64),
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(limit) => write!(f, ">= {limit:.2}"),
            Self::AtMost(limit) => write!(f, "<= {limit:.2}"),
        }
    }
}

/// Whether a limit is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Three quarters of the rounds keep it.
    Met,
    /// Some rounds keep it, some do not, or there were fewer than nine.
    Undecided,
    /// Three quarters of the rounds break it.
    Missed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::Undecided => "undecided",
            Self::Missed => "MISSED",
        })
    }
}

/// Holds paired ratios against a limit.
pub fn judge(ratios: &[f64], limit: Limit) -> Verdict {
    if ratios.len() < ROUNDS || ratios.iter().any(|ratio| ratio.is_nan()) {
        return Verdict::Undecided;
    }
    let Quartiles { low, high, .. } = Quartiles::of(ratios);
    let (worse, better, limit) = match limit {
        Limit::AtLeast(limit) => (low, high, limit),
        Limit::AtMost(limit) => (-high, -low, -limit),
    };
    if worse >= limit {
        Verdict::Met
    } else if better < limit {
        Verdict::Missed
    } else {
        Verdict::Undecided
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated() {
        let q = Quartiles::of(&[4.0, 1.0, 3.0, 2.0]);
        assert_eq!((q.low, q.median, q.high), (1.75, 2.5, 3.25));
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn three_quarters_of_nine_rounds_decide() {
        let rising: Vec<f64> = (1..=9).map(f64::from).collect();
        assert_eq!(judge(&rising, Limit::AtLeast(3.0)), Verdict::Met);
        assert_eq!(judge(&rising, Limit::AtLeast(3.1)), Verdict::Undecided);
        assert_eq!(judge(&rising, Limit::AtLeast(7.1)), Verdict::Missed);
        assert_eq!(judge(&rising, Limit::AtMost(7.0)), Verdict::Met);
        assert_eq!(judge(&rising, Limit::AtMost(6.9)), Verdict::Undecided);
        assert_eq!(judge(&rising, Limit::AtMost(2.9)), Verdict::Missed);
        assert_eq!(judge(&rising[..8], Limit::AtLeast(0.1)), Verdict::Undecided);
        assert_eq!(judge(&[f64::NAN; 9], Limit::AtLeast(0.1)), Verdict::Undecided);
    }
}
