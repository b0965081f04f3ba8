//! Inputs that abort, hang or fill the memory of other codecs.
//!
//! Nearly all of them run confined: see `confined/mod.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod confined;
mod refusal;

use std::io::Write;

use confined::{ADDRESS_SPACE_KIB, confined};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use meshx_etf::guard::{self, GuardError, GuardPolicy};
use meshx_etf::{DecodeError, Limits, Term, Walk, decode, term_len};
use refusal::{open_policy, refusal};

fn zlib(announced: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![131, 80];
    bytes.extend_from_slice(&announced.to_be_bytes());
    let mut encoder = ZlibEncoder::new(bytes, Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// `[[], [], ...]` without a version byte.
fn list_of_nils(len: u32) -> Vec<u8> {
    let mut bytes = vec![108];
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.resize(bytes.len() + len as usize + 1, 106);
    bytes
}

#[test]
fn the_confinement_is_real() {
    confined("the_confinement_is_real", || {
        assert!(Vec::<u8>::new().try_reserve(ADDRESS_SPACE_KIB << 10).is_err());
    });
}

#[test]
fn a_million_nested_containers() {
    confined("a_million_nested_containers", || {
        for head in [
            &[104, 1][..],
            &[108, 0, 0, 0, 1],
            &[116, 0, 0, 0, 1, 97, 1],
            &[116, 0, 0, 0, 1],
        ] {
            let mut bytes = vec![131];
            (0..1_000_000).for_each(|_| bytes.extend_from_slice(head));
            // Enough bytes that no count can be the reason.
            bytes.resize(bytes.len() + 3_000_000, 106);
            assert!(
                matches!(refusal(&bytes), DecodeError::TooDeep { limit: 256, .. }),
                "{head:?}"
            );
        }
    });
}

#[test]
fn three_thousand_nested_tuples_from_a_beam() {
    confined("three_thousand_nested_tuples_from_a_beam", || {
        let mut bytes = [131]
            .into_iter()
            .chain([104, 1].repeat(3000))
            .collect::<Vec<u8>>();
        bytes.push(106);
        assert_eq!(
            refusal(&bytes),
            DecodeError::TooDeep {
                limit: 256,
                offset: 513
            }
        );
        // What a program raises the limit to is still bounded.
        let limits = Limits {
            max_depth: u32::MAX,
            ..Limits::default()
        };
        assert_eq!(
            decode(&bytes, &limits),
            Err(DecodeError::TooDeep {
                limit: 512,
                offset: 1025
            })
        );
    });
}

#[test]
fn counts_of_four_billion_in_eight_bytes() {
    confined("counts_of_four_billion_in_eight_bytes", || {
        let count = u32::MAX as usize;
        for tag in [105, 108, 116] {
            let bytes = [131, tag, 255, 255, 255, 255, 97, 1];
            assert_eq!(
                refusal(&bytes),
                DecodeError::CountPastEnd {
                    count,
                    offset: 1,
                    remaining: 2
                }
            );
        }
        for tag in [109, 111, 77] {
            assert!(matches!(
                refusal(&[131, tag, 255, 255, 255, 255, 1, 1]),
                DecodeError::Truncated { .. } | DecodeError::IntegerTooLong { .. }
            ));
        }
    });
}

#[test]
fn nested_headers_that_each_claim_ten_million() {
    confined("nested_headers_that_each_claim_ten_million", || {
        let mut bytes = vec![131];
        for _ in 0..200 {
            bytes.extend_from_slice(&[108, 0, 152, 150, 128]);
        }
        assert_eq!(
            refusal(&bytes),
            DecodeError::CountPastEnd {
                count: 10_000_000,
                offset: 1,
                remaining: 995
            }
        );
    });
}

/// Each claim alone would fit the bytes that are left; all together they don't.
#[test]
fn nested_headers_that_share_one_stretch_of_bytes() {
    confined("nested_headers_that_share_one_stretch_of_bytes", || {
        let claim = 3_000_000u32;
        let mut bytes = vec![131];
        for _ in 0..200 {
            bytes.push(108);
            bytes.extend_from_slice(&claim.to_be_bytes());
        }
        bytes.resize(bytes.len() + claim as usize + 1, 106);
        let error = refusal(&bytes);
        assert!(
            matches!(
                error,
                DecodeError::CountPastEnd {
                    count: 3_000_000,
                    offset: 6,
                    ..
                }
            ),
            "{error}"
        );
    });
}

fn fun(size: u32, num_free: u32, parts: &[u8]) -> Vec<u8> {
    let mut bytes = vec![131, 112];
    bytes.extend_from_slice(&size.to_be_bytes());
    bytes.push(1);
    bytes.extend_from_slice(&[7; 16]);
    bytes.extend_from_slice(&0u32.to_be_bytes());
    bytes.extend_from_slice(&num_free.to_be_bytes());
    bytes.extend_from_slice(parts);
    bytes
}

#[test]
fn funs_with_false_sizes() {
    confined("funs_with_false_sizes", || {
        // Module m, old index, old uniq, pid, one captured value.
        let parts = [
            119, 1, b'm', 97, 0, 97, 0, 88, 119, 1, b'n', 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 97, 5,
        ];
        let size = 29 + parts.len() as u32;
        assert!(matches!(
            decode(&fun(size, 1, &parts), &Limits::default()),
            Ok(Term::Fun(_))
        ));
        assert_eq!(
            refusal(&fun(size, u32::MAX, &parts)),
            DecodeError::CountPastEnd {
                count: u32::MAX as usize,
                offset: 1,
                remaining: parts.len()
            }
        );
        // Bytes after the fun are not its own.
        let followed = [fun(size, 1000, &parts), vec![106; 2000]].concat();
        assert_eq!(
            refusal(&followed),
            DecodeError::CountPastEnd {
                count: 1000,
                offset: 1,
                remaining: parts.len()
            }
        );
        assert!(matches!(
            refusal(&fun(u32::MAX, 1, &parts)),
            DecodeError::Truncated { .. }
        ));
        assert!(matches!(refusal(&fun(0, 1, &parts)), DecodeError::FunSize { .. }));
        assert!(matches!(
            refusal(&fun(size - 1, 1, &parts)),
            DecodeError::FunSize { .. }
        ));
        assert!(matches!(
            refusal(&fun(size, 0, &parts)),
            DecodeError::FunSize { .. }
        ));
        let mut nested = [104, 1].repeat(1000);
        nested.push(106);
        let parts = [&parts[..23], &nested].concat();
        assert!(matches!(
            refusal(&fun(29 + parts.len() as u32, 1, &parts)),
            DecodeError::TooDeep { .. }
        ));
    });
}

#[test]
fn an_integer_of_four_gibibytes() {
    confined("an_integer_of_four_gibibytes", || {
        let bytes = [131, 111, 255, 255, 255, 255, 0, 1];
        let len = u32::MAX as usize;
        assert_eq!(
            refusal(&bytes),
            DecodeError::IntegerTooLong {
                len,
                limit: 64 << 10,
                offset: 1
            }
        );
    });
}

#[test]
fn tags_that_have_no_place_in_a_term() {
    confined("tags_that_have_no_place_in_a_term", || {
        for (tag, part) in [
            (82, "ATOM_CACHE_REF"),
            (68, "distribution header"),
            (69, "fragment"),
            (67, "NATIVE_RECORD"),
            (121, "LOCAL_EXT"),
            (117, "FUN_EXT"),
            (131, "version"),
        ] {
            for bytes in [
                vec![131, tag],
                vec![131, tag, 0, 0, 0, 0, 0, 0],
                vec![131, 104, 1, tag, 0],
            ] {
                let error = refusal(&bytes);
                assert!(
                    matches!(error, DecodeError::Refused { tag: t, .. } if t == tag),
                    "{error}"
                );
                assert!(error.to_string().contains(part), "{error}");
            }
        }
        // A pid's node as an atom of the distribution cache.
        assert!(matches!(
            refusal(&[131, 88, 82, 0]),
            DecodeError::Refused {
                tag: 82,
                offset: 2,
                ..
            }
        ));
        // Compressed, but not at the top.
        assert!(matches!(
            refusal(&[131, 104, 1, 80, 0]),
            DecodeError::Refused { tag: 80, .. }
        ));
        for tag in (0..=66).chain([71, 76, 81, 122, 130, 255]) {
            assert_eq!(
                refusal(&[131, tag, 0]),
                DecodeError::UnknownTag { tag, offset: 1 }
            );
        }
        assert_eq!(refusal(&[]), DecodeError::Version { found: None });
        assert_eq!(refusal(&[130, 97, 1]), DecodeError::Version { found: Some(130) });
        assert!(matches!(refusal(&[131]), DecodeError::Truncated { .. }));
    });
}

#[test]
fn a_few_kilobytes_of_zlib() {
    confined("a_few_kilobytes_of_zlib", || {
        let content = list_of_nils(8_000_000);
        let bomb = zlib(content.len() as u32, &content);
        assert!(bomb.len() < 8_192, "{}", bomb.len());
        let limits = Limits::default();
        assert!(matches!(
            decode(&bomb, &limits),
            Err(DecodeError::TooManyTerms { limit: 4_194_304, .. })
        ));
        // The announced size is held against the limit before anything is inflated, and is held to.
        let limit = 1_000_000;
        let small = Limits {
            max_inflated: limit,
            ..limits
        };
        let announced = content.len();
        assert_eq!(
            decode(&bomb, &small),
            Err(DecodeError::InflatedTooLong { announced, limit })
        );
        let lie = zlib(1000, &content);
        assert_eq!(
            decode(&lie, &small),
            Err(DecodeError::InflatedLength {
                announced: 1000,
                actual: 1000,
                more: true
            })
        );
        let lie = zlib(1000, &content[..10]);
        assert_eq!(
            decode(&lie, &small),
            Err(DecodeError::InflatedLength {
                announced: 1000,
                actual: 10,
                more: false
            })
        );
        let honest_max = zlib(u32::MAX, &content[..10]);
        assert!(matches!(
            decode(&honest_max, &limits),
            Err(DecodeError::InflatedTooLong { .. })
        ));
        for cut in 6..bomb.len() {
            assert!(decode(&bomb[..cut], &limits).is_err());
        }
        let refuse = Limits {
            allow_compressed: false,
            ..limits
        };
        assert_eq!(decode(&bomb, &refuse), Err(DecodeError::CompressedNotAllowed));
        // What can't be looked into without inflating is refused where nothing is inflated.
        let refused = DecodeError::Refused {
            tag: 80,
            name: "compressed term",
            offset: 1,
        };
        assert_eq!(term_len(&bomb, &limits), Err(refused));
        assert_eq!(
            guard::check(&bomb, &open_policy()),
            Err(GuardError::Decode(refused))
        );
        // Compressed in compressed.
        let twice = zlib(bomb.len() as u32 - 1, &bomb[1..]);
        assert!(matches!(
            decode(&twice, &limits),
            Err(DecodeError::Refused { tag: 80, .. })
        ));
        // Two terms in one.
        let two = zlib(4, &[97, 1, 97, 2]);
        assert_eq!(
            decode(&two, &limits),
            Err(DecodeError::Trailing {
                offset: 3,
                remaining: 2
            })
        );
    });
}

#[test]
fn the_most_terms_that_are_taken_fit() {
    confined("the_most_terms_that_are_taken_fit", || {
        let max = Limits::default().max_terms as u32;
        let mut bytes = vec![131];
        bytes.extend(list_of_nils(max - 2));
        assert_eq!(
            decode(&bytes, &Limits::default())
                .unwrap()
                .as_list()
                .unwrap()
                .len(),
            max as usize - 2
        );
        let mut bytes = vec![131];
        bytes.extend(list_of_nils(max - 1));
        assert!(matches!(refusal(&bytes), DecodeError::TooManyTerms { .. }));
        // Strings are lists too: 65,535 elements for each 3 bytes that announce them.
        let mut bytes = vec![131, 105];
        bytes.extend_from_slice(&65u32.to_be_bytes());
        for _ in 0..65 {
            bytes.extend_from_slice(&[107, 255, 255]);
            bytes.resize(bytes.len() + 65_535, b'x');
        }
        assert!(matches!(refusal(&bytes), DecodeError::TooManyTerms { .. }));
    });
}

#[test]
fn more_bytes_than_the_limit() {
    let limits = Limits {
        max_bytes: 8,
        ..Limits::default()
    };
    assert_eq!(
        decode(&[131; 9], &limits),
        Err(DecodeError::TooLong { len: 9, limit: 8 })
    );
    assert_eq!(
        term_len(&[131; 9], &limits),
        Err(DecodeError::TooLong { len: 9, limit: 8 })
    );
    assert!(Walk::new(&[131; 9], &limits).is_err());
}

#[test]
fn maps_in_keys_of_maps_stay_cheap() {
    confined("maps_in_keys_of_maps_stay_cheap", || {
        // Two pairs per map; the first key is a map again, down to a 4 MiB binary that every comparison could read.
        let mut bytes = vec![131];
        let depth = 250;
        for _ in 0..depth {
            bytes.extend_from_slice(&[116, 0, 0, 0, 2]);
        }
        bytes.push(109);
        bytes.extend_from_slice(&(4u32 << 20).to_be_bytes());
        bytes.resize(bytes.len() + (4 << 20), 0);
        for _ in 0..depth {
            bytes.extend_from_slice(&[97, 1, 106, 97, 1]);
        }
        let term = decode(&bytes, &Limits::default()).unwrap();
        assert_eq!(term, term.clone());
        // A BEAM hashes or compares it all for every map: nearly a second for this one, in which nothing else runs.
        assert!(matches!(
            guard::check(&bytes, &GuardPolicy::default()),
            Err(GuardError::TooManyKeyBytes { limit: 4_194_304, .. })
        ));
    });
}

#[test]
fn half_a_million_pairs() {
    confined("half_a_million_pairs", || {
        let mut bytes = vec![131, 116];
        bytes.extend_from_slice(&500_000u32.to_be_bytes());
        for key in 0..500_000u32 {
            bytes.push(98);
            bytes.extend_from_slice(&key.to_be_bytes());
            bytes.push(106);
        }
        // Cheap here, where pairs are sorted; a BEAM builds its tree without yielding.
        assert!(decode(&bytes, &Limits::default()).is_ok());
        assert_eq!(
            guard::check(&bytes, &GuardPolicy::default()),
            Err(GuardError::TooManyMapPairs {
                pairs: 500_000,
                limit: 262_144,
                offset: 1
            })
        );
    });
}
