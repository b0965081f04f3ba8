use std::sync::Arc;

use meshx_etf::{Limits, Term, Walk, decode, decode_bare_prefix, decode_shared, encode, term_len};

use super::etf_agreement::{check_agreement, check_indexed};

/// The external term format: walk, decoder and guard agree; with its atoms in a table a term is the same; what is decoded
/// can be shown, ordered, encoded and decoded again.
pub fn etf(data: &[u8]) {
    let limits = Limits {
        max_inflated: 1 << 20,
        ..Limits::default()
    };
    check_agreement(data);
    check_indexed(data);
    if term_len(data, &limits) == Ok(data.len()) {
        check_indexed(&among_atoms(data));
    }
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

/// `{Term, ['an atom', ...]}`: terms of few atoms are not written with a table.
fn among_atoms(data: &[u8]) -> Vec<u8> {
    const COUNT: u16 = 300;
    let mut bytes = vec![131, 104, 2];
    bytes.extend_from_slice(data.get(1..).unwrap_or_default());
    bytes.extend([&[108, 0, 0][..], &COUNT.to_be_bytes()].concat());
    bytes.extend(b"\x77\x07an atom".repeat(COUNT.into()));
    bytes.push(106);
    bytes
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
