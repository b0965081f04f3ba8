//! Agreement with a real BEAM over generated terms. Needs `erl` on the path.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use common::{each, encoded, readable_term, term};
use meshx_etf::guard::{self, GuardPolicy};
use meshx_etf::{DecodeError, Limits, Term, decode, parse};
use proptest::prelude::*;

/// Place of `{minor_version, 0}` among the options of the oracle.
const MINOR_VERSION_0: usize = 3;

/// A BEAM that answers questions over a loopback connection and ends when it is closed.
struct Beam {
    socket: TcpStream,
}

impl Beam {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let oracle = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle.erl");
        // Compiled in memory.
        let boot = format!(
            "{{ok, M, B}} = compile:file(\"{oracle}\", [binary, report]), \
             {{module, M}} = code:load_binary(M, \"oracle.erl\", B), M:main({}).",
            address.port()
        );
        let mut process = Command::new("erl")
            .args(["-noshell", "-noinput", "+pc", "unicode", "-eval", &boot])
            .stdin(Stdio::null())
            .spawn()
            .expect("erl must run");
        // If it ends before it connects, this connection ends the wait in its place and fails the first question.
        thread::spawn(move || {
            process.wait().unwrap();
            TcpStream::connect(address)
        });
        let (socket, _) = listener.accept().unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { socket }
    }

    fn ask(&mut self, question: &str, parts: &[&[u8]]) -> Vec<u8> {
        let request = [&[question.as_bytes()], parts].concat().concat();
        self.socket
            .write_all(&(request.len() as u32).to_be_bytes())
            .unwrap();
        self.socket.write_all(&request).unwrap();
        let mut len = [0; 4];
        self.socket.read_exact(&mut len).unwrap();
        let mut reply = vec![0; u32::from_be_bytes(len) as usize];
        self.socket.read_exact(&mut reply).unwrap();
        reply
    }
}

/// A BEAM for all tests of this process. Its socket closes when the process ends, and the BEAM with it.
static BEAM: LazyLock<Mutex<Beam>> = LazyLock::new(|| Mutex::new(Beam::start()));

fn ask(question: &str, parts: &[&[u8]]) -> Vec<u8> {
    BEAM.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .ask(question, parts)
}

/// Asks for all encodings of the term in `bytes`; also returns the heap words that it takes.
fn encodings(question: &str, bytes: &[u8]) -> (Vec<Vec<u8>>, u64) {
    let reply = ask(question, &[bytes]);
    assert_eq!(reply.first(), Some(&1), "the BEAM refused the term: {bytes:?}");
    let words = u64::from_be_bytes(*reply[1..].first_chunk().unwrap());
    let mut rest = &reply[9..];
    let mut all = Vec::new();
    while let Some((len, after)) = rest.split_first_chunk() {
        let (one, after) = after.split_at(u32::from_be_bytes(*len) as usize);
        all.push(one.to_vec());
        rest = after;
    }
    (all, words)
}

fn same(a: &[u8], b: &[u8]) -> bool {
    ask("same", &[&(a.len() as u32).to_be_bytes(), a, b]) == [1]
}

/// `eetf` on bytes of a BEAM: `None` where it is known to be unsound. It refuses Latin-1 atoms above ASCII, and reads
/// the text form of the smallest and largest floats (`minor_version` 0) as 0 or as infinite.
fn eetf_decode(bytes: &[u8], term: &Term, text_floats: bool) -> Option<eetf::Term> {
    let mut sound = true;
    each(term, &mut |part| {
        let atoms = match part {
            Term::Atom(atom) => vec![atom],
            Term::Pid(pid) => vec![&pid.node],
            Term::Port(port) => vec![&port.node],
            Term::Reference(reference) => vec![&reference.node],
            Term::Export(export) => vec![&export.module, &export.function],
            Term::Float(_) => {
                sound &= !text_floats;
                vec![]
            }
            _ => vec![],
        };
        sound &= atoms.iter().all(|atom| atom.as_str().is_ascii());
    });
    sound.then(|| eetf::Term::decode(bytes).unwrap())
}

/// The term with no map of more than one pair (a BEAM prints pairs in an order of its own), and with no character
/// that we escape though a BEAM prints it, because it could steer a terminal.
fn without_order(term: &Term) -> Term {
    let safe = |c: char| if steers(c) { 'x' } else { c };
    match term {
        Term::List(items) => Term::list(items.iter().map(|item| match item {
            Term::Int(code) if char::from_u32(*code as u32).is_some_and(steers) => Term::from(120),
            item => without_order(item),
        })),
        Term::ImproperList(items, tail) => Term::ImproperList(
            items.iter().map(without_order).collect(),
            Box::new(without_order(tail)),
        ),
        Term::Tuple(items) => Term::tuple(items.iter().map(without_order)),
        Term::Map(map) => Term::map(
            map.iter()
                .take(1)
                .map(|(key, value)| (without_order(key), without_order(value))),
        ),
        Term::Atom(atom) => Term::atom(atom.as_str().chars().map(safe).collect::<String>()),
        Term::Binary(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Term::binary(text.chars().map(safe).collect::<String>()),
            Err(_) => term.clone(),
        },
        other => other.clone(),
    }
}

fn steers(c: char) -> bool {
    matches!(c, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{FEFF}')
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_beam_reads_what_is_encoded_and_writes_what_decodes(term in term()) {
        let bytes = encoded(&term);
        let (theirs, _) = encodings("echo", &bytes);
        prop_assert_eq!(theirs.len(), 6);
        for (option, theirs) in theirs.into_iter().enumerate() {
            let decoded = decode(&theirs, &Limits::default());
            prop_assert_eq!(decoded.as_ref(), Ok(&term), "{:?}", theirs);
            if let Some(third) = eetf_decode(&theirs, &term, option == MINOR_VERSION_0) {
                prop_assert_eq!(Term::try_from(&third), Ok(term.clone()));
            }
            prop_assert!(same(&theirs, &bytes));
        }
    }

    #[test]
    fn text_reads_back_as_the_term(term in readable_term()) {
        let bytes = encoded(&term);
        let text = term.to_string();
        let reply = ask("read", &[&(bytes.len() as u32).to_be_bytes(), &bytes, text.as_bytes()]);
        prop_assert_eq!(reply.first(), Some(&1), "{} was read as {}", text, String::from_utf8_lossy(&reply[1..]));
        prop_assert_eq!(parse(&text, &Limits::default()), Ok(term.clone()));
    }

    #[test]
    fn damaged_text_that_is_read_a_beam_reads_as_the_same(
        term in readable_term(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 0usize..3, "[ -~\n]{0,2}"), 1..4),
    ) {
        let mut text: Vec<char> = term.to_string().chars().collect();
        for (at, remove, insert) in damage {
            let at = at.index(text.len() + 1);
            text.splice(at..(at + remove).min(text.len()), insert.chars());
        }
        let text: String = text.into_iter().collect();
        if let Ok(term) = parse(&text, &Limits::default()) {
            let bytes = encoded(&term);
            let parts = [&(bytes.len() as u32).to_be_bytes(), &bytes[..], text.as_bytes()];
            let reply = ask("read", &parts);
            let theirs = String::from_utf8_lossy(&reply[1..]);
            prop_assert_eq!(reply.first(), Some(&1), "{:?} is {}, and {} for a BEAM", text, term, theirs);
        }
    }

    #[test]
    fn text_is_what_a_beam_prints(term in readable_term()) {
        let term = without_order(&term);
        let theirs = String::from_utf8(ask("show", &[&encoded(&term)])).unwrap();
        prop_assert_eq!(term.to_string(), theirs);
    }

    #[test]
    fn floats_are_written_as_a_beam_does(digits in 0..10_000_000_000_000_000_i64, shorter in 0..16_u32, exponent in -40..40) {
        let float: f64 = format!("{}e{exponent}", digits / 10_i64.pow(shorter)).parse().unwrap();
        let term = Term::list([Term::Float(float), Term::Float(-float)]);
        let theirs = String::from_utf8(ask("show", &[&encoded(&term)])).unwrap();
        prop_assert_eq!(term.to_string(), theirs);
    }

    #[test]
    fn heap_words_are_an_upper_estimate(term in term()) {
        let bytes = encoded(&term);
        let (_, words) = encodings("echo", &bytes);
        let policy = GuardPolicy { allow_exports: true, ..GuardPolicy::default() };
        let estimate = guard::check(&bytes, &policy).unwrap().heap_words as u64;
        prop_assert!(words <= estimate && estimate <= 2 * words + 16, "{} words, estimated {}", words, estimate);
    }

    #[test]
    fn what_decodes_from_damaged_bytes_a_beam_takes_too(
        term in term(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), 88u8..=121, 0u8..=5]), 1..4),
    ) {
        let mut bytes = encoded(&term);
        for (index, byte) in damage {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        let ours = decode(&bytes, &Limits::default());
        let theirs = ask("take", &[&bytes]) == [1];
        prop_assert_eq!(ours.is_ok(), theirs, "{:?} from {:?}", ours, bytes);
    }
}

#[test]
fn terms_that_only_a_node_makes() {
    let (all, _) = encodings("own", &[]);
    assert_eq!(all.len(), 60);
    for bytes in all {
        let term = decode(&bytes, &Limits::default()).unwrap();
        assert!(same(&bytes, &encoded(&term)), "{term}");
    }
}

/// Forms that OTP no longer writes, but reads.
#[test]
fn forms_of_earlier_releases() {
    let node = [100, 0, 3, b'a', b'@', b'h'];
    let float = [&[99][..], b"1.50000000000000000000e+00\0\0\0\0\0"].concat();
    let cases = [
        [&[103][..], &node, &[0, 0, 0, 7, 0, 0, 0, 1, 2]].concat(),
        [&[102][..], &node, &[0, 0, 0, 7, 2]].concat(),
        [&[101][..], &node, &[0, 0, 0, 7, 2]].concat(),
        [&[114, 0, 3][..], &node, &[2, 0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9]].concat(),
        [&[89][..], &node, &[0, 0, 0, 7, 0, 0, 0, 9]].concat(),
        float,
        vec![115, 2, 0xE9, b'a'],
        vec![118, 0, 2, 0xC3, 0xA9],
        vec![108, 0, 0, 0, 0, 97, 5],
        vec![108, 0, 0, 0, 1, 97, 1, 107, 0, 1, 2],
        vec![107, 0, 0],
        vec![110, 1, 1, 0],
        vec![110, 2, 7, 1, 0],
        vec![77, 0, 0, 0, 1, 8, 1],
        vec![77, 0, 0, 0, 1, 3, 0xFF],
        vec![105, 0, 0, 0, 1, 106],
    ];
    for case in cases {
        let bytes = [&[131][..], &case].concat();
        let term = decode(&bytes, &Limits::default()).unwrap();
        assert!(same(&bytes, &encoded(&term)), "{term} from {bytes:?}");
    }
}

/// OTP 25 takes it for `<<>>`, OTP 29 does not, and some OTP 27 would not survive it: none is asked.
#[test]
fn an_empty_bit_string_is_refused() {
    let refused = decode(&[131, 77, 0, 0, 0, 0, 0], &Limits::default());
    let (len, bits, offset) = (0, 0, 1);
    assert_eq!(refused, Err(DecodeError::BitCount { len, bits, offset }));
}

#[test]
fn a_deep_term_from_a_beam_is_refused_here_alone() {
    let bytes = [&[131][..], &[104, 1].repeat(3000), &[106]].concat();
    assert_eq!(ask("take", &[&bytes]), [1]);
    assert!(matches!(
        decode(&bytes, &Limits::default()),
        Err(DecodeError::TooDeep { .. })
    ));
}
