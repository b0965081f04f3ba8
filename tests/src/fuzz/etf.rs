use std::sync::Arc;

use meshx_etf::{Limits, Term, Walk, decode, decode_bare_prefix, decode_shared, encode};

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
    shared(data, &limits);
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

/// Sharing memory makes no other term, whatever lies around it, and keeps nothing alive but with the term.
fn shared(data: &[u8], limits: &Limits) {
    let bare = data.get(1..).unwrap_or_default();
    let copied = match decode_bare_prefix(bare, limits) {
        Ok((term, [])) => Ok(term),
        Ok((_, rest)) => Err(meshx_etf::DecodeError::Trailing {
            offset: bare.len() - rest.len(),
            remaining: rest.len(),
        }),
        Err(error) => Err(error),
    };
    for around in [0, data.len() * 40] {
        let mut whole = vec![0; around];
        whole.extend_from_slice(bare);
        whole.resize(around + bare.len() + around, 0);
        let whole = Arc::new(whole);
        let term = decode_shared(&whole, around..around + bare.len(), limits);
        assert_eq!(term, copied);
        // Less than a sixteenth of it is never kept.
        assert!(around == 0 || Arc::strong_count(&whole) == 1);
        drop(term);
        assert_eq!(Arc::strong_count(&whole), 1);
    }
}
