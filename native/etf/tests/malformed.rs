//! Terms that are not quite terms, and terms that other encoders write as other terms.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod refusal;

use meshx_etf::{DecodeError, Limits, Term, decode, encode};
use refusal::refusal;

#[test]
fn malformed_leaves() {
    let long_atom = [&[131, 118, 1, 0][..], &[b'a'; 256]].concat();
    assert_eq!(
        refusal(&long_atom),
        DecodeError::AtomTooLong {
            chars: 256,
            offset: 1
        }
    );
    let long_latin1 = [&[131, 100, 1, 0][..], &[0xE9; 256]].concat();
    assert_eq!(
        refusal(&long_latin1),
        DecodeError::AtomTooLong {
            chars: 256,
            offset: 1
        }
    );
    assert_eq!(refusal(&[131, 119, 1, 0xFF]), DecodeError::AtomUtf8 { offset: 1 });
    for bits in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let bytes = [&[131, 70][..], &bits.to_be_bytes()].concat();
        assert_eq!(refusal(&bytes), DecodeError::Float { offset: 1 });
    }
    for text in ["inf", "nan", "1e999", "", "1.5x", &"0".repeat(31)] {
        let mut bytes = [&[131, 99], text.as_bytes()].concat();
        bytes.resize(33, 0);
        assert_eq!(refusal(&bytes), DecodeError::Float { offset: 1 });
    }
    assert_eq!(
        refusal(&[131, 77, 0, 0, 0, 1, 9, 0]),
        DecodeError::BitCount {
            len: 1,
            bits: 9,
            offset: 1
        }
    );
    assert_eq!(
        refusal(&[131, 77, 0, 0, 0, 1, 0, 0]),
        DecodeError::BitCount {
            len: 1,
            bits: 0,
            offset: 1
        }
    );
    assert_eq!(
        refusal(&[131, 77, 0, 0, 0, 0, 4]),
        DecodeError::BitCount {
            len: 0,
            bits: 4,
            offset: 1
        }
    );
    assert_eq!(
        refusal(&[131, 90, 0, 0, 119, 0]),
        DecodeError::ReferenceWords { count: 0, offset: 1 }
    );
    assert_eq!(
        refusal(&[131, 90, 0, 6, 119, 0]),
        DecodeError::ReferenceWords { count: 6, offset: 1 }
    );
    assert_eq!(
        refusal(&[131, 88, 97, 1]),
        DecodeError::Expected {
            wanted: "an atom",
            tag: 97,
            offset: 2
        }
    );
    assert_eq!(
        refusal(&[131, 113, 119, 0, 119, 0, 98]),
        DecodeError::Expected {
            wanted: "a small integer",
            tag: 98,
            offset: 6
        }
    );
}

/// `term_to_binary(#point{x = 5})` of OTP 29, for `-record #point{x = 1, y = 2}` in the module `rec`. We do not set
/// the flag that says we read them.
#[test]
fn a_native_record_of_otp_29() {
    let bytes = [
        131, 67, 0, 0, 0, 2, 0, 119, 3, 114, 101, 99, 119, 5, 112, 111, 105, 110, 116, 119, 1, 120, 119, 1,
        121, 97, 5, 97, 2,
    ];
    let wanted = |offset| DecodeError::Refused {
        tag: 67,
        name: "NATIVE_RECORD_EXT",
        offset,
    };
    assert_eq!(refusal(&bytes), wanted(1));
    let within = [&[131, 104, 1][..], &bytes[1..]].concat();
    assert_eq!(refusal(&within), wanted(3));
}

/// Terms that other encoders write as other terms.
#[test]
fn what_is_encoded_is_the_term() {
    let cases = [
        Term::list([-1, 2, 3].map(Term::from)),
        Term::list([1, 256].map(Term::from)),
        Term::list((0..70_000).map(|i| Term::from(i % 256))),
        Term::list((0..65_535).map(|i| Term::from(i % 256))),
        Term::map([(Term::from(1), Term::from(2)), (Term::from(1.0), Term::from(3))]),
    ];
    for term in cases {
        let mut bytes = Vec::new();
        encode(&term, &mut bytes).unwrap();
        assert_eq!(decode(&bytes, &Limits::default()).unwrap(), term);
    }
}
