//! What is refused, in whichever way it comes in.

use meshx_etf::guard::{self, GuardError, GuardPolicy};
use meshx_etf::{DecodeError, Limits, decode, decode_prefix, term_len};

/// The error that every way into the crate must agree on.
pub(crate) fn refusal(bytes: &[u8]) -> DecodeError {
    let limits = Limits::default();
    let error = decode(bytes, &limits).expect_err("decode accepted it");
    assert_eq!(decode_prefix(bytes, &limits).map(|_| ()), Err(error));
    assert_eq!(term_len(bytes, &limits), Err(error));
    assert_eq!(
        guard::check(
            bytes,
            &GuardPolicy {
                allow_funs: true,
                ..open_policy()
            }
        ),
        Err(GuardError::Decode(error))
    );
    error
}

/// The guard with the limits of a decoder.
pub(crate) fn open_policy() -> GuardPolicy {
    GuardPolicy {
        max_integer_bytes: Limits::default().max_integer_bytes,
        max_heap_words: usize::MAX,
        max_key_bytes: usize::MAX,
        ..GuardPolicy::default()
    }
}
