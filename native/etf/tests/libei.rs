//! Agreement with libei, C's erl_interface, over generated terms. Needs `cc` and libei (Debian's erlang-dev).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::{LazyLock, Mutex, PoisonError};

use common::libei::Libei;
use common::{each, encoded, term};
use meshx_etf::{Limits, Term, decode, term_len};
use proptest::prelude::*;

static LIBEI: LazyLock<Mutex<Libei>> = LazyLock::new(|| Mutex::new(Libei::start()));

fn libei<T>(ask: impl FnOnce(&mut Libei) -> T) -> T {
    ask(&mut LIBEI.lock().unwrap_or_else(PoisonError::into_inner))
}

/// libei keeps atoms as C strings, which end at the first zero.
fn has_zero_in_an_atom(term: &Term) -> bool {
    let mut found = false;
    each(term, &mut |part| {
        found |= match part {
            Term::Atom(atom) => atom.as_str().contains('\0'),
            Term::Export(export) => [&export.module, &export.function]
                .iter()
                .any(|atom| atom.as_str().contains('\0')),
            _ => false,
        };
    });
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn libei_reads_what_is_encoded_and_writes_what_decodes(
        term in term().prop_filter("libei cannot hold it", |term| !has_zero_in_an_atom(term)),
    ) {
        let bytes = encoded(&term);
        prop_assert_eq!(libei(|ei| ei.skip(&bytes)), Some(bytes.len()));
        prop_assert_eq!(term_len(&bytes, &Limits::default()), Ok(bytes.len()));
        let theirs = libei(|ei| ei.echo(&bytes));
        prop_assert!(theirs.is_some(), "libei refuses {}: {:?}", term, bytes);
        let theirs = theirs.unwrap();
        prop_assert_eq!(decode(&theirs, &Limits::default()), Ok(term), "{:?}", theirs);
    }
}

/// The check above can fail: another term is another answer.
#[test]
fn the_program_answers_with_what_it_was_asked() {
    let (one, two) = (encoded(&Term::from(1)), encoded(&Term::from(2)));
    assert_eq!(libei(|ei| ei.echo(&one)), Some(one));
    assert_eq!(libei(|ei| ei.echo(&two)), Some(two));
    assert_eq!(libei(|ei| ei.echo(&[131, 104, 2, 97, 1])), None);
    assert_eq!(libei(|ei| ei.skip(&[131, 255])), None);
}
