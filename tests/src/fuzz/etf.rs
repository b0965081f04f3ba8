use meshx_etf::{Limits, Term, Walk, decode, encode};

use super::etf_agreement::check_agreement;

/// The external term format: walk, decoder and guard agree; what is decoded can be shown, ordered, encoded and
/// decoded again.
pub fn etf(data: &[u8]) {
    let limits = Limits {
        max_inflated: 1 << 20,
        ..Limits::default()
    };
    check_agreement(data);
    if let Ok(mut walk) = Walk::new(data, &limits) {
        while let Ok(Some(token)) = walk.next_token() {
            std::hint::black_box(format!("{token:?}"));
        }
        assert!(walk.offset() <= data.len());
    }
    let Ok(term) = decode(data, &limits) else { return };
    std::hint::black_box(term.to_string());
    assert_eq!(term.cmp(&term), std::cmp::Ordering::Equal);
    let mut bytes = Vec::new();
    encode(&term, &mut bytes).unwrap();
    // What was written otherwise than we write it (an old atom, say) may have grown a little.
    let limits = Limits {
        max_bytes: usize::MAX,
        ..limits
    };
    let again: Term = decode(&bytes, &limits).unwrap();
    assert_eq!(again, term);
    let mut second = Vec::new();
    encode(&again, &mut second).unwrap();
    assert_eq!(second, bytes);
}
