//! Terms: decoding against `eetf`, walking and encoding against libei.
//!
//! All time the same bytes: what libei encodes it has decoded from them before, and what each reads is checked first.
#![allow(clippy::panic)]

use std::hint::black_box;

use meshx_etf::{Limits, Term, Token, Walk, decode, encode, term_len};
use rustix::time::{ClockId, clock_gettime};

#[path = "../../../../native/etf/tests/common/libei.rs"]
pub(crate) mod libei;

use libei::Libei;

/// One line of the table: seconds of CPU for one pass over a corpus, ours and theirs, round by round.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Whom it is held against.
    pub(crate) against: &'static str,
    /// How many times as fast it has to be, and should be; `None` for what is only told.
    pub(crate) wanted: Option<(f64, f64)>,
    pub(crate) ours: Vec<f64>,
    pub(crate) theirs: Vec<f64>,
}

/// A corpus: its name, the term's bytes as a BEAM sends them, how often one round goes over it.
struct Corpus {
    name: &'static str,
    bytes: Vec<u8>,
    passes: u32,
}

fn corpora() -> Vec<Corpus> {
    let list = |len: usize, item: &dyn Fn(usize, &mut Vec<u8>)| {
        let mut bytes = vec![131, 108];
        bytes.extend_from_slice(&(len as u32).to_be_bytes());
        (0..len).for_each(|index| item(index, &mut bytes));
        bytes.push(106);
        bytes
    };
    let part =
        |term: &Term, out: &mut Vec<u8>| meshx_etf::encode_bare(term, out).unwrap_or_else(|e| panic!("{e}"));
    let maps = list(10_000, &|index, out| {
        // Keys in the order of a program's source, as OTP 26 and later keep and send them.
        out.extend_from_slice(&[116, 0, 0, 0, 5]);
        let pairs = [
            ("id", Term::from(index as i64 * 37)),
            ("name", Term::binary(format!("item {index}"))),
            ("price", Term::from(index as f64 * 0.25)),
            ("active", Term::from(index % 3 == 0)),
            ("tags", Term::list([Term::atom("new"), Term::atom("sale")])),
        ];
        for (key, value) in pairs {
            part(&Term::atom(key), out);
            part(&value, out);
        }
    });
    let i64s = list(100_000, &|index, out| {
        let value = (index as i64).wrapping_mul(0x9E37_79B9_7F4A_7C15_u64 as i64);
        part(&Term::from(value), out);
    });
    let small = list(100_000, &|index, out| part(&Term::from(index as i64 % 1000), out));
    let tuples = list(10_000, &|index, out| {
        let inner = Term::tuple([Term::atom("at"), Term::from(index as i64), Term::from(1)]);
        part(&Term::tuple([Term::atom("ok"), inner, Term::tuple([])]), out);
    });
    let binary = [&[131, 109, 0, 16, 0, 0][..], &vec![7; 1 << 20]].concat();
    [
        ("10k maps", maps, 3),
        ("100k i64", i64s, 5),
        ("100k small integers", small, 10),
        ("10k nested tuples", tuples, 20),
        ("1 MiB binary", binary, 20),
    ]
    .map(|(name, bytes, passes)| Corpus { name, bytes, passes })
    .into()
}

/// What has to be reached: how many times as fast, at least and as the aim.
fn wanted(action: &str, corpus: &str) -> Option<(f64, f64)> {
    match (action, corpus) {
        ("decode", "10k maps" | "100k i64") => Some((4.0, 7.0)),
        ("walk", "10k maps") => Some((3.0, 6.0)),
        ("encode", "10k maps") => Some((2.0, 3.0)),
        _ => None,
    }
}

/// Seconds of this thread's CPU for one pass of `action`: both sides only compute, and what else runs on the machine
/// shall not count.
fn time(passes: u32, mut action: impl FnMut()) -> f64 {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let began = now();
    (0..passes).for_each(|_| action());
    (now() - began) / f64::from(passes)
}

/// Reads every leaf, as the C program does.
fn walk(bytes: &[u8], limits: &Limits) -> u64 {
    let mut sink = 0u64;
    let see = |token: Token<'_>| {
        sink = sink.wrapping_add(match token {
            Token::Int(value) => value as u64,
            Token::Float(value) => u64::from(value > 0.0),
            Token::Atom(atom) => atom.encoded_len() as u64,
            Token::Binary(bytes) | Token::ByteList(bytes) => bytes.len() as u64,
            _ => 0,
        });
    };
    let walked = Walk::new(bytes, limits).and_then(|walk| walk.for_each(see));
    assert!(walked == Ok(bytes.len()), "{walked:?}");
    sink
}

/// Runs so many rounds; in each, every measurement takes its turn.
pub(crate) fn rows(rounds: usize) -> Vec<Row> {
    let limits = Limits::default();
    let mut all = Vec::new();
    for corpus in corpora() {
        let Corpus { name, bytes, passes } = &corpus;
        let term = decode(bytes, &limits).unwrap_or_else(|error| panic!("{name}: {error}"));
        let theirs = eetf::Term::decode(bytes.as_slice()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut ei = Libei::start();
        ei.load(bytes);
        let echoed = ei.echo(bytes).unwrap_or_else(|| panic!("libei refuses {name}"));
        assert!(
            decode(&echoed, &limits).as_ref() == Ok(&term),
            "libei has another term for {name}"
        );
        let row = |action: &'static str, against| Row {
            name: Box::leak(format!("{action} {name}").into_boxed_str()),
            against,
            wanted: wanted(action, name),
            ours: Vec::new(),
            theirs: Vec::new(),
        };
        let mut rows = [
            row("decode", "eetf"),
            row("encode to a new buffer", "eetf"),
            row("walk", "libei"),
            row("skip", "libei"),
            row("encode", "libei"),
        ];
        let mut out = Vec::new();
        for _ in 0..rounds {
            let per_pass = |time: std::time::Duration| time.as_secs_f64() / f64::from(*passes);
            let measured = [
                (
                    time(*passes, || drop(black_box(decode(black_box(bytes), &limits)))),
                    time(*passes, || {
                        drop(black_box(eetf::Term::decode(black_box(bytes.as_slice()))))
                    }),
                ),
                (
                    time(*passes, || {
                        let mut out = Vec::new();
                        let _ = encode(black_box(&term), &mut out);
                        black_box(out);
                    }),
                    time(*passes, || {
                        let mut out = Vec::new();
                        let _ = black_box(&theirs).encode(&mut out);
                        black_box(out);
                    }),
                ),
                (
                    time(*passes, || {
                        black_box(walk(black_box(bytes), &limits));
                    }),
                    per_pass(ei.walk(*passes)),
                ),
                (
                    time(*passes, || {
                        let _ = black_box(term_len(black_box(bytes), &limits));
                    }),
                    per_pass(ei.skip_kept(*passes)),
                ),
                (
                    time(*passes, || {
                        out.clear();
                        let _ = encode(black_box(&term), &mut out);
                        black_box(&out);
                    }),
                    per_pass(ei.encode(*passes)),
                ),
            ];
            for (row, (ours, theirs)) in rows.iter_mut().zip(measured) {
                row.ours.push(ours);
                row.theirs.push(theirs);
            }
        }
        all.extend(rows);
    }
    all
}
