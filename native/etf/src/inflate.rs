//! Compressed terms: `131, 80, uncompressed size as u32, zlib data`.

use std::borrow::Cow;

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::DecodeError;
use crate::limits::Limits;
use crate::tag;
use crate::walk::check_start;

/// Version byte, tag, size.
const HEAD: usize = 6;
/// Deflate never makes more than 1,032 bytes of one.
const MAX_RATIO: usize = 1032;

/// The term's bytes with compression undone: a version byte and the term. Bytes that follow the term are dropped
/// when it was compressed.
///
/// Borrows when there was nothing to undo.
///
/// # Errors
/// [`DecodeError::CompressedNotAllowed`], [`DecodeError::InflatedTooLong`] before any inflating, and
/// [`DecodeError::InflatedLength`] and [`DecodeError::Zlib`] when the data is not what it says.
pub fn inflate<'a>(bytes: &'a [u8], limits: &Limits) -> Result<Cow<'a, [u8]>, DecodeError> {
    Ok(match inflate_prefix(bytes, limits)? {
        Some(inflated) => Cow::Owned(inflated.bytes),
        None => Cow::Borrowed(bytes),
    })
}

/// A term that was compressed.
pub(crate) struct Inflated<'a> {
    /// Version byte and term.
    pub(crate) bytes: Vec<u8>,
    /// What follows the compressed term.
    pub(crate) rest: &'a [u8],
}

/// `None` if the term is not compressed.
pub(crate) fn inflate_prefix<'a>(
    bytes: &'a [u8],
    limits: &Limits,
) -> Result<Option<Inflated<'a>>, DecodeError> {
    check_start(bytes, limits)?;
    if bytes.get(1) != Some(&tag::COMPRESSED) {
        return Ok(None);
    }
    if !limits.allow_compressed {
        return Err(DecodeError::CompressedNotAllowed);
    }
    let Some((&[_, _, a, b, c, d], data)) = bytes.split_first_chunk::<HEAD>() else {
        return Err(DecodeError::Truncated {
            offset: 2,
            needed: 4,
            remaining: bytes.len() - 2,
        });
    };
    let announced = u32::from_be_bytes([a, b, c, d]) as usize;
    if announced > limits.max_inflated {
        return Err(DecodeError::InflatedTooLong {
            announced,
            limit: limits.max_inflated,
        });
    }
    // One byte more than announced, so that data that goes on shows; never more than the data could hold.
    let room = (announced + 1).min(data.len().saturating_mul(MAX_RATIO));
    let mut out = Vec::with_capacity(1 + room);
    out.push(tag::VERSION);
    let used = inflate_into(&mut out, data, announced)?;
    Ok(Some(Inflated {
        bytes: out,
        rest: data.get(used..).unwrap_or_default(),
    }))
}

/// Returns how many bytes of `data` were used.
fn inflate_into(out: &mut Vec<u8>, data: &[u8], announced: usize) -> Result<usize, DecodeError> {
    let mut zlib = Decompress::new(true);
    loop {
        // Both counts stay below the slice lengths, which are usize.
        let used = zlib.total_in() as usize;
        let made = zlib.total_out() as usize;
        let rest = data.get(used..).unwrap_or_default();
        let status = zlib
            .decompress_vec(rest, out, FlushDecompress::Finish)
            .map_err(|_| DecodeError::Zlib {
                offset: zlib.total_in() as usize,
            })?;
        let (used_now, made_now) = (zlib.total_in() as usize, zlib.total_out() as usize);
        if made_now > announced {
            return Err(DecodeError::InflatedLength {
                announced,
                actual: announced,
                more: true,
            });
        }
        if status == Status::StreamEnd {
            if made_now != announced {
                return Err(DecodeError::InflatedLength {
                    announced,
                    actual: made_now,
                    more: false,
                });
            }
            return Ok(used_now);
        }
        if used_now == used && made_now == made {
            return Err(DecodeError::Zlib { offset: used_now });
        }
    }
}
