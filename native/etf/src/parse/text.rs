//! Characters and their escapes, in quotes or behind `$`.

use super::{ParseError, Parser};

impl Parser<'_> {
    /// The code points between quotes.
    pub(super) fn quoted(&mut self, quote: char) -> Result<Vec<u32>, ParseError> {
        self.next();
        let mut text = Vec::new();
        while !self.at(quote) {
            text.push(self.character()?);
        }
        self.next();
        Ok(text)
    }

    /// One character, or an escape for one.
    pub(super) fn character(&mut self) -> Result<u32, ParseError> {
        let missing = "the text ends where a character is wanted";
        match self.next() {
            Some('\\') => {}
            Some(c) => return Ok(u32::from(c)),
            None => return Err(self.error(missing.to_owned())),
        }
        let Some(escaped) = self.next() else {
            return Err(self.error(missing.to_owned()));
        };
        Ok(match escaped {
            'b' => 8,
            't' => 9,
            'n' => 10,
            'v' => 11,
            'f' => 12,
            'r' => 13,
            'e' => 27,
            's' => 32,
            'd' => 127,
            '^' => match self.next() {
                Some(c @ '@'..='_') => u32::from(c) & 31,
                Some(c @ 'a'..='z') => u32::from(c) & 31,
                Some('?') => 127,
                _ => return Err(self.error("a control character as in \\^a is wanted".to_owned())),
            },
            '0'..='7' => {
                let mut value = u32::from(escaped) - 48;
                for _ in 0..2 {
                    match self.peek().and_then(|c| c.to_digit(8)) {
                        Some(digit) => value = value * 8 + digit,
                        None => break,
                    }
                    self.next();
                }
                value
            }
            'x' => self.hexadecimal()?,
            other => u32::from(other),
        })
    }

    /// What follows `\x`: two digits, or any number of them in braces.
    fn hexadecimal(&mut self) -> Result<u32, ParseError> {
        let braces = self.at('{');
        if braces {
            self.next();
        }
        let mut value = 0u32;
        let mut digits = 0;
        while let Some(digit) = self.peek().and_then(|c| c.to_digit(16)) {
            if !braces && digits == 2 {
                break;
            }
            self.next();
            digits += 1;
            value = value.saturating_mul(16).saturating_add(digit);
        }
        if braces && !self.at('}') || digits == 0 || !braces && digits < 2 || value > u32::from(char::MAX) {
            return Err(self.error("a code point as in \\x{e9} is wanted".to_owned()));
        }
        if braces {
            self.next();
        }
        Ok(value)
    }
}
