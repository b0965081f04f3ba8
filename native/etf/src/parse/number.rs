//! Integers of any base, and floats.

use super::{ParseError, Parser};
use crate::term::Term;

/// Most digits of an integer that is not hexadecimal: they take time quadratic in their number.
pub(super) const MAX_DIGITS: usize = 2_500;

impl Parser<'_> {
    /// What follows the sign.
    pub(super) fn number(&mut self, negative: bool) -> Result<Term, ParseError> {
        let mut digits = self.digits(10)?;
        if self.at('.') && self.follows(|c| c.is_ascii_digit()) {
            self.next();
            return self.float(negative, &digits);
        }
        let mut base = 10;
        if self.at('#') {
            base = match digits.parse() {
                Ok(base @ 2..=36) => base,
                _ => return Err(self.error("a base from 2 to 36 is wanted before #".to_owned())),
            };
            self.next();
            digits = self.digits(base)?;
        }
        let max_digits = match base {
            16 => self.limits.max_integer_bytes.saturating_mul(2),
            _ => MAX_DIGITS,
        };
        if digits.len() > max_digits {
            return Err(self.error(format!(
                "an integer of {} digits, at most {max_digits}",
                digits.len()
            )));
        }
        Ok(Term::integer_from_le_bytes(negative, &magnitude(&digits, base)))
    }

    /// What follows the point.
    fn float(&mut self, negative: bool, whole: &str) -> Result<Term, ParseError> {
        let mut text = format!("{}{whole}.{}", if negative { "-" } else { "" }, self.digits(10)?);
        if self.at('e') || self.at('E') {
            self.next();
            text.push('e');
            if self.at('-') || self.at('+') {
                text.extend(self.next());
            }
            text.push_str(&self.digits(10)?);
        }
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Term::Float(value)),
            _ => Err(self.error("the float is too large".to_owned())),
        }
    }

    /// Digits, at least one, with single underscores between them taken out.
    fn digits(&mut self, base: u32) -> Result<String, ParseError> {
        let mut digits = String::new();
        loop {
            match self.peek() {
                Some(c) if c.is_digit(base) => digits.push(c),
                Some('_') if !digits.is_empty() && self.follows(|c| c.is_digit(base)) => {}
                _ => break,
            }
            self.next();
        }
        if digits.is_empty() {
            return Err(self.error(format!("digits of base {base} are wanted")));
        }
        Ok(digits)
    }
}

/// Least byte first.
fn magnitude(digits: &str, base: u32) -> Vec<u8> {
    let values = digits.chars().filter_map(|c| c.to_digit(base));
    if base == 16 {
        let nibbles: Vec<u8> = values.rev().map(|digit| digit as u8).collect();
        let byte = |pair: &[u8]| pair.iter().rev().fold(0, |byte, nibble| byte << 4 | nibble);
        return nibbles.chunks(2).map(byte).collect();
    }
    let mut bytes: Vec<u8> = Vec::new();
    for digit in values {
        let mut carry = digit;
        for byte in &mut bytes {
            carry += u32::from(*byte) * base;
            *byte = carry as u8;
            carry >>= 8;
        }
        if carry > 0 {
            bytes.push(carry as u8);
        }
    }
    bytes
}
