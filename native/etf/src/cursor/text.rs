//! Text within terms: of atoms, and of floats as old releases send them.

use super::{MAX_ATOM_CHARS, not_finite};
use crate::error::DecodeError;
use crate::token::{AtomRef, Token};

#[inline(never)]
pub(super) fn atom_text(at: usize, bytes: &[u8], latin1: bool) -> Result<AtomRef<'_>, DecodeError> {
    let too_long = |chars| DecodeError::AtomTooLong { chars, offset: at };
    if bytes.is_ascii() {
        return match bytes.len() {
            0..=MAX_ATOM_CHARS => Ok(AtomRef::ascii(bytes)),
            chars => Err(too_long(chars)),
        };
    }
    if latin1 {
        return match bytes.len() {
            0..=MAX_ATOM_CHARS => Ok(AtomRef::latin1(bytes)),
            chars => Err(too_long(chars)),
        };
    }
    let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::AtomUtf8 { offset: at })?;
    // Fewer bytes than the limit can't be more characters.
    let chars = if bytes.len() <= MAX_ATOM_CHARS {
        bytes.len()
    } else {
        text.chars().count()
    };
    if chars > MAX_ATOM_CHARS {
        return Err(too_long(chars));
    }
    Ok(AtomRef::utf8(text))
}

/// `FLOAT_EXT`: the number as text, `sprintf("%.20e")`, filled up with zero bytes.
///
/// There is at least one. `binary_to_term` reads digits up to a zero byte wherever that is: of a text without one, at the
/// end of a message, memory behind the message would become part of the number.
pub(super) fn float_text<'a>(offset: usize, bytes: &[u8]) -> Result<Token<'a>, DecodeError> {
    let end = bytes.iter().position(|&b| b == 0);
    let text = end.and_then(|end| bytes.get(..end));
    // Rust also parses "inf" and "nan".
    let value = text
        .and_then(|text| std::str::from_utf8(text).ok())
        .and_then(|text| text.parse::<f64>().ok())
        .filter(|value| value.is_finite());
    value.map(Token::Float).ok_or_else(|| not_finite(offset))
}
