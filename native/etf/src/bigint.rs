//! Integers that do not fit 64 bits.

use std::cmp::Ordering;
use std::fmt;

/// Beyond this many bytes an integer is printed in hexadecimal: decimal takes time quadratic in the length.
const MAX_DECIMAL_BYTES: usize = 1024;

/// An integer that does not fit an `i64`: sign and magnitude, nothing to calculate with.
///
/// Made by [`Term::integer_from_le_bytes`](crate::Term::integer_from_le_bytes) or from a wide Rust integer.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BigInt {
    negative: bool,
    /// Least byte first, no zero byte at the end.
    magnitude: Box<[u8]>,
}

impl BigInt {
    pub(crate) fn from_trimmed(negative: bool, magnitude: &[u8]) -> Self {
        Self {
            negative,
            magnitude: magnitude.into(),
        }
    }

    /// Whether it is below zero.
    pub fn is_negative(&self) -> bool {
        self.negative
    }

    /// Its absolute value, least byte first, without zero bytes at the end.
    pub fn magnitude_le(&self) -> &[u8] {
        &self.magnitude
    }

    /// The value, if it fits.
    pub fn to_u128(&self) -> Option<u128> {
        if self.negative || self.magnitude.len() > 16 {
            return None;
        }
        Some(self.low_bits())
    }

    /// The value, if it fits.
    pub fn to_i128(&self) -> Option<i128> {
        if self.magnitude.len() > 16 {
            return None;
        }
        if self.negative {
            0i128.checked_sub_unsigned(self.low_bits())
        } else {
            i128::try_from(self.low_bits()).ok()
        }
    }

    fn low_bits(&self) -> u128 {
        self.magnitude
            .iter()
            .rev()
            .fold(0, |acc, &b| acc << 8 | u128::from(b))
    }

    /// The value, if it fits.
    pub fn to_u64(&self) -> Option<u64> {
        if self.negative || self.magnitude.len() > 8 {
            return None;
        }
        Some(
            self.magnitude
                .iter()
                .rev()
                .fold(0, |acc, &b| acc << 8 | u64::from(b)),
        )
    }
}

impl Ord for BigInt {
    fn cmp(&self, other: &Self) -> Ordering {
        let absolute = || {
            let (a, b) = (&self.magnitude, &other.magnitude);
            a.len()
                .cmp(&b.len())
                .then_with(|| a.iter().rev().cmp(b.iter().rev()))
        };
        match (self.negative, other.negative) {
            (false, false) => absolute(),
            (true, true) => absolute().reverse(),
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
        }
    }
}

impl PartialOrd for BigInt {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// As Erlang writes it: decimal up to 1,024 bytes, `16#...` beyond.
impl fmt::Display for BigInt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.negative {
            f.write_str("-")?;
        }
        if self.magnitude.len() > MAX_DECIMAL_BYTES {
            f.write_str("16#")?;
            return self
                .magnitude
                .iter()
                .rev()
                .try_for_each(|byte| write!(f, "{byte:02X}"));
        }
        const DIGITS: usize = 9;
        const BASE: u64 = 1_000_000_000;
        let mut limbs: Vec<u32> = self
            .magnitude
            .chunks(4)
            .map(|chunk| chunk.iter().rev().fold(0, |acc, &b| acc << 8 | u32::from(b)))
            .collect();
        let mut groups = Vec::new();
        while limbs.last().is_some() {
            let mut rest = 0u64;
            for limb in limbs.iter_mut().rev() {
                let value = rest << 32 | u64::from(*limb);
                *limb = (value / BASE) as u32;
                rest = value % BASE;
            }
            groups.push(rest);
            while limbs.last() == Some(&0) {
                limbs.pop();
            }
        }
        let mut groups = groups.iter().rev();
        if let Some(first) = groups.next() {
            write!(f, "{first}")?;
        }
        groups.try_for_each(|group| write!(f, "{group:0DIGITS$}"))
    }
}

impl fmt::Debug for BigInt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use crate::Term;

    #[test]
    fn decimal_digits_are_those_of_rust() {
        for value in [
            i128::MIN,
            i128::MAX,
            -9_223_372_036_854_775_809,
            9_223_372_036_854_775_808,
            10i128.pow(27),
        ] {
            assert_eq!(Term::from(value).to_string(), value.to_string());
        }
    }

    #[test]
    fn long_integers_are_printed_in_hexadecimal() {
        let mut magnitude = vec![0; 1025];
        magnitude[1024] = 0x1F;
        let text = Term::integer_from_le_bytes(true, &magnitude).to_string();
        assert_eq!(text, format!("-16#1F{}", "00".repeat(1024)));
    }

    #[test]
    fn order_is_by_value() {
        let mut values = [5i128 << 64, -5i128 << 64, 1, i128::MAX, i128::MIN, 0, 3 << 70]
            .map(Term::from)
            .to_vec();
        values.sort();
        let mut wanted = [5i128 << 64, -5i128 << 64, 1, i128::MAX, i128::MIN, 0, 3 << 70];
        wanted.sort();
        assert_eq!(values, wanted.map(Term::from));
    }
}
