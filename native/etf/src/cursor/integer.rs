//! Integers of any size.

use super::truncated;
use crate::error::DecodeError;
use crate::token::Token;

/// An integer with `len` bytes of magnitude; `rest` begins with its sign and is the end of `input` bytes. Returns what
/// follows it.
#[inline(never)]
pub(super) fn any_integer(
    rest: &[u8],
    input: usize,
    limit: usize,
    at: usize,
    len: usize,
) -> Result<(Token<'_>, &[u8]), DecodeError> {
    if len > limit {
        return Err(DecodeError::IntegerTooLong {
            len,
            limit,
            offset: at,
        });
    }
    let Some((&sign, rest)) = rest.split_first() else {
        return Err(truncated(input, rest, 1));
    };
    let Some((magnitude, rest)) = rest.split_at_checked(len) else {
        return Err(truncated(input, rest, len));
    };
    // Any byte but 0 means negative to the BEAM.
    let negative = sign != 0;
    let magnitude = trim_zeros(magnitude);
    let token = match small_integer(negative, magnitude) {
        Some(value) => Token::Int(value),
        None => Token::BigInt { negative, magnitude },
    };
    Ok((token, rest))
}

/// Magnitude bytes without the zero bytes at their high end.
pub(crate) fn trim_zeros(magnitude: &[u8]) -> &[u8] {
    let len = magnitude.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    magnitude.get(..len).unwrap_or_default()
}

/// The integer, if it fits 64 bits. `magnitude` is little-endian and trimmed.
pub(crate) fn small_integer(negative: bool, magnitude: &[u8]) -> Option<i64> {
    if magnitude.len() > 8 {
        return None;
    }
    let value = magnitude
        .iter()
        .rev()
        .fold(0u64, |acc, &b| acc << 8 | u64::from(b));
    signed(negative, value)
}

#[inline(always)]
pub(super) fn signed(negative: bool, value: u64) -> Option<i64> {
    if negative {
        0i64.checked_sub_unsigned(value)
    } else {
        i64::try_from(value).ok()
    }
}
